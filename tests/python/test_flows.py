"""Flows in the shape of NIXL's own examples: descriptor lists exchanged as bytes, metadata over NIXL's sockets, strides."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import numpy as np
import pytest
from nixl._api import nixl_agent, nixl_agent_config

from harness.peers import take_notifications
from harness.sides import BACKEND, Side, assert_bytes, pattern
from harness.waiting import wait_until

KIB = 1024


@pytest.mark.versions
def test_two_peers_exchange_serialized_descriptors(make_side, make_peer):
    """The target serializes what it offers, the initiator reads it and says so."""
    target = make_peer("target", 256 * KIB, seed=1)
    initiator = make_side("initiator", 256 * KIB, seed=2)
    offered = target.call(serialize, [(start * KIB, 16 * KIB) for start in range(0, 256, 16)])
    theirs = initiator.agent.deserialize_descs(offered)
    ours = initiator.descriptors([(start * KIB, 16 * KIB) for start in range(0, 256, 16)])
    initiator.agent.add_remote_agent(target.metadata)

    handle = initiator.agent.initialize_xfer("READ", ours, theirs, target.name, b"UUID1")
    assert initiator.agent.transfer(handle) in ("DONE", "PROC")
    initiator.wait(handle)
    initiator.agent.release_xfer_handle(handle)

    assert target.call(take_notifications, 1) == [(initiator.name, b"UUID1")]
    assert_bytes(initiator.buffer, target.original())


@pytest.mark.versions
def test_metadata_over_the_agents_own_sockets(make_peer, unique):
    """NIXL's listener threads carry the metadata; the backend gets it from a thread of NIXL's."""
    port = free_port()
    target = make_peer("target", KIB, seed=3)
    target.call(open_listening, target.name, port)
    base = target.call(base_of_listening)
    initiator = listening_agent(unique("initiator"), free_port())
    buffer = np.zeros(KIB, dtype=np.uint8)
    registered = initiator.register_memory([(buffer.ctypes.data, KIB, 0, "")], "DRAM")
    name = "listening " + target.name

    initiator.fetch_remote_metadata(name, "127.0.0.1", port)
    wait_until(lambda: initiator.check_remote_metadata(name), "the metadata to be fetched")
    initiator.send_local_metadata("127.0.0.1", port)
    wait_until(lambda: target.call(knows, initiator.name), "the metadata to be sent")

    ours = initiator.get_xfer_descs([(buffer.ctypes.data, KIB, 0)], "DRAM")
    theirs = initiator.get_xfer_descs([(base, KIB, 0)], "DRAM")
    handle = initiator.initialize_xfer("READ", ours, theirs, name, b"fetched")
    initiator.transfer(handle)
    wait_until(lambda: initiator.check_xfer_state(handle) == "DONE", "the read")
    initiator.release_xfer_handle(handle)
    target.call(answer, initiator.name)
    wait_until(lambda: initiator.check_remote_xfer_done(name, b"answer"), "the answer")

    assert_bytes(buffer, pattern(4, KIB))
    initiator.deregister_memory(registered)


@pytest.mark.versions
@pytest.mark.parametrize("sender_polls", [True, False], ids=["polling", "not polling"])
def test_blocking_send_and_receive(make_side, make_peer, sender_polls):
    """A hundred messages handed over by WRITE and notification, each answered before the next."""
    receiver = make_peer("receiver", 64 * KIB, seed=5)
    sender = make_side("sender", 64 * KIB, seed=6)
    sender.agent.add_remote_agent(receiver.metadata)
    receiver.call(know, sender.metadata())
    receiver.remote.begin(receive_and_answer, sender.name, 100)

    handle = sender.prepare("WRITE", [(0, 64 * KIB)], receiver.base, [(0, 64 * KIB)], receiver.name)
    for turn in range(100):
        sender.buffer[:] = turn
        sender.agent.transfer(handle, b"message %d" % turn)
        if sender_polls:
            sender.wait(handle)
        assert sender.notifications(1) == [(receiver.name, b"%d" % (turn * 64 * KIB))]
        sender.wait(handle)
    sender.agent.release_xfer_handle(handle)
    receiver.remote.finish()


def test_strided_blocks(make_side, make_any_peer):
    """A row of the array stands for many blocks a stride apart."""
    count, length, stride = 100, 512, 2048
    peer = make_any_peer("prefill", count * stride, seed=7)
    side = make_side("decode", count * stride, seed=8)
    side.agent.add_remote_agent(peer.metadata)
    expected = side.buffer.copy().reshape(count, stride)

    def strided(base: int) -> np.ndarray:
        return np.array([(base, length, 0, stride, count)], dtype=np.uint64)

    local = side.agent.prep_xfer_dlist("NIXL_INIT_AGENT", strided(side.base), "DRAM")
    remote = side.agent.prep_xfer_dlist(peer.name, strided(peer.base), "DRAM")
    mine, theirs = [*range(0, 50)], [*range(99, 49, -1)]
    handle = side.agent.make_prepped_xfer("READ", local, mine, remote, theirs)
    side.agent.transfer(handle)
    side.wait(handle)
    side.agent.release_xfer_handle(handle)
    side.agent.release_dlist_handle(local)
    side.agent.release_dlist_handle(remote)

    expected[mine, :length] = peer.original().reshape(count, stride)[theirs, :length]
    assert_bytes(side.buffer, expected.reshape(-1))


def test_beside_ucx_in_one_agent(make_process):
    """Both backends in one agent: each does what it is asked for. In a process that UCX may crash on its way out."""
    process = make_process()
    process.call(use_both_backends)
    process.kill()


@pytest.mark.versions
def test_memory_views_are_not_supported(make_side):
    side = make_side()
    if hasattr(side.agent, "prep_mem_view"):
        with pytest.raises(Exception, match="NIXL_ERR_"):
            side.agent.prep_mem_view(side.descriptors([(0, 100)]))


# --- what runs in other processes


def serialize(state, ranges) -> bytes:
    """What the side offers."""
    return state.side.agent.get_serialized_descs(state.side.descriptors(ranges))


def free_port() -> int:
    """Nobody listens on it just now, and nobody gets it by asking the kernel for any, as everything else here does."""
    lowest_of_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10_000, lowest_of_kernel if lowest_of_kernel > 11_000 else 32_768)
    for port in random.sample(candidates, 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def listening_agent(name: str, port: int) -> nixl_agent:
    """With NIXL's listener thread, hence with its locks."""
    return nixl_agent(name, nixl_agent_config(True, True, port, backends=[BACKEND]))


