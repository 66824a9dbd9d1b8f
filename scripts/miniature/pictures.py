"""Arrays to tensors and tensors to contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 `(B, H, W, 3)` to float `(B, 3, H, W)` in [-1, 1], channels last in memory."""
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def to_uint8(pictures: Tensor) -> np.ndarray:
    """Float `(B, 3, H, W)` in [-1, 1] to uint8 `(B, H, W, 3)`; values outside are clipped."""
    scaled = (pictures.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def contact_sheet(
    pictures: Tensor | np.ndarray,
    path: Path,
    columns: int,
    zoom: int = 2,
    captions: list[str] | None = None,
) -> None:
    """Write pictures as one PNG, row by row, each with its caption below in lines of at most 24 letters."""
    if isinstance(pictures, Tensor):
        pictures = to_uint8(pictures)
    side = pictures.shape[1] * zoom
    line, rows = 12, -(-len(pictures) // columns)
    text_height = 3 * line + 4 if captions else 0
    sheet = Image.new("RGB", (columns * (side + 6), rows * (side + text_height + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        x, y = index % columns * (side + 6) + 3, index // columns * (side + text_height + 6) + 3
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
        if captions:
            for number, text in enumerate(_wrap(captions[index], 24)[:3]):
                draw.text((x, y + side + 2 + number * line), text, fill="black")
    sheet.save(path, optimize=True)


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
