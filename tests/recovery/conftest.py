"""What every test of recovery starts from: no accelerator that another test left."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test():
    """Scripts that earlier tests ran in this process leave accelerate's state, with a precision of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
