"""One side of a transfer: a NIXL agent with one registered buffer, seen as a row of blocks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import nixl._api
import numpy as np
from nixl._api import nixl_agent, nixl_agent_config

from harness.waiting import PATIENCE_SECONDS, wait_until

BACKEND = os.environ.get("CORELANE_TEST_BACKEND", "CORELANE")
"""Another one shows whether a test asks for what NIXL promises or for what this plugin does."""

TCP = {"transports": "tcp"} if BACKEND == "CORELANE" else {}
"""Options of a side that moves bytes with the help of its peers and not by itself: one that stands still is waited for."""

Range = tuple[int, int]
"""Offset and length within a side's buffer, in bytes."""


def pattern(seed: int, length: int) -> np.ndarray:
    """The same bytes for the same seed, in every process."""
    return np.frombuffer(np.random.default_rng(seed).bytes(length), dtype=np.uint8).copy()


def assert_bytes(actual: np.ndarray | bytes, expected: np.ndarray | bytes) -> None:
    """Byte for byte, and says where they differ first."""
    actual = np.frombuffer(actual, dtype=np.uint8)
    expected = np.frombuffer(expected, dtype=np.uint8)
    assert actual.size == expected.size, f"{actual.size} bytes, expected {expected.size}"
    wrong = np.flatnonzero(actual != expected)
    assert wrong.size == 0, (
        f"{wrong.size} of {actual.size} bytes differ, the first at {wrong[0]}:"
        f" {actual[wrong[0]]}, expected {expected[wrong[0]]}"
    )


def at(base: int, ranges: Iterable[Range]) -> list[tuple[int, int, int]]:
    """The descriptors of `ranges` in a buffer that starts at address `base`."""
    return [(base + offset, length, 0) for offset, length in ranges]


class Side:
    """An agent as vLLM makes it, unless options are given: progress thread on, no parameters for the backend, no lock in the
    agent. `locked` takes NIXL's own lock, for threads that change what the agent itself knows (newer NIXL only)."""

    def __init__(
        self,
        name: str,
        size: int = 1 << 20,
        seed: int = 0,
        *,
        progress_thread: bool = True,
        telemetry: bool = False,
        locked: bool = False,
        options: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        config = nixl_agent_config(
            enable_prog_thread=progress_thread,
            capture_telemetry=telemetry,
            backends=[BACKEND] if options is None else [],
            **({"sync_mode": nixl._api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW} if locked else {}),
        )
        self.agent = nixl_agent(name, config)
        if options is not None:
            self.agent.create_backend(BACKEND, options)
        assert BACKEND in self.agent.backends, f"no backend {BACKEND} among {self.agent.plugin_list}"
        self.buffer = pattern(seed, size)
        self.base = self.buffer.ctypes.data
        self.registration = self.agent.register_memory([(self.base, size, 0, "")], "DRAM")

    def close(self) -> None:
        """Ends the agent: nothing of it is left but handles that a test kept."""
        if self.agent is not None:
            self.agent.deregister_memory(self.registration)
            self.agent = None

    def metadata(self) -> bytes:
        """What another agent needs to reach this one."""
        return self.agent.get_agent_metadata()

    def descriptors(self, ranges: Iterable[Range]):
        """NIXL's descriptor list of `ranges` in the own buffer."""
        return self.agent.get_xfer_descs(at(self.base, ranges), "DRAM")

    def start(
        self,
        operation: str,
        local: Sequence[Range],
        remote_base: int,
        remote: Sequence[Range],
        peer: str,
        notification: bytes = b"",
    ):
        """Posts a transfer and gives its handle back."""
        handle = self.prepare(operation, local, remote_base, remote, peer, notification)
        self.agent.transfer(handle)
        return handle

    def prepare(
        self,
        operation: str,
        local: Sequence[Range],
        remote_base: int,
        remote: Sequence[Range],
        peer: str,
        notification: bytes = b"",
    ):
        """A transfer that is not posted yet."""
        theirs = self.agent.get_xfer_descs(at(remote_base, remote), "DRAM")
        return self.agent.initialize_xfer(operation, self.descriptors(local), theirs, peer, notification)

    def wait(self, handle, seconds: float = PATIENCE_SECONDS) -> None:
        """Returns when the transfer is done; raises what NIXL raises when it fails."""
        wait_until(lambda: self.is_done(handle), "the end of a transfer", seconds)

    def is_done(self, handle) -> bool:
        """Raises where the transfer failed."""
        state = self.agent.check_xfer_state(handle)
        assert state in ("DONE", "PROC"), state
        return state == "DONE"

    def run(self, *arguments, **keywords) -> None:
        """A transfer from post to release; takes what `start` takes."""
        handle = self.start(*arguments, **keywords)
        self.wait(handle)
        self.agent.release_xfer_handle(handle)

    def notifications(self, count: int, seconds: float = PATIENCE_SECONDS) -> list[tuple[str, bytes]]:
        """The next `count` notifications as (sender, message); of one sender in the order of arrival."""
        taken: list[tuple[str, bytes]] = []

        def enough() -> bool:
            for sender, messages in self.agent.get_new_notifs().items():
                taken.extend((sender, message) for message in messages)
            return len(taken) >= count

        wait_until(enough, f"{count} notifications", seconds)
        return taken
