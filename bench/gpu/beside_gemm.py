#!/usr/bin/env python3
"""What a model on the GPUs and transfers between them take from each other.

Two processes, each with a GPU, as prefill and decode have them. In both, one thread keeps the GPU busy with matrix products
(bf16, torch) for as long as a phase lasts; this process transfers between the two through NIXL at the same time. Each case is
looked at three times in a row: products alone, transfers alone, both together. The ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time

os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
os.environ.setdefault("CORELANE_LOG_LEVEL", "warn")

try:
    import torch
    from nixl._api import nixl_agent, nixl_agent_config
except ImportError as missing:
    sys.exit(f"beside_gemm.py: {missing}: it needs torch and nixl in this Python")

KIB, MIB = 1 << 10, 1 << 20
CASES = {"4096x4KiB": (4096, 4 * KIB), "256x16KiB": (256, 16 * KIB), "1x64MiB": (1, 64 * MIB)}
SPREAD = 3
"""Every third block is used, so that none is beside another and the two sides do not go in step."""


class Products:
    """Matrix products on one GPU, launched by a thread as a graph of some 20 ms, as models are: two are always queued, so that the
    GPU never waits for the thread, which the one that transfers keeps from running Python.
    """

    def __init__(self, gpu: int, size: int):
        self.gpu, self.flops = gpu, 2 * size**3
        torch.cuda.set_device(gpu)
        self.a, self.b = (torch.randn(size, size, device=f"cuda:{gpu}", dtype=torch.bfloat16) for _ in range(2))
        self.c = torch.empty_like(self.a)
        self.multiply(20).synchronize()
        begin = time.perf_counter()
        self.multiply(20).synchronize()
        self.count = max(1, int(0.02 / ((time.perf_counter() - begin) / 20)))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.multiply(self.count)
        self.goes_on, self.rate = threading.Event(), 0.0

    def multiply(self, count: int):
        for _ in range(count):
            torch.matmul(self.a, self.b, out=self.c)
        return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream().record_event()

    def launch(self):
        self.graph.replay()
        return torch.cuda.current_stream().record_event()

    def run(self):
        torch.cuda.set_device(self.gpu)
        self.launch().synchronize()
        queued, begin, done = [self.launch(), self.launch()], time.perf_counter(), 0
        while self.goes_on.is_set():
            queued.pop(0).synchronize()
            done += self.count
            now = time.perf_counter()
            queued.append(self.launch())
        self.rate = self.flops * done / (now - begin) / 1e12
        queued[-1].synchronize()

    def begin(self):
        self.goes_on.set()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def end(self) -> float:
        """Their rate in TFLOP/s."""
        self.goes_on.clear()
        self.thread.join()
        return self.rate


class Side:
    """One process's GPU: what it computes, and the memory that is transferred."""

    def __init__(self, name: str, gpu: int, options):
        self.gpu = gpu
        self.products = Products(gpu, options.matrix)
        bytes_ = max(SPREAD * count * size for count, size in CASES.values())
        self.memory = torch.zeros(bytes_, dtype=torch.uint8, device=f"cuda:{gpu}")
        torch.cuda.synchronize()
        self.agent = nixl_agent(name, nixl_agent_config(backends=[options.backend]))
        self.agent.register_memory(self.memory)


class Target:
    """The other process."""

    def __init__(self, options):
        command = [sys.executable, os.path.abspath(__file__), "--role", "target", *sys.argv[1:]]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"beside_gemm.py: the target process has ended (status {self.process.wait()})")
        return json.loads(line)


def serve(options):
    """The target's part: products when told to. Its memory is read and written without its doing."""
    side = Side("target", options.gpus[1], options)
    say = lambda what: print(json.dumps(what), flush=True)
    say({"metadata": side.agent.get_agent_metadata().hex(), "base": side.memory.data_ptr()})
    for line in sys.stdin:
        if line.strip() == "begin":
            side.products.begin()
            say(True)
        else:
            say(side.products.end())


def prepare(side: Side, name: str, target: dict, operation: str, case: str, options):
    count, size = CASES[case]
    far = [(target["base"] + (count - 1 - at) * SPREAD * size, size, options.gpus[1]) for at in range(count)]
    near = [(side.memory.data_ptr() + at * SPREAD * size, size, side.gpu) for at in range(count)]
    agent = side.agent
    return agent.initialize_xfer(operation, agent.get_xfer_descs(near, "VRAM"), agent.get_xfer_descs(far, "VRAM"), name, b"")


