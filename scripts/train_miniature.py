"""Train the embedded miniatures from scratch: a small Stable-Diffusion-shaped and a small FLUX-shaped text-to-image
pipeline (`--arch unet`, `--arch mmdit`), stage by stage.

    accelerate launch scripts/train_miniature.py --stage vae --output_dir runs/miniature
    accelerate launch scripts/train_miniature.py --stage denoiser --output_dir runs/miniature
    accelerate launch scripts/train_miniature.py --stage denoiser --arch mmdit --output_dir runs/miniature
    accelerate launch scripts/train_miniature.py --stage distill --arch mmdit --output_dir runs/miniature
    accelerate launch scripts/train_miniature.py --stage decoder --output_dir runs/miniature
    accelerate launch scripts/train_miniature.py --stage grader --output_dir runs/miniature
    accelerate launch scripts/train_miniature.py --stage export --output_dir runs/miniature
    accelerate launch scripts/train_miniature.py --stage evaluate --output_dir runs/miniature

Each stage keeps its checkpoints in `{output_dir}/{stage}` (the denoiser in `{output_dir}/{arch}`) and goes on from
there with `--resume_from_checkpoint latest`, to the same weights as without the interruption. The pictures are
composed emoji scenes; `--dataset_name` or `--train_data_dir` train the same pipeline on other captioned images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.miniature.assembly import ARCHITECTURES  # noqa: E402
from scripts.miniature.data import CaptionedImages, EmojiScenes  # noqa: E402
from scripts.miniature.loop import LoopConfig, train  # noqa: E402

# what each trained stage uses where a flag is not given; the embedded miniature was trained with these
DEFAULTS = {
    "vae": {"max_train_steps": 3400, "learning_rate": 2e-3, "train_batch_size": 16, "mixed_precision": "bf16"},
    "decoder": {"max_train_steps": 1200, "learning_rate": 1e-3, "train_batch_size": 16, "mixed_precision": "bf16"},
    "denoiser": {"max_train_steps": 3900, "learning_rate": 1.5e-3, "train_batch_size": 48, "mixed_precision": "no"},
    "distill": {"max_train_steps": 700, "learning_rate": 5e-4, "train_batch_size": 64, "mixed_precision": "no"},
    "grader": {"max_train_steps": 900, "learning_rate": 2e-3, "train_batch_size": 64, "mixed_precision": "no"},
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=[*DEFAULTS, "export", "evaluate"])
    parser.add_argument("--arch", default="unet", choices=list(ARCHITECTURES), help="kind of denoiser")
    parser.add_argument("--output_dir", type=Path, required=True, help="checkpoints, previews and logs of all stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume_from_checkpoint", help="'latest' or a checkpoint folder")
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--train_batch_size", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--lr_scheduler", choices=["warmup_stable_decay", "cosine", "constant"])
    parser.add_argument("--lr_warmup_steps", type=int)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"])
    parser.add_argument("--checkpointing_steps", type=int)
    parser.add_argument("--checkpoints_total_limit", type=int)
    parser.add_argument("--preview_steps", type=int, help="pictures for a person to look at, every so many steps")
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1)
    parser.add_argument("--pool_size", type=int, default=32_768, help="distinct training pictures of the denoiser")
    data = parser.add_argument_group("other data than the emoji scenes")
    data.add_argument("--dataset_name", help="hub id of a dataset with images and captions")
    data.add_argument("--train_data_dir", type=Path, help="folder in the imagefolder layout, with metadata.jsonl")
    data.add_argument("--image_column", default="image")
    data.add_argument("--caption_column", default="text")
    result = parser.add_argument_group("export and evaluate")
    result.add_argument("--export_dir", type=Path, help="default: genprune/miniature for export")
    result.add_argument("--denoiser_weights", type=Path, help="default: the last averaged weights of the denoiser")
    result.add_argument("--docs_dir", type=Path, default=Path(__file__).parents[1] / "docs")
    result.add_argument("--num_scenes", type=int, default=512, help="test captions that are drawn and graded")
    return parser.parse_args(argv)


def loop_config(arguments: argparse.Namespace) -> LoopConfig:
    """The stage's defaults with every flag that was given on top."""
    fields = {field.name for field in dataclasses.fields(LoopConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in fields and value is not None}
    defaults = {name: value for name, value in DEFAULTS[arguments.stage].items() if name in fields}
    folder = {"denoiser": arguments.arch, "distill": f"{arguments.arch}_4_step"}.get(arguments.stage, arguments.stage)
    return LoopConfig(**{**defaults, **given, "output_dir": arguments.output_dir / folder})


def batch_size_of(arguments: argparse.Namespace) -> int:
    """Pictures a step, of all processes together."""
    return arguments.train_batch_size or DEFAULTS[arguments.stage]["train_batch_size"]


def load_data(arguments: argparse.Namespace) -> EmojiScenes | CaptionedImages:
    if arguments.dataset_name or arguments.train_data_dir:
        return CaptionedImages(
            arguments.dataset_name,
            arguments.train_data_dir,
            arguments.image_column,
            arguments.caption_column,
            count=arguments.pool_size,
        )
    return EmojiScenes(arguments.seed, arguments.pool_size)


def build_stage(arguments: argparse.Namespace):
    """The thing to train, with fresh weights (or, for the decoder, the first stage's)."""
    from scripts.miniature import assembly

    torch.manual_seed(arguments.seed)
    batch_size = batch_size_of(arguments)
    if arguments.stage == "grader":
        from genprune.miniature.grader import Grader
        from scripts.miniature.grading import GraderStage

        return GraderStage(Grader(), arguments.seed, batch_size)
    data = load_data(arguments)
    if arguments.stage in ("vae", "decoder"):
        return assembly.autoencoder_stage(arguments, data, batch_size)
    if arguments.stage == "distill":
        return assembly.distillation_stage(arguments, data, batch_size)
    return assembly.denoiser_stage(arguments, data, batch_size)


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = parse_arguments(argv)
    if arguments.stage == "export":
        from scripts.miniature.export import export

        export(arguments)
    elif arguments.stage == "evaluate":
        from scripts.miniature.evaluate import evaluate

        evaluate(arguments)
    else:
        config = loop_config(arguments)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
        shown["train_batch_size"] = batch_size_of(arguments)
        (config.output_dir / "config.json").write_text(json.dumps(shown, indent=1) + "\n")
        train(build_stage(arguments), config, arguments.resume_from_checkpoint)


if __name__ == "__main__":
    main()
