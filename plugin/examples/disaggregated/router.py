"""The router: starts both processes, sends them requests, and makes the run in one process that theirs must equal."""

import json
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from . import Failure, now_ns, report
from .arrays import choose
from .model import VOCABULARY, PagedCache, Transformer, blocks_for, decode, prefill

PROGRAM = Path(__file__).resolve().parents[1] / "disaggregated_decode.py"


class Process:
    """A worker as the router sees it."""

    def __init__(self, role, arguments):
        self.role = role
        command = [sys.executable, str(PROGRAM), "--role", role, *arguments]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.messages = queue.Queue()
        self.error = None
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.child.stdout:
            message = json.loads(line)
            self.error = message.get("error", self.error)
            self.messages.put(message)
        self.messages.put(None)

    def send(self, **message):
        try:
            self.child.stdin.write(json.dumps(message) + "\n")
            self.child.stdin.flush()
        except OSError:
            raise Failure(self.epitaph()) from None

    def receive(self, key, timeout_s):
        try:
            message = self.messages.get(timeout=timeout_s)
        except queue.Empty:
            raise Failure(f"{self.role}: no answer within {timeout_s} s") from None
        if message is None or key not in message:
            raise Failure(self.epitaph())
        return message

    def epitaph(self):
        if self.error is None:
            try:
                status = self.child.wait(5)
            except subprocess.TimeoutExpired:
                return f"{self.role}: has closed its pipes"
            if self.error is None:
                how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return f"{self.role}: {how}"
        return f"{self.role}: {self.error}"

    def finish(self, timeout_s):
        """Asks the worker to end by closing its stdin; makes it end when it does not."""
        try:
            self.child.stdin.close()
        except OSError:
            pass
        try:
            self.child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.error = self.error or "did not end by itself, and was stopped"
            self.child.kill()
            self.child.wait()


def run_router(options):
    workers = []
    try:
        # Whether that can be had at all.
        where = choose(options.device).name
        workers += [Process(role, worker_arguments(options)) for role in ("prefill", "decode")]
        # NIXL takes its time to load; as long again for a busy machine.
        pids = [worker.receive("ready", 60 + options.timeout)["ready"] for worker in workers]
        report.print_start(options, pids, where)
        return serve_requests(options, *workers)
    except (Failure, KeyboardInterrupt) as failure:
        # The other side notices by itself; what it has to say belongs to the story.
        told = [str(failure) or "interrupted"]
        for worker in workers:
            worker.finish(options.timeout + 5)
            if worker.child.returncode:
                told.append(worker.epitaph())
        # What both have to say (no such backend) is said once.
        sentences = {line.removeprefix("prefill: ").removeprefix("decode: "): line for line in reversed(told)}
        print(*reversed(sentences.values()), sep="\n", file=sys.stderr)
        return 1
    finally:
        for worker in workers:
            worker.finish(0)


def worker_arguments(options):
    names = ("layers", "seed", "backend", "prompt_tokens", "decode_tokens", "timeout", "device")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    return arguments + ["--push"] * options.push


def serve_requests(options, prefill_worker, decode_worker):
    prompts = np.random.default_rng([options.seed, 1])
    records = []
    for number in range(options.requests):
        prompt = prompts.integers(VOCABULARY, size=options.prompt_tokens).tolist()
        corrupt_block = options.corrupt_block if number == 0 else None
        record = serve_request(options, prefill_worker, decode_worker, f"request-{number + 1}", prompt, corrupt_block)
        record["expected"] = single_process_run(options, prompt)
        record["must_differ"] = corrupt_block is not None
        records.append(record)
        report.print_request(options, number, record)
    summary = {}
    for worker, key in ((decode_worker, "positions_computed"), (prefill_worker, "free_blocks")):
        worker.child.stdin.close()
        summary |= worker.receive(key, options.timeout)
        worker.finish(options.timeout)
        if worker.child.returncode:
            raise Failure(worker.epitaph())
    return report.print_end(options, records, summary)


def serve_request(options, prefill_worker, decode_worker, request, prompt, corrupt_block):
    times = {"arrived_ns": now_ns()}
    prefill_worker.send(request=request, prompt=prompt, corrupt_block=corrupt_block)
    patience_s = 3 * options.timeout
    answer = prefill_worker.receive("ticket", patience_s)
    decode_worker.send(ticket=answer["ticket"], tokens=options.decode_tokens)
    result = decode_worker.receive("tokens", patience_s)
    freed = prefill_worker.receive("freed", patience_s)
    for message in (answer, result, freed):
        times.update((key, value) for key, value in message.items() if key.endswith("_ns"))
    return {"tokens": result["tokens"], "from": answer["ticket"]["blocks"], "to": result["blocks"], "times": times}


def single_process_run(options, prompt):
    """The tokens of the same model, prompt and cache without any transfer."""
    arrays = choose(options.device)
    model = Transformer(options.layers, options.seed, arrays)
    block_ids = range(2 * blocks_for(len(prompt) + options.decode_tokens))
    cache = PagedCache(options.layers, block_ids, options.seed, arrays)
    blocks = prefill(model, prompt, cache)
    length = len(prompt) - 1
    blocks += cache.take(blocks_for(length + options.decode_tokens) - len(blocks))
    return decode(model, prompt[-1], length, options.decode_tokens, cache, blocks)
