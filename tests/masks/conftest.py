from __future__ import annotations

import pytest
from mask_cases import small_dit_pipeline
from tiny_pipelines import ddpm_pipeline, flux_pipeline, sd_pipeline


@pytest.fixture(scope="session")
def dit():
    """The quickest pipeline; never changed."""
    return small_dit_pipeline()


@pytest.fixture(scope="session")
def ddpm():
    return ddpm_pipeline()


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    return sd_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    return flux_pipeline(tmp_path_factory.mktemp("flux"))
