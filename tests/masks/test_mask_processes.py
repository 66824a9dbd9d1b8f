"""Two processes learn what one does with twice the batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from mask_cases import problem_of, small_dit_pipeline, trained

from genprune.masks import MaskLogits
from genprune.masks.processes import averaged, process_rank, summed

TESTS = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/masks"]
import torch
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
from mask_cases import problem_of, small_dit_pipeline, trained
from genprune.masks import MaskLogits
problem = problem_of(small_dit_pipeline(), prompts=(0, 1, 2, 0, 2))
outcome = trained(problem, output_dir=folder + "/run", batch_size=1, **{settings!r})
MaskLogits(outcome.logits).save(folder + f"/rank{{rank}}.safetensors")
torch.distributed.destroy_process_group()
"""
SETTINGS = {
    "train_steps": 4,
    "gradient_accumulation_steps": 2,
    "guidance_scale": (1.0, 1.0),
    "validate_every": 4,
    "validation_prompts": 1,
    "init": 1.0,
}


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    code = SCRIPT.format(tests=str(TESTS), settings=SETTINGS)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    problem = problem_of(small_dit_pipeline(), prompts=(0, 1, 2, 0, 2))
    outcome = trained(problem, batch_size=2, **SETTINGS)
    alone = trained(problem, batch_size=1, **SETTINGS)
    for process in started:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text.decode()
    first, second = (MaskLogits.load(tmp_path / f"rank{rank}.safetensors")[0].detached() for rank in range(2))
    saved, _ = MaskLogits.load(tmp_path / "run" / "logits.safetensors")  # written once, by the first
    for name, expected in outcome.logits.items():
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], saved[name])
        # kernels for one row and for two round otherwise
        torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-5)
    assert any(not torch.allclose(alone.logits[name], values, atol=1e-3) for name, values in outcome.logits.items())


def test_one_process_sums_nothing():
    tensors = [torch.ones(2, 3), torch.ones(())]
    assert process_rank() == (0, 1) and summed(tensors) is tensors
    assert averaged(0.1, torch.device("cpu")) == 0.1
