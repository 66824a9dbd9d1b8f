"""Two processes recover to what one does with twice the batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from recovery_cases import PROMPTS, quick, recovered, student_of, weights_of
from safetensors.torch import load_file
from tiny_pipelines import sd_pipeline

TESTS = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/recovery"]
import pathlib, torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from test_recover_processes import run
folder = pathlib.Path(sys.argv[1])
student, done = run(folder, folder / "run", batch_size=1)
import os
save_file(student, folder / f"rank{{os.environ['RANK']}}.safetensors")
torch.distributed.destroy_process_group()
"""
SETTINGS = {"steps": 4, "gradient_accumulation": 2, "ema_decay": 0.9, "learned_weights": True, "prompt_dropout": 0.3}


def run(folder, output_dir, **changes):
    teacher = sd_pipeline(folder)
    student = student_of(teacher, "mid_block.attentions.0:wrapper", "down_blocks.1.resnets.0:branch")
    options = {"prompts": PROMPTS, "output_dir": output_dir, "checkpointing_steps": 2}
    done = recovered(student, teacher, quick(**(SETTINGS | changes)), **options)
    return weights_of(student), done


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    code, port = SCRIPT.format(tests=str(TESTS)), str(free_port())
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "two").mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "two")],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    expected, whole = run(tmp_path, tmp_path / "run", batch_size=2)
    alone, _ = run(tmp_path, None, batch_size=1)
    for process in started:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text.decode()
    first, second = (load_file(tmp_path / "two" / f"rank{rank}.safetensors") for rank in range(2))
    start = weights_of(
        student_of(sd_pipeline(tmp_path), "mid_block.attentions.0:wrapper", "down_blocks.1.resnets.0:branch")
    )
    moved = {name: (value - start[name]).norm() for name, value in expected.items() if value.numel()}
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        if value.numel():  # kernels for one row and for two round otherwise, and Adam enlarges the rest
            assert (first[name] - value).norm() <= 0.02 * moved[name] + 1e-6, name
    assert any((alone[name] - expected[name]).norm() > 0.1 * moved[name] + 1e-5 for name in moved)
    curve = [json.loads(line) for line in (tmp_path / "two" / "run" / "curve.jsonl").read_text().splitlines()]
    for found, record in zip(curve, whole.curve, strict=True):  # written once, of all rows
        torch.testing.assert_close(found["loss"], record["loss"], rtol=1e-4, atol=1e-5)
