"""Stage "evaluate": every figure of `docs/results/miniature*.json`, and the contact sheets of the docs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from genprune.miniature import grammar
from genprune.miniature.grader import Grader, chance, grade

from .assembly import assemble_pipeline, averaged_weights, distilled_weights, load_autoencoder
from .denoiser import decode
from .grading import stack
from .loop import seed_step
from .pictures import contact_sheet, to_tensor, to_uint8
from .provenance import command, describe_data, describe_training, provenance
from .report import write_report
from .sampling import SAMPLER, STUDENT_SAMPLER, loss_stage, sample_latents
from .statistics import (
    bootstrap_interval,
    frechet_distance,
    kernel_distance,
    nearest_pictures,
    smallest_difference,
)

SEED = 20  # of the test scenes and of the noise; training used other seeds
SHEET = 40  # pictures of the contact sheet, the first ones
# --arch: what it is, its scheduler, the architecture of half the width, where the figures go
KINDS = {
    "unet": ("miniature A: Stable-Diffusion-shaped", "DDIMScheduler", "unet_half", "miniature"),
    "mmdit": ("miniature B: FLUX-shaped", "FlowMatchEulerDiscreteScheduler", "mmdit_half", "miniature_mmdit"),
}


class Judge:
    """Grades pictures of given scenes and compares their features with those of other real scenes."""

    def __init__(self, grader: Grader, scenes: list[grammar.Scene]) -> None:
        self.grader, self.scenes = grader, scenes
        # the references are other scenes of the same split, so that no picture is compared with its own
        self.reference = self.features(stack(grammar.scenes("test", 2048, seed=SEED + 1)))

    @torch.no_grad()
    def features(self, pictures: Tensor) -> np.ndarray:
        return torch.cat([self.grader.features(part) for part in pictures.split(256)]).double().numpy()

    def row(self, pictures: Tensor, scenes: list[grammar.Scene] | None = None) -> dict:
        """Accuracies, KID and FD of uint8 pictures `(N, 3, 64, 64)`."""
        features = self.features(pictures)
        return {
            "grader": rounded(grade(pictures, scenes or self.scenes, self.grader)),
            "kid_miniature_grader": rounded(kernel_distance(features, self.reference)),
            "fd_miniature_grader": rounded(frechet_distance(features, self.reference)),
        }


def evaluate(arguments: argparse.Namespace) -> dict:
    """Draw test captions with every rung of the ladder, grade, compare, and write JSON, sheets and the docs' table."""
    output, docs = arguments.output_dir, arguments.docs_dir
    what, scheduler, half, name = KINDS[arguments.arch]
    grader = Grader()
    weights = load_file(averaged_weights(output / "grader"))
    # what is embedded is float16, so what is measured is float16 rounded
    grader.load_state_dict({name.removeprefix("grader."): t.half().float() for name, t in weights.items()})
    grader.eval().requires_grad_(False)
    scenes = grammar.scenes("test", arguments.num_scenes, seed=SEED)
    judge = Judge(grader, scenes)
    real = stack(scenes)

    ladder, pictures = climb(output, arguments.arch, judge)
    last = ladder[-1]
    right = all_right(pictures, scenes, grader)
    result = {
        "what": f"{what}, 64 px, trained from scratch on composed emoji scenes, nothing else",
        "command": command(arguments),
        "provenance": provenance(arguments, averaged_weights(output / arguments.arch)),
        "data": describe_data(scenes),
        "training": describe_training(output, arguments.arch),
        "sampler": {"scheduler": scheduler, **SAMPLER, "seed": f"{SEED} + index", "n": len(scenes)},
        "grader_on_real_test_scenes": rounded(grade_real(grader, 4000)),
        "reference_scenes": len(judge.reference),
        "chance": rounded(chance(scenes)),
        "rows": baseline_rows(judge, scenes, real, pictures, load_autoencoder(output))
        | student_rows(output, arguments.arch, judge, last["step"]),
        "ladder": ladder,
        "ladder_in_order": in_order(ladder),
        "half_width": half_width(output, half, judge, last["step"], last["samples_seen"]),
        "all_right_interval_95": rounded(bootstrap_interval(right)),
        "smallest_difference_in_all_right": rounded(smallest_difference(right)),
        "held_out_pairs": held_out(pictures, scenes, grader),
        **copying(pictures, real, scenes, right, arguments),
    }
    (docs / "results").mkdir(parents=True, exist_ok=True)
    (docs / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_report(docs, name)
    write_sheets(docs / name, scenes, real, pictures, load_autoencoder(output))
    return result


def climb(output: Path, arch: str, judge: Judge) -> tuple[list[dict], Tensor]:
    """One row for every rung of the training's ladder, and the last rung's pictures."""
    final = averaged_weights(output / arch)
    last_step = json.loads((final.parent / "state.json").read_text())["step"]
    batch = json.loads((output / arch / "config.json").read_text())["train_batch_size"]
    rungs = sorted((int(path.stem.split("-")[1]), path) for path in (output / arch).glob("ema-*.safetensors"))
    ladder = []
    for step, path in [rung for rung in rungs if rung[0] < last_step] + [(last_step, final)]:
        pictures = draw_all(output, arch, path, step, judge.scenes)
        loss = test_loss(output, arch, path, judge.scenes)
        ladder.append({"step": step, "samples_seen": step * batch, "test_loss": loss, **judge.row(pictures)})
    return ladder, pictures


@torch.no_grad()
def test_loss(output: Path, arch: str, weights: Path, scenes: list[grammar.Scene], rounds: int = 4) -> float:
    """Mean squared error of v-prediction, or of the velocity, on real test scenes; same noise for every model.

    Scores of drawn pictures end at 100 %; this does not, so it still tells good models apart.
    """
    pipeline = assemble_pipeline(output, arch, weights)
    pictures = stack(scenes).permute(0, 2, 3, 1).numpy()
    latents = torch.cat(
        [pipeline.vae.encode(to_tensor(part)).latent_dist.mode() for part in np.array_split(pictures, 8)]
    )
    stage = loss_stage(pipeline, latents, [grammar.caption(scene) for scene in scenes])
    losses = []
    for step in range(rounds * len(scenes) // 64):
        seed_step(SEED, step, rank=0)
        losses.append(float(stage.loss(step)[0]))
    return rounded(np.mean(losses), 5)


def in_order(ladder: list[dict]) -> dict[str, bool]:
    """Whether every further rung is at least as good as the one before, by each figure."""

    def rising(values: list[float]) -> bool:
        return all(before <= after for before, after in zip(values, values[1:], strict=False))

    figures = {name: rising([rung["grader"][name] for rung in ladder]) for name in ("object", "all")}
    distances = ("kid_miniature_grader", "fd_miniature_grader", "test_loss")
    return figures | {name: rising([-rung[name] for rung in ladder]) for name in distances}


def half_width(output: Path, arch: str, judge: Judge, step: int, samples_seen: int) -> dict | None:
    """The same figures of a denoiser of half the width, where one was trained for as many steps."""
    path = output / arch / f"checkpoint-{step}" / "ema.safetensors"
    if not path.is_file():
        return None
    pictures = draw_all(output, arch, path, step, judge.scenes)
    loss = test_loss(output, arch, path, judge.scenes)
    return {"step": step, "samples_seen": samples_seen, "test_loss": loss, **judge.row(pictures)}


def grade_real(grader: Grader, n: int) -> dict[str, float]:
    """How well the grader reads held-out scenes as the grammar draws them."""
    scenes = grammar.scenes("test", n, seed=SEED + 2)
    return grade(stack(scenes), scenes, grader)


def student_rows(output: Path, arch: str, judge: Judge, step: int) -> dict[str, dict]:
    """The 4-step student, and its teacher at as many steps; nothing where none was distilled."""
    if not any((output / f"{arch}_4_step").glob("checkpoint-*[0-9]")):
        return {}
    weights, student = averaged_weights(output / arch), distilled_weights(output, arch)
    short = {**SAMPLER, "steps": STUDENT_SAMPLER["steps"]}
    return {
        "4-step student": judge.row(draw_all(output, arch, weights, step, judge.scenes, student, STUDENT_SAMPLER)),
        "teacher at 4 steps": judge.row(draw_all(output, arch, weights, step, judge.scenes, sampler=short)),
    }


def draw_all(
    output: Path,
    arch: str,
    weights: Path,
    step: int,
    scenes: list[grammar.Scene],
    student: Path | None = None,
    sampler: dict = SAMPLER,
) -> Tensor:
    """uint8 `(N, 3, 64, 64)` of one rung in the embedded float16 values; noise of picture i is seeded by `SEED + i`.

    Latents are kept in the output folder, so that a rung is drawn once, whatever becomes of the decoder later.
    """
    pipeline = assemble_pipeline(output, arch, weights, student)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.half().float()
    kind = ("student-" if student else "") + ("" if sampler == SAMPLER else f"{sampler['steps']}-steps-")
    path = output / arch / f"latents-{kind}{step}-{len(scenes)}.safetensors"
    if not path.is_file():
        captions, drawn = [grammar.caption(scene) for scene in scenes], []
        for start in tqdm(range(0, len(captions), 64), desc=f"draw {step}"):
            drawn.append(sample_latents(pipeline, captions[start : start + 64], SEED + start, **sampler))
        save_file({"latents": torch.cat(drawn).contiguous()}, path)
    pictures = to_uint8(decode(pipeline.vae, load_file(path)["latents"]))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def baseline_rows(judge: Judge, scenes, real: Tensor, generated: Tensor, vae) -> dict[str, dict]:
    """The rows that every table needs: what no model, a wrong caption and a perfect model would get."""
    train = stack(grammar.scenes("train", 2048, seed=SEED))
    mean = train.float().mean(0).round().to(torch.uint8).expand(len(scenes), -1, -1, -1).contiguous()
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0))
    rows = {
        "real scenes": judge.row(real),
        "real scenes through the autoencoder": judge.row(reconstruct(vae, real)),
        "generated": judge.row(generated),
        "generated, shuffled prompts": judge.row(generated[order]),
        "mean image": judge.row(mean),
        "blank canvas": judge.row(torch.full_like(real, 255)),
    }
    return rows


