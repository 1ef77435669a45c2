"""READ and WRITE through `nixl._api`: every byte that should move does, and no other."""

from __future__ import annotations

import numpy as np
import pytest

from harness.peers import add_agent, bytes_at_notification, run_transfer, take_notifications, write_bytes
from harness.sides import assert_bytes, pattern

MIB = 1 << 20


@pytest.mark.versions
@pytest.mark.parametrize("length", [1, 64, 4096, 65_537, 8 * MIB])
def test_read_brings_the_peers_bytes(make_side, make_any_peer, length):
    peer = make_any_peer("prefill", length + 200, seed=1)
    side = make_side("decode", length + 100, seed=2)
    expected = side.buffer.copy()
    side.agent.add_remote_agent(peer.metadata)

    side.run("READ", [(50, length)], peer.base, [(77, length)], peer.name)

    expected[50 : 50 + length] = peer.original()[77 : 77 + length]
    assert_bytes(side.buffer, expected)
    assert_bytes(peer.bytes(), peer.original())


@pytest.mark.versions
@pytest.mark.parametrize("length", [1, 64, 4096, 65_537, 8 * MIB])
def test_write_puts_our_bytes_there(make_side, make_any_peer, length):
    peer = make_any_peer("decode", length + 200, seed=1)
    side = make_side("prefill", length + 100, seed=2)
    ours = side.buffer.copy()
    side.agent.add_remote_agent(peer.metadata)

    side.run("WRITE", [(50, length)], peer.base, [(77, length)], peer.name)

    expected = peer.original()
    expected[77 : 77 + length] = ours[50 : 50 + length]
    assert_bytes(peer.bytes(), expected)
    assert_bytes(side.buffer, ours)


@pytest.mark.parametrize("operation", ["READ", "WRITE"])
def test_transfer_with_itself(make_side, operation):
    side = make_side("alone", 4096, seed=3)
    expected = side.buffer.copy()

    side.run(operation, [(0, 1000)], side.base, [(2000, 1000)], side.name, b"to myself")

    source, destination = (2000, 0) if operation == "READ" else (0, 2000)
    expected[destination : destination + 1000] = expected[source : source + 1000]
    assert_bytes(side.buffer, expected)
    assert side.notifications(1) == [(side.name, b"to myself")]


@pytest.mark.versions
@pytest.mark.parametrize("length", [64, 100_000, 16 * MIB])
def test_written_bytes_are_there_when_the_notification_is(make_side, make_any_peer, length):
    peer = make_any_peer("decode", length, seed=1)
    side = make_side("prefill", length, seed=2)
    side.agent.add_remote_agent(peer.metadata)
    handle = side.prepare("WRITE", [(0, length)], peer.base, [(0, length)], peer.name)

    for turn in range(5):
        side.buffer[:] = pattern(100 + turn, length)
        side.agent.transfer(handle, b"turn %d" % turn)
        assert_bytes(peer.call(bytes_at_notification, b"turn %d" % turn, [(0, length)]), side.buffer)
        side.wait(handle)
    side.agent.release_xfer_handle(handle)


@pytest.mark.versions
@pytest.mark.parametrize("operation", ["READ", "WRITE"])
def test_twenty_thousand_scattered_descriptors(make_side, make_any_peer, operation):
    block, count = 512, 20_000
    size = 2 * block * count
    peer = make_any_peer("remote", size, seed=4)
    side = make_side("local", size, seed=5)
    side.agent.add_remote_agent(peer.metadata)
    # Of twice as many blocks on each side, so that the bytes between must survive; in an order that merges with nothing.
    random = np.random.default_rng(6)
    local, remote = (random.permutation(2 * count)[:count] for _ in range(2))
    ours, theirs = side.buffer.copy(), peer.original()

    side.run(
        operation,
        [(int(index) * block, block) for index in local],
        peer.base,
        [(int(index) * block, block) for index in remote],
        peer.name,
        b"all of them",
    )

    if operation == "READ":
        ours.reshape(-1, block)[local] = theirs.reshape(-1, block)[remote]
    else:
        theirs.reshape(-1, block)[remote] = ours.reshape(-1, block)[local]
    assert peer.call(take_notifications, 1) == [(side.name, b"all of them")]
    assert_bytes(side.buffer, ours)
    assert_bytes(peer.bytes(), theirs)


def test_descriptors_of_all_sizes_in_one_transfer(make_side, make_any_peer):
    lengths = [1, 7, 64, 511, 4096, 4097, 65_536, 1_000_001, 3, 2 * MIB]
    size = sum(lengths) + 100 * len(lengths)
    peer = make_any_peer("remote", size, seed=7)
    side = make_side("local", size, seed=8)
    side.agent.add_remote_agent(peer.metadata)
    local, remote, expected = [], [], side.buffer.copy()
    position = 0
    for length in lengths:
        local.append((position + 100, length))
        remote.append((size - position - length, length))
        expected[position + 100 : position + 100 + length] = peer.original()[size - position - length : size - position]
        position += length + 100

    side.run("READ", local, peer.base, remote, peer.name)

    assert_bytes(side.buffer, expected)


