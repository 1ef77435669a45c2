"""After os.fork the child has its parent's agents in name only: errors, no hanging, and nothing of the parent's touched."""

from __future__ import annotations

import os
import signal
import time

import pytest

from harness.peers import poll_notifications, take_notifications
from harness.sides import Side, assert_bytes

MIB = 1 << 20
CHILD_SECONDS = 60


def test_the_child_gets_errors_and_the_parent_goes_on(make_process, make_peer):
    peer = make_peer("prefill", MIB, seed=1)
    process = make_process()
    process.call(open_and_read, peer.metadata, peer.name, peer.base)

    for turn in range(3):
        process.call(fork_and_try_all, peer.name, peer.base, seconds=90)
        assert_bytes(process.call(read_again, peer.name, peer.base, b"after fork %d" % turn), peer.original())
        assert peer.call(take_notifications, 1) == [("forking", b"after fork %d" % turn)]
    assert peer.call(poll_notifications) == {}
    assert process.end(45) == 0


@pytest.mark.parametrize("way", ["exit", "end agents", "new agent"])
def test_other_things_that_children_do(make_process, make_peer, way):
    """Leave by the normal way out, end the agents they were born with, or make an agent of their own."""
    peer = make_peer("prefill", MIB, seed=2)
    process = make_process()
    process.call(open_and_read, peer.metadata, peer.name, peer.base)

    process.call(fork_and_run, way, peer.metadata, peer.name, peer.base, seconds=90)
    assert_bytes(process.call(read_again, peer.name, peer.base, b"parent"), peer.original())

    expected = [("forking", b"parent")]
    if way == "new agent":
        expected.insert(0, ("child", b"from the child"))
    assert peer.call(take_notifications, len(expected)) == expected
    assert process.end(45) == 0


def test_a_child_forked_with_transfers_in_flight(make_process, make_peer):
    peer = make_peer("prefill", 32 * MIB, seed=3)
    process = make_process()
    process.call(open_and_read, peer.metadata, peer.name, peer.base)

    process.call(fork_in_flight, peer.name, peer.base, seconds=90)

    assert_bytes(process.call(read_again, peer.name, peer.base, b"done"), peer.original()[:MIB])


# --- what runs in other processes


def open_and_read(state, metadata: bytes, name: str, base: int) -> None:
    """An agent that has a connection, and a prepared transfer."""
    state.side = Side("forking", 32 * MIB, seed=4)
    state.side.agent.add_remote_agent(metadata)
    state.side.run("READ", [(0, MIB)], base, [(0, MIB)], name)
    state.prepared = state.side.prepare("READ", [(0, MIB)], base, [(0, MIB)], name)


def read_again(state, name: str, base: int, message: bytes) -> bytes:
    """The parent's agent is what it was."""
    state.side.buffer[:] = 0
    for _ in range(20):
        state.side.run("READ", [(0, MIB)], base, [(0, MIB)], name)
    state.side.agent.transfer(state.prepared, message)
    state.side.wait(state.prepared)
    assert state.side.agent.get_new_notifs() == {}
    return state.side.buffer[:MIB].tobytes()


def in_child(work) -> int:
    """Runs `work` in a forked child and gives its wait status back; a child that hangs is killed."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return wait_for(child)


def wait_for(child: int) -> int:
    """Bounded."""
    deadline = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.WIFEXITED(status), f"the child died of signal {os.WTERMSIG(status)}"
            return os.WEXITSTATUS(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the child still ran after {CHILD_SECONDS} s")


def fork_and_try_all(state, name: str, base: int) -> None:
    """Each call that reaches the backend, in a child."""
    side: Side = state.side

    def posting() -> None:
        side.agent.transfer(state.prepared)
        side.wait(state.prepared, 5)

    def preparing() -> None:
        side.run("READ", [(0, MIB)], base, [(0, MIB)], name)

    calls = [
        posting,
        preparing,
        lambda: side.agent.send_notif(name, b"from the child"),
        lambda: side.agent.send_notif("forking", b"to itself"),
        lambda: side.agent.make_connection(name),
        lambda: side.agent.register_memory([(side.base, 100, 0, "")], "DRAM"),
    ]

    def work() -> int:
        # The number of the first call that was no error is the exit status.
        for number, call in enumerate(calls, start=1):
            try:
                call()
            except AssertionError:
                return number + 50
            except Exception:  # noqa: BLE001 - what NIXL makes of the backend's error
                continue
            return number
        try:
            assert side.agent.get_new_notifs() == {}
        except AssertionError:
            return 40
        except Exception:  # noqa: BLE001
            pass
        return 0

    status = in_child(work)
    assert status == 0, f"call {status} in the child was no error (50 more: it hung)"


def fork_and_run(state, way: str, metadata: bytes, name: str, base: int) -> None:
    """A child that does one thing and has to end with status 0."""
    child = os.fork()
    if child == 0:
        # Not the parent's pipes: the interpreter's way out, with all its destructors, is the point here.
        if way == "end agents":
            del state.prepared
            state.side.agent = None
        elif way == "new agent":
            own = Side("child", MIB)
            own.agent.add_remote_agent(metadata)
            own.run("READ", [(0, MIB)], base, [(0, MIB)], name, b"from the child")
            own.close()
        raise SystemExit(0)
    status = wait_for(child)
    assert status == 0, f"exit status {status} of the child"


def fork_in_flight(state, name: str, base: int) -> None:
    """The child must not take the parent's bytes from its socket."""
    side: Side = state.side
    side.buffer[:] = 0
    for _ in range(5):
        handle = side.start("READ", [(0, 32 * MIB)], base, [(0, 32 * MIB)], name)

        def work() -> int:
            try:
                side.wait(handle, 3)
            except AssertionError:
                return 1
            except Exception:  # noqa: BLE001
                return 0
            return 0

        status = in_child(work)
        assert status == 0, "in the child the parent's transfer goes on for ever"
        side.wait(handle)
        side.agent.release_xfer_handle(handle)
