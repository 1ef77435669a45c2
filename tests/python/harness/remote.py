"""Runs functions in another process, one after the other, in a state that lasts as long as the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from harness.waiting import PATIENCE_SECONDS, wait_until

TESTS_DIRECTORY = Path(__file__).resolve().parent.parent


class RemoteError(Exception):
    """What a function raised in the other process: the name of the exception, and its traceback as text."""

    def __init__(self, kind: str, traceback: str) -> None:
        super().__init__(f"{kind} in the other process:\n{traceback}")
        self.kind = kind
        self.traceback = traceback


class RemoteGone(Exception):
    """The other process has ended, or was ended for not answering."""


class Remote:
    """Another process. Functions go there by name, so they are top-level functions of a module in tests/python."""

    def __init__(self, environment: dict[str, str] | None = None, cores: set[int] | None = None) -> None:
        ours, theirs = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness.remote", str(ours[0]), str(theirs[1])],
            cwd=TESTS_DIRECTORY,
            env={**os.environ, **(environment or {})},
            pass_fds=(ours[0], theirs[1]),
            preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
            stdin=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._calls = Connection(ours[1], readable=False)
        self._answers = Connection(theirs[0], writable=False)

    def call(self, function: Callable, *arguments, seconds: float = PATIENCE_SECONDS):
        """Runs `function(state, *arguments)` there and gives back what it returns."""
        self.begin(function, *arguments)
        return self.finish(seconds)

    def begin(self, function: Callable, *arguments) -> None:
        """As `call`, without waiting: `finish` does."""
        self._calls.send((function, arguments))

    def finish(self, seconds: float = PATIENCE_SECONDS):
        """The answer to the last `begin`."""
        try:
            if not self._answers.poll(seconds):
                self.kill()
                raise RemoteGone(f"no answer within {seconds:.0f} s")
            raised, answer = self._answers.recv()
        except EOFError:
            raise RemoteGone(f"exit status {self.process.wait(PATIENCE_SECONDS)}") from None
        if raised:
            raise RemoteError(*answer)
        return answer

    def kill(self) -> None:
        """Ends it as a crash would, and leaves nothing behind; also when it is stopped."""
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)

    def stop(self) -> None:
        """Freezes it: it keeps its sockets and says nothing any more. Returns when the last thread has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: self._thread_states() <= {"T", "t"}, "a process to stop")

    def _thread_states(self) -> set[str]:
        """Letters, as in proc(5)."""
        states = set()
        for stat in Path(f"/proc/{self.process.pid}/task").glob("*/stat"):
            states.add(stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0])
        return states

    def resume(self) -> None:
        """Lets a frozen one go on."""
        self.process.send_signal(signal.SIGCONT)

    def end(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Lets it leave by the normal way out of an interpreter; gives the exit status back."""
        self._calls.close()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RemoteGone(f"does not exit within {seconds:.0f} s") from None
        finally:
            self._answers.close()

    def close(self) -> None:
        """For clean-up: whatever it does, it is gone afterwards."""
        self.kill()
        for connection in (self._calls, self._answers):
            if not connection.closed:
                connection.close()


def serve(calls: Connection, answers: Connection) -> None:
    """The other process's main loop; ends when the parent closes its end, or dies."""
    import traceback

    state = types.SimpleNamespace()
    while True:
        try:
            function, arguments = calls.recv()
        except EOFError:
            return
        try:
            answer = (False, function(state, *arguments))
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the caller
            answer = (True, (type(error).__name__, traceback.format_exc()))
        answers.send(answer)


def main() -> None:
    """`python -m harness.remote CALLS ANSWERS`: the descriptors of two pipes."""
    import faulthandler

    faulthandler.enable()
    sys.path.insert(0, str(TESTS_DIRECTORY))
    calls, answers = (int(argument) for argument in sys.argv[1:3])
    serve(Connection(calls, writable=False), Connection(answers, readable=False))
    if os.environ.get("CORELANE_TEST_BACKEND") == "UCX":
        os._exit(0)  # the wheel's UCX crashes on the way out


if __name__ == "__main__":
    main()
