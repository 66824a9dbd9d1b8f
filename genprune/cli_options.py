"""Options that several commands share, by one name, type and help text."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Quantity(StrEnum):
    """What --keep is a share of."""

    params = "params"
    macs = "macs"
    units = "units"


class TokenQuantity(StrEnum):
    """What --keep is a share of, where tokens are reduced."""

    macs = "macs"
    latency = "latency"


class Compensate(StrEnum):
    """How `gp.compensate` does it."""

    least_squares = "least_squares"
    bias = "bias"


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A pipeline's or model's folder, a hub id (owner/name), a timm name, or `miniature` (embedded).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier result in --out.")]
Keep = Annotated[float, typer.Option(help="Share of the whole dense denoiser that stays, above 0 and up to 1.")]
Of = Annotated[Quantity, typer.Option(help="What --keep is a share of.")]
Seed = Annotated[int, typer.Option(help="Of every random draw.")]
