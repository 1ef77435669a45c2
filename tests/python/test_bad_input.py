"""Bad input is an error of its own kind, moves nothing, and leaves the agent as usable as before."""

from __future__ import annotations

import subprocess
import sys

import pytest
from nixl import _bindings

from harness.peers import take_notifications
from harness.remote import TESTS_DIRECTORY
from harness.sides import BACKEND, TCP, assert_bytes, at

PAGE = 4096


@pytest.fixture
def pair(make_side, make_any_peer):
    """Both with two pages, and afterwards proof that nothing moved and that both still work."""
    peer = make_any_peer("prefill", 2 * PAGE, seed=1)
    side = make_side("decode", 2 * PAGE, seed=2)
    side.agent.add_remote_agent(peer.metadata)
    before = side.buffer.copy()
    yield side, peer
    assert_bytes(side.buffer, before)
    assert_bytes(peer.bytes(), peer.original())
    side.run("READ", [(0, 2 * PAGE)], peer.base, [(0, 2 * PAGE)], peer.name, b"works")
    assert_bytes(side.buffer, peer.original())
    assert peer.call(take_notifications, 1) == [(side.name, b"works")]


@pytest.mark.versions
@pytest.mark.parametrize("operation", ["READ", "WRITE"])
@pytest.mark.parametrize(
    ("offset", "length"), [(PAGE, PAGE + 1), (2 * PAGE, 1), (-1, 10), (0, 1 << 40)], ids=["over", "after", "before", "huge"]
)
def test_outside_of_the_remote_registration(pair, operation, offset, length):
    side, peer = pair
    with pytest.raises(Exception, match="NIXL_ERR_(NOT_FOUND|INVALID_PARAM)"):
        side.prepare(operation, [(0, length)], peer.base, [(offset, length)], peer.name)


@pytest.mark.versions
def test_outside_of_the_local_registration(pair):
    side, peer = pair
    with pytest.raises(Exception, match="NIXL_ERR_(NOT_FOUND|INVALID_PARAM)"):
        side.prepare("READ", [(PAGE, PAGE + 1)], peer.base, [(0, PAGE + 1)], peer.name)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("local", "remote"),
    [([(0, 100)], [(0, 101)]), ([(0, 100)], [(0, 50), (50, 50)]), ([(0, 50), (50, 50)], [(0, 100)])],
    ids=["lengths", "one to two", "two to one"],
)
def test_lists_that_do_not_match(pair, local, remote):
    side, peer = pair
    with pytest.raises(_bindings.nixlInvalidParamError):
        side.prepare("READ", local, peer.base, remote, peer.name)


def test_an_unknown_agent(pair):
    side, peer = pair
    with pytest.raises(_bindings.nixlNotFoundError):
        side.prepare("READ", [(0, 100)], peer.base, [(0, 100)], "whom nobody has added")
    with pytest.raises(_bindings.nixlNotFoundError):
        side.agent.prep_xfer_dlist("whom nobody has added", at(peer.base, [(0, 100)]), "DRAM")


def test_indices_outside_of_a_prepared_list(pair):
    side, peer = pair
    local = side.agent.prep_xfer_dlist("NIXL_INIT_AGENT", at(side.base, [(0, 100), (200, 100)]), "DRAM")
    remote = side.agent.prep_xfer_dlist(peer.name, at(peer.base, [(0, 100), (200, 100)]), "DRAM")
    for mine, theirs in (([2], [0]), ([0], [-1]), ([0, 1], [1]), ([], [])):
        with pytest.raises(_bindings.nixlInvalidParamError):
            side.agent.make_prepped_xfer("READ", local, mine, remote, theirs)
    side.agent.release_dlist_handle(local)
    side.agent.release_dlist_handle(remote)


def test_a_transfer_posted_while_it_runs(make_side, make_peer):
    length = 32 << 20
    peer = make_peer("prefill", length, seed=3)
    side = make_side("decode", length, options=TCP)
    side.agent.add_remote_agent(peer.metadata)
    side.run("READ", [(0, 1)], peer.base, [(0, 1)], peer.name)
    peer.remote.stop()
    handle = side.start("READ", [(0, length)], peer.base, [(0, length)], peer.name)

    with pytest.raises(_bindings.nixlRepostActiveError):
        side.agent.transfer(handle)
    peer.remote.resume()
    side.wait(handle)

    side.agent.release_xfer_handle(handle)
    assert_bytes(side.buffer, peer.original())


def test_memory_that_is_no_dram_is_refused(make_side):
    side = make_side()
    with pytest.raises(Exception, match="NIXL_ERR_"):
        side.agent.register_memory([(side.base, 4096, 0, "")], "VRAM", backends=[BACKEND])


@pytest.mark.versions
def test_a_second_backend_of_the_same_name_is_refused(make_side, make_peer):
    side = make_side("decode", PAGE)
    with pytest.raises(Exception, match="NIXL_ERR_"):
        side.agent.create_backend(BACKEND, {})
    peer = make_peer("prefill", PAGE, seed=4)
    side.agent.add_remote_agent(peer.metadata)


def test_any_device_number_is_taken_for_dram(make_side, make_any_peer):
    """vLLM numbers DRAM descriptors by the worker's device."""
    peer = make_any_peer("prefill", PAGE, seed=5)
    side = make_side("decode", PAGE)
    peer.call(register_for_device, 3)
    registered = side.agent.register_memory([(side.base, PAGE, 5, "")], "DRAM")
    side.agent.add_remote_agent(peer.call(metadata_now))
    ours = side.agent.get_xfer_descs([(side.base, PAGE, 5)], "DRAM")
    theirs = side.agent.get_xfer_descs([(peer.base, PAGE, 3)], "DRAM")

    handle = side.agent.initialize_xfer("READ", ours, theirs, peer.name)
    side.agent.transfer(handle)
    side.wait(handle)
    side.agent.release_xfer_handle(handle)

    assert_bytes(side.buffer, peer.original())
    side.agent.deregister_memory(registered)


def test_the_reason_is_logged_once():
    """The status alone says little: standard error has one line that says what was wrong."""
    program = """
from harness.sides import Side
left, right = Side("left", 4096), Side("right", 4096)
metadata = right.metadata()
right.agent.deregister_memory(right.registration)
left.agent.add_remote_agent(metadata)
try:
    left.run("READ", [(0, 100)], right.base, [(0, 100)], "right")
except Exception as error:
    assert "NIXL_ERR_NOT_ALLOWED" in str(error), error
else:
    raise SystemExit("the read of deregistered memory was no error")
right.registration = right.agent.register_memory([(right.base, 4096, 0, "")], "DRAM")
left.close(), right.close()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=TESTS_DIRECTORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stderr.splitlines() if "corelane" in line and ("WARN" in line or "ERROR" in line)]
    assert len(told) == 1, result.stderr


# --- what runs in other processes


def register_for_device(state, device: int) -> None:
    """The whole buffer once more, under another device number."""
    side = state.side
    state.more = side.agent.register_memory([(side.base, side.buffer.size, device, "")], "DRAM")


def metadata_now(state) -> bytes:
    """With what was registered since."""
    return state.side.metadata()
