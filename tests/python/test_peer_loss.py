"""Peers that die, stop, end or are dropped, with transfers in flight: an error each, quiet memory, and a way back."""

from __future__ import annotations

import time
from importlib.metadata import version

import numpy as np
import pytest
from nixl import _bindings

from harness.peers import Peer, close_side, take_notifications
from harness.sides import BACKEND, TCP, Side, assert_bytes, pattern
from harness.waiting import wait_until

MIB = 1 << 20
LENGTH = 16 * MIB
SOON = {"liveness_ms": "1000"} if BACKEND == "CORELANE" else {}
"""A peer that says nothing for that long is gone: the tests with stopped peers need not wait for the default."""

AGENT_FORGETS = tuple(map(int, version("nixl").split(".")[:2])) < (1, 5)

Disconnected = _bindings.nixlRemoteDisconnectError


def fails_as_disconnected(side: Side, handle) -> None:
    """The transfer ends, in the one error by which NIXL forgets a peer."""
    with pytest.raises(Disconnected):
        side.wait(handle)


def is_forgotten(side: Side, peer: Peer) -> None:
    """The state before a new handshake. Old agents forget a lost peer by themselves; newer ones want to be told."""
    if AGENT_FORGETS:
        assert not side.agent.check_remote_metadata(peer.name)
    elif side.agent.check_remote_metadata(peer.name):
        side.agent.remove_remote_agent(peer.name)


def reads_all(side: Side, peer: Peer) -> None:
    """The peer is usable: all of its memory arrives, and a notification goes back."""
    side.buffer[:] = 0
    side.run("READ", [(0, peer.size)], peer.base, [(0, peer.size)], peer.name, b"all read")
    assert_bytes(side.buffer[: peer.size], peer.original())
    assert (side.name, b"all read") in peer.call(take_notifications, 1)


def release(side: Side, handle) -> None:
    """As often as it takes: a transfer that is still active is canceled first."""

    def released() -> bool:
        try:
            side.agent.release_xfer_handle(handle)
        except _bindings.nixlRepostActiveError:
            return False
        return True

    wait_until(released, "a canceled transfer to be released")


def stays_quiet(side: Side) -> None:
    """The memory is the application's again: nothing is written to it any more."""
    mine = pattern(12345, side.buffer.size)
    side.buffer[:] = mine
    time.sleep(0.5)
    assert_bytes(side.buffer, mine)


@pytest.mark.versions
@pytest.mark.parametrize("operation", ["READ", "WRITE"])
def test_a_killed_peer_fails_its_transfers_and_comes_back(make_side, make_peer, make_process, operation):
    side = make_side("decode", LENGTH, options=TCP)
    name = ""
    for life in range(3):
        peer = make_peer("prefill", LENGTH, seed=life) if life == 0 else Peer(make_process())
        name = name or peer.name
        peer.open(name, LENGTH, seed=life)
        side.agent.add_remote_agent(peer.metadata)
        reads_all(side, peer)

        # Frozen first, so that the transfer is certainly in flight when the peer dies.
        peer.remote.stop()
        handle = side.start(operation, [(0, LENGTH)], peer.base, [(0, LENGTH)], peer.name)
        assert not side.is_done(handle)
        peer.remote.kill()

        fails_as_disconnected(side, handle)
        side.agent.release_xfer_handle(handle)
        is_forgotten(side, peer)
        stays_quiet(side)


@pytest.mark.versions
def test_many_transfers_in_flight_all_fail(make_side, make_peer):
    count, block = 200, 32_768
    peer = make_peer("prefill", count * block, seed=1)
    side = make_side("decode", count * block, options=TCP)
    side.agent.add_remote_agent(peer.metadata)
    reads_all(side, peer)
    peer.remote.stop()
    handles = [
        side.start("READ", [(n * block, block)], peer.base, [(n * block, block)], peer.name) for n in range(count)
    ]
    peer.remote.kill()

    for handle in handles:
        with pytest.raises((Disconnected, _bindings.nixlNotFoundError)):
            side.wait(handle)
    for handle in handles:
        release(side, handle)
    is_forgotten(side, peer)


def test_a_peer_that_died_before_the_first_transfer(make_side, make_peer):
    peer = make_peer("prefill", LENGTH)
    side = make_side("decode", LENGTH)
    side.agent.add_remote_agent(peer.metadata)
    handle = side.prepare("READ", [(0, LENGTH)], peer.base, [(0, LENGTH)], peer.name)
    peer.remote.kill()

    with pytest.raises(Disconnected):
        side.agent.transfer(handle)
        side.wait(handle)
    release(side, handle)
    is_forgotten(side, peer)


