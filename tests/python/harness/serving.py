"""A decode worker in the shape of vLLM's connector: three threads that call one agent at once, with no lock around it.

The handshaker adds agents and prepares block lists; the mover posts transfers, reads notifications and sends heartbeats;
the poller asks for the state of what is in flight, for its telemetry, and releases it. The prefill side's blocks never
change, so every block that arrives is compared.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from harness.sides import Side, at, pattern
from harness.waiting import PATIENCE_SECONDS

BLOCK = 1024
BLOCKS = 2048
PER_REQUEST = 16
IN_FLIGHT = 32
HEARTBEAT_EVERY = 10


@dataclass
class Prefill:
    """What the worker is told about one prefill agent."""

    name: str
    metadata: bytes
    base: int
    seed: int
    blocks: int = BLOCKS


@dataclass
class Ready:
    """A prefill agent after the handshake."""

    prefill: Prefill
    handle: object
    source: np.ndarray


@dataclass
class Request:
    """One transfer in flight."""

    number: int
    handle: object
    mine: np.ndarray
    expected: np.ndarray


@dataclass
class Worker:
    """Runs `requests` reads from the given prefill agents. `run` returns when the last is compared and released."""

    side: Side
    prefills: list[Prefill]
    requests: int
    errors: list[BaseException] = field(default_factory=list)
    sent: dict[str, list[bytes]] = field(default_factory=dict)
    taken: list[tuple[str, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = self.side.buffer.reshape(-1, BLOCK)
        self.to_shake: queue.SimpleQueue[Prefill | None] = queue.SimpleQueue()
        self.ready: list[Ready] = []
        self.in_flight: deque[Request] = deque()
        self.free = deque(range(len(self.blocks)))
        self.finished = 0
        self.over = threading.Event()
        self.random = np.random.default_rng(99)
        self.local = self.side.agent.prep_xfer_dlist("NIXL_INIT_AGENT", whole(self.side.base, len(self.blocks)), "DRAM")

    def run(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Fails with the first error of any thread."""
        threads = [
            threading.Thread(target=self.guarded, args=(part,), name=part.__name__, daemon=True)
            for part in (self.shake_hands, self.move, self.poll)
        ]
        for thread in threads:
            thread.start()
        for prefill in self.prefills:
            self.to_shake.put(prefill)
        in_time = self.over.wait(seconds)
        self.over.set()
        self.to_shake.put(None)
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert not any(thread.is_alive() for thread in threads), "a thread hangs in a call"
        if self.errors:
            raise self.errors[0]
        assert in_time, f"{self.finished} of {self.requests} requests within {seconds:.0f} s"
        for ready in self.ready:
            self.side.agent.release_dlist_handle(ready.handle)
        self.side.agent.release_dlist_handle(self.local)

    def guarded(self, part) -> None:
        """What any thread raises ends all of them."""
        try:
            part()
        except BaseException as error:  # noqa: BLE001 - handed to who called `run`
            self.errors.append(error)
            self.over.set()

    def shake_hands(self) -> None:
        """Adds agents while others are in use, and goes on preparing lists for them afterwards."""
        agent = self.side.agent
        while (prefill := self.to_shake.get()) is not None:
            name = agent.add_remote_agent(prefill.metadata)
            assert name in (prefill.name, prefill.name.encode())
            handle = agent.prep_xfer_dlist(prefill.name, whole(prefill.base, prefill.blocks), "DRAM")
            source = pattern(prefill.seed, prefill.blocks * BLOCK).reshape(-1, BLOCK)
            self.ready.append(Ready(prefill, handle, source))
        # Other work of this thread under the others' traffic.
        assert all(agent.check_remote_metadata(prefill.name) for prefill in self.prefills)

    def move(self) -> None:
        """Starts one request after the other."""
        agent, started = self.side.agent, 0
        while not self.over.is_set():
            self.take_notifications()
            if not self.ready or started == self.requests or len(self.in_flight) >= IN_FLIGHT:
                time.sleep(0.0005)
                continue
            ready = self.ready[started % len(self.ready)]
            mine = np.array([self.free.popleft() for _ in range(PER_REQUEST)], dtype=np.int32)
            theirs = self.random.choice(ready.prefill.blocks, PER_REQUEST, replace=False).astype(np.int32)
            message = b"request-%d:1" % started
            handle = agent.make_prepped_xfer("READ", self.local, mine, ready.handle, theirs, message)
            self.sent.setdefault(ready.prefill.name, []).append(message)
            assert agent.transfer(handle) in ("DONE", "PROC")
            self.in_flight.append(Request(started, handle, mine, ready.source[theirs]))
            started += 1
            if started % HEARTBEAT_EVERY == 0:
                message = b"HB:%d" % started
                self.sent[ready.prefill.name].append(message)
                agent.send_notif(ready.prefill.name, message)

    def take_notifications(self) -> None:
        """As the mover does all the time."""
        for sender, messages in self.side.agent.get_new_notifs().items():
            self.taken.extend((sender, message) for message in messages)

    def poll(self) -> None:
        """Asks for the state of all that is in flight, again and again."""
        while not self.over.is_set():
            for _ in range(len(self.in_flight)):
                request = self.in_flight.popleft()
                state = self.side.agent.check_xfer_state(request.handle)
                if state == "PROC":
                    self.in_flight.append(request)
                    continue
                assert state == "DONE", state
                self.finish(request)
            if self.finished == self.requests:
                self.over.set()
            time.sleep(0.0002)

    def finish(self, request: Request) -> None:
        """Compares what came, and gives the blocks back for the next."""
        telemetry = self.side.agent.get_xfer_telemetry(request.handle)
        assert telemetry.totalBytes == PER_REQUEST * BLOCK
        self.side.agent.release_xfer_handle(request.handle)
        wrong = np.flatnonzero((self.blocks[request.mine] != request.expected).any(axis=1))
        assert wrong.size == 0, f"blocks {wrong.tolist()} of request {request.number} are wrong"
        self.blocks[request.mine] = 0
        self.free.extend(request.mine.tolist())
        self.finished += 1


def whole(base: int, blocks: int) -> list[tuple[int, int, int]]:
    """All blocks of a buffer."""
    return at(base, [(index * BLOCK, BLOCK) for index in range(blocks)])


def open_worker_side(name: str, **keywords) -> Side:
    """The worker's agent: as vLLM makes it, with telemetry."""
    return Side(name, IN_FLIGHT * 2 * PER_REQUEST * BLOCK, telemetry=True, **keywords)
