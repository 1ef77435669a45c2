"""A process may end with agents alive: it exits with status 0, soon, and its peers are not harmed."""

from __future__ import annotations

import atexit
import sys
import threading
import time

import pytest

from harness.peers import take_notifications
from harness.sides import TCP, Side, assert_bytes

MIB = 1 << 20


def leave(process, way, *arguments) -> None:
    """Runs `way` there, then lets the process end by itself."""
    process.call(way, *arguments)
    assert process.end(45) == 0


@pytest.mark.versions
def test_with_agents_alive(make_process, make_peer):
    peer = make_peer("prefill", MIB, seed=1)
    for _ in range(3):
        leave(make_process(), hold_agents, peer.metadata, peer.name, peer.base)
    assert_bytes(peer.bytes(), peer.original())


def test_with_an_agent_that_never_met_anybody(make_process):
    leave(make_process(), hold_lonely_agent)


def test_with_transfers_in_flight(make_process, make_peer):
    peer = make_peer("prefill", 64 * MIB, seed=2)
    leave(make_process(), hold_transfers, peer.metadata, peer.name, peer.base)
    assert_bytes(peer.bytes(), peer.original())


def test_with_transfers_to_a_stopped_peer(make_process, make_peer):
    peer = make_peer("prefill", 64 * MIB, seed=3)
    process = make_process()
    process.call(hold_agents, peer.metadata, peer.name, peer.base, TCP)
    peer.remote.stop()
    process.call(hold_more_transfers, peer.name, peer.base)
    assert process.end(60) == 0


@pytest.mark.versions
def test_with_an_agent_ended_at_exit(make_process, make_peer):
    """The last words of the function registered with atexit arrive."""
    peer = make_peer("prefill", MIB, seed=4)
    leave(make_process(), register_at_exit, peer.metadata, peer.name, peer.base, "decode")
    assert peer.call(take_notifications, 1) == [("decode", b"last words")]


def test_with_an_agent_made_at_exit(make_process, make_peer):
    peer = make_peer("prefill", MIB, seed=5)
    leave(make_process(), make_agent_at_exit, peer.metadata, peer.name, peer.base)
    assert peer.call(take_notifications, 1) == [("late", b"made at exit")]


@pytest.mark.versions
def test_with_a_daemon_thread_that_uses_the_agent(make_process, make_peer):
    """It is abandoned between two of its calls, with references to everything. (Abandoned inside of a call, it would end
    the process in pybind11 itself.)"""
    peer = make_peer("prefill", MIB, seed=6)
    for _ in range(3):
        leave(make_process(), poll_in_daemon_thread, peer.metadata, peer.name, peer.base)


def test_with_the_agent_ended_by_another_thread(make_process, make_peer):
    """A thread that outlives the main one: the interpreter waits for it, then ends."""
    peer = make_peer("prefill", MIB, seed=7)
    leave(make_process(), end_in_other_thread, peer.metadata, peer.name, peer.base)
    assert peer.call(take_notifications, 1) == [("decode", b"from the other thread")]


def test_with_an_exception(make_process, make_peer):
    """sys.exit below frames that hold agents and handles."""
    peer = make_peer("prefill", 64 * MIB, seed=8)
    process = make_process()
    process.begin(exit_with_agents, peer.metadata, peer.name, peer.base)
    assert process.end(45) == 7


# --- what runs in other processes


def hold_lonely_agent(state) -> None:
    """Until the interpreter takes it away."""
    state.side = Side("lonely")


def hold_agents(state, metadata: bytes, name: str, base: int, options: dict[str, str] | None = None) -> None:
    """Two agents that know a peer, one another and themselves, and have used it all."""
    state.side, state.second = Side("decode", 64 * MIB, options=options), Side("second", MIB)
    state.side.agent.add_remote_agent(metadata)
    state.side.agent.add_remote_agent(state.second.metadata())
    state.second.agent.add_remote_agent(metadata)
    for side in (state.side, state.second):
        side.run("READ", [(0, MIB)], base, [(0, MIB)], name)
    state.side.run("READ", [(0, MIB)], state.second.base, [(0, MIB)], "second")
    state.side.agent.send_notif("second", b"never read")
    state.kept = state.side.prepare("READ", [(0, MIB)], base, [(0, MIB)], name)


def hold_transfers(state, metadata: bytes, name: str, base: int) -> None:
    """Posted, and nobody asks for them."""
    hold_agents(state, metadata, name, base)
    hold_more_transfers(state, name, base)


def hold_more_transfers(state, name: str, base: int) -> None:
    """Long ones, of the agent that is there."""
    state.handles = [
        state.side.start("READ", [(n * 8 * MIB, 8 * MIB)], base, [(n * 8 * MIB, 8 * MIB)], name) for n in range(8)
    ]


def register_at_exit(state, metadata: bytes, name: str, base: int, own: str) -> None:
    """The agent works until then."""
    side = Side(own, MIB)
    side.agent.add_remote_agent(metadata)

    def last_words() -> None:
        side.run("READ", [(0, MIB)], base, [(0, MIB)], name)
        side.agent.send_notif(name, b"last words")
        side.close()

    atexit.register(last_words)


def make_agent_at_exit(state, metadata: bytes, name: str, base: int) -> None:
    """The first agent of its process, and it is not ended either."""

    def late() -> None:
        state.side = Side("late", MIB)
        state.side.agent.add_remote_agent(metadata)
        state.side.run("READ", [(0, MIB)], base, [(0, MIB)], name, b"made at exit")

    atexit.register(late)


def poll_in_daemon_thread(state, metadata: bytes, name: str, base: int) -> None:
    """Until the main thread has nothing more to do."""
    hold_agents(state, metadata, name, base)
    over = threading.Event()
    stopped = threading.Event()
    atexit.register(lambda: (over.set(), stopped.wait(10)))

    def poll() -> None:
        side = state.side
        while not over.is_set():
            side.agent.get_new_notifs()
            side.run("READ", [(0, MIB)], base, [(0, MIB)], name)
        stopped.set()
        threading.Event().wait()

    threading.Thread(target=poll, daemon=True).start()
    time.sleep(0.2)


def end_in_other_thread(state, metadata: bytes, name: str, base: int) -> None:
    """Not the one that made it."""
    side = Side("decode", MIB)
    side.agent.add_remote_agent(metadata)

    def finish() -> None:
        threading.main_thread().join(0.5)
        side.run("READ", [(0, MIB)], base, [(0, MIB)], name)
        side.agent.send_notif(name, b"from the other thread")
        side.close()

    threading.Thread(target=finish).start()


def exit_with_agents(state, metadata: bytes, name: str, base: int) -> None:
    """With a status of its own."""
    hold_transfers(state, metadata, name, base)
    sys.exit(7)
