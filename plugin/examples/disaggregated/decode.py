"""The decode process."""

import json
import os
import selectors
import socket
import sys

from . import Failure, now_ns
from .model import blocks_for, decode
from .worker import Worker, done_notification, receive_json, send_json, wait_until


class Decode(Worker):
    """Generates behind prompts that it has not seen: it knows their last token and fetches the blocks of the others."""

    def __init__(self, options, messages_out):
        super().__init__(options, messages_out)
        self.peers = {}
        self.arrived = set()

    def run(self):
        self.send(ready=os.getpid())
        while True:
            readable = [key.fileobj for key, _ in self.selector.select()]
            self.check_peers()
            if sys.stdin in readable:
                jobs = self.receive()
                if jobs is None:
                    return self.send(positions_computed=self.model.positions_computed)
                for job in jobs:
                    self.serve(**job)

    def check_peers(self):
        """A peer that has gone closes the side channel; nothing else ever arrives there."""
        for stream, name in self.peers.values():
            try:
                gone = not stream.recv(1)
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if gone:
                raise Failure(f"{name} has gone: it has closed its side channel")

    def serve(self, ticket, tokens):
        times = {"received_ns": now_ns()}
        peer = self.meet(tuple(ticket["side_channel"]))
        times["met_ns"] = now_ns()
        request, length = ticket["request"], ticket["length"]
        blocks = self.cache.take(blocks_for(length + tokens))
        filled = blocks[: len(ticket["blocks"])]
        if self.options.push:
            self.ask_for_push(peer, request, filled)
            times["notified_ns"] = now_ns()
        else:
            times["posted_ns"], times["done_ns"] = self.transfer("READ", filled, peer, ticket["blocks"], request)
        generated = decode(
            self.model, ticket["last_token"], length, tokens, self.cache, blocks,
            after_first=lambda: times.update(first_token_ns=now_ns()),
        )  # fmt: skip
        self.cache.give_back(blocks)
        self.send(request=request, tokens=generated, blocks=filled, **times)

    def meet(self, address):
        """Fetches the peer's metadata over the side channel, once; NIXL connects with the first transfer."""
        if address in self.peers:
            return self.peers[address][1]
        try:
            stream = socket.create_connection(address, timeout=self.options.timeout)
            send_json(stream, self.introduction())
            hello = receive_json(stream, "prefill")
        except OSError as error:
            raise Failure(f"the prefill process does not answer at {address[0]}:{address[1]} ({error})") from error
        name = self.add_peer(hello)
        stream.setblocking(False)
        self.peers[address] = (stream, name)
        self.selector.register(stream, selectors.EVENT_READ)
        return name

    def ask_for_push(self, peer, request, blocks):
        wish = json.dumps({"request": request, "blocks": blocks}).encode()
        self.agent.send_notif(peer, wish)

        def arrived():
            # A dead writer is not reported to the side that waits: there is no transfer here that could fail.
            self.check_peers()
            for notifications in self.agent.get_new_notifs(backends=[self.options.backend]).values():
                self.arrived.update(notifications)
            return done_notification(request) in self.arrived

        wait_until(f"the WRITE of {request} by {peer}", arrived, self.options.timeout)