def open_listening(state, name: str, port: int) -> None:
    """Beside the side that the peer has anyway."""
    state.listening = listening_agent("listening " + name, port)
    state.data = pattern(4, KIB)
    state.registered = state.listening.register_memory([(state.data.ctypes.data, KIB, 0, "")], "DRAM")


def base_of_listening(state) -> int:
    """Of the listening agent's memory."""
    return state.data.ctypes.data


def knows(state, name: str) -> bool:
    """Whether metadata came in."""
    return state.listening.check_remote_metadata(name)


def answer(state, name: str) -> None:
    """To who has read."""
    wait_until(lambda: state.listening.check_remote_xfer_done(name, b"fetched"), "the notification of the read")
    state.listening.send_notif(name, b"answer")


def know(state, metadata: bytes) -> None:
    """Adds an agent."""
    state.side.agent.add_remote_agent(metadata)


def receive_and_answer(state, sender: str, count: int) -> None:
    """The answer is the sum of all bytes, so it shows that they were there with the notification."""
    side: Side = state.side
    for turn in range(count):
        assert side.notifications(1) == [(sender, b"message %d" % turn)]
        side.agent.send_notif(sender, b"%d" % int(side.buffer.sum(dtype=np.int64)))


def use_both_backends(state) -> None:
    """Two agents with both, one transfer by each."""
    state.agents = [nixl_agent(name, nixl_agent_config(backends=["UCX", BACKEND])) for name in ("left", "right")]
    left, right = state.agents
    state.buffers = [pattern(seed, KIB) for seed in (1, 2)]
    for agent, buffer in zip(state.agents, state.buffers, strict=True):
        agent.register_memory([(buffer.ctypes.data, KIB, 0, "")], "DRAM")
    left.add_remote_agent(right.get_agent_metadata())
    for backend in ("UCX", BACKEND):
        state.buffers[0][:] = 0
        ours = left.get_xfer_descs([(state.buffers[0].ctypes.data, KIB, 0)], "DRAM")
        theirs = left.get_xfer_descs([(state.buffers[1].ctypes.data, KIB, 0)], "DRAM")
        handle = left.initialize_xfer("READ", ours, theirs, "right", b"by " + backend.encode(), backends=[backend])
        assert left.query_xfer_backend(handle) == backend
        left.transfer(handle)
        wait_until(lambda: left.check_xfer_state(handle) == "DONE", "the read")
        assert_bytes(state.buffers[0], state.buffers[1])
        left.release_xfer_handle(handle)
        wait_until(lambda: right.check_remote_xfer_done("left", b"by " + backend.encode()), "the notification")
