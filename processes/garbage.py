"""Python's garbage collector in processes that live long and hold many objects."""

import gc


def collect_garbage_less_often() -> None:
    """Collect for 3 to 5% less CPU: what a process has in memory is hardly ever garbage in a cycle, and Python would
    look at all of it again and again. Call it once everything is imported."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
