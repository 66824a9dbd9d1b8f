"""Build the sprite atlas of the miniature from the MIT-licensed npm package `@lobehub/fluent-emoji-3d` 1.1.0.

npm pack @lobehub/fluent-emoji-3d@1.1.0
python scripts/miniature/sprites.py --package lobehub-fluent-emoji-3d-1.1.0.tgz
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

# word in captions -> code point of the picture; every word is one token, every picture nameable at 24 px
CODE_POINTS = {
    "apple": "1f34e",
    "banana": "1f34c",
    "watermelon": "1f349",
    "carrot": "1f955",
    "pizza": "1f355",
    "donut": "1f369",
    "mushroom": "1f344",
    "cactus": "1f335",
    "cat": "1f431",
    "dog": "1f436",
    "frog": "1f438",
    "pig": "1f437",
    "penguin": "1f427",
    "fish": "1f420",
    "car": "1f697",
    "house": "1f3e0",
    "umbrella": "2602-fe0f",
    "star": "2b50",
    "diamond": "1f48e",
    "snowman": "26c4",
    # never named in a caption: they only widen what the autoencoder has seen
    "rocket": "1f680",
    "butterfly": "1f98b",
    "turtle": "1f422",
    "burger": "1f354",
}
CELL = 96  # px; the largest object drawn by the grammar is well below this
COLUMNS = 6


def build_atlas(package: Path, out: Path) -> None:
    """Crop each emoji to its content, centre it in a 96 px cell, write `sprites.png` and `sprites.json` to `out`."""
    rows = -(-len(CODE_POINTS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    cells = {}
    with tarfile.open(package) as archive:
        for index, (word, code_point) in enumerate(CODE_POINTS.items()):
            data = archive.extractfile(f"package/assets/{code_point}.webp").read()
            picture = Image.open(io.BytesIO(data)).convert("RGBA")
            picture = picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())
            scale = CELL / max(picture.size)
            picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
            x, y = index % COLUMNS * CELL, index // COLUMNS * CELL
            atlas.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
            cells[word] = {"x": x, "y": y, "code_point": code_point}
    out.mkdir(parents=True, exist_ok=True)
    atlas.save(out / "sprites.png", optimize=True)
    source = "npm @lobehub/fluent-emoji-3d 1.1.0 (MIT); Fluent Emoji by Microsoft (MIT)"
    (out / "sprites.json").write_text(json.dumps({"cell": CELL, "source": source, "sprites": cells}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, required=True, help="tarball written by npm pack")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "genprune" / "miniature")
    arguments = parser.parse_args()
    build_atlas(arguments.package, arguments.out)