@pytest.mark.versions
def test_a_transfer_can_be_posted_again_and_again(make_side, make_any_peer):
    block, count = 1024, 16
    peer = make_any_peer("remote", block * count, seed=9)
    side = make_side("local", block * count, seed=10)
    side.agent.add_remote_agent(peer.metadata)
    ranges = [(index * block, block) for index in range(0, count, 2)]
    handle = side.prepare("READ", ranges, peer.base, ranges, peer.name, b"first")
    expected = side.buffer.copy().reshape(-1, block)

    for turn in range(100):
        data = pattern(1000 + turn, block * count)
        peer.call(write_bytes, 0, data.tobytes())
        side.agent.transfer(handle, b"turn %d" % turn)
        side.wait(handle)
        # Asking again after the end changes nothing and sends nothing twice.
        assert side.is_done(handle)
        expected[::2] = data.reshape(-1, block)[::2]
        assert_bytes(side.buffer, expected.reshape(-1))
    side.agent.release_xfer_handle(handle)

    # One each, although nobody polled meanwhile.
    assert peer.call(take_notifications, 100) == [(side.name, b"turn %d" % turn) for turn in range(100)]


def test_many_transfers_at_once(make_side, make_any_peer):
    block, count = 10_000, 300
    peer = make_any_peer("remote", block * count, seed=11)
    side = make_side("local", block * count, seed=12)
    side.agent.add_remote_agent(peer.metadata)
    order = np.random.default_rng(13).permutation(count)

    handles = [
        side.start("READ", [(index * block, block)], peer.base, [(int(order[index]) * block, block)], peer.name)
        for index in range(count)
    ]
    for handle in handles:
        side.wait(handle)
        side.agent.release_xfer_handle(handle)

    assert_bytes(side.buffer, peer.original().reshape(-1, block)[order].reshape(-1))


def test_both_sides_transfer_at_once(make_side, make_any_peer):
    half = 4 * MIB
    peer = make_any_peer("right", 2 * half, seed=14)
    side = make_side("left", 2 * half, seed=15)
    left, right = side.buffer.copy(), peer.original()
    side.agent.add_remote_agent(peer.metadata)
    peer.call(add_agent, side.metadata())

    handle = side.start("READ", [(0, half)], peer.base, [(half, half)], peer.name)
    peer.call(run_transfer, "READ", [(0, half)], side.base, [(half, half)], side.name)
    side.wait(handle)
    side.agent.release_xfer_handle(handle)

    assert_bytes(side.buffer, np.concatenate([right[half:], left[half:]]))
    assert_bytes(peer.bytes(), np.concatenate([left[half:], right[half:]]))


def test_registrations_that_overlap_and_repeat(make_side, make_any_peer):
    peer = make_any_peer("remote", 65_536, seed=16)
    side = make_side("local", 65_536, seed=17)
    # The buffer as a whole is registered already.
    extra = [side.agent.register_memory([(side.base + start, 30_000, 0, "")], "DRAM") for start in (0, 10_000, 30_000)]
    extra.append(side.agent.register_memory([(side.base, 100, 0, ""), (side.base, 65_536, 0, "")], "DRAM"))
    side.agent.add_remote_agent(peer.metadata)

    side.run("READ", [(5_000, 50_000)], peer.base, [(0, 50_000)], peer.name)
    for registration in extra:
        side.agent.deregister_memory(registration)
        side.run("READ", [(5_000, 50_000)], peer.base, [(0, 50_000)], peer.name)

    assert_bytes(side.buffer[5_000:55_000], peer.original()[:50_000])


@pytest.mark.versions
def test_a_peer_that_registered_the_same_memory_twice(make_side, make_any_peer):
    peer = make_any_peer("remote", 65_536, seed=18)
    side = make_side("local", 65_536, seed=19)
    side.agent.add_remote_agent(peer.call(register_again))
    side.run("READ", [(0, 65_536)], peer.base, [(0, 65_536)], peer.name)
    peer.call(deregister_first)
    side.buffer[:] = 0
    side.run("READ", [(0, 65_536)], peer.base, [(0, 65_536)], peer.name)

    assert_bytes(side.buffer, peer.original())


# --- what runs in other processes


def register_again(state) -> bytes:
    """The whole buffer and parts of it, some of them twice; gives the metadata back."""
    side = state.side
    state.again = [
        side.agent.register_memory([(side.base + start, length, 0, "")], "DRAM")
        for start, length in ((0, 65_536), (0, 4096), (0, 4096), (8192, 4096))
    ]
    return side.metadata()


def deregister_first(state) -> None:
    """One of the two registrations of the whole buffer; the other still serves."""
    state.side.agent.deregister_memory(state.again.pop(0))
    while state.again:
        state.side.agent.deregister_memory(state.again.pop())
