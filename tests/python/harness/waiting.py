"""Waits that end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_SECONDS = 60.0
"""Longer than anything takes on a busy machine, so that a wait that fails means something."""

Result = TypeVar("Result")


def wait_until(condition: Callable[[], Result], what: str, seconds: float = PATIENCE_SECONDS) -> Result:
    """Asks `condition` until it answers with something true, and gives that back; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = 0.0
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"still waiting after {seconds:.0f} s: {what}")
        # The first rounds at once, for speed; later ones leave the cores to who is waited for.
        time.sleep(pause)
        pause = min(pause + 0.00002, 0.002)