@torch.no_grad()
def reconstruct(vae, pictures: Tensor) -> Tensor:
    """Encode and decode uint8 pictures `(N, 3, 64, 64)`."""
    decoded = []
    for part in pictures.split(128):
        tensor = to_tensor(part.permute(0, 2, 3, 1).numpy())
        decoded.append(to_uint8(vae.decode(vae.encode(tensor).latent_dist.mode()).sample))
    return torch.from_numpy(np.concatenate(decoded)).permute(0, 3, 1, 2).contiguous()


def all_right(pictures: Tensor, scenes, grader: Grader) -> np.ndarray:
    """1.0 where everything said is right, shape `(N,)`."""
    return np.array([grade(p[None], [s], grader)["all"] for p, s in zip(pictures, scenes, strict=True)])


def held_out(pictures: Tensor, scenes, grader: Grader) -> dict:
    """Scores of the captions whose object-on-colour pair never occurred in training, and of the others."""
    pairs = grammar.HELD_OUT_PAIRS
    unseen = [any((word, s.background) in pairs for word in (s.concept, s.other)) for s in scenes]
    mask = torch.tensor(unseen)
    split = {"unseen_pair": (pictures[mask], [s for s, u in zip(scenes, unseen, strict=True) if u])}
    split["other_test"] = (pictures[~mask], [s for s, u in zip(scenes, unseen, strict=True) if not u])
    return {name: {"n": len(s), "all": round(grade(p, s, grader)["all"], 4)} for name, (p, s) in split.items() if s}


