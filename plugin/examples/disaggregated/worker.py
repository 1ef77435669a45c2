"""What the processes of prefill and decode have in common: a model, a cache registered with NIXL, messages."""

import base64
import json
import os
import selectors
import sys
import time
import traceback

from . import Failure, now_ns
from .arrays import choose
from .model import BLOCK_BYTES, PagedCache, Transformer, block_descriptors, blocks_for, descriptor_indices


class Worker:
    """What prefill and decode have in common: the model, the cache registered with NIXL, messages with the router."""

    def __init__(self, options, messages_out):
        self.options = options
        self.messages_out = messages_out
        # The two roles on two GPUs where there are several.
        arrays = choose(options.device, 1 if options.role == "decode" else 0)
        self.model = Transformer(options.layers, options.seed, arrays)
        count = 4 * blocks_for(options.prompt_tokens + options.decode_tokens)
        # The decode side has other block numbers, as it would have by chance: nothing may depend on their being equal.
        first_block = count if options.role == "decode" else 0
        block_ids = range(first_block, first_block + count)
        self.cache = PagedCache(options.layers, block_ids, options.seed + first_block, arrays)
        self.name = f"{options.role}-{os.getpid()}"
        self.agent = create_agent(self.name, options.backend)
        region = [(self.cache.address(), self.cache.bytes, arrays.device, "")]
        self.registration = self.agent.register_memory(region, arrays.kind, backends=[options.backend])
        # Prepared once for all transfers; each of them then names rows of this list.
        self.local_list = self.prepare_list("NIXL_INIT_AGENT", self.cache.descriptors(), arrays.kind)
        self.remote_lists = {}
        self.remote_caches = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        self.unread = b""

    def receive(self):
        """The messages on stdin, where something can be read; nothing at its end."""
        chunk = os.read(sys.stdin.fileno(), 1 << 16)
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        return [json.loads(line) for line in lines] if chunk else None

    def send(self, **message):
        self.messages_out.write(json.dumps(message) + "\n")
        self.messages_out.flush()

    def prepare_list(self, agent_name, descriptors, kind):
        return self.agent.prep_xfer_dlist(agent_name, descriptors, kind, backends=[self.options.backend])

    def introduction(self):
        """What a peer must know: the metadata of the agent, and where the blocks lie."""
        return {
            "agent": self.name,
            "metadata": base64.b64encode(self.agent.get_agent_metadata()).decode(),
            "kind": self.cache.arrays.kind,
            "device": self.cache.arrays.device,
            "address": self.cache.address(),
            "layers": self.cache.layers,
            "blocks": self.cache.count,
            "block_bytes": BLOCK_BYTES,
        }

    def add_peer(self, introduction):
        if (introduction["layers"], introduction["block_bytes"]) != (self.cache.layers, BLOCK_BYTES):
            raise Failure(f"the cache of {introduction['agent']} has another shape")
        name = self.agent.add_remote_agent(base64.b64decode(introduction["metadata"]))
        name = name.decode() if isinstance(name, bytes) else name
        where = [introduction[key] for key in ("address", "layers", "blocks", "device")]
        self.remote_lists[name] = self.prepare_list(name, block_descriptors(*where), introduction["kind"])
        self.remote_caches[name] = introduction
        return name

    def transfer(self, operation, local_blocks, peer, remote_blocks, request):
        """Moves all layers of these blocks, and then notifies the peer; returns when it began and when it was done."""
        layers = self.cache.layers
        prepared = self.agent.make_prepped_xfer(
            operation,
            self.local_list,
            descriptor_indices(local_blocks, layers, self.cache.count),
            self.remote_lists[peer],
            descriptor_indices(remote_blocks, layers, self.remote_caches[peer]["blocks"]),
            done_notification(request),
            backends=[self.options.backend],
        )
        what = f"the {operation} of {request} with {peer}"
        posted_ns = now_ns()
        try:
            state = self.agent.transfer(prepared)
            if state == "PROC":
                wait_until(what, lambda: self.agent.check_xfer_state(prepared) != "PROC", self.options.timeout)
                state = self.agent.check_xfer_state(prepared)
        except Exception as error:  # NIXL raises a class of its own for each status.
            raise error if isinstance(error, Failure) else Failure(f"{what} failed: {error}") from error
        if state != "DONE":
            raise Failure(f"{what} failed")
        done_ns = now_ns()
        self.agent.release_xfer_handle(prepared)
        return posted_ns, done_ns

    def close(self):
        for prepared in [self.local_list, *self.remote_lists.values()]:
            self.agent.release_dlist_handle(prepared)
        for name in self.remote_lists:
            self.agent.remove_remote_agent(name)
        self.agent.deregister_memory(self.registration, backends=[self.options.backend])
        self.agent = None


def done_notification(request):
    """As vLLM writes it: the request, and how many consumers its blocks have."""
    return f"{request}:1".encode()


def create_agent(name, backend):
    try:
        from nixl._api import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise Failure(f"{sys.executable} cannot import NIXL ({error}): {sys.executable} -m pip install nixl") from error
    agent = nixl_agent(name, nixl_agent_config(backends=[]))
    if backend not in agent.get_plugin_list():
        visible = "it has " + ", ".join(agent.get_plugin_list())
        how = "run plugin/install.sh for this Python" if backend == "CORELANE" else visible
        raise Failure(f"the NIXL of {sys.executable} has no backend {backend}: {how}")
    try:
        agent.create_backend(backend)
    except Exception as error:
        raise Failure(f"NIXL could not create a backend {backend} ({error}): its reason is on stderr") from error
    return agent


def wait_until(what, condition, timeout_s):
    """Asks again and again, at first without sleeping: what is waited for here usually takes less than a millisecond."""
    started_ns = now_ns()
    while not condition():
        waited_ns = now_ns() - started_ns
        if waited_ns > timeout_s * 1e9:
            raise Failure(f"{what} did not end within {timeout_s} s")
        if waited_ns < 20e6:
            os.sched_yield()
        else:
            time.sleep(0.0005)


def send_json(stream, message):
    stream.sendall(json.dumps(message).encode() + b"\n")


def receive_json(stream, who):
    # Nothing follows the line, so nothing is lost with the buffer.
    with stream.makefile("rb") as lines:
        line = lines.readline()
    if not line.endswith(b"\n"):
        raise Failure(f"{who} has closed the side channel")
    return json.loads(line)


def run_worker(worker_class, options):
    """A worker speaks JSON lines on stdin and stdout; whatever else is printed goes to stderr."""
    messages_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = 0
    try:
        worker = worker_class(options, messages_out)
        worker.run()
        worker.close()
    except (Failure, KeyboardInterrupt) as failure:
        status = report_failure(messages_out, str(failure) or "interrupted")
    except Exception as error:
        if not type(error).__name__.startswith("nixl"):
            traceback.print_exc()
        status = report_failure(messages_out, f"{error} ({type(error).__name__})")
    if options.backend == "UCX" or status:
        # A process that has made a UCX backend crashes in a destructor of one of its libraries.
        os._exit(status)


def report_failure(messages_out, text):
    try:
        messages_out.write(json.dumps({"error": text}) + "\n")
        messages_out.flush()
    except OSError:
        print(text, file=sys.stderr, flush=True)
    return 1