def test_metadata_of_a_process_long_gone(make_side, make_peer):
    peer = make_peer("prefill", LENGTH)
    peer.remote.kill()
    side = make_side("decode", LENGTH)

    # Loading it is cheap and connects nowhere, so that it succeeds.
    side.agent.add_remote_agent(peer.metadata)
    with pytest.raises(Disconnected):
        side.run("READ", [(0, LENGTH)], peer.base, [(0, LENGTH)], peer.name)
    is_forgotten(side, peer)


def test_notifications_to_a_killed_peer_become_errors(make_side, make_peer):
    peer = make_peer("prefill")
    side = make_side("decode")
    side.agent.add_remote_agent(peer.metadata)
    side.agent.send_notif(peer.name, b"hello")
    peer.call(take_notifications, 1)
    peer.remote.kill()

    def refused() -> bool:
        try:
            side.agent.send_notif(peer.name, b"anybody there?")
        except (Disconnected, _bindings.nixlNotFoundError):
            return True
        return False

    wait_until(refused, "an error from send_notif")


@pytest.mark.versions
def test_a_stopped_peer_is_given_up_and_taken_back(make_side, make_peer):
    """It keeps its sockets open and says nothing: only the liveness timeout can tell."""
    peer = make_peer("prefill", LENGTH, seed=2)
    side = make_side("decode", LENGTH, options=SOON | TCP)
    side.agent.add_remote_agent(peer.metadata)
    reads_all(side, peer)
    peer.remote.stop()
    handle = side.start("READ", [(0, LENGTH)], peer.base, [(0, LENGTH)], peer.name)

    fails_as_disconnected(side, handle)
    side.agent.release_xfer_handle(handle)
    is_forgotten(side, peer)

    # What it still has to say when it goes on must not reach memory that is ours again.
    peer.remote.resume()
    stays_quiet(side)
    side.agent.add_remote_agent(peer.metadata)
    reads_all(side, peer)


@pytest.mark.versions
@pytest.mark.parametrize("life", ["peer alive", "peer stopped"])
def test_a_transfer_released_in_flight(make_side, make_peer, life):
    peer = make_peer("prefill", 4 * LENGTH, seed=3)
    side = make_side("decode", 4 * LENGTH, options=SOON | TCP if life == "peer stopped" else SOON)
    side.agent.add_remote_agent(peer.metadata)
    reads_all(side, peer)
    if life == "peer stopped":
        peer.remote.stop()

    for _ in range(3):
        handle = side.start("READ", [(0, 4 * LENGTH)], peer.base, [(0, 4 * LENGTH)], peer.name)
        release(side, handle)
        stays_quiet(side)
        if life == "peer stopped":
            break

    if life == "peer stopped":
        peer.remote.resume()
        stays_quiet(side)
    add_again(side, peer)
    reads_all(side, peer)


@pytest.mark.versions
def test_a_peer_removed_with_transfers_in_flight(make_side, make_peer):
    count, block = 64, MIB
    peer = make_peer("prefill", count * block, seed=4)
    side = make_side("decode", count * block)
    for _ in range(3):
        add_again(side, peer)
        handles = [
            side.start("READ", [(n * block, block)], peer.base, [(n * block, block)], peer.name) for n in range(count)
        ]
        side.agent.remove_remote_agent(peer.name)
        for handle in handles:
            try:
                side.wait(handle)
            except (_bindings.nixlCancelledError, _bindings.nixlNotFoundError, Disconnected):
                pass
            release(side, handle)
        stays_quiet(side)
    add_again(side, peer)
    reads_all(side, peer)


@pytest.mark.versions
@pytest.mark.parametrize("life", ["peer alive", "peer stopped"])
def test_an_agent_ended_with_transfers_in_flight(make_side, make_peer, life):
    """The handles were dropped, not released: the end of the agent waits until its memory is quiet."""
    peer = make_peer("prefill", 4 * LENGTH, seed=10)
    options = SOON | TCP if life == "peer stopped" else SOON
    for turn in range(2):
        side = Side(f"ends-{turn}-{peer.name}", 4 * LENGTH, options=options)
        side.agent.add_remote_agent(peer.metadata)
        reads_all(side, peer)
        if life == "peer stopped":
            peer.remote.stop()
        handle = side.start("READ", [(0, 4 * LENGTH)], peer.base, [(0, 4 * LENGTH)], peer.name)
        del handle
        side.agent = None
        if life == "peer stopped":
            peer.remote.resume()
        stays_quiet(side)
        stays = make_side("stays", 4 * LENGTH)
        stays.agent.add_remote_agent(peer.metadata)
        reads_all(stays, peer)


