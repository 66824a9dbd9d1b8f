"""Peak memory of one candidate in a process of its own: load it, draw once, report.

`python -m genprune.bench.memory SPEC` is the child; `candidate_memory` starts it. A fresh process, because a used one
keeps freed pages and hides what a smaller model saves.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import torch

from genprune.bench.candidate import Candidate
from genprune.bench.errors import BadCandidate
from genprune.bench.sampling import Sampling, call_arguments
from genprune.metrics.device import device_name
from genprune.metrics.memory import PeakMemory, peak_memory, peak_rss_bytes, rss_bytes

STEPS = 2  # the peak is in a step or in the decoder; more steps only take longer


def candidate_memory(candidate: Candidate, prompt: str, sampling: Sampling, device: str = "cpu") -> PeakMemory:
    """Peak memory to load a candidate and draw one batch of one image, measured in a fresh process.

    On the CPU the resident set (`before_bytes`: torch and diffusers imported, nothing loaded); on CUDA the allocator's
    peak, weights included.

    Raises:
        BadCandidate: the candidate lives in this process's memory, or the child failed (its last line is shown).
    """
    if candidate.model is None:
        raise BadCandidate(
            f"candidate '{candidate.name}' is a pipeline in memory, and a clean peak needs a fresh process. "
            "Save it with pipe.save_pretrained(folder) and pass the folder."
        )
    request = {
        "candidate": {"name": candidate.name, "model": candidate.model, "plan": candidate.plan},
        "sampling": dataclasses.replace(sampling, num_inference_steps=STEPS, batch_size=1).to_json(),
        "prompt": prompt,
        "device": str(device),
    }
    child = subprocess.run(
        [sys.executable, "-m", "genprune.bench.memory", json.dumps(request)], capture_output=True, text=True
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadCandidate(f"the memory measurement of candidate '{candidate.name}' failed: {last}")
    return PeakMemory(**json.loads(child.stdout.strip().splitlines()[-1]))


def measure(request: dict) -> PeakMemory:
    """The child's work, in this process."""
    import diffusers  # noqa: F401  its import is the baseline, not the candidate's cost

    candidate, sampling = Candidate(**request["candidate"]), Sampling(**request["sampling"])
    device = torch.device(request["device"])

    def run() -> None:
        pipeline = candidate.load(sampling.dtype, device)
        pipeline.set_progress_bar_config(disable=True)
        with torch.no_grad():
            pipeline(**call_arguments(pipeline, sampling, range(1), [request["prompt"]]))

    if device.type == "cuda":
        torch.cuda.init()
        return peak_memory(run, device)
    before = rss_bytes()
    run()
    return PeakMemory(before, peak_rss_bytes(), "rss-peak-fresh-process", device_name(device))


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1])).to_json()))
