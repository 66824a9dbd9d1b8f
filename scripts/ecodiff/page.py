"""Tables, curves and picture grids of the comparison; generated from the JSON, never edited."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file

from genprune.files import whole_file

MARK = "<!-- begin: generated from docs/results/ecodiff.json -->", "<!-- end: generated -->"
GRID = ("dense", "random", "magnitude", "taylor", "obs", "obs + least squares", "ecodiff", "ecodiff + least squares")
TITLES = {
    "unet": "Miniature A (U-Net, 20 DDIM steps)",
    "mmdit": "Miniature B (FLUX-shaped, 20 Euler steps)",
    "mmdit-4-step": "Miniature B distilled to 4 steps",
}


def main_figures(parts: dict) -> dict[str, float]:
    """PSNR to the dense pictures and share of captions all right, of the main rows at 70 % of MACs."""
    found = {}
    for base, part in parts.items():
        for row in part["rows"].values():
            if row.get("keep") == 0.7 and row.get("of") == "macs" and "seed" not in row["label"]:
                name = re.sub(r"[^a-z0-9]+", "_", f"{base} {row['label']}".lower())
                found[f"psnr_{name}"] = row["psnr"]["estimate"]
                found[f"all_right_{name}"] = row["all_right"]["estimate"]
    return found


def write_page(docs: Path, result: dict, work: Path, prompts: list[str]) -> None:
    """Put the tables between the marks of `ecodiff.md`, and write the picture grids beside it."""
    lines = []
    for base, part in result["bases"].items():
        lines += [f"### {TITLES.get(base, base)}", "", *_table(part["rows"]), ""]
        picture = docs / "ecodiff" / f"{base}.png"
        if _grid(part["rows"], work / base / f"drawn-{result['data']['test_captions']}", prompts, picture):
            lines += [f"![{base} at 70 % of MACs]({picture.relative_to(docs)})", ""]
            lines += ["*The first test captions, unselected, at 70 % of MACs; rows as named.*", ""]
    page = docs / "ecodiff.md"
    text = page.read_text()
    begin, end = text.index(MARK[0]) + len(MARK[0]), text.index(MARK[1])
    with whole_file(page) as temporary:
        temporary.write_text(text[:begin] + "\n\n" + "\n".join(lines).rstrip() + "\n\n" + text[end:])


def _table(rows: dict) -> list[str]:
    dense = rows["dense"]
    lines = [
        f"Dense: {_percent(dense['all_right'])} of the captions all right, KID {dense['kid']:.3f}.",
        "",
        "| kept | candidate | params | MACs | PSNR to dense (dB) | SSIM | latent error | all right | KID |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows.values():
        if "label" not in row:
            continue
        costs = row["costs"]
        params = f"{costs['params'] / costs['dense_params']:.1%}" if "params" in costs else "100 %"
        macs = f"{costs['macs'] / costs['dense_macs']:.1%}" if "macs" in costs else f"{costs['steps']} steps"
        psnr, error = row["psnr"], row["latent_error"]
        lines.append(
            f"| {row['keep']:.0%} of {row['of']} | {row['label']} | {params} | {macs} | "
            f"{psnr['estimate']:.2f} [{psnr['low']:.2f}, {psnr['high']:.2f}] | {row['ssim']['estimate']:.4f} | "
            f"{error['estimate']:.2e} | {_percent(row['all_right'])} | {row['kid']:.3f} |"
        )
    return lines


def _percent(interval: dict) -> str:
    return f"{interval['estimate']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def _grid(rows: dict, folder: Path, prompts: list[str], path: Path, columns: int = 6) -> bool:
    """One row of pictures for each main candidate at 70 % of MACs."""
    from scripts.miniature.pictures import contact_sheet

    labels = {
        row.get("label", name): name for name, row in rows.items() if name == "dense" or name.endswith("@0.7-macs")
    }
    pictures, captions = [], []
    for label in GRID:
        if label in labels and (folder / f"{labels[label]}.safetensors").is_file():
            drawn = load_file(folder / f"{labels[label]}.safetensors")["pictures"][:columns]
            pictures.append(drawn.permute(0, 2, 3, 1).numpy())
            captions += [f"{label}: {prompt}" for prompt in prompts[:columns]]
    if not pictures:
        return False
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(np.concatenate(pictures), path, columns=columns, zoom=2, captions=captions)
    return True
