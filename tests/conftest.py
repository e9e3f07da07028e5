"""Shared by all tests."""

import os

# Threads of a kernel wait asleep: where cores are shared, spinning costs ten times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
