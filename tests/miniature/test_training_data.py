"""What the training script reads, and the figures and drawings of its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parents[2]))

from genprune import miniature  # noqa: E402
from scripts.miniature.data import CaptionedImages, EmojiScenes  # noqa: E402
from scripts.miniature.denoiser import decode  # noqa: E402
from scripts.miniature.export import write_log  # noqa: E402
from scripts.miniature.pictures import to_tensor, to_uint8  # noqa: E402
from scripts.miniature.report import BEGIN, END, write_report  # noqa: E402
from scripts.miniature.sampling import sample_latents  # noqa: E402
from scripts.miniature.statistics import frechet_distance, kernel_distance, nearest_pictures  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"


def test_processes_share_the_pictures_of_one_without_overlap():
    data = EmojiScenes(seed=0, count=10)
    whole = np.concatenate(list(data.pictures(2)))
    halves = [list(data.pictures(2, rank, world=2)) for rank in (0, 1)]
    woven = [halves[number % 2][number // 2] for number in range(5)]
    assert np.array_equal(np.concatenate(woven), whole)
    assert len(data.captions()) == len(whole) == 10


def test_image_folder_replaces_the_scenes(tmp_path: Path):
    pytest.importorskip("datasets")
    rows = []
    for number in range(3):
        Image.new("RGB", (80 + 10 * number, 70), (number * 80, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "words": f"picture {number}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    data = CaptionedImages(None, tmp_path, caption_column="words")
    assert data.captions() == ["picture 0", "picture 1", "picture 2"]
    batch = np.concatenate(list(data.pictures(2)))
    assert batch.shape == (3, 64, 64, 3) and batch[2, 0, 0].tolist() == [160, 0, 0]
    with pytest.raises(ValueError, match="no column 'text'.*set --image_column"):
        CaptionedImages(None, tmp_path)


def test_distances_against_naive_formulas():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=(50, 5)) + 0.5
    assert abs(frechet_distance(x, x)) < 1e-9  # float64 noise of an eigenvalue decomposition
    # independent: the root of the symmetric product instead of eigenvalues of the plain one
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)

    def k(u, v):
        return (u @ v / 5 + 1) ** 3

    xx = np.mean([k(u, v) for i, u in enumerate(x) for j, v in enumerate(x) if i != j])
    yy = np.mean([k(u, v) for i, u in enumerate(y) for j, v in enumerate(y) if i != j])
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * np.mean([k(u, v) for u in x for v in y]), rel=1e-9)


def test_nearest_pictures_finds_the_planted_copy():
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 256, (5000, 3, 4, 4), generator=generator, dtype=torch.uint8)
    first, second, index = nearest_pictures(pool[[4321, 7]], pool)
    assert index.tolist() == [4321, 7]
    # float32 sums of squares of up to 255 cancel to about 1e-2 levels
    assert (first < 0.5).all() and (second > 20).all()


def test_pictures_survive_the_way_to_tensors_and_back():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(to_uint8(to_tensor(pictures)), pictures)


def test_training_log_keeps_the_last_record_of_a_repeated_step(tmp_path: Path):
    (tmp_path / "vae").mkdir()
    records = [{"step": 100, "loss": 3.0}, {"step": 200, "loss": 2.0}, {"step": 200, "loss": 1.0}]
    (tmp_path / "vae" / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_log(tmp_path, tmp_path / "short.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "short.jsonl").read_text().splitlines()]
    assert kept == [{"stage": "vae", **records[0]}, {"stage": "vae", **records[2]}]


@pytest.mark.parametrize("name", ["miniature", "miniature_mmdit"])
def test_the_page_shows_the_committed_figures(tmp_path: Path, name: str):
    if not (DOCS / "results" / f"{name}.json").is_file():
        pytest.skip("no result in this checkout")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{name}.json").write_text((DOCS / "results" / f"{name}.json").read_text())
    page, begin = (DOCS / "miniature.md").read_text(), BEGIN.format(name=name)
    before, after = page.split(begin)
    (tmp_path / "miniature.md").write_text(before + begin + END + after.split(END, 1)[1])
    write_report(tmp_path, name)
    assert (tmp_path / "miniature.md").read_text() == page
    (tmp_path / "miniature.md").write_text("no markers")
    with pytest.raises(ValueError, match="put them where the tables belong"):
        write_report(tmp_path, name)


@pytest.mark.skipif(
    not (Path(miniature.__file__).parent / "pipeline" / "model_index.json").is_file(), reason="no trained pipeline"
)
@pytest.mark.parametrize("name", miniature.NAMES)
def test_report_draws_what_the_stock_pipeline_draws(name: str):
    pipe = miniature.load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    captions = miniature.prompts("dev", 2)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    options = miniature.call_options(name) | {"num_inference_steps": 3}
    guidance = options.get("guidance_scale") or options.get("true_cfg_scale") or 1.0
    if "negative_prompt" in options:
        options["negative_prompt"] = [""] * 2
    stock = pipe(captions, generator=generators, output_type="pt", **options).images
    latents = sample_latents(pipe, captions, seed=5, steps=3, guidance_scale=guidance)
    own = decode(pipe.vae, latents).clamp(-1, 1) / 2 + 0.5
    # the same float32 operations, in another memory layout
    assert (own - stock).abs().max() < 1e-3
