"""Metadata strings: whole, in parts, and broken."""

from __future__ import annotations

import pytest
from nixl import _bindings

from harness.peers import (
    add_agent,
    get_metadata,
    poll_notifications,
    run_transfer,
    send_notification,
    take_notifications,
    write_bytes,
)
from harness.sides import BACKEND, Side, assert_bytes, at, pattern
from harness.waiting import wait_until

PAGE = 4096


@pytest.mark.versions
def test_metadata_is_the_same_each_time(make_side):
    side = make_side()
    metadata = side.metadata()

    assert all(side.metadata() == metadata for _ in range(10))
    assert len(metadata) < 16_384


@pytest.mark.versions
def test_connection_info_first_and_regions_later(make_side, make_peer):
    peer = make_peer("prefill", 4 * PAGE, seed=1)
    side = make_side("decode", 4 * PAGE, seed=2)
    connection, second_page = peer.call(partial_metadata, [(PAGE, PAGE)])
    theirs = side.agent.get_xfer_descs(at(peer.base, [(PAGE, PAGE)]), "DRAM")

    assert not side.agent.check_remote_metadata(peer.name)
    assert side.agent.add_remote_agent(connection) in (peer.name, peer.name.encode())
    assert side.agent.check_remote_metadata(peer.name)
    assert not side.agent.check_remote_metadata(peer.name, theirs)
    # Known without regions: notifications work, transfers do not yet.
    side.agent.send_notif(peer.name, b"before any region")
    assert peer.call(take_notifications, 1) == [(side.name, b"before any region")]
    with pytest.raises(_bindings.nixlNotFoundError):
        side.start("READ", [(0, PAGE)], peer.base, [(PAGE, PAGE)], peer.name)

    side.agent.add_remote_agent(second_page)
    assert side.agent.check_remote_metadata(peer.name, theirs)
    side.run("READ", [(0, PAGE)], peer.base, [(PAGE, PAGE)], peer.name)

    expected = pattern(2, 4 * PAGE)
    expected[:PAGE] = peer.original()[PAGE : 2 * PAGE]
    assert_bytes(side.buffer, expected)


def test_parts_of_memory_one_after_the_other(make_side, make_peer):
    count = 16
    peer = make_peer("prefill", count * PAGE, seed=3)
    side = make_side("decode", count * PAGE, seed=4)
    parts = peer.call(partial_metadata_with_connection, [(index * PAGE, PAGE) for index in range(count)])

    for index, part in enumerate(parts):
        side.agent.add_remote_agent(part)
        side.run("READ", [(index * PAGE, PAGE)], peer.base, [(index * PAGE, PAGE)], peer.name)

    assert_bytes(side.buffer, peer.original())


def test_loading_the_same_metadata_again_changes_nothing(make_side, make_any_peer):
    peer = make_any_peer("remote", 4 * PAGE, seed=5)
    side = make_side("local", 4 * PAGE, seed=6)
    for _ in range(5):
        side.agent.add_remote_agent(peer.metadata)
        side.buffer[:] = 0
        side.run("READ", [(0, 4 * PAGE)], peer.base, [(0, 4 * PAGE)], peer.name)
        assert_bytes(side.buffer, peer.original())


@pytest.mark.versions
def test_a_peer_removed_and_added_again(make_side, make_any_peer):
    peer = make_any_peer("remote", PAGE, seed=7)
    side = make_side("local", PAGE, seed=8)
    for turn in range(10):
        side.agent.add_remote_agent(peer.metadata)
        side.buffer[:] = 0
        side.run("READ", [(0, PAGE)], peer.base, [(0, PAGE)], peer.name, b"turn %d" % turn)
        assert_bytes(side.buffer, peer.original())
        assert peer.call(take_notifications, 1) == [(side.name, b"turn %d" % turn)]
        side.agent.remove_remote_agent(peer.name)
        assert not side.agent.check_remote_metadata(peer.name)
        with pytest.raises(_bindings.nixlNotFoundError):
            side.agent.send_notif(peer.name, b"to nobody")


