"""Where prompts and real pictures come from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from genprune.bench import coco_data, dataset_data, miniature_data, prompt_data
from genprune.bench.data import first
from genprune.errors import GenpruneError


def test_the_miniatures_captions_and_pictures():
    from genprune.miniature import caption, render, scenes

    data = miniature_data("test", count=5, seed=3)
    assert (len(data.prompts), len(data.real), len(data.scenes)) == (5, 10, 5)
    assert data.prompts == tuple(caption(scene) for scene in data.scenes)
    (batch,) = data.real_batches((64, 64))
    assert batch.dtype == torch.uint8 and batch.shape == (10, 3, 64, 64)
    # other scenes than those of the prompts
    assert np.array_equal(batch[4].permute(1, 2, 0).numpy(), render(scenes("test", 10, 3)[9]))
    assert miniature_data("test", count=5, seed=4).prompts != data.prompts
    assert first(data, 2).prompts == data.prompts[:2] and len(first(data, 2).scenes) == 2


def test_provenance_hashes_prompts_and_pixels():
    data, other = miniature_data("test", 3, seed=0), miniature_data("dev", 3, seed=0)
    here = data.provenance()
    assert here == miniature_data("test", 3, seed=0).provenance()
    assert here["split"] == "test" and here["seed"] == 0 and here["prompts"] == 3 and here["real_images"] == 6
    assert here["prompts_hash"] != other.provenance()["prompts_hash"]
    assert here["real_hash"] != other.provenance()["real_hash"]


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "images").mkdir()
    listed = {"images": [], "annotations": []}
    for key in range(6):
        Image.new("RGB", (40, 20), (40 * key, 0, 0)).save(tmp_path / "images" / f"{key}.png")
        listed["images"].append({"id": key, "file_name": f"{key}.png"})
        listed["annotations"] += [
            {"id": 100 - key, "image_id": key, "caption": f"first of {key} "},
            {"id": 200 + key, "image_id": key, "caption": "second"},
        ]
    (tmp_path / "captions.json").write_text(json.dumps(listed))
    return tmp_path


def test_coco_format_one_caption_a_picture_and_its_own(coco):
    data = coco_data(coco / "captions.json", coco / "images", count=2, seed=1)
    assert len(data.prompts) == 2 and len(data.real) == 4
    (batch,) = data.real_batches((16, 16))
    assert batch.shape == (4, 3, 16, 16)
    for prompt, image in zip(data.prompts, batch, strict=False):
        assert prompt == f"first of {int(image[0, 0, 0]) // 40}"
    assert coco_data(coco / "captions.json", coco / "images", 2, seed=1).prompts == data.prompts


def test_coco_errors(coco):
    (coco / "images" / "3.png").unlink()
    with pytest.raises(GenpruneError, match="lists 3.png, which is not in"):
        coco_data(coco / "captions.json", coco / "images", count=6)
    (coco / "broken.json").write_text('{"images": []')
    with pytest.raises(GenpruneError, match="cannot be read as MS-COCO captions.*captions_val2014.json"):
        coco_data(coco / "broken.json", coco / "images")


def test_a_local_folder_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "test").mkdir()
    rows = []
    for key in range(4):
        Image.new("RGB", (8, 8), (60 * key, 0, 0)).save(tmp_path / "test" / f"{key}.png")
        rows.append(json.dumps({"file_name": f"{key}.png", "caption": f"number {key}"}))
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(rows))
    data = dataset_data(str(tmp_path), caption_column="caption", count=2)
    (batch,) = data.real_batches((8, 8))
    for prompt, image in zip(data.prompts, batch, strict=False):
        assert prompt == f"number {int(image[0, 0, 0]) // 60}"
    with pytest.raises(GenpruneError, match="has no column 'text', it has image, caption.*--caption_column"):
        dataset_data(str(tmp_path))


def test_pictures_of_another_shape_are_cropped_not_squeezed(tmp_path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255  # the middle third is white
    Image.fromarray(wide).save(tmp_path / "0.png")
    listed = {"images": [{"id": 0, "file_name": "0.png"}], "annotations": [{"image_id": 0, "caption": "white"}]}
    (tmp_path / "captions.json").write_text(json.dumps(listed))
    (batch,) = coco_data(tmp_path / "captions.json", tmp_path, count=1).real_batches((20, 20))
    assert batch.min() == 255


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    assert prompt_data(tmp_path / "prompts.txt").prompts == ("a cat", "a dog")
    assert prompt_data(["x"]).prompts == ("x",)
    with pytest.raises(GenpruneError, match="gave no prompts"):
        prompt_data([])
    with pytest.raises(GenpruneError, match="cannot be read.*One prompt a line"):
        prompt_data(tmp_path / "absent.txt")
