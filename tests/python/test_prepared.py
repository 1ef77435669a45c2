"""Prepared descriptor lists and transfers picked out of them by index: how vLLM moves KV blocks."""

from __future__ import annotations

import numpy as np
import pytest

from harness.peers import take_notifications
from harness.sides import assert_bytes, at

BLOCK = 2048


def blocks(count: int) -> list[tuple[int, int]]:
    """A buffer's ranges as a row of blocks."""
    return [(index * BLOCK, BLOCK) for index in range(count)]


def prepare_both(side, peer, count: int):
    """The block lists of both sides, as handles."""
    local = side.agent.prep_xfer_dlist("NIXL_INIT_AGENT", at(side.base, blocks(count)), "DRAM")
    remote = side.agent.prep_xfer_dlist(peer.name, at(peer.base, blocks(count)), "DRAM")
    return local, remote


def release_both(side, *handles) -> None:
    """In the order given."""
    for handle in handles:
        side.agent.release_dlist_handle(handle)


@pytest.mark.versions
@pytest.mark.parametrize("as_array", [False, True], ids=["lists", "arrays"])
@pytest.mark.parametrize("operation", ["READ", "WRITE"])
def test_blocks_picked_by_index(make_side, make_any_peer, operation, as_array):
    count, picked = 1024, 300
    peer = make_any_peer("prefill", count * BLOCK, seed=1)
    side = make_side("decode", count * BLOCK, seed=2)
    side.agent.add_remote_agent(peer.metadata)
    local, remote = prepare_both(side, peer, count)
    random = np.random.default_rng(3)
    mine, theirs = (random.permutation(count)[:picked].astype(np.int32) for _ in range(2))
    our_bytes, their_bytes = side.buffer.copy(), peer.original()

    handle = side.agent.make_prepped_xfer(
        operation,
        local,
        mine if as_array else mine.tolist(),
        remote,
        theirs if as_array else theirs.tolist(),
        b"request-1:1",
    )
    side.agent.transfer(handle)
    side.wait(handle)
    side.agent.release_xfer_handle(handle)
    release_both(side, local, remote)

    if operation == "READ":
        our_bytes.reshape(-1, BLOCK)[mine] = their_bytes.reshape(-1, BLOCK)[theirs]
    else:
        their_bytes.reshape(-1, BLOCK)[theirs] = our_bytes.reshape(-1, BLOCK)[mine]
    assert peer.call(take_notifications, 1) == [(side.name, b"request-1:1")]
    assert_bytes(side.buffer, our_bytes)
    assert_bytes(peer.bytes(), their_bytes)


def test_runs_of_neighbours_and_single_blocks(make_side, make_any_peer):
    """NIXL merges neighbours before the backend sees them; what arrives is the same."""
    count = 256
    peer = make_any_peer("prefill", count * BLOCK, seed=4)
    side = make_side("decode", count * BLOCK, seed=5)
    side.agent.add_remote_agent(peer.metadata)
    local, remote = prepare_both(side, peer, count)
    mine = [*range(0, 40), 100, 99, 98, *range(200, 256)]
    theirs = [*range(10, 50), 3, 2, 1, *range(100, 156)]
    expected = side.buffer.copy().reshape(-1, BLOCK)
    expected[mine] = peer.original().reshape(-1, BLOCK)[theirs]

    handle = side.agent.make_prepped_xfer("READ", local, mine, remote, theirs)
    side.agent.transfer(handle)
    side.wait(handle)
    side.agent.release_xfer_handle(handle)
    release_both(side, remote, local)

    assert_bytes(side.buffer, expected.reshape(-1))


def test_one_source_block_read_into_many(make_side, make_any_peer):
    count = 64
    peer = make_any_peer("prefill", count * BLOCK, seed=6)
    side = make_side("decode", count * BLOCK, seed=7)
    side.agent.add_remote_agent(peer.metadata)
    local, remote = prepare_both(side, peer, count)

    handle = side.agent.make_prepped_xfer("READ", local, list(range(count)), remote, [17] * count)
    side.agent.transfer(handle)
    side.wait(handle)
    side.agent.release_xfer_handle(handle)
    release_both(side, local, remote)

    block = peer.original().reshape(-1, BLOCK)[17]
    assert_bytes(side.buffer, np.tile(block, count))


def test_prepared_transfers_outlive_their_lists(make_side, make_any_peer):
    count = 32
    peer = make_any_peer("prefill", count * BLOCK, seed=8)
    side = make_side("decode", count * BLOCK, seed=9)
    side.agent.add_remote_agent(peer.metadata)
    local, remote = prepare_both(side, peer, count)
    handles = [side.agent.make_prepped_xfer("READ", local, [index], remote, [index]) for index in range(count)]
    release_both(side, local, remote)

    for _ in range(3):
        side.buffer[:] = 0
        for handle in handles:
            side.agent.transfer(handle)
        for handle in handles:
            side.wait(handle)
        assert_bytes(side.buffer, peer.original())
    for handle in handles:
        side.agent.release_xfer_handle(handle)


def test_thousands_of_prepared_blocks_in_hundreds_of_transfers(make_side, make_any_peer):
    """The proportions of a serving node: 8192 blocks prepared per peer, a few hundred requests with a handful each."""
    count, per_request, requests = 8192, 24, 300
    peer = make_any_peer("prefill", count * BLOCK, seed=10)
    side = make_side("decode", count * BLOCK, seed=11)
    side.agent.add_remote_agent(peer.metadata)
    local, remote = prepare_both(side, peer, count)
    random = np.random.default_rng(12)
    mine, theirs = (random.permutation(count)[: per_request * requests].astype(np.int32) for _ in range(2))
    expected = side.buffer.copy().reshape(-1, BLOCK)
    expected[mine] = peer.original().reshape(-1, BLOCK)[theirs]

    handles = []
    for request in range(requests):
        part = slice(request * per_request, (request + 1) * per_request)
        handles.append(
            side.agent.make_prepped_xfer("READ", local, mine[part], remote, theirs[part], b"request-%d:1" % request)
        )
        side.agent.transfer(handles[-1])
    for handle in handles:
        side.wait(handle)
        side.agent.release_xfer_handle(handle)
    release_both(side, local, remote)

    assert_bytes(side.buffer, expected.reshape(-1))
    taken = peer.call(take_notifications, requests)
    assert sorted(taken) == sorted((side.name, b"request-%d:1" % request) for request in range(requests))


def test_lists_of_two_peers_side_by_side(make_side, make_any_peer):
    count = 128
    side = make_side("decode", count * BLOCK, seed=13)
    expected = side.buffer.copy().reshape(-1, BLOCK)
    peers = [make_any_peer("prefill", count * BLOCK, seed=20 + number) for number in range(2)]
    handles = []
    for number, peer in enumerate(peers):
        side.agent.add_remote_agent(peer.metadata)
        local, remote = prepare_both(side, peer, count)
        mine = list(range(number, count, 2))
        handles.append(side.agent.make_prepped_xfer("READ", local, mine, remote, mine[::-1]))
        expected[mine] = peer.original().reshape(-1, BLOCK)[mine[::-1]]
        release_both(side, local, remote)

    for handle in handles:
        side.agent.transfer(handle)
    for handle in handles:
        side.wait(handle)
        side.agent.release_xfer_handle(handle)

    assert_bytes(side.buffer, expected.reshape(-1))
