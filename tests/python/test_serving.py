"""Agents used as vLLM uses them: several threads at once, telemetry on every transfer, on many cores and on one."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.peers import Peer, add_agent, close_side, send_notification, take_notifications
from harness.serving import BLOCK, BLOCKS, Prefill, Worker, open_worker_side
from harness.sides import BACKEND, Side, assert_bytes
from harness.waiting import wait_until


def open_prefills(make_peer, count: int, **keywords) -> list[Peer]:
    """Each in a process of its own."""
    return [make_peer("prefill", BLOCKS * BLOCK, seed=50 + number, **keywords) for number in range(count)]


def described(peer: Peer) -> Prefill:
    """What a worker is told about it."""
    return Prefill(peer.name, peer.metadata, peer.base, peer.seed)


def check_notifications(peer: Peer, sent: list[bytes], sender: str) -> None:
    """All of them, each once, and the heartbeats in order."""
    taken = peer.call(take_notifications, len(sent))
    assert {name for name, _ in taken} == {sender}
    messages = [message for _, message in taken]
    assert sorted(messages) == sorted(sent)
    heartbeats = [message for message in messages if message.startswith(b"HB:")]
    assert heartbeats == sorted(heartbeats, key=lambda message: int(message[3:]))


@pytest.mark.versions
@pytest.mark.parametrize("progress_thread", [True, False], ids=["progress thread", "no progress thread"])
def test_three_threads_call_one_agent(make_peer, unique, progress_thread):
    prefills = open_prefills(make_peer, 2, progress_thread=progress_thread)
    side = open_worker_side(unique("decode"), progress_thread=progress_thread)
    worker = Worker(side, [described(peer) for peer in prefills], requests=3000)

    worker.run(150)

    for peer in prefills:
        check_notifications(peer, worker.sent[peer.name], side.name)
        assert_bytes(peer.bytes(), peer.original())
    side.close()


def test_traffic_in_both_directions_on_many_threads(make_peer, unique):
    """Prefill agents send notifications of their own while the worker's three threads are at it."""
    prefills = open_prefills(make_peer, 2)
    side = open_worker_side(unique("decode"))
    worker = Worker(side, [described(peer) for peer in prefills], requests=1000)
    for peer in prefills:
        peer.call(add_agent, side.metadata())
        peer.remote.begin(send_blocks, side.name, 500)

    worker.run(150)

    for peer in prefills:
        peer.remote.finish()
        check_notifications(peer, worker.sent[peer.name], side.name)
    missing = 1000 - len(worker.taken)
    taken = worker.taken + (side.notifications(missing) if missing else [])
    for peer in prefills:
        assert [message for sender, message in taken if sender == peer.name] == [block_list(n) for n in range(500)]
    side.close()


def test_peers_come_and_go_under_the_traffic_of_others(make_side, make_peer):
    """One thread adds, uses and removes a peer, again and again; two others use one that stays."""
    size = 64 * BLOCK
    stays, goes = make_peer("stays", size, seed=90), make_peer("goes", size, seed=91)
    side = make_side("decode", 2 * size, locked=True)
    side.agent.add_remote_agent(stays.metadata)
    over = threading.Event()
    counts = {"transfers": 0, "heartbeats": 0, "visits": 0}

    def transfer() -> None:
        while not over.is_set():
            side.buffer[:size] = 0
            side.run("READ", [(0, size)], stays.base, [(0, size)], stays.name)
            assert_bytes(side.buffer[:size], stays.original())
            counts["transfers"] += 1

    def heartbeat() -> None:
        while not over.is_set():
            side.agent.send_notif(stays.name, b"HB:%d" % counts["heartbeats"])
            counts["heartbeats"] += 1
            assert side.agent.get_new_notifs() == {}
            time.sleep(0.001)

    def visit() -> None:
        while counts["visits"] < 100:
            side.agent.add_remote_agent(goes.metadata)
            side.buffer[size:] = 0
            side.run("READ", [(size, size)], goes.base, [(0, size)], goes.name, b"visit %d" % counts["visits"])
            assert_bytes(side.buffer[size:], goes.original())
            side.agent.remove_remote_agent(goes.name)
            counts["visits"] += 1
        over.set()

    with ThreadPoolExecutor() as threads:
        running = [threads.submit(work) for work in (transfer, heartbeat, visit)]
        for work in running:
            work.add_done_callback(lambda _: over.set())
        for work in running:
            work.result(120)

    assert counts["transfers"] > 0 < counts["heartbeats"]
    expected = [(side.name, b"HB:%d" % number) for number in range(counts["heartbeats"])]
    assert stays.call(take_notifications, len(expected)) == expected
    visits = [(side.name, b"visit %d" % number) for number in range(100)]
    assert goes.call(take_notifications, 100) == visits


