"""What a process holds, as the kernel counts it."""

from __future__ import annotations

import gc
import os
import resource
from dataclasses import dataclass

from harness.waiting import wait_until


@dataclass
class Held:
    """File descriptors, threads, and memory in use."""

    descriptors: int
    threads: int
    memory_bytes: int


def held() -> Held:
    """By this process, now."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as statm:
        resident = int(statm.read().split()[1]) * resource.getpagesize()
    # The listing of the descriptors opens one itself.
    return Held(len(os.listdir("/proc/self/fd")) - 1, len(os.listdir("/proc/self/task")), resident)


def open_descriptors() -> list[str]:
    """What the open descriptors are, for the message of a test that fails."""
    listed = []
    for number in os.listdir("/proc/self/fd"):
        try:
            listed.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:
            continue
    return listed


def assert_no_more_than(before: Held, memory_bytes: int) -> Held:
    """Waits for descriptors and threads to be no more than `before`, and memory no more than so much above."""

    def back() -> bool:
        now = held()
        return now.descriptors <= before.descriptors and now.threads <= before.threads

    try:
        wait_until(back, "descriptors and threads to be given back", 20)
    except AssertionError:
        raise AssertionError(f"before: {before}, now: {held()}, open: {open_descriptors()}") from None
    now = held()
    assert now.memory_bytes <= before.memory_bytes + memory_bytes, f"before: {before}, now: {now}"
    return now
