"""The Inception default: equal to torchmetrics with the same weights, typed errors without them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_extractors import pictures

from genprune.metrics import FID, InceptionExtractor, MissingWeights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random tensors in the shape of the real file: the real one cannot be had offline."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Keep the random initialisation."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    state = Unloaded("inception-v3-compat", ["2048"], str(folder / "empty.pth")).state_dict()
    torch.save(state, folder / "random.pth")
    yield folder / "random.pth"
    (folder / "random.pth").unlink()  # 95 MB


def test_bilinear_equals_torchmetrics_and_floats_equal_uint8(weights):
    from torchmetrics.image.fid import NoTrainInceptionV3

    images = pictures(2, 0, side=48)
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    ours = InceptionExtractor(weights, resize_mode="bilinear")
    with torch.no_grad():
        expected = theirs(images).double()
    assert torch.equal(ours(images), expected)
    assert torch.equal(ours(images.float() / 255), expected)
    ours.resize_mode = "bicubic-antialias-8bit"
    assert not torch.equal(ours(images), expected)

    assert not ours.card.official
    assert FID(ours).name == "FD(inception-v3-shape:random)"  # other weights are not FID


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"Conv2d_1a_3x3.conv.weight": Harm()}, tmp_path / "bad.pth")
    with pytest.raises(MissingWeights, match="could not be read as plain tensors"):
        InceptionExtractor(tmp_path / "bad.pth")


def test_errors_name_the_file(tmp_path):
    with pytest.raises(MissingWeights, match="no Inception weights file .*absent.pth"):
        InceptionExtractor(tmp_path / "absent.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(MissingWeights, match="do not fit torch-fidelity's Inception-v3"):
        InceptionExtractor(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"resize_mode is 'nearest', expected one of \('bicubic', 'bilinear'\)"):
        InceptionExtractor(resize_mode="nearest")


def test_offline_default_is_a_typed_error_and_nothing_loads_at_import(tmp_path):
    program = """
import sys, genprune.metrics as metrics
assert not {"torchmetrics", "timm", "open_clip", "torch_fidelity", "diffusers"} & set(sys.modules), "not lazy"
try:
    metrics.FID()
except metrics.MissingWeights as error:
    print(error)
sys.modules["open_clip"] = None
try:
    metrics.open_clip_extractor("ViT-B-32", "openai")
except ModuleNotFoundError as error:
    print(error)
"""
    # a proxy where nobody listens: no download even on a machine that could
    env = {"PATH": "", "TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the Inception-v3 weights are not in" in done.stdout
    assert "pass another extractor" in done.stdout
    assert "package 'open-clip-torch' is needed here" in done.stdout
    assert "pip install genprune[bench]" in done.stdout
