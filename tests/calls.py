"""What work costs, in calls of functions: the same on every machine, if blind to what one call of C does at length."""

from __future__ import annotations

import cProfile
import gc
from collections.abc import Callable


def calls(work: Callable[[], object]) -> int:
    """How many functions are called by some work, those of C included."""
    profile = cProfile.Profile()
    gc.collect()
    gc.disable()  # finalizers of what others left behind would count too
    try:
        profile.runcall(work)
    finally:
        gc.enable()
    return sum(entry.callcount for entry in profile.getstats())
