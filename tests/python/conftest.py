"""Fixtures: sides in this process, peers in this or another, all ended after the test, whatever became of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from harness.peers import Peer
from harness.remote import Remote
from harness.sides import BACKEND, Side

_numbers = itertools.count()


@pytest.fixture
def unique() -> Callable[[str], str]:
    """Agent names that no other test has used."""
    return lambda role: f"{role}-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def make_side(unique) -> Iterator[Callable[..., Side]]:
    """Makes sides in this process."""
    made: list[Side] = []

    def make(role: str = "local", *arguments, **keywords) -> Side:
        made.append(Side(unique(role), *arguments, **keywords))
        return made[-1]

    yield make
    for side in reversed(made):
        side.close()


@pytest.fixture
def make_process() -> Iterator[Callable[..., Remote]]:
    """Starts processes that run functions."""
    made: list[Remote] = []

    def make(*arguments, **keywords) -> Remote:
        made.append(Remote(*arguments, **keywords))
        return made[-1]

    yield make
    for process in reversed(made):
        process.close()


@pytest.fixture
def make_peer(unique, make_process) -> Callable[..., Peer]:
    """Makes peers, each in a process of its own."""
    return lambda role="remote", *arguments, **keywords: Peer(make_process()).open(unique(role), *arguments, **keywords)


@pytest.fixture(params=["same process", "two processes"])
def make_any_peer(request, unique, make_process) -> Iterator[Callable[..., Peer]]:
    """Makes peers: a test that takes this runs with the peer here and with the peer in another process."""
    made: list[Peer] = []

    def make(role: str = "remote", *arguments, **keywords) -> Peer:
        peer = Peer(None if request.param == "same process" else make_process())
        made.append(peer)
        return peer.open(unique(role), *arguments, **keywords)

    yield make
    for peer in reversed(made):
        peer.close()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """The wheel's UCX crashes on the way out of any process that used it."""
    if BACKEND == "UCX":
        import sys

        sys.stdout.flush()
        os._exit(pytest_status[0])


pytest_status = [1]


def pytest_sessionfinish(exitstatus: int) -> None:
    """For the way out above."""
    pytest_status[0] = int(exitstatus)