@pytest.mark.versions
def test_a_target_that_never_loaded_the_initiator_serves_it(make_side, make_peer):
    peer = make_peer("prefill", PAGE, seed=9)
    side = make_side("decode", PAGE, seed=10)
    side.agent.add_remote_agent(peer.metadata)

    side.agent.send_notif(peer.name, b"hello")
    side.run("READ", [(0, PAGE)], peer.base, [(0, PAGE)], peer.name, b"read")

    assert sorted(peer.call(take_notifications, 2)) == [(side.name, b"hello"), (side.name, b"read")]
    assert_bytes(side.buffer, peer.original())
    # And it knows nobody whom it could answer.
    with pytest.raises(Exception, match="nixlNotFoundError"):
        peer.call(send_notification, side.name, b"answer")


def test_later_registrations_are_in_later_metadata(make_side, make_peer):
    peer = make_peer("remote", PAGE, seed=11)
    side = make_side("local", PAGE, seed=12)
    side.agent.add_remote_agent(peer.metadata)
    base = peer.call(register_more, 2 * PAGE, 13)
    later = peer.call(get_metadata)
    assert later != peer.metadata

    with pytest.raises(_bindings.nixlNotFoundError):
        side.start("READ", [(0, PAGE)], base, [(PAGE, PAGE)], peer.name)
    side.agent.add_remote_agent(later)
    side.run("READ", [(0, PAGE)], base, [(PAGE, PAGE)], peer.name)

    assert_bytes(side.buffer, pattern(13, 2 * PAGE)[PAGE:])


def test_broken_metadata_never_crashes(make_peer, make_process):
    """In a process of its own, which has to survive all of it and still work."""
    peer = make_peer("remote", PAGE, seed=14)
    process = make_process()

    process.call(load_broken_metadata, peer.metadata, peer.name)
    assert_bytes(process.call(read_page, peer.metadata, peer.name, peer.base), peer.original())
    assert peer.call(poll_notifications) == {}


def test_altered_metadata_gives_an_error_or_the_true_bytes(make_peer, make_process):
    """Whatever is altered, secret, address or name: posting to it ends, and only the true peer's bytes arrive."""
    peer = make_peer("remote", PAGE, seed=15)
    process = make_process()

    process.call(use_altered_metadata, peer.metadata, peer.name, peer.base, peer.seed, seconds=150)

    assert_bytes(peer.bytes(), peer.original())
    assert_bytes(process.call(read_page, peer.metadata, peer.name, peer.base), peer.original())


@pytest.mark.versions
def test_peers_that_know_each_other_use_each_other(make_side, make_peer):
    peer = make_peer("remote", PAGE, seed=15)
    side = make_side("local", PAGE, seed=16)
    peer.call(add_agent, side.metadata())
    side.agent.add_remote_agent(peer.metadata)

    side.run("READ", [(0, PAGE)], peer.base, [(0, PAGE)], peer.name)
    assert_bytes(side.buffer, peer.original())
    peer.call(write_bytes, 0, bytes(PAGE))
    peer.call(run_transfer, "WRITE", [(0, 100)], side.base, [(200, 100)], side.name, b"back")

    assert side.notifications(1) == [(peer.name, b"back")]
    expected = peer.original()
    expected[200:300] = 0
    assert_bytes(side.buffer, expected)


# --- what runs in other processes


def partial_metadata(state, ranges) -> tuple[bytes, bytes]:
    """Connection info alone, and the given ranges alone."""
    agent = state.side.agent
    connection = agent.get_partial_agent_metadata(_bindings.nixlRegDList(_bindings.DRAM_SEG), True)
    state.parts = [agent.register_memory([(*at(state.side.base, [part])[0], "")], "DRAM") for part in ranges]
    return connection, agent.get_partial_agent_metadata(state.parts[0], False)


