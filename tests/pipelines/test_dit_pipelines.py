"""DiT and PixArt pipelines: planned, cut, saved, and loaded in a fresh process."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from cut_models import no_pickle_in, same_state
from diffusers import DiffusionPipeline
from tiny_pipelines import dit_pipeline, pixart_alpha_pipeline, pixart_sigma_pipeline

import genprune as gp
from genprune.errors import BadCalibrationData

MAKERS = {"dit": dit_pipeline, "alpha": pixart_alpha_pipeline, "sigma": pixart_sigma_pipeline}

_FRESH_PROGRAM = """
import json, sys
from diffusers import DiffusionPipeline
import genprune

for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    print("RESULT" + json.dumps([type(pipe).__name__, type(pipe.transformer).__name__, draw(pipe).tolist()]))
"""


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    if type(pipe).__name__ == "DiTPipeline":
        return pipe([1, 0], **common).images
    size = {"height": 16, "width": 24, "use_resolution_binning": False, "clean_caption": False}
    return pipe("a cat", **size, **common).images


def randomised(name: str, folder) -> DiffusionPipeline:
    pipe = MAKERS[name](folder)
    torch.manual_seed(1)
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return pipe


def test_fresh_process(tmp_path):
    expected = {}
    for name in MAKERS:
        pipe = randomised(name, tmp_path)
        assert len(gp.find_sites(pipe)) > 0
        before, dense = draw(pipe), gp.count_costs(pipe)
        # A DiT of three narrow blocks is mostly embeddings, which no plan reaches; its modulation is the next largest.
        keep = 0.9 if name == "dit" else 0.7
        gp.cut(pipe, gp.make_plan(pipe, gp.Magnitude(keep=keep)))
        assert gp.count_costs(pipe).params == pytest.approx(keep * dense.params, rel=0.01)
        pipe.save_pretrained(tmp_path / name)
        no_pickle_in(tmp_path / name / "transformer")
        expected[name] = draw(pipe)
        assert np.abs(before - expected[name]).max() > 1e-2
    program = f"import torch\n\n{inspect.getsource(draw)}{_FRESH_PROGRAM}"
    command = [sys.executable, "-c", program, *(str(tmp_path / name) for name in MAKERS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert [kind for kind, _, _ in results] == ["DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"]
    for (_, model, image), (name, drawn) in zip(results, expected.items(), strict=True):
        assert model == f"Pruned{'DiT' if name == 'dit' else 'PixArt'}Transformer2DModel"
        assert np.abs(np.asarray(image) - drawn).max() < 1e-4, name  # float32 noise over two steps and a decoder


@pytest.mark.parametrize("name", ["dit", "alpha"])
def test_repositories_that_name_the_old_class(name, tmp_path):
    """The published DiT and PixArt-Alpha repositories say `Transformer2DModel`, which diffusers maps to today's."""
    pipe = randomised(name, tmp_path)
    pipe.save_pretrained(tmp_path / "base")
    index, config = tmp_path / "base" / "model_index.json", tmp_path / "base" / "transformer" / "config.json"
    for file in (index, config):
        file.write_text(file.read_text().replace(type(pipe.transformer).__name__, "Transformer2DModel"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_vector_embeds": None}))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "base")
    assert type(loaded.transformer) is type(pipe.transformer)
    assert gp.plan_base(loaded.transformer) == gp.plan_base(pipe.transformer)
    plan = gp.make_plan(loaded, gp.Magnitude(keep=0.9))
    gp.cut(loaded, plan)
    loaded.save_pretrained(tmp_path / "small")
    again = DiffusionPipeline.from_pretrained(tmp_path / "small")
    same_state(again.transformer, gp.cut(pipe, plan).transformer)


METHODS = (
    gp.Taylor(keep=0.9, steps=2, timesteps=1),
    gp.OBS(keep=0.9, steps=2, timesteps=1),
    gp.LaptopDiff(keep=0.7, of="macs", steps=2, timesteps=1, additivity_sets=0),
    gp.LDPruner(keep=0.7, of="macs", steps=2, timesteps=1, trajectory_steps=2, menu=("remove",)),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_class_labels_are_prompts(method):
    pipe = dit_pipeline()
    plan = gp.make_plan(pipe, method, prompts=[0, 1, 0], progress=False)
    gp.cut(pipe, plan)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(class_labels=[1], num_inference_steps=1).images) == 1
    with pytest.raises(BadCalibrationData, match="draws by class label, got 'cat'; expected whole numbers"):
        gp.score(dit_pipeline(), method, prompts=["cat"], progress=False)


def test_calls_of_a_class_conditional_pipeline_are_its_own():
    """Conditional rows come first there; the final latents are those that it decodes."""
    from genprune.denoising.calibration import conditions
    from genprune.denoising.capture import capture_runs

    pipe = dit_pipeline()
    pipe.set_progress_bar_config(disable=True)
    (run,) = capture_runs(pipe, [1, 0], steps=2, seed=3, guidance_scale=3.0)
    given = conditions(run, "hidden_states")
    assert given["class_labels"].tolist() == [1, 0] and run.calls[0].inputs["class_labels"].shape == (4,)
    with torch.no_grad():
        decoded = pipe.vae.decode(run.latents / pipe.vae.config.scaling_factor).sample
        generators = [torch.Generator("cpu").manual_seed(3 + row) for row in range(2)]
        drawn = pipe(
            class_labels=[1, 0], num_inference_steps=2, guidance_scale=3.0, generator=generators, output_type="pt"
        ).images
    decoded = (decoded / 2 + 0.5).clamp(0, 1)
    drawn = torch.as_tensor(drawn)
    assert torch.allclose(decoded if drawn.shape == decoded.shape else decoded.permute(0, 2, 3, 1), drawn, atol=1e-6)


def test_a_class_conditional_pipeline_recovers():
    pipe, teacher = dit_pipeline(), dit_pipeline()
    gp.cut(pipe, gp.make_plan(pipe, gp.Magnitude(keep=0.9, kinds=("neurons", "heads")), progress=False))
    method = gp.NormalizedDistillation(steps=3, batch_size=2, teacher_steps=2, prompt_dropout=0.5, learning_rate=1e-3)
    result = gp.recover(pipe, teacher, method, prompts=[0, 1, 1, 0], progress=False)
    assert len(result.curve) == 3 and all(row["loss"] > 0 for row in result.curve)
