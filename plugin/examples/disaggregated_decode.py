#!/usr/bin/env python3
"""Prefill in one process, decode in another; the KV cache between them moves block by block through NIXL.

Three processes play the parts of a disaggregated inference server:

    router (this process)   sends a prompt to prefill, gets a ticket back, and sends only the ticket to decode
    prefill                 fills blocks of its paged KV cache from the prompt, and keeps them until a notification comes
    decode                  moves these blocks into other blocks of its own cache, and generates from there

The model is a small transformer with random weights: in numpy, or in torch on the GPU (--device), where the two processes
take two GPUs if there are several. The ticket holds block numbers, the length and the last token of the prompt, as between
vLLM's prefill and decode; the prompt never reaches the decode process, so its tokens can only be those of a run in one
process if every block has arrived whole. The router makes such a run and compares.
"""

import argparse
import os
import sys

# Set before anything reads them. The matrices are too small for threads, and the output is ours; all can be overridden.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
os.environ.setdefault("CORELANE_LOG_LEVEL", "warn")

from disaggregated.decode import Decode  # noqa: E402
from disaggregated.model import blocks_for  # noqa: E402
from disaggregated.prefill import Prefill  # noqa: E402
from disaggregated.router import run_router  # noqa: E402
from disaggregated.worker import run_worker  # noqa: E402


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Exit status 0: the tokens are as they must be. CORELANE_LOG_LEVEL=info shows what the backend does.",
    )
    add = parser.add_argument
    add("--prompt-tokens", type=at_least(2), default=160, metavar="N", help="length of each prompt (default %(default)s)")
    add("--decode-tokens", type=at_least(1), default=32, metavar="N", help="tokens to generate (default %(default)s)")
    add("--layers", type=at_least(1), default=4, metavar="N", help="layers of the model (default %(default)s)")
    add("--requests", type=at_least(1), default=1, metavar="N", help="requests, one after another (default %(default)s)")
    add("--seed", type=at_least(0), default=1, metavar="N", help="of weights, prompts and block order (default %(default)s)")
    add("--backend", default="CORELANE", metavar="NAME", help="NIXL backend (default %(default)s)")
    add("--push", action="store_true", help="prefill WRITEs the blocks, instead of decode READing them")
    device_help = "where model and cache are: auto is gpu where torch sees one (default %(default)s)"
    add("--device", choices=("auto", "cpu", "gpu"), default="auto", help=device_help)
    add("--corrupt-block", type=at_least(0), metavar="N", help="flip the bytes of block N of those that request 1 moves")
    add("--timeout", type=at_least(1), default=30, metavar="S", help="longest wait for a peer in seconds (default %(default)s)")
    add("--role", choices=("prefill", "decode"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    moved = options.layers * blocks_for(options.prompt_tokens - 1)
    if options.corrupt_block is not None and options.corrupt_block >= moved:
        parser.error(f"--corrupt-block: a request moves {moved} blocks, 0 to {moved - 1}")
    return options


def at_least(minimum):
    def whole_number(text):
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return whole_number


def main():
    options = parse_options()
    if options.role:
        run_worker({"prefill": Prefill, "decode": Decode}[options.role], options)
    else:
        sys.exit(run_router(options))


if __name__ == "__main__":
    main()
