"""The far side of a transfer, in this process or in another, used in the same way."""

from __future__ import annotations

import types
from collections.abc import Callable

import numpy as np

from harness.remote import Remote
from harness.sides import Range, Side, pattern
from harness.waiting import PATIENCE_SECONDS


class Peer:
    """A side that is reached by calls only."""

    def __init__(self, caller: Remote | None = None) -> None:
        self.remote = caller
        self._state = types.SimpleNamespace()
        self.name = ""
        self.metadata = b""
        self.base = 0
        self.size = 0
        self.seed = 0

    def call(self, function: Callable, *arguments, seconds: float = PATIENCE_SECONDS):
        """Runs `function(state, *arguments)` where the peer is; `state.side` is its side."""
        if self.remote is None:
            return function(self._state, *arguments)
        return self.remote.call(function, *arguments, seconds=seconds)

    def open(self, name: str, size: int = 1 << 20, seed: int = 0, **keywords) -> Peer:
        """Makes the side there, in place of the one that may have been there before."""
        self.name, self.size, self.seed = name, size, seed
        self.metadata, self.base = self.call(open_side, name, size, seed, keywords)
        return self

    def bytes(self) -> np.ndarray:
        """All of its memory, now."""
        return np.frombuffer(self.call(read_bytes), dtype=np.uint8).copy()

    def original(self) -> np.ndarray:
        """What its memory held at first."""
        return pattern(self.seed, self.size)

    def close(self) -> None:
        """Ends the side, and the process where it has one."""
        if self.remote is not None:
            self.remote.close()
        elif hasattr(self._state, "side"):
            self._state.side.close()


def open_side(state, name: str, size: int, seed: int, keywords: dict) -> tuple[bytes, int]:
    """Makes `state.side`; gives back its metadata and the address of its memory."""
    state.side = Side(name, size, seed, **keywords)
    return state.side.metadata(), state.side.base


def close_side(state) -> None:
    """Ends `state.side`, in order."""
    state.side.close()
    del state.side


def read_bytes(state) -> bytes:
    """All of the side's memory."""
    return state.side.buffer.tobytes()


def write_bytes(state, offset: int, data: bytes) -> None:
    """Changes the side's memory behind everybody's back, as its application does."""
    state.side.buffer[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)


def get_metadata(state) -> bytes:
    """The side's metadata, now."""
    return state.side.metadata()


def add_agent(state, metadata: bytes) -> str:
    """Makes another agent known to the side."""
    return state.side.agent.add_remote_agent(metadata)


def take_notifications(state, count: int) -> list[tuple[str, bytes]]:
    """Waits for so many."""
    return state.side.notifications(count)


def poll_notifications(state) -> dict[str, list[bytes]]:
    """What is there now."""
    return state.side.agent.get_new_notifs()


def send_notification(state, to: str, message: bytes) -> None:
    """From the side to an agent that it knows."""
    state.side.agent.send_notif(to, message)


def run_transfer(
    state, operation: str, local: list[Range], remote_base: int, remote: list[Range], peer: str, message: bytes = b""
) -> None:
    """One transfer that the side begins."""
    state.side.run(operation, local, remote_base, remote, peer, message)


def bytes_at_notification(state, message: bytes, ranges: list[Range]) -> bytes:
    """Waits for exactly this notification and reads `ranges` at that moment."""
    taken = state.side.notifications(1)
    data = b"".join(state.side.buffer[offset : offset + length].tobytes() for offset, length in ranges)
    assert [text for _, text in taken] == [message], taken
    return data
