"""`import genprune` loads torch alone, and imports inside the package go only downwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOSTS = ("diffusers", "timm", "transformers", "torchvision", "safetensors", "accelerate", "peft", "scipy", "typer")

# The floors of the house, lowest first (docs/architecture.md): a room imports its own floor and those below.
# Imports inside functions count as well; only `TYPE_CHECKING` blocks do not.
FLOORS = (
    ("errors", "interrupts", "files", "plan_format", "plan", "miniature"),
    ("sites", "replacements", "operators", "families"),
    (
        "operations",
        "gates",
        "cutting",
        "cut_guards",
        "costs",
        "widths",
        "saving",
        "pruned_models",
        "stock",
        "slice_loading",
        "lora",
        "lora_names",
        "ip_adapters",
        "untouched",
    ),
    ("denoising", "metrics"),
    ("criteria", "masks", "allocation", "schedules", "recovery", "layers", "tokens", "scores"),
    ("methods", "planning", "presets"),
    ("routers",),
    ("pipelines",),
    ("bench",),
    (
        "model_source",
        "inspection",
        "prune_run",
        "recover_run",
        "tokens_run",
        "route_run",
        "demo",
        "demo_page",
        "console",
        "cli_options",
        "cli_tokens",
        "cli_route",
        "cli",
    ),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def source_files() -> list[tuple[str, Path]]:
    """(dotted module name, file) of every module of the package, the two mapped folders included."""
    found = []
    for folder in ("genprune", "pipelines", "routers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = parts if folder == "genprune" else ["genprune", *parts]
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imported_rooms(name: str, path: Path) -> set[tuple[str, int]]:
    """(room, line) of each import of this package in a file, the relative ones included."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    rooms = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    skipped = {child for node in for_types for child in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*above, *filter(None, [node.module, alias.name])]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for imported in names:
            root, _, rest = imported.partition(".")
            if root == "genprune" and rest:
                rooms.add((rest.split(".")[0], node.lineno))
    return rooms


def test_every_room_has_a_floor():
    missing = {name.split(".")[1] for name, _ in source_files() if "." in name} - FLOOR_OF.keys()
    assert not missing, f"rooms without a floor: {sorted(missing)}; add them to FLOORS where they belong"


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n) for n, p in source_files() if "." in n])
def test_imports_go_downwards(name: str, path: Path):
    own = name.split(".")[1]
    for room, line in sorted(imported_rooms(name, path)):
        if room in FLOOR_OF:  # otherwise a public name of the package, such as `__version__`
            assert FLOOR_OF[room] <= FLOOR_OF[own], f"{path.relative_to(ROOT)}:{line} imports '{room}' from above"


def fresh(code: str) -> subprocess.CompletedProcess:
    """Run code in a new interpreter with this checkout first on its path."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_import_loads_torch_alone():
    done = fresh(
        f"import genprune, torch; print([m for m in {HOSTS!r} if m in sys.modules], torch.cuda.is_initialized())"
    )
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr


def test_sites_of_a_model_need_its_host_alone():
    done = fresh(
        "import timm, genprune; m = timm.create_model('vit_tiny_patch16_224', depth=1, embed_dim=32, num_heads=2); "
        "genprune.find_sites(m); print('diffusers' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import genprune

    with pytest.raises(AttributeError, match="module 'genprune' has no attribute 'prune'"):
        getattr(genprune, "prune")  # noqa: B009
    assert {"cut", "find_sites", "PrunedUNet2DConditionModel"} <= set(dir(genprune))
