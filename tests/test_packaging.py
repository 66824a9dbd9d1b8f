"""What an installed copy has: every sub-package, the data files, a light import, and the commands of the README."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_listed_as_a_package():
    found = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "genprune").rglob("__init__.py")}
    found |= {f"genprune.{name}" for name in ("pipelines", "routers") if (ROOT / name / "__init__.py").is_file()}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_pipelines_and_routers_install_inside_the_package():
    script = "import genprune.pipelines as p, genprune.routers as r; print(p.__name__, r.__name__)"
    assert _python(script).split() == ["genprune.pipelines", "genprune.routers"]


def test_importing_genprune_loads_torch_only():
    hosts = "diffusers transformers timm accelerate peft torchmetrics open_clip scipy matplotlib typer rich".split()
    script = (
        f"import sys, genprune; print([name for name in {hosts!r} if name in sys.modules], 'torch' in sys.modules)"
    )
    assert _python(script).strip() == "[] True"


def test_help_loads_no_host_library():
    script = (
        "import sys; from genprune.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('diffusers', 'transformers', 'timm') if name in sys.modules])"
    )
    assert _python(script).strip().endswith("[]")


def test_dependencies_have_floors_and_no_ceilings():
    project = PROJECT["project"]
    extras = [item for items in project["optional-dependencies"].values() for item in items]
    for requirement in [*project["dependencies"], *extras]:
        if not requirement.startswith("genprune["):
            assert re.fullmatch(r"[A-Za-z0-9_.-]+>=[0-9.]+", requirement), requirement


def test_readme_opens_with_the_two_commands():
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), flags=re.M)
    assert len(commands) == 2
    assert "genprune demo --out demo" in commands[0]
    assert "pytest" in commands[1]
    extras = set(re.findall(r"\.\[([a-z,]+)\]", " ".join(commands)))
    assert extras <= set(PROJECT["project"]["optional-dependencies"])


def test_ci_runs_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script and "ruff" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, "not executable"
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this checkout, built without a network from a copy of what git tracks."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of files to build from")
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    # setuptools itself, as pip would call it, but without an isolated environment: that needs a network.
    script = f"import setuptools.build_meta as backend; print(backend.build_wheel({str(out)!r}))"
    built = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_the_wheel_has_code_data_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "genprune"], capture_output=True, text=True).stdout
    assert {name for name in tracked.split() if (ROOT / name).is_file()} <= names, "a tracked file is not packaged"
    assert {"genprune/pipelines/__init__.py", "genprune/routers/__init__.py", "genprune/py.typed"} <= names
    assert not {name for name in names if name.startswith(("pipelines/", "routers/", "tests/", "scripts/"))}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))], "no pickle travels"


def test_the_wheel_imports_from_a_folder_of_its_own(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import genprune, genprune.pipelines; print(genprune.__file__, genprune.pipelines.__file__)"
    )
    told = _python(script, cwd=tmp_path).split()
    assert all(path.startswith(str(tmp_path)) for path in told), told


def _python(script: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