def partial_metadata_with_connection(state, ranges) -> list[bytes]:
    """Each range alone, with the connection info."""
    agent = state.side.agent
    state.parts = [agent.register_memory([(*at(state.side.base, [part])[0], "")], "DRAM") for part in ranges]
    return [agent.get_partial_agent_metadata(part, True) for part in state.parts]


def register_more(state, size: int, seed: int) -> int:
    """One more buffer of the peer; gives its address back."""
    state.more = pattern(seed, size)
    state.side.agent.register_memory([(state.more.ctypes.data, size, 0, "")], "DRAM")
    return state.more.ctypes.data


def load_broken_metadata(state, metadata: bytes, name: str) -> None:
    """Cut short at every length, and altered at every place that is the backend's to read."""
    state.side = Side("broken", PAGE)
    for length in range(0, len(metadata)):
        load_and_forget(state.side, metadata[:length], name)
    for place in places_of_the_backend(metadata):
        altered = bytearray(metadata)
        altered[place] ^= 1 << (place % 8)
        load_and_forget(state.side, bytes(altered), name)
    for seed in range(50):
        load_and_forget(state.side, pattern(seed, 200).tobytes(), name)


def places_of_the_backend(metadata: bytes) -> list[int]:
    """Where the connection info and the descriptor of the one region are. What lies around them is NIXL's own framing, and
    NIXL itself crashes on some values there, before it asks any backend."""
    connection = metadata.index(BACKEND.encode() + b"|c") + len(BACKEND) + 2
    # An element without a tag: address, length and device, eight bytes each, and the backend's own descriptor.
    region = metadata.rindex(b"|", 0, metadata.rindex(b"CLRD") - 31) + 1
    places: list[int] = []
    for field, own in ((connection, 0), (region, 24)):
        length = int.from_bytes(metadata[field : field + 8], "little")
        places.extend(range(field + 8 + own, field + 8 + length))
    assert len(places) > 100
    return places


def load_and_forget(side: Side, metadata: bytes, name: str) -> None:
    """Refused or taken, under the true name or another, it leaves nothing behind."""
    try:
        taken_name = side.agent.add_remote_agent(metadata)
    except Exception:  # noqa: BLE001 - NIXL itself answers with many kinds
        taken_name = name
    forget(side, name)
    forget(side, taken_name)


def forget(side: Side, name: str | bytes) -> None:
    """A name that is no text cannot be removed through Python: NIXL loads it and takes only text back."""
    try:
        side.agent.remove_remote_agent(name.decode() if isinstance(name, bytes) else name)
    except (UnicodeDecodeError, _bindings.nixlNotFoundError):
        pass


def use_altered_metadata(state, metadata: bytes, name: str, base: int, seed: int) -> None:
    """A read from every peer that altered metadata may describe."""
    state.side = Side("doubter", PAGE, options={"connect_timeout_ms": "300"} if BACKEND == "CORELANE" else {})
    for place in places_of_the_backend(metadata)[::3]:
        altered = bytearray(metadata)
        altered[place] ^= 0x11
        state.side.buffer[:] = 0
        try:
            state.side.agent.add_remote_agent(bytes(altered))
            state.side.run("READ", [(0, PAGE)], base, [(0, PAGE)], name)
        except AssertionError:
            raise
        except Exception:  # noqa: BLE001 - refused at any step
            pass
        else:
            assert_bytes(state.side.buffer, pattern(seed, PAGE))
        load_and_forget(state.side, bytes(altered), name)


def read_page(state, metadata: bytes, name: str, base: int) -> bytes:
    """A whole transfer with the true peer."""
    state.side.agent.add_remote_agent(metadata)
    wait_until(lambda: state.side.agent.check_remote_metadata(name), "the metadata of the peer")
    state.side.run("READ", [(0, PAGE)], base, [(0, PAGE)], name)
    return state.side.buffer.tobytes()