def copying(generated: Tensor, real: Tensor, scenes, right: np.ndarray, arguments: argparse.Namespace) -> dict:
    """Distance to the nearest training picture, for generated and, as the floor, for real test pictures.

    Returns:
        `copying`, figures over all pictures, and `samples`, one entry for each picture of the contact sheet.
    """
    train = torch.cat([stack(grammar.scenes("train", 4096, arguments.seed, i)) for i in range(0, 32_768, 4096)])
    result = {"training_pictures_searched": len(train), "distance": "RMS over pixels, levels of 255"}
    samples = []
    for name, pictures in (("real_test", real), ("generated", generated)):
        first, second, _ = nearest_pictures(pictures, train)
        result[name] = {
            "median_nearest": round(float(np.median(first)), 2),
            "min_nearest": round(float(first.min()), 2),
            # a copy would be several times nearer to one training picture than to any other
            "copy_rate_nearest_below_half_of_second": round(float((first < 0.5 * second).mean()), 4),
        }
        samples = [
            {"caption": grammar.caption(scene), "all_right": bool(ok), "nearest_training_picture": round(float(d), 2)}
            for scene, ok, d in zip(scenes[:SHEET], right, first, strict=False)
        ]
    return {"copying": result, "samples": samples}


def rounded(value, digits: int = 4):
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return round(float(value), digits)


def write_sheets(folder: Path, scenes, real: Tensor, generated: Tensor, vae) -> None:
    """The pictures of the docs: the first test captions, unselected, and real scenes beside reconstructions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [grammar.caption(scene) for scene in scenes]
    as_rows = generated.permute(0, 2, 3, 1).numpy()
    contact_sheet(as_rows[:SHEET], folder / "generated.png", columns=8, zoom=2, captions=captions[:SHEET])
    both = torch.cat([real[:8], reconstruct(vae, real[:8]), generated[:8]]).permute(0, 2, 3, 1).numpy()
    labels = [f"{kind}: {c}" for kind in ("real", "autoencoder", "generated") for c in captions[:8]]
    contact_sheet(both, folder / "real_autoencoder_generated.png", columns=8, zoom=2, captions=labels)
