"""The parts of disaggregated_decode.py, which says what they do together."""

import sys
import time

try:
    import numpy  # noqa: F401
except ImportError:
    sys.exit(f"this example needs numpy: {sys.executable} -m pip install numpy")

# One clock for all processes of a host.
now_ns = time.monotonic_ns


class Failure(Exception):
    """Something that the user has to know, in one sentence."""
