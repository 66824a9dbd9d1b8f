from __future__ import annotations

import pytest
from tiny_pipelines import ddpm_pipeline, flux_pipeline, sd3_pipeline, sd_pipeline

PIPELINES = {
    "sd": sd_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "ddpm": lambda folder: ddpm_pipeline(),
}


@pytest.fixture(scope="session", params=PIPELINES)
def pipe(request, tmp_path_factory):
    """A stock pipeline of each family; never changed."""
    return PIPELINES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    return sd_pipeline(tmp_path_factory.mktemp("sd"))
