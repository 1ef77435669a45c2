"""The prefill process."""

import json
import os
import selectors
import socket
import sys
import time

from . import Failure, now_ns
from .model import prefill
from .worker import Worker, receive_json, send_json


class Prefill(Worker):
    """Computes prompts, and keeps the blocks of each until a notification says that they have been fetched."""

    def __init__(self, options, messages_out):
        super().__init__(options, messages_out)
        self.lent = {}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.peers = {}

    def run(self):
        self.send(ready=os.getpid())
        while True:
            # While blocks are lent a notification can come at any time, and NIXL has no descriptor to wait for it.
            for key, _ in self.selector.select(0 if self.lent else 0.2):
                if key.fileobj is sys.stdin:
                    jobs = self.receive()
                    if jobs is None:
                        return self.send(free_blocks=len(self.cache.free), of=self.cache.count)
                    for job in jobs:
                        self.serve(**job)
                elif key.fileobj is self.listener:
                    self.greet(self.listener.accept()[0])
                else:
                    self.part_with(key.fileobj)
            self.read_notifications()

    def greet(self, stream):
        stream.settimeout(self.options.timeout)
        hello = receive_json(stream, "decode")
        if self.options.push:
            self.add_peer(hello)
        send_json(stream, self.introduction())
        self.peers[stream] = hello["agent"]
        self.selector.register(stream, selectors.EVENT_READ)

    def part_with(self, stream):
        """A peer says nothing more after its introduction: it has ended. Blocks that wait for it would wait for ever."""
        self.selector.unregister(stream)
        stream.close()
        name = self.peers.pop(stream)
        if self.lent:
            raise Failure(f"{name} has gone before it has fetched {', '.join(self.lent)}")

    def serve(self, request, prompt, corrupt_block=None):
        started_ns = now_ns()
        blocks = prefill(self.model, prompt, self.cache)
        if corrupt_block is not None:
            layer, index = divmod(corrupt_block, len(blocks))
            self.cache.corrupt(layer, blocks[index])
        self.lent[request] = {"blocks": blocks, "since": time.monotonic()}
        ticket = {
            "request": request,
            "blocks": blocks,
            "length": len(prompt) - 1,
            "last_token": prompt[-1],
            "side_channel": self.listener.getsockname(),
        }
        self.send(ticket=ticket, started_ns=started_ns, computed_ns=now_ns())

    def read_notifications(self):
        if not self.lent:
            return
        for peer, notifications in self.agent.get_new_notifs(backends=[self.options.backend]).items():
            for notification in notifications:
                if notification.startswith(b"{"):
                    self.push(peer, json.loads(notification))
                else:
                    self.take_back(notification.decode().split(":")[0], notified_ns=now_ns())
        os.sched_yield()
        oldest = min((loan["since"] for loan in self.lent.values()), default=time.monotonic())
        if time.monotonic() - oldest > self.options.timeout:
            raise Failure(f"nobody has fetched the blocks of {', '.join(self.lent)} within {self.options.timeout} s")

    def push(self, peer, wish):
        request = wish["request"]
        posted_ns, done_ns = self.transfer("WRITE", self.lent[request]["blocks"], peer, wish["blocks"], request)
        self.take_back(request, posted_ns=posted_ns, done_ns=done_ns)

    def take_back(self, request, **times):
        self.cache.give_back(self.lent.pop(request)["blocks"])
        self.send(freed=request, **times)
