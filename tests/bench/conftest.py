"""Two tiny pipelines on disk, one a perturbed copy of the other, shared by the benchmark's tests."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One CPU thread, as the child processes have: the order of sums decides the last bit of a pixel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`{"dense": folder, "changed": folder}` of complete Stable Diffusion pipelines."""
    from tiny_pipeline import tiny_pipeline

    root = tmp_path_factory.mktemp("pipelines")
    pipeline = tiny_pipeline(root)
    pipeline.save_pretrained(root / "dense")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in pipeline.unet.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    pipeline.save_pretrained(root / "changed")
    return {"dense": root / "dense", "changed": root / "changed"}


@pytest.fixture(scope="session")
def pipeline(folders):
    """The dense one, loaded; tests leave it as it is."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folders["dense"])
