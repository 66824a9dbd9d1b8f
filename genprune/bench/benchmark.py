"""One comparison from start to end: draw, measure, time, write `result.json` and `report.html`."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from genprune.bench.candidate import Candidate, fingerprint, read_candidates
from genprune.bench.compare import Measurement, SceneScores, compare_images
from genprune.bench.data import BenchData, miniature_data, prompt_data
from genprune.bench.errors import BadCandidate
from genprune.bench.grading import scene_grader
from genprune.bench.instruments import choose_instruments
from genprune.bench.memory import candidate_memory
from genprune.bench.page import write_page
from genprune.bench.result import environment, write_result
from genprune.bench.run import draw_images, load_image
from genprune.bench.sampling import Sampling
from genprune.bench.speed import compare_speed
from genprune.errors import GenpruneError, UnsupportedModel
from genprune.families import denoiser
from genprune.metrics.extractors import FeatureExtractor


def run_benchmark(
    candidates: Mapping[str, object] | Sequence[str],
    out: str | Path,
    *,
    data: BenchData | Sequence[str] | None = None,
    reference: str | None = None,
    sampling: Sampling | None = None,
    extractors: Sequence[str | FeatureExtractor] | None = None,
    scene_scores: SceneScores | None = None,
    controls: bool = True,
    latency_rounds: int = 10,
    memory: bool = True,
    device: torch.device | str | None = None,
    resamples: int = 2000,
    progress: bool = True,
) -> dict | None:
    """Compare pipelines on the same prompts and seeds; what `genprune bench` and `scripts/benchmark.py` run.

    Writes `out/images/NAME/*.png`, `out/result.json` and `out/report.html`. Started again with the same arguments it
    draws only what is missing. Under `accelerate launch` every process draws its share and the first one measures.

    Args:
        candidates: `["dense=FOLDER", "pruned=FOLDER", "other=BASE@PLAN"]`, or a mapping from name to folder, hub id,
            `BASE@PLAN` or a loaded pipeline. `miniature` names the embedded pipeline.
        out: folder for pictures and results.
        data: prompts and real pictures (`miniature_data`, `coco_data`, `dataset_data`, `prompt_data`), or a list of
            prompts. Default: 64 captions of the miniature's test split.
        reference: the candidate that differences and ratios are against. Default: `dense`, or else the first.
        sampling: steps, guidance, size, seed, batch, dtype. Default: `Sampling()`.
        extractors: names from `instruments.INSTRUMENTS` or extractors. Default: the miniature's grader for its own
            scenes; Inception and CLIP for photographs; none for prompts alone.
        scene_scores: grades pictures against `data.scenes`, as `scene_grader()` does, which is the default.
        controls: add the rows blank canvas, mean image and shuffled prompts.
        latency_rounds: timed rounds, 0 for no timing (then `speed` is empty).
        memory: measure peak memory, each candidate in a fresh process; candidates in memory are left out.
        device: default: accelerate's choice for this process.
        resamples: of the bootstrap.
        progress: bars on the main process.

    Returns:
        The result as written (see `result.SCHEMA`); None in all processes but the first.

    Raises:
        GenpruneError: a candidate, the data, an extractor or the folder is not what it should be; before anything is
            drawn where that can be known.
    """
    from accelerate import PartialState

    # without cpu=True accelerate takes several CPU processes for unrelated ones
    state = PartialState(cpu=not torch.accelerator.is_available() or str(device) == "cpu")
    device = torch.device(device) if device is not None else state.device
    out, sampling = Path(out), sampling or Sampling()
    if latency_rounds < 0 or latency_rounds == 1:
        raise GenpruneError(f"latency_rounds is {latency_rounds}, expected 0 for no timing, or at least 2 rounds.")
    entries = read_candidates(candidates)
    reference = _reference(entries, reference)
    data = miniature_data() if data is None else data if isinstance(data, BenchData) else prompt_data(data)
    progress = progress and state.is_main_process
    tools = []
    if state.is_main_process:  # before hours of drawing: missing weights are found now
        tools = [tool.to(device) for tool in choose_instruments(extractors, data)]
        if data.scenes is not None and scene_scores is None:
            scene_scores = scene_grader()

    folders = {entry.name: out / "images" / entry.name for entry in entries}
    described = [_draw_share(entry, folders[entry.name], data, sampling, state, device, progress) for entry in entries]
    state.wait_for_everyone()
    if not state.is_main_process:
        return None

    rows = compare_images(
        folders,
        data,
        reference,
        extractors=tools,
        scene_scores=scene_scores,
        controls=controls,
        resamples=resamples,
    )
    speed = _speed(entries, reference, data, sampling, device, latency_rounds)
    peaks = _memory(entries, data, sampling, device) if memory else {}
    height, width = load_image(folders[reference], 0).shape[-2:]
    result = {
        **environment(device, state.num_processes),
        "kind": "genprune-bench",
        "reference": reference,
        "seeds": {"images": sampling.seed, "bootstrap": 0, "rule": "image seed = sha256('seed:index')[:8] >> 1"},
        "data": data.provenance(),
        "sampling": {**sampling.to_json(), "height": height, "width": width},
        "extractors": [tool.card.to_json() for tool in tools],
        "candidates": described,
        "measurements": [row.to_json() for row in rows],
        "speed": {name: timing.to_json() for name, timing in speed.items()},
        "memory": {name: peak.to_json() for name, peak in peaks.items()},
    }
    result |= collect_figures(described, rows, speed, peaks, reference)
    write_result(out / "result.json", result)
    write_page(out / "report.html", result, folders, data)
    return result


def _draw_share(entry: Candidate, folder: Path, data: BenchData, sampling: Sampling, state, device, progress) -> dict:
    """Draw this process's pictures of one candidate, free its memory, and say what it was."""
    pipeline = entry.load(sampling.dtype, device)
    draw_images(
        pipeline,
        data.prompts,
        sampling,
        folder,
        process_index=state.process_index,
        process_count=state.num_processes,
        progress=progress,
        label=entry.name,
    )
    described = describe(entry, pipeline, sampling)
    del pipeline
    _free(device)
    return described