def transfer_for(seconds: float, agent, handle) -> list[float]:
    """One transfer after another: how long each took, in seconds."""
    took, end = [], time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            sys.exit(f"beside_gemm.py: a transfer has ended with {state}")
        took.append(time.perf_counter() - begin)
    return took


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def look(side: Side, target: Target, handle, seconds: float) -> dict:
    """Products alone, transfers alone, both."""
    products = side.products

    def computing(meanwhile):
        target.ask("begin")
        products.begin()
        result = meanwhile()
        return (products.end(), target.ask("end")), result

    alone, _ = computing(lambda: time.sleep(seconds))
    quiet = transfer_for(seconds, side.agent, handle)
    beside, loaded = computing(lambda: transfer_for(seconds, side.agent, handle))
    return {"alone": alone, "beside": beside, "quiet": quiet, "loaded": loaded}


def show(operation: str, case: str, rounds: list[dict]):
    count, size = CASES[case]
    median = lambda of: statistics.median(of(one) for one in rounds)
    row = f"{operation:<6}{case:<10}"
    for gpu in range(2):
        was, then = (median(lambda one: one[key][gpu]) for key in ("alone", "beside"))
        kept = median(lambda one: one["beside"][gpu] / one["alone"][gpu])
        row += f"{was:9.0f}{then:8.0f}{kept:7.1%}"
    gigabytes = lambda key: median(lambda one: count * size * len(one[key]) / sum(one[key]) / 1e9)
    row += f"{gigabytes('quiet'):10.1f}{gigabytes('loaded'):8.1f}{gigabytes('loaded') / gigabytes('quiet'):7.1%}"
    for share in (0.5, 0.99):
        for key in ("quiet", "loaded"):
            row += f"{median(lambda one: percentile(one[key], share)) * 1e6:9.1f}"
    print(row, flush=True)


def measure(options):
    target = Target(options)
    side = Side("initiator", options.gpus[0], options)
    told = target.answer()
    name = side.agent.add_remote_agent(bytes.fromhex(told["metadata"]))
    print(f"backend {options.backend}; GPU {options.gpus[0]} (initiator) and {options.gpus[1]} (target): {torch.cuda.get_device_name()}")
    print(f"products of {options.matrix} x {options.matrix}, {options.rounds} rounds of {options.seconds} s\n")
    print(f"{'':16}{'initiator, TFLOP/s':>24}{'target, TFLOP/s':>24}{'transfers, GB/s':>25}{'p50, us':>18}{'p99, us':>18}")
    print(f"{'':16}" + 3 * f"{'alone':>9}{'beside':>8}{'kept':>7}" + 2 * f"{'alone':>10}{'beside':>8}")
    for operation in options.operation:
        for case in options.cases:
            handle = prepare(side, name, told, operation, case, options)
            transfer_for(0.2, side.agent, handle)
            show(operation, case, [look(side, target, handle, options.seconds) for _ in range(options.rounds)])
            side.agent.release_xfer_handle(handle)
    target.process.stdin.close()
    target.process.wait()


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--backend", default="CORELANE", metavar="NAME", help="NIXL backend (default %(default)s)")
    add("--gpus", type=two_gpus, default="0,1", metavar="A,B", help="of initiator and target (default %(default)s)")
    add("--operation", type=some_of(["READ", "WRITE"]), default="READ,WRITE", help="default %(default)s")
    add("--cases", type=some_of(CASES), default=",".join(CASES), help="blocks x bytes, of %(default)s")
    add("--matrix", type=int, default=8192, metavar="N", help="rows and columns of the matrices (default %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="default %(default)s")
    add("--seconds", type=float, default=1.0, metavar="S", help="of each of the three looks of a round (default %(default)s)")
    add("--role", choices=("initiator", "target"), default="initiator", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.matrix, options.rounds, options.seconds) <= 0:
        parser.error("--matrix, --rounds and --seconds must be above zero")
    if not torch.cuda.is_available() or max(options.gpus) >= torch.cuda.device_count():
        parser.error(f"--gpus {options.gpus[0]},{options.gpus[1]}: torch sees {torch.cuda.device_count()} GPUs here")
    return options


def two_gpus(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError("two numbers, as 0,1")
    return int(parts[0]), int(parts[1])


def some_of(known):
    def chosen(text: str) -> list[str]:
        unknown = [one for one in text.split(",") if one not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return text.split(",")

    return chosen


if __name__ == "__main__":
    options = parse_options()
    serve(options) if options.role == "target" else measure(options)
