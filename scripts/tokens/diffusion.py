"""Fewer image tokens in the embedded miniatures: pictures against the dense ones, MACs, wall time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import genprune as gp
from genprune.families import denoiser
from genprune.metrics.latency import compare_latency
from genprune.tokens.attached import take_off
from genprune.tokens.diffusion import DiffusionTokens
from scripts.ecodiff.bases import Base, bases, latents_of, pictures_of
from scripts.ecodiff.figures import Dense, Judge

PROMPTS = 64  # test captions
SEED = 20_000  # of the noise
EARLY = ((0.3, 0.0),)  # nothing goes in the first 30 % of the chain
RANDOM = {"score": "random", "reduce": "drop"}


@dataclass(frozen=True)
class Row:
    """One way to draw: its name in tables, and its settings."""

    name: str
    settings: DiffusionTokens


def transformer_rows() -> list[Row]:
    """Of MMDiT B: shares of the MACs of a step that removes in full."""
    Z = gp.ZeroTPrune
    rows = [
        Row("default", DiffusionTokens(Z(keep=0.75))),
        Row("default, merged", DiffusionTokens(Z(keep=0.75, reduce="merge"))),
        Row("ToMe", DiffusionTokens(gp.ToMe(keep=0.75))),
        Row("random, dropped", DiffusionTokens(Z(keep=0.75, **RANDOM))),
        Row("page rank, published", DiffusionTokens(Z.published(keep=0.75))),
        Row("vote, dropped, importance alone", DiffusionTokens(_importance(0.75))),
        Row("default, nothing removed early", DiffusionTokens(Z(keep=0.75), early=EARLY)),
        Row("default, scored in every 4th step", DiffusionTokens(Z(keep=0.75), every=4)),
        Row("default, removed tokens as they were", DiffusionTokens(Z(keep=0.75), restore="own")),
    ]
    for keep in (0.85, 0.65):
        rows += [
            Row("default", DiffusionTokens(Z(keep=keep))),
            Row("ToMe", DiffusionTokens(gp.ToMe(keep=keep))),
            Row("random, dropped", DiffusionTokens(Z(keep=keep, **RANDOM))),
        ]
    return rows


def unet_rows() -> list[Row]:
    """Of U-Net A: shares of the image tokens of every level; convolutions, most of its MACs, stay."""
    Z = gp.ZeroTPrune
    rows = [
        Row("default", DiffusionTokens(Z(), tokens=0.5)),
        Row("default, dropped", DiffusionTokens(Z(reduce="drop"), tokens=0.5)),
        Row("ToMe", DiffusionTokens(gp.ToMe(), tokens=0.5)),
        Row("random, dropped", DiffusionTokens(Z(**RANDOM), tokens=0.5)),
        Row("page rank, published", DiffusionTokens(Z.published(), tokens=0.5)),
        Row("vote, dropped, importance alone", DiffusionTokens(_importance(0.65), tokens=0.5)),
        Row("default, around attention", DiffusionTokens(Z(), tokens=0.5, around="attention")),
        Row("default, around blocks at the same MACs", DiffusionTokens(Z(keep=0.964))),
        Row("default, nothing removed early", DiffusionTokens(Z(), tokens=0.5, early=EARLY)),
        Row("default, scored in every 4th step", DiffusionTokens(Z(), tokens=0.5, every=4)),
    ]
    rows += [
        Row(name, DiffusionTokens(method, tokens=0.75))
        for name, method in (("default", Z()), ("ToMe", gp.ToMe()), ("random, dropped", Z(**RANDOM)))
    ]
    return rows


def _importance(keep: float) -> gp.ZeroTPrune:
    return gp.ZeroTPrune.published(keep=keep, score="vote", similarity_share=0.0, fall="count")


def diffusion_rows(quick: bool, work: Path | None = None) -> dict[str, Any]:
    """Both miniatures, and the speed of larger shapes.

    Args:
        quick: 8 captions, the first rows, no larger shapes.
        work: folder where finished rows are kept between runs.
    """
    found: dict[str, Any] = {}
    for name, rows in (("mmdit", transformer_rows()), ("unet", unet_rows())):
        found[name] = base_rows(bases()[name], rows[:3] if quick else rows, 8 if quick else PROMPTS, work)
    if not quick:
        found["speed"] = speed_rows()
    return found


def base_rows(base: Base, rows: list[Row], prompts: int, work: Path | None = None) -> dict[str, Any]:
    """Every row on the same captions and noise, and paired with the dense pictures."""
    pipe = base.load()
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(prompts)
    latents = latents_of(pipe, base, judge.prompts, SEED)
    pictures = pictures_of(pipe, latents)
    right = judge.grade(pictures, judge.scenes)["grade(all)"].double()
    dense = Dense(latents, pictures, right)
    found: dict[str, Any] = {
        "prompts": prompts,
        "steps": base.steps,
        "dense": judge.figures(pictures, latents, None),
        "rows": [],
    }
    for row in rows:
        settings = replace(row.settings, operating_point=dict(base.point))
        file = work and work / f"diffusion-{base.name}-{prompts}-{_slug(settings)}.json"
        if not file or not file.is_file():
            drawn = _drawn(pipe, base, row, settings, judge, dense)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(drawn, indent=1))
        else:
            drawn = json.loads(file.read_text())
        found["rows"].append(drawn)
    return found


def _drawn(pipe, base: Base, row: Row, settings: DiffusionTokens, judge: Judge, dense: Dense) -> dict[str, Any]:
    with gp.prune_tokens(pipe, settings) as handle:
        latents = latents_of(pipe, base, judge.prompts, SEED)
        figures = judge.figures(pictures_of(pipe, latents), latents, dense)
        report = handle.report()
        early = sum(
            share - before for (share, _), before in zip(settings.early, (0.0, *(s for s, _ in settings.early)))
        )
        average = getattr(report, "average_keep", report.keep)
        return {
            "name": row.name,
            "settings": settings.to_json(),
            "counts": {str(layer): count for layer, count in handle.counts.items()},
            "macs": report.keep,
            # about: early steps by their share of the timesteps; reuse in transformers saves scoring alone
            "macs_of_the_chain": early + (1 - early) * average,
            **figures,
            "time": _time(pipe, base, settings, judge.prompts[0]),
        }


def _slug(settings: DiffusionTokens) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(settings.to_json(), sort_keys=True).encode()).hexdigest()[:12]


@torch.no_grad()
def _time(pipe, base: Base, settings: DiffusionTokens, prompt: str, rounds: int = 8) -> dict[str, Any]:
    """One call of the denoiser as the pipeline makes it for 4 pictures, dense and reduced in turns."""
    model = denoiser(pipe)
    dense = copy.deepcopy(model)
    take_off(dense)
    inputs = _call_of(pipe, base, prompt)
    calls = {"dense": lambda: dense(**inputs), "reduced": lambda: model(**inputs)}
    return compare_latency(calls, "dense", rounds=rounds, warmup=1).ratio["reduced"].to_json()


def _call_of(pipe, base: Base, prompt: str) -> dict[str, Any]:
    caught: list[dict] = []
    hook = denoiser(pipe).register_forward_pre_hook(
        lambda m, args, kwargs: caught.append(_named(args, kwargs)), with_kwargs=True
    )
    try:
        options = {**base.options, "num_inference_steps": 2}
        pipe([prompt] * 4, output_type="latent", **options)
    finally:
        hook.remove()
    return caught[0]


def _named(args: tuple, kwargs: dict) -> dict:
    return {**dict(zip(("sample", "timestep"), args)), **kwargs}


# ---- speed of larger shapes, random weights -------------------------------------------------------------------------


def flux_shaped():
    """FLUX's blocks at a quarter of its width, 2 of two streams and 4 of one: 1024 px, 4096 + 512 tokens."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(num_layers=2, num_single_layers=4, num_attention_heads=6, joint_attention_dim=768)


