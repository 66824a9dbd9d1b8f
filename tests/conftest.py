"""What every test may rely on."""

from __future__ import annotations

import os
import signal

import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Before torch is imported, and for the processes that tests start: the workers share the cores.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_interrupts():
    """Python's own handler of Ctrl-C, also where the tests run in the background, which ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