@pytest.mark.versions
def test_memory_deregistered_with_transfers_in_flight(make_side, make_peer):
    """Deregistering waits in the same way; afterwards the memory may be given back."""
    peer = make_peer("prefill", 4 * LENGTH, seed=11)
    side = make_side("decode", 4 * LENGTH)
    side.agent.add_remote_agent(peer.metadata)
    reads_all(side, peer)
    handle = side.start("READ", [(0, 4 * LENGTH)], peer.base, [(0, 4 * LENGTH)], peer.name)
    side.agent.deregister_memory(side.registration)
    stays_quiet(side)
    try:
        side.wait(handle)
    except Exception as error:  # noqa: BLE001 - canceled, whatever NIXL calls it
        assert "NIXL_ERR_" in str(error)
    release(side, handle)

    side.registration = side.agent.register_memory([(side.base, side.buffer.size, 0, "")], "DRAM")
    add_again(side, peer)
    reads_all(side, peer)


def test_prepared_lists_of_a_removed_peer_are_errors_not_crashes(make_side, make_peer):
    peer = make_peer("prefill", LENGTH, seed=5)
    side = make_side("decode", LENGTH)
    side.agent.add_remote_agent(peer.metadata)
    blocks = np.array([(peer.base + n * 4096, 4096, 0) for n in range(100)], dtype=np.uint64)
    ours = np.array([(side.base + n * 4096, 4096, 0) for n in range(100)], dtype=np.uint64)
    local = side.agent.prep_xfer_dlist("NIXL_INIT_AGENT", ours, "DRAM")
    remote = side.agent.prep_xfer_dlist(peer.name, blocks, "DRAM")
    handle = side.agent.make_prepped_xfer("READ", local, [1], remote, [2])
    side.agent.remove_remote_agent(peer.name)

    with pytest.raises(Exception, match="NIXL_ERR_"):
        side.agent.make_prepped_xfer("READ", local, [1], remote, [2])
    with pytest.raises(Exception, match="NIXL_ERR_"):
        side.agent.transfer(handle)
        side.wait(handle)
    release(side, handle)
    side.agent.release_dlist_handle(remote)
    side.agent.release_dlist_handle(local)
    add_again(side, peer)
    reads_all(side, peer)


@pytest.mark.versions
def test_an_agent_that_ends_in_order_is_gone_for_its_peers(make_side, make_peer):
    """And the same name, made again in the same process, works: another agent to whoever reloads its metadata."""
    peer = make_peer("prefill", MIB, seed=6)
    side = make_side("decode", MIB)
    for life in range(3):
        side.agent.add_remote_agent(peer.metadata)
        reads_all(side, peer)
        handle = side.prepare("READ", [(0, MIB)], peer.base, [(0, MIB)], peer.name)
        peer.call(close_side)

        with pytest.raises(Disconnected):
            side.agent.transfer(handle)
            side.wait(handle)
        release(side, handle)
        is_forgotten(side, peer)
        peer.open(peer.name, MIB, seed=7 + life)


def test_one_broken_peer_never_disturbs_another(make_side, make_peer):
    good, bad = make_peer("good", MIB, seed=8), make_peer("bad", LENGTH, seed=9)
    side = make_side("decode", LENGTH, options=SOON | TCP)
    side.agent.add_remote_agent(good.metadata)
    side.agent.add_remote_agent(bad.metadata)
    reads_all(side, bad)
    bad.remote.stop()
    handle = side.start("READ", [(0, LENGTH)], bad.base, [(0, LENGTH)], bad.name)
    expected = good.original()
    reads = 0

    def bad_has_failed() -> bool:
        nonlocal reads
        side.run("READ", [(MIB, MIB)], good.base, [(0, MIB)], good.name)
        assert_bytes(side.buffer[MIB : 2 * MIB], expected)
        reads += 1
        try:
            return side.is_done(handle)
        except Disconnected:
            return True

    wait_until(bad_has_failed, "the stopped peer's transfer to fail")
    assert reads > 1
    release(side, handle)
    reads_all(side, good)


def add_again(side: Side, peer: Peer) -> None:
    """Whether the agent still knows the peer or not."""
    if side.agent.check_remote_metadata(peer.name):
        side.agent.remove_remote_agent(peer.name)
    side.agent.add_remote_agent(peer.metadata)