def sdxl_shaped():
    """The level of SDXL with 4096 tokens at 1024 px, 640 channels, 8 blocks; a narrow level above it."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(64, 640),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
    )


@torch.no_grad()
def speed_rows(rounds: int = 3) -> dict[str, Any]:
    """Wall time of one forward call against the dense model with fused attention, batch 1."""
    shapes: dict[str, tuple[Callable, dict[str, DiffusionTokens]]] = {
        "FLUX-shaped, 4096 tokens": (
            flux_shaped,
            {
                "default, keep .75": DiffusionTokens(gp.ZeroTPrune(keep=0.75)),
                "ToMe, keep .75": DiffusionTokens(gp.ToMe(keep=0.75)),
            },
        ),
        "SDXL-shaped, 4096 tokens": (
            sdxl_shaped,
            {
                "default, half the tokens": DiffusionTokens(gp.ZeroTPrune(), tokens=0.5),
                "default, half the tokens, around attention": DiffusionTokens(
                    gp.ZeroTPrune(), tokens=0.5, around="attention"
                ),
                "ToMe, half the tokens": DiffusionTokens(gp.ToMe(), tokens=0.5),
            },
        ),
    }
    return {name: _shape_times(build().eval(), settings, rounds) for name, (build, settings) in shapes.items()}


def _shape_times(model, settings: dict[str, DiffusionTokens], rounds: int) -> dict[str, Any]:
    from genprune.tokens.hosts import host_of

    inputs = host_of(model).example_inputs(model)
    handles = {}
    twins = {}
    for name, one in settings.items():
        twins[name] = copy.deepcopy(model)
        for mine, theirs in zip(twins[name].modules(), model.modules()):
            mine._parameters.update(theirs._parameters)  # the weights exist once
        handles[name] = gp.prune_tokens(twins[name], one)
    calls = {"dense": lambda: model(**inputs)} | {name: lambda m=twin: m(**inputs) for name, twin in twins.items()}
    times = compare_latency(calls, "dense", rounds=rounds, warmup=1)
    return {name: {"macs": handles[name].report().keep, "time": times.ratio[name].to_json()} for name in settings} | {
        "dense_ms": times.median_ms["dense"],
        "threads": times.threads,
    }


# ---- for the page ---------------------------------------------------------------------------------------------------


def diffusion_lines(found: dict[str, Any]) -> list[str]:
    """The page's part: a table of each miniature, and of the larger shapes."""
    found = found.get("found", found)
    titles = {"mmdit": "MMDiT B (FLUX-shaped, 64 image tokens)", "unet": "U-Net A (64 and 16 image tokens)"}
    lines = []
    for base, title in titles.items():
        part = found.get(base)
        if not part:
            continue
        dense = part["dense"]["all_right"]["estimate"]
        lines += [
            f"### {title}",
            "",
            f"{part['prompts']} test captions, {part['steps']} steps, guided. Dense: {dense:.1%} of the captions all "
            "right. Time: one call for 4 pictures, dense call = 1.",
            "",
            "| MACs of a step | of the chain | method | all right | less dense | PSNR | latent error | time |",
            "|---:|---:|---|---:|---|---:|---:|---:|",
        ]
        for row in part["rows"]:
            less = row["all_right_less_dense"]
            cells = [
                f"{row['macs']:.1%}",
                f"{row['macs_of_the_chain']:.1%}",
                row["name"],
                f"{row['all_right']['estimate']:.1%}",
                f"{less['estimate']:+.1%} [{less['low']:+.1%}, {less['high']:+.1%}]",
                f"{row['psnr']['estimate']:.1f}",
                f"{row['latent_error']['estimate']:.3f}",
                f"{row['time']['estimate']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    for name, rows in found.get("speed", {}).items():
        lines += [
            f"### {name}: wall time of one call, random weights",
            "",
            "| method | MACs | time |",
            "|---|---:|---:|",
        ]
        for method, row in rows.items():
            if isinstance(row, dict):
                lines.append(f"| {method} | {row['macs']:.1%} | {row['time']['estimate']:.2f} |")
        lines.append("")
    return lines


def diffusion_figures(found: dict[str, Any]) -> dict[str, float]:
    """Main figures: the default against the dense pictures."""
    figures = {}
    for base, part in found.items():
        if base == "speed":
            for shape, rows in part.items():
                first = next(row for row in rows.values() if isinstance(row, dict))
                figures[f"diffusion_time_{shape.split('-')[0].lower()}_4096"] = first["time"]["estimate"]
            continue
        row = part["rows"][0]
        figures[f"diffusion_difference_{base}"] = row["all_right_less_dense"]["estimate"]
        figures[f"diffusion_macs_{base}"] = row["macs"]
    return figures
