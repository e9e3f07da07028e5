"""Shared by all tests."""

import gc
import os

# Threads of a kernel wait asleep: where cores are shared, spinning costs ten times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Two workers of pytest-xdist on two cores: a torch of two threads in each would make them fight.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Set aside what thousands of collected tests and torch hold: a run collects garbage often,
    and each time would look through all of that."""
    gc.collect()
    gc.freeze()