@pytest.mark.versions
def test_everything_on_one_core(make_process, unique):
    """Prefill, decode and all their threads, lanes included, on the same core."""
    core = {min(os.sched_getaffinity(0))}
    prefill = Peer(make_process(cores=core)).open(unique("prefill"), BLOCKS * BLOCK, seed=60)
    decode = make_process(cores=core)

    sent = decode.call(run_worker, unique("decode"), described(prefill), 1000, seconds=150)

    check_notifications(prefill, sent, decode.call(name_of_side))
    assert_bytes(prefill.bytes(), prefill.original())


@pytest.mark.parametrize("limit", ["one core", "all cores"])
def test_both_agents_in_one_process(make_process, unique, limit):
    core = {min(os.sched_getaffinity(0))} if limit == "one core" else None
    make_process(cores=core).call(run_worker_beside_prefill, unique("prefill"), unique("decode"), 500, seconds=150)


def test_eight_processes_on_these_cores(make_process, unique):
    """Each prefill serves three decode agents; sixteen cores' worth of lanes and threads on what there is."""
    prefills = [Peer(make_process()).open(unique("prefill"), BLOCKS * BLOCK, seed=70 + n) for n in range(2)]
    decodes = [make_process() for _ in range(6)]
    names = [unique("decode") for _ in decodes]
    for number, decode in enumerate(decodes):
        decode.begin(run_worker, names[number], described(prefills[number % 2]), 200)
    sent = [decode.finish(180) for decode in decodes]

    for number, prefill in enumerate(prefills):
        theirs = [messages for index, messages in enumerate(sent) if index % 2 == number]
        taken = prefill.call(take_notifications, sum(map(len, theirs)))
        for index in range(number, len(decodes), 2):
            assert sorted(m for sender, m in taken if sender == names[index]) == sorted(sent[index])