def describe(entry: Candidate, pipeline, sampling: Sampling) -> dict:
    """What a candidate is: its source, classes, sampler, plan hash, weights hash, parameters and MACs."""
    import genprune

    model = denoiser(pipeline)
    point = {}
    if sampling.height and sampling.width:  # MACs at the drawn size, not at the family's default
        scale = pipeline.vae_scale_factor
        point = {"height": sampling.height // scale, "width": sampling.width // scale}
    try:
        costs = genprune.count_costs(model, **point)
        params, macs = costs.params, costs.macs
    except UnsupportedModel:  # a denoiser without a family can still be compared
        params, macs = sum(tensor.numel() for tensor in model.parameters()), None
    return {
        "name": entry.name,
        "model": entry.model,
        "plan": entry.plan,
        "plan_hash": _plan_hash(entry, model),
        "pipeline": type(pipeline).__name__,
        "denoiser": type(model).__name__,
        "sampler": type(pipeline.scheduler).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": fingerprint(pipeline),
        "params": params,
        "macs": macs,
    }


def _plan_hash(entry: Candidate, model) -> str | None:
    """Of the plan's files, or of the widths in a cut model's configuration; None for a dense model."""
    digest = hashlib.sha256()
    if entry.plan is not None:
        path = Path(entry.plan)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(file.name.encode() + file.read_bytes())
    elif model.config.get("pruning") is not None:
        digest.update(json.dumps(model.config["pruning"], sort_keys=True, default=str).encode())
    else:
        return None
    return f"sha256:{digest.hexdigest()}"


def _reference(entries: Sequence[Candidate], reference: str | None) -> str:
    names = [entry.name for entry in entries]
    if reference is None:
        return "dense" if "dense" in names else names[0]
    if reference not in names:
        raise BadCandidate(f"the reference '{reference}' is none of the candidates {', '.join(names)}.")
    return reference


def _speed(entries, reference: str, data: BenchData, sampling: Sampling, device, rounds: int) -> dict:
    if rounds == 0 or len(entries) < 2:
        return {}
    pipelines = {entry.name: entry.load(sampling.dtype, device) for entry in entries}
    timings = compare_speed(pipelines, reference, data.prompts[0], sampling, device, rounds)
    del pipelines
    _free(device)
    return timings


def _memory(entries, data: BenchData, sampling: Sampling, device) -> dict:
    return {
        entry.name: candidate_memory(entry, data.prompts[0], sampling, str(device))
        for entry in entries
        if entry.model is not None
    }


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def collect_figures(described: list[dict], rows: list[Measurement], speed: dict, peaks: dict, reference: str) -> dict:
    """`{"figures": {name: number}, "run_to_run": [names that differ from run to run]}`."""
    figures: dict[str, float] = {}
    base = next(entry for entry in described if entry["name"] == reference)
    for entry in described:
        name = entry["name"]
        for quantity in ("params", "macs"):
            if entry[quantity] is not None and base[quantity]:
                figures[f"{quantity}/{name}"] = entry[quantity]
                figures[f"{quantity}_ratio/{name}"] = entry[quantity] / base[quantity]
    for row in rows:
        figures[f"{row.metric}/{row.candidate}"] = row.value
        if row.floor is not None:
            figures[f"{row.metric}/floor"] = row.floor.mean
        if row.difference is not None:
            pair = f"{row.metric}/{row.candidate} - {reference}"
            figures |= {pair: row.difference.estimate, f"{pair}/low": row.difference.low}
            figures[f"{pair}/high"] = row.difference.high
    stable = set(figures)
    for what, timing in speed.items():
        for name, ratio in timing.ratio.items():
            figures[f"{what}_latency_ms/{name}"] = timing.median_ms[name]
            figures[f"{what}_latency_ratio/{name}"] = ratio.estimate
    for name, peak in peaks.items():
        figures[f"peak_memory_bytes/{name}"] = peak.peak_bytes
        if reference in peaks:
            figures[f"peak_memory_ratio/{name}"] = peak.peak_bytes / peaks[reference].peak_bytes
    return {"figures": figures, "run_to_run": sorted(set(figures) - stable)}
