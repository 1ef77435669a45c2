"""Agents come and go, and take with them what they held."""

from __future__ import annotations

import pytest

from harness.peers import get_metadata, take_notifications
from harness.resources import Held, assert_no_more_than, held
from harness.sides import Side, assert_bytes, at

PAGE = 4096
MIB = 1 << 20
WARM_UP, TURNS = 100, 500


def test_five_hundred_agents_leave_nothing_behind(make_peer, make_process):
    """Each meets the same peer under a name of its own, reads, notifies and ends; neither side keeps anything."""
    peer = make_peer("prefill", PAGE, seed=1)
    process = make_process()
    process.call(come_and_go, WARM_UP, "warm-up", peer.metadata, peer.name, peer.base, seconds=120)
    peer.call(take_notifications, WARM_UP)
    there = peer.call(count_resources)

    process.call(come_and_go_and_count, TURNS, peer.metadata, peer.name, peer.base, seconds=200)

    assert len(set(peer.call(take_notifications, TURNS))) == TURNS
    peer.call(compare_resources, there, 4 * MIB)


def test_the_same_name_again_and_again(make_process):
    """Two agents of one process, both made anew each time under their old names."""
    process = make_process()
    process.call(pairs_come_and_go, 40)
    before = process.call(count_resources)
    process.call(pairs_come_and_go, 100, seconds=120)
    process.call(compare_resources, before, 8 * MIB)


@pytest.mark.versions
def test_an_agent_ends_while_others_go_on(make_side, make_peer):
    peer = make_peer("prefill", PAGE, seed=2)
    stays = make_side("stays", PAGE)
    stays.agent.add_remote_agent(peer.metadata)
    for turn in range(10):
        goes = Side(f"goes-{turn}-{stays.name}", PAGE)
        goes.agent.add_remote_agent(peer.metadata)
        handle = goes.start("READ", [(0, PAGE)], peer.base, [(0, PAGE)], peer.name)
        stays.run("READ", [(0, PAGE)], peer.base, [(0, PAGE)], peer.name)
        goes.wait(handle)
        del handle
        goes.close()
        stays.buffer[:] = 0
        stays.run("READ", [(0, PAGE)], peer.base, [(0, PAGE)], peer.name)
        assert_bytes(stays.buffer, peer.original())


def test_thousands_of_registrations_come_and_go(make_side, make_peer):
    count = 4096
    peer = make_peer("prefill", count * 256, seed=3)
    side = make_side("decode", count * 256, seed=4)
    side.agent.add_remote_agent(peer.metadata)

    for _ in range(3):
        registered = side.agent.register_memory([(side.base + n * 256, 256, 0, "") for n in range(count)], "DRAM")
        assert len(side.agent.query_memory(registered, next(iter(side.agent.backends)))) == count
        side.agent.deregister_memory(registered)
    side.run("READ", [(0, count * 256)], peer.base, [(0, count * 256)], peer.name)

    assert_bytes(side.buffer, peer.original())


def test_memory_that_is_gone_is_not_served(make_side, make_peer):
    """A peer deregisters: who still has the old metadata gets an error, and what is registered still works."""
    peer = make_peer("prefill", 2 * PAGE, seed=5)
    side = make_side("decode", 2 * PAGE, seed=6)
    peer.call(register_only_second_page)
    metadata = peer.call(get_metadata)
    side.agent.add_remote_agent(metadata)
    side.run("READ", [(0, PAGE)], peer.base, [(PAGE, PAGE)], peer.name)
    before = side.buffer.copy()
    peer.call(deregister_second_page)

    with pytest.raises(Exception, match="NIXL_ERR_NOT_ALLOWED"):
        side.run("READ", [(PAGE, PAGE)], peer.base, [(PAGE, PAGE)], peer.name)

    assert_bytes(side.buffer, before)
    side.agent.send_notif(peer.name, b"still friends")
    assert peer.call(take_notifications, 1) == [(side.name, b"still friends")]


# --- what runs in other processes


def come_and_go(state, count: int, prefix: str, metadata: bytes, peer: str, base: int) -> None:
    """So many agents, one after the other."""
    for number in range(count):
        side = Side(f"{prefix}-{number}", PAGE)
        side.agent.add_remote_agent(metadata)
        side.run("READ", [(0, PAGE)], base, [(0, PAGE)], peer, b"from %d" % number)
        # Every other one leaves without saying goodbye.
        if number % 2 == 0:
            side.agent.remove_remote_agent(peer)
        side.close()


def come_and_go_and_count(state, count: int, metadata: bytes, peer: str, base: int) -> None:
    """As `come_and_go`, and nothing of it may be left in this process."""
    before = held()
    come_and_go(state, count, "agent", metadata, peer, base)
    assert_no_more_than(before, 4 * MIB)


def pairs_come_and_go(state, count: int) -> None:
    """Two agents that read from each other and end, in one order and in the other."""
    for number in range(count):
        left, right = Side("left", PAGE, seed=number), Side("right", PAGE, seed=number + 1)
        expected = right.buffer.copy()
        left.agent.add_remote_agent(right.metadata())
        right.agent.add_remote_agent(left.metadata())
        left.run("READ", [(0, PAGE)], right.base, [(0, PAGE)], "right", b"hello")
        assert right.notifications(1) == [("left", b"hello")]
        assert_bytes(left.buffer, expected)
        for side in (left, right) if number % 2 == 0 else (right, left):
            side.close()


def count_resources(state) -> Held:
    """Held by that process."""
    return held()


def compare_resources(state, before: Held, memory_bytes: int) -> None:
    """Fails there where more is held than before."""
    assert_no_more_than(before, memory_bytes)


def register_only_second_page(state) -> None:
    """In place of the whole buffer."""
    side: Side = state.side
    side.agent.deregister_memory(side.registration)
    side.registration = side.agent.register_memory([(*at(side.base, [(0, PAGE)])[0], "")], "DRAM")
    state.second = side.agent.register_memory([(*at(side.base, [(PAGE, PAGE)])[0], "")], "DRAM")


def deregister_second_page(state) -> None:
    """While others still know it."""
    state.side.agent.deregister_memory(state.second)
