"""`accelerate launch scripts/benchmark.py`: two processes draw what one draws."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from genprune.bench import Sampling, draw_images, load_image, read_result

ROOT = Path(__file__).parents[2]
PROMPTS = ["a cat", "two dogs", "a red car", "a frog", "a star"]


def test_two_processes_give_the_pixels_of_one(folders, pipeline, tmp_path):
    # what `accelerate launch` starts on GPUs; on a CPU its own launcher needs MPI
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--candidates", f"dense={folders['dense']}", f"changed={folders['changed']}", "--prompts", *PROMPTS]
    flags += ["--num_inference_steps", "2", "--guidance_scale", "3", "--seed", "7", "--batch_size", "2"]
    flags += ["--output_dir", str(tmp_path / "two"), "--latency_rounds", "0", "--no_memory", "--cpu", "--extractors"]
    done = subprocess.run(
        [*launch, str(ROOT / "scripts" / "benchmark.py"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = read_result(tmp_path / "two" / "result.json")
    assert result["device"]["processes"] == 2 and result["seeds"]["images"] == 7
    assert result["figures"]["PSNR to dense (dB)/changed"] < 99
    assert done.stdout.count("results: ") == 1  # the first process alone

    sampling = Sampling(num_inference_steps=2, guidance_scale=3.0, seed=7, batch_size=2)
    draw_images(pipeline, PROMPTS, sampling, tmp_path / "one", progress=False)
    for index in range(len(PROMPTS)):
        two = load_image(tmp_path / "two" / "images" / "dense", index)
        assert torch.equal(two, load_image(tmp_path / "one", index)), index


def script():
    spec = importlib.util.spec_from_file_location("benchmark_script", ROOT / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bad_flags_get_one_line_and_no_traceback(tmp_path, capsys):
    out = ["--output_dir", str(tmp_path)]
    assert script().main(["--candidates", "dense", *out, "--prompts", "x"]) == 2
    assert capsys.readouterr().err.startswith("BadCandidate: 'dense' is no candidate, expected NAME=FOLDER")
    assert script().main(["--candidates", "a=b", *out, "--prompts", "x", "--dataset_name", "y"]) == 2
    assert "--prompts and --dataset_name are two sources of prompts" in capsys.readouterr().err
    assert script().main(["--candidates", "a=b", *out, "--captions_json", "x.json"]) == 2
    assert "--captions_json and --images_dir belong together" in capsys.readouterr().err


def test_prompts_from_flags_and_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(100)))
    given = script()
    flags = ["--candidates", "a=b", "--output_dir", "o"]
    assert len(given.read_data(given.parse([*flags, "--prompts", str(tmp_path / "prompts.txt")])).prompts) == 100
    short = given.parse([*flags, "--prompts", str(tmp_path / "prompts.txt"), "--num_prompts", "3"])
    assert given.read_data(short).prompts == ("prompt 0", "prompt 1", "prompt 2")
    assert given.read_data(given.parse([*flags, "--num_prompts", "4"])).name == "miniature test split"
