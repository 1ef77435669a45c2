"""Notifications: exactly once, whole, in the order of their sender, under the sender's name."""

from __future__ import annotations

import threading
import time

import pytest

from harness.peers import add_agent, close_side, poll_notifications, send_notification, take_notifications
from harness.sides import Side, pattern
from harness.waiting import wait_until

MIB = 1 << 20


@pytest.mark.versions
def test_before_any_transfer_in_both_directions(make_side, make_any_peer):
    peer = make_any_peer("right")
    side = make_side("left")
    side.agent.add_remote_agent(peer.metadata)
    peer.call(add_agent, side.metadata())

    side.agent.send_notif(peer.name, b"ping")
    assert peer.call(take_notifications, 1) == [(side.name, b"ping")]
    peer.call(send_notification, side.name, b"pong")
    assert side.notifications(1) == [(peer.name, b"pong")]
    assert side.agent.get_new_notifs() == {} == peer.call(poll_notifications)


@pytest.mark.versions
@pytest.mark.parametrize("length", [0, 1, 34, 50, 1023, 65_536, MIB, 16 * MIB - 1])
def test_any_length_arrives_whole(make_side, make_any_peer, length):
    peer = make_any_peer("right")
    side = make_side("left")
    side.agent.add_remote_agent(peer.metadata)
    message = pattern(length, length).tobytes()

    side.agent.send_notif(peer.name, message)

    assert peer.call(take_notifications, 1) == [(side.name, message)]


def test_too_long_is_an_error_and_the_next_one_arrives(make_side, make_any_peer):
    peer = make_any_peer("right")
    side = make_side("left")
    side.agent.add_remote_agent(peer.metadata)

    with pytest.raises(Exception, match="NIXL_ERR_"):
        side.agent.send_notif(peer.name, bytes(17 * MIB))
    side.agent.send_notif(peer.name, b"short")

    assert peer.call(take_notifications, 1) == [(side.name, b"short")]


@pytest.mark.versions
def test_to_itself(make_side):
    side = make_side("alone")
    for length in (0, 5, 100_000):
        message = pattern(length, length).tobytes()
        side.agent.send_notif(side.name, message)
        assert side.notifications(1) == [(side.name, message)]


def test_to_nobody_is_not_found(make_side):
    side = make_side()
    with pytest.raises(Exception, match="NIXL_ERR_NOT_FOUND"):
        side.agent.send_notif("whom nobody has added", b"hello")


@pytest.mark.versions
@pytest.mark.parametrize("progress_thread", [True, False], ids=["progress thread", "no progress thread"])
def test_ten_thousand_heartbeats_in_order(make_side, make_peer, progress_thread):
    count = 10_000
    peer = make_peer("prefill", progress_thread=progress_thread)
    side = make_side("decode", progress_thread=progress_thread)
    side.agent.add_remote_agent(peer.metadata)
    expected = [(side.name, b"HB:%d" % number) for number in range(count)]

    peer.remote.begin(take_notifications, count)
    for _, message in expected:
        side.agent.send_notif(peer.name, message)

    assert peer.remote.finish() == expected
    assert peer.call(poll_notifications) == {}


def test_heartbeats_that_nobody_polls_wait(make_side, make_peer):
    """The receiver's application is busy for a while; nothing is lost, and the sender is not held up."""
    count = 5_000
    peer = make_peer("prefill")
    side = make_side("decode")
    side.agent.add_remote_agent(peer.metadata)

    peer.remote.begin(busy, 2.0)
    for number in range(count):
        side.agent.send_notif(peer.name, b"HB:%d" % number)
    peer.remote.finish()

    assert peer.call(take_notifications, count) == [(side.name, b"HB:%d" % number) for number in range(count)]


def test_threads_of_one_sender_each_keep_their_order(make_side, make_peer):
    threads, count = 4, 1_000
    peer = make_peer("prefill")
    side = make_side("decode")
    side.agent.add_remote_agent(peer.metadata)

    def send(thread: int) -> None:
        for number in range(count):
            side.agent.send_notif(peer.name, b"%d:%d" % (thread, number))

    senders = [threading.Thread(target=send, args=(thread,)) for thread in range(threads)]
    for sender in senders:
        sender.start()
    taken = [tuple(map(int, message.split(b":"))) for _, message in peer.call(take_notifications, threads * count)]
    for sender in senders:
        sender.join(60)

    for thread in range(threads):
        assert [number for owner, number in taken if owner == thread] == list(range(count))


def test_many_senders_to_one_receiver(make_side, make_peer):
    count, senders = 500, 3
    side = make_side("prefill")
    peers = [make_peer("decode") for _ in range(senders)]
    for peer in peers:
        peer.call(add_agent, side.metadata())
        peer.remote.begin(send_many, side.name, count)
    taken = side.notifications(senders * count)
    for peer in peers:
        peer.remote.finish()
        assert [message for sender, message in taken if sender == peer.name] == [b"%d" % n for n in range(count)]
    assert len(taken) == senders * count


def test_sent_just_before_the_end_still_arrives(make_side, make_peer):
    """An agent that ends in order hands over what it has accepted first."""
    side = make_side("prefill")
    peer = make_peer("decode")
    peer.call(add_agent, side.metadata())

    peer.call(send_many_and_close, side.name, 200)

    assert side.notifications(200) == [(peer.name, b"%d" % number) for number in range(200)]


@pytest.mark.versions
def test_looking_for_one_among_others(make_side, make_any_peer):
    peer = make_any_peer("prefill")
    side = make_side("decode")
    peer.call(add_agent, side.metadata())
    for message in (b"request-1:done", b"HB:1", b"request-2:done"):
        peer.call(send_notification, side.name, message)

    wait_until(lambda: side.agent.check_remote_xfer_done(peer.name, b"request-2"), "request-2")
    assert side.agent.check_remote_xfer_done(peer.name, b":done", tag_is_prefix=False)
    assert not side.agent.check_remote_xfer_done(peer.name, b"request-2")
    assert side.agent.update_notifs() == {peer.name: [b"HB:1"]}


def test_two_agents_of_one_process_never_see_each_others(make_side):
    left, right, sender = make_side("left"), make_side("right"), make_side("sender")
    for side in (left, right):
        sender.agent.add_remote_agent(side.metadata())
    for number in range(100):
        sender.agent.send_notif(left.name, b"left %d" % number)
        sender.agent.send_notif(right.name, b"right %d" % number)

    assert left.notifications(100) == [(sender.name, b"left %d" % number) for number in range(100)]
    assert right.notifications(100) == [(sender.name, b"right %d" % number) for number in range(100)]


# --- what runs in other processes


def busy(state, seconds: float) -> None:
    """An application that computes and calls nothing."""
    time.sleep(seconds)


def send_many(state, to: str, count: int) -> None:
    """One after the other, numbered."""
    side: Side = state.side
    for number in range(count):
        side.agent.send_notif(to, b"%d" % number)


def send_many_and_close(state, to: str, count: int) -> None:
    """And ends the agent at once."""
    send_many(state, to, count)
    close_side(state)
