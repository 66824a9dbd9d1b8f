#!/usr/bin/env python
"""Train a deep and narrow ViT classifier on Fashion-MNIST: a base to prune whose accuracy is worth measuring.

    python scripts/train_vit.py --data fashion/usr/share/datasets/fashion-mnist --out vit        # one CPU core
    python scripts/train_vit.py --data ... --out vit-quick --quick                               # a minute, for a look

Writes `model` (a folder for `genprune.load_model`), `checkpoint`, and `result.json` with accuracy and provenance.
5,000 training images are held out as development images; decisions are made on those, never on the test images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

QUICK_IMAGES = 6_400


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the four IDX files of Fashion-MNIST (*-ubyte.gz)")
    add("--out", type=Path, required=True, help="folder to write")
    add("--epochs", type=int, default=5)
    add("--batch-size", type=int, default=64)
    add("--learning-rate", type=float, default=1e-3)
    add("--embed-dim", type=int, default=128)
    add("--depth", type=int, default=12)
    add("--heads", type=int, default=4)
    add("--patch-size", type=int, default=7, help="pixels; 4 costs three times as much")
    add("--class-token", action="store_true", help="pool by a class token, not by the mean of the patches")
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="bf16: forward calls under autocast")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on after the last whole epoch in --out")
    add("--quick", action="store_true", help=f"one epoch on {QUICK_IMAGES:,} images: a check, not a result")
    return parser.parse_args(arguments)


def build(args: argparse.Namespace):
    """The ViT with fresh weights; square patches, and a class token where asked for."""
    import timm
    import torch

    torch.manual_seed(args.seed)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=args.patch_size,
        in_chans=1,
        num_classes=10,
        embed_dim=args.embed_dim,
        depth=args.depth,
        num_heads=args.heads,
        class_token=args.class_token,  # without one the mean of the patches is pooled, which learns faster
        global_pool="token" if args.class_token else "avg",
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    import genprune as gp
    from genprune.bench.result import environment
    from genprune.files import whole_file
    from scripts.vit.data import DEV_SEED, data_hash, load_fashion_mnist
    from scripts.vit.training import Training, accuracy, train

    data = load_fashion_mnist(args.data)
    if args.quick:
        data = data._replace(
            train_images=data.train_images[:QUICK_IMAGES], train_labels=data.train_labels[:QUICK_IMAGES]
        )
    settings = Training(
        epochs=1 if args.quick else args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        mixed_precision=args.mixed_precision,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    model = build(args)
    progress = train(model, data, settings, args.out, args.resume)
    gp.save_model(model, args.out / "model")
    result = {
        **environment(),
        "kind": "ViT classifier training",
        "quick": args.quick,
        "seeds": {"training": args.seed, "development split": DEV_SEED},
        "data": {
            "name": "Fashion-MNIST",
            "sha256": data_hash(args.data),
            "train_images": len(data.train_images),
            "dev_images": len(data.dev_images),
            "test_images": len(data.test_images),
        },
        "model": {name: getattr(args, name) for name in ("embed_dim", "depth", "heads", "patch_size", "class_token")},
        "settings": dataclasses.asdict(settings),
        "figures": {
            "dev_accuracy": accuracy(model, data.dev_images, data.dev_labels),
            "test_accuracy": accuracy(model, data.test_images, data.test_labels),
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "seconds": progress.seconds,
            "cpu_seconds": progress.cpu_seconds,
        },
        "curve": progress.curve,
    }
    with whole_file(args.out / "result.json") as written:
        written.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(result["figures"], indent=2))


if __name__ == "__main__":
    main()
