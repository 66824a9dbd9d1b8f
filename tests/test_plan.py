"""Plans as data: both forms on disk, damaged files, composition, comparison."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import genprune
from genprune.errors import PlanMismatch
from genprune.plan import FORMAT_VERSION, PlanBase, PruningPlan


@pytest.fixture
def plan() -> PruningPlan:
    return PruningPlan(
        base=PlanBase("UNet2DConditionModel", "ab" * 32),
        keep={"a.attn:heads": torch.tensor([True, False, True, True]), "a.ff:neurons": torch.arange(6) > 3},
        ops=({"op": "fold_bias", "path": "a.ff"},),
        operating_point={"height": 64, "width": 48, "text_length": 77, "batch": 1},
        figures={"params": 70.0, "dense_params": 100.0},
        made_by={"method": "Taylor", "seed": 3},
        tensors={"a.ff": torch.arange(3.0)},
    )


@pytest.mark.parametrize("name", ["plan", "plan.safetensors"])
def test_a_saved_plan_comes_back_equal(plan: PruningPlan, tmp_path: Path, name: str):
    assert plan.save(tmp_path / name) == tmp_path / name
    loaded = PruningPlan.load(tmp_path / name)
    assert loaded == plan
    assert loaded.to_json() == json.loads(json.dumps(plan.to_json()))
    assert loaded.keep["a.attn:heads"].dtype == torch.bool
    loaded.save(tmp_path / name)  # over the first one
    assert PruningPlan.load(tmp_path / name) == plan


def test_a_folder_holds_json_that_a_person_can_read(plan: PruningPlan, tmp_path: Path):
    plan.save(tmp_path / "plan")
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["plan.json", "plan.safetensors"]
    data = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert data["format_version"] == FORMAT_VERSION == 1
    assert data["sites"] == {"a.attn:heads": [3, 4], "a.ff:neurons": [2, 6]}
    assert not list(tmp_path.glob(".*"))  # no temporary is left


def edited(plan: PruningPlan, folder: Path, change) -> Path:
    plan.save(folder)
    data = json.loads((folder / "plan.json").read_text())
    change(data)
    (folder / "plan.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda d: d.update(made_bye={}),
            "unknown key 'made_bye', nearest name: 'made_by'.*Make it again, or restore",
        ),
        (
            lambda d: d.update(format_version=2),
            r"has format 2, this genprune reads up to 1. Upgrade with `pip install -U",
        ),
        (lambda d: d.pop("format_version"), "has no format_version; expected the JSON object that plan.save writes"),
        (
            lambda d: d["sites"].update({"a.attn:heads": [2, 4]}),
            "names other sites or widths than its masks",
        ),
        (lambda d: d["sites"].pop("a.ff:neurons"), "names other sites or widths than its masks"),
        (lambda d: d["sites"].update({"b:heads": [1, 2]}), "names other sites or widths than its masks"),
        (lambda d: d.pop("base"), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(base={"host": "X"}), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(sites=[1, 2]), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(ops=["fold"]), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(base={"host": 5, "sites_sha256": None}), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(figures={"params": "many"}), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(figures=[]), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(made_by=[1]), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(made_by={"budget": 1}), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(operating_point={"height": "x"}), "lacks a part or has one of the wrong type"),
        (lambda d: d.update(format_version=True), "has no format_version"),
        (lambda d: d.update(format_version=0), "has no format_version"),
        (
            lambda d: d.update(sites=dict(zip(reversed(d["sites"]), d["sites"].values()))),
            "names other sites or widths than its masks",
        ),
    ],
)
def test_hand_edited_json_is_refused(plan: PruningPlan, tmp_path: Path, change, text: str):
    with pytest.raises(PlanMismatch, match=text):
        PruningPlan.load(edited(plan, tmp_path / "plan", change))


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 1', "[1, 2]", "null"])
def test_json_that_is_not_whole_is_refused(plan: PruningPlan, tmp_path: Path, content: str):
    plan.save(tmp_path / "plan")
    (tmp_path / "plan" / "plan.json").write_text(content)
    with pytest.raises(PlanMismatch, match="is not whole JSON|has no format_version"):
        PruningPlan.load(tmp_path / "plan")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", ["plan", "plan.safetensors"])
def test_a_truncated_file_is_refused(plan: PruningPlan, tmp_path: Path, name: str, share: float):
    path = plan.save(tmp_path / name)
    tensors = path / "plan.safetensors" if path.is_dir() else path
    content = tensors.read_bytes()
    tensors.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(PlanMismatch, match="is not a whole safetensors file .* Make the plan again, or restore"):
        PruningPlan.load(path)


def test_half_a_folder_and_no_plan_are_refused(plan: PruningPlan, tmp_path: Path):
    plan.save(tmp_path / "plan")
    (tmp_path / "plan" / "plan.safetensors").unlink()
    for path in (tmp_path / "plan", tmp_path / "nothing", tmp_path):
        with pytest.raises(PlanMismatch, match="no plan at .*expected a folder with plan.json.*plan.save"):
            PruningPlan.load(path)


def test_a_safetensors_file_of_weights_is_no_plan(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(PlanMismatch, match="safetensors file without a plan. Pass a file that plan.save wrote"):
        PruningPlan.load(tmp_path / "model.safetensors")


def test_a_failed_save_leaves_the_old_plan(plan: PruningPlan, tmp_path: Path):
    plan.save(tmp_path / "plan")
    bad = replace(plan, made_by={"criterion": object()})  # no JSON
    with pytest.raises(TypeError):
        bad.save(tmp_path / "plan")
    assert PruningPlan.load(tmp_path / "plan") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(2, 2, dtype=torch.bool), torch.tensor(True)])
def test_a_mask_is_a_bool_vector(plan: PruningPlan, mask: torch.Tensor):
    with pytest.raises(PlanMismatch, match=r"keep\['x'\] is torch.* expected a bool vector .* Pass e.g. scores >= "):
        replace(plan, keep={"x": mask})


def test_then_indexes_what_the_first_plan_left(plan: PruningPlan):
    later = replace(
        plan,
        keep={"a.attn:heads": torch.tensor([True, False, True]), "b.ff:neurons": torch.tensor([False, True])},
        ops=({"op": "late"},),
        figures={"params": 50.0},
        made_by={"method": "Random"},
        tensors={"b.ff": torch.zeros(1)},
    )
    joined = plan.then(later)
    assert joined.keep["a.attn:heads"].tolist() == [True, False, False, True]
    assert joined.keep["a.ff:neurons"].tolist() == plan.keep["a.ff:neurons"].tolist()
    assert joined.keep["b.ff:neurons"].tolist() == [False, True]
    assert [op["op"] for op in joined.ops] == ["fold_bias", "late"]
    assert joined.figures == {"params": 50.0} and set(joined.tensors) == {"a.ff", "b.ff"}
    assert joined.made_by == {"first": plan.made_by, "then": {"method": "Random"}}


def test_then_refuses_what_does_not_fit(plan: PruningPlan):
    with pytest.raises(
        PlanMismatch, match="has 4 units at 'a.attn:heads', but 3 are left there. Make it on the model"
    ):
        plan.then(plan)
    other = replace(plan, base=PlanBase("UNet2DModel", "00"))
    with pytest.raises(PlanMismatch, match="is for UNet2DModel, this one for UNet2DConditionModel; expected the same"):
        plan.then(other)


def test_then_is_associative():
    source = torch.Generator().manual_seed(0)
    base, plans, size = PlanBase("Host", "00"), [], 40
    for _ in range(3):
        mask = torch.rand(size, generator=source) < 0.7
        plans.append(PruningPlan(base, {"x:neurons": mask}))
        size = int(mask.sum())
    first, second, third = plans
    left, right = first.then(second).then(third), first.then(second.then(third))
    assert torch.equal(left.keep["x:neurons"], right.keep["x:neurons"])
    assert int(left.keep["x:neurons"].sum()) == size


def test_overlap_is_the_share_of_removals_in_common(plan: PruningPlan):
    def removing(*units: int) -> PruningPlan:
        mask = torch.ones(8, dtype=torch.bool)
        mask[list(units)] = False
        return replace(plan, keep={"x:neurons": mask})

    assert removing(1, 2).overlap(removing(1, 2)) == 1.0
    assert removing(1, 2).overlap(removing(3)) == 0.0
    assert removing(1, 2, 3).overlap(removing(3, 4)) == 0.25
    assert removing().overlap(removing()) == 1.0


def test_equality_sees_masks_and_tensors(plan: PruningPlan):
    assert plan == replace(plan)
    assert plan != replace(plan, keep={**plan.keep, "a.attn:heads": torch.tensor([False, True, True, True])})
    assert plan != replace(plan, tensors={"a.ff": torch.zeros(3)})
    assert plan != replace(plan, figures={})
    assert plan != "plan"


def test_a_plan_prints_what_goes_and_what_it_costs(plan: PruningPlan):
    assert str(plan).splitlines()[:5] == [
        "PruningPlan for UNet2DConditionModel",
        "  heads            1 of 4 units go, at 1 sites",
        "  neurons          4 of 6 units go, at 1 sites",
        "  operators        1 x fold_bias",
        "  params     70 of 100 (70.0%)",
    ]


# torch-fidelity reads its Inception weights with torch.load alone: it gets a temporary file that we wrote.
_WRITES_FOR_A_HOST = {"metrics/inception.py"}


def test_nothing_of_the_package_unpickles():
    """No pickle: a file from anybody runs no code. Foreign weights are read with `weights_only=True` alone."""
    package = Path(genprune.__file__).parent
    for path in package.rglob("*.py"):
        where = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
                assert safe, f"{where}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.save":
                assert where in _WRITES_FOR_A_HOST, f"{where}:{node.lineno}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {"pickle", "dill", "joblib"} & {name.split(".")[0] for name in names}, where
    assert "torch.load" not in (package / "plan.py").read_text(encoding="utf-8")


def test_a_folder_of_other_files_is_not_replaced(plan: PruningPlan, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("four years")
    with pytest.raises(PlanMismatch, match="a folder with other files; expected a new folder or one of a plan"):
        plan.save(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]


def test_masks_take_a_bit_a_unit(tmp_path: Path):
    mask = torch.rand(80_003, generator=torch.Generator().manual_seed(0)) > 0.5
    plan = PruningPlan(PlanBase("UNet2DConditionModel", "ab" * 32), {"a.ff:neurons": mask, "b:heads": ~mask[:3]})
    assert plan.save(tmp_path / "plan.safetensors").stat().st_size < 80_003 / 8 + 1500
    assert PruningPlan.load(tmp_path / "plan.safetensors") == plan
