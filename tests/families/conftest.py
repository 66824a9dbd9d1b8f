from __future__ import annotations

import pytest
from family_cases import CASE_NAMES, DenseRun, dense_run


@pytest.fixture(params=CASE_NAMES, scope="session")
def dense(request: pytest.FixtureRequest) -> DenseRun:
    """One family case after another; pytest runs all tests of a case together."""
    return dense_run(request.param)