@pytest.mark.versions
def test_telemetry_of_every_finished_transfer(make_side, make_any_peer):
    peer = make_any_peer("prefill", BLOCK * 64, seed=80)
    side = make_side("decode", BLOCK * 64, telemetry=True)
    side.agent.add_remote_agent(peer.metadata)
    for operation in ("READ", "WRITE"):
        for count in (1, 64):
            ranges = [(index * BLOCK, BLOCK // 2) for index in range(count)]
            handle = side.prepare(operation, ranges, peer.base, ranges, peer.name)
            for _ in range(3):
                side.agent.transfer(handle)
                side.wait(handle)
                telemetry = side.agent.get_xfer_telemetry(handle)
                assert (telemetry.totalBytes, telemetry.descCount) == (count * BLOCK // 2, count)
                assert telemetry.xferDuration >= telemetry.postDuration >= 0
            side.agent.release_xfer_handle(handle)


@pytest.mark.versions
def test_the_backend_says_what_it_is(make_side, make_any_peer):
    peer = make_any_peer("prefill")
    side = make_side("decode")
    side.agent.add_remote_agent(peer.metadata)
    assert BACKEND in side.agent.get_plugin_list()
    assert "DRAM" in str(side.agent.get_plugin_mem_types(BACKEND))
    assert "DRAM" in str(side.agent.get_backend_mem_types(BACKEND))
    side.agent.make_connection(peer.name)
    handle = side.prepare("READ", [(0, 100)], peer.base, [(0, 100)], peer.name)
    assert side.agent.query_xfer_backend(handle) == BACKEND
    side.agent.release_xfer_handle(handle)


@pytest.mark.versions
def test_memory_inside_and_outside_of_registrations(make_side):
    side = make_side(size=4096)
    inside, partly = (side.base + 100, 200, 0, ""), (side.base + 4000, 200, 0, "")
    outside = (4096, 100, 0, "")

    answers = side.agent.query_memory([inside, partly, outside, inside], BACKEND, "DRAM")

    assert [answer is not None for answer in answers] == [True, False, False, True]


def test_cost_is_estimated_from_what_was_measured(make_side, make_peer):
    peer = make_peer("prefill", 4 << 20, seed=81)
    side = make_side("decode", 4 << 20)
    side.agent.add_remote_agent(peer.metadata)
    handle = side.prepare("READ", [(0, 4 << 20)], peer.base, [(0, 4 << 20)], peer.name)
    with pytest.raises(Exception, match="NIXL_ERR_NOT_SUPPORTED"):
        side.agent.estimate_xfer_cost(handle)
    for _ in range(20):
        side.agent.transfer(handle)
        side.wait(handle)

    duration, error_margin, _ = side.agent.estimate_xfer_cost(handle)

    assert duration > 0 <= error_margin
    side.agent.release_xfer_handle(handle)


@pytest.mark.versions
def test_push_with_the_block_list_in_the_notification(make_side, make_any_peer):
    """The other mode of the connector: decode registers its blocks by a long notification, prefill writes them."""
    decode = make_any_peer("decode", 64 * BLOCK, seed=82)
    prefill = make_side("prefill", 64 * BLOCK, seed=83)
    decode.call(add_agent, prefill.metadata())
    decode.call(send_notification, prefill.name, block_list(20_000))
    [(sender, message)] = prefill.notifications(1)
    assert (sender, message) == (decode.name, block_list(20_000))

    prefill.agent.add_remote_agent(decode.metadata)
    picked = [(index * BLOCK, BLOCK) for index in (3, 9, 27, 40)]
    prefill.run("WRITE", picked, decode.base, picked[::-1], decode.name, b"request-7:1")

    assert decode.call(take_notifications, 1) == [(prefill.name, b"request-7:1")]
    expected = decode.original()
    for (source, _), (destination, _) in zip(picked, reversed(picked), strict=True):
        expected[destination : destination + BLOCK] = prefill.buffer[source : source + BLOCK]
    assert_bytes(decode.bytes(), expected)


# --- what runs in other processes


def block_list(number: int) -> bytes:
    """A notification as long as a request's list of blocks."""
    return b"PUSH:%d:" % number + b",".join(b"%d" % block for block in range(number % 20 * 100 + number // 20))


def send_blocks(state, to: str, count: int) -> None:
    """Push registrations of many lengths."""
    for number in range(count):
        state.side.agent.send_notif(to, block_list(number))


def run_worker(state, name: str, prefill: Prefill, requests: int) -> list[bytes]:
    """A whole worker; gives back the notifications that it sent."""
    state.side = open_worker_side(name)
    worker = Worker(state.side, [prefill], requests)
    worker.run(140)
    return worker.sent[prefill.name]


def name_of_side(state) -> str:
    """Of the worker that ran."""
    return state.side.name


def run_worker_beside_prefill(state, prefill_name: str, decode_name: str, requests: int) -> None:
    """Both agents in one process."""
    prefill = Side(prefill_name, BLOCKS * BLOCK, seed=61)
    described_here = Prefill(prefill_name, prefill.metadata(), prefill.base, 61)
    sent = run_worker(state, decode_name, described_here, requests)
    taken = prefill.notifications(len(sent))
    assert sorted(message for _, message in taken) == sorted(sent)
    wait_until(lambda: prefill.agent.get_new_notifs() == {}, "nothing more")
    close_side(state)
    prefill.close()
