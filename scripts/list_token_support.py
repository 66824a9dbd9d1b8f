"""Try token reduction on every transformer of timm, and write the table of what works and what is refused, and why.

    python scripts/list_token_support.py --quick                                   # one entry point of each class
    python scripts/list_token_support.py --out docs/tokens-supported.md            # all of them, some minutes

Every entry point of timm whose module has attention is built: at a small size (few, narrow blocks, a small image) with
random weights, or, where its class is refused, on the meta device. Of one that is supported it is checked that keep=1
changes no bit of the output, that keep=.7 in two layers changes it and shortens what the last layer computes, and that
`remove()` restores it and leaves no hook. Of one class each that is refused, the experiment behind the refusal is run:
a forward pass in which one block in the middle hands on three quarters of its tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import genprune as gp  # noqa: E402
from genprune.tokens.hosts import host_of  # noqa: E402

# What a module of timm.models has in its source, and a model among its parts, when it is asked at all.
ATTENTION = re.compile(
    r"\b(Attention|AttentionRope|EvaBlock|VisionTransformer)\b|class \w*(Att|MHSA|GPSA|SHSA|LiteMLA)"
)
ATTENDS = re.compile(r"attention|attn|MHSA|GPSA|SHSA|LiteMLA|XCA|ParallelScaling", re.I)
SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}
OF_MODULE = {  # what a class needs beside, or instead of, `SMALL`
    "vision_transformer_sam": {"depth": 4, "window_size": 2, "global_attn_indexes": (1, 3)},
    "vitamin": {"embed_dim": None},
    "vision_transformer_hybrid": {"embed_dim": None, "num_heads": None},
}


def entry_points() -> dict[str, list[str]]:
    """Module of timm.models -> names of the entry points, for modules that have an attention."""
    import timm
    from timm.models._registry import _model_to_module

    modules = defaultdict(list)
    for name in timm.list_models():
        modules[_model_to_module[name]].append(name)
    sources = {name: inspect.getsource(importlib.import_module(f"timm.models.{name}")) for name in modules}
    return {module: names for module, names in sorted(modules.items()) if ATTENTION.search(sources[module])}


def attends(module: nn.Module) -> bool:
    """Whether any part of it is called an attention."""
    return any(ATTENDS.search(type(part).__name__) for part in module.modules())


def attempts(name: str, module: str) -> list[dict[str, Any]]:
    """Arguments to build a small model with, best first: not every entry point takes all of them."""
    patch = int(found[1]) if (found := re.search(r"patch(\d+)", name)) else 14 if "_14" in name else 16
    small = {key: value for key, value in (SMALL | OF_MODULE.get(module, {})).items() if value is not None}
    narrow = dict(small)
    small["img_size"] = 4 * patch
    wide = {key: value for key, value in small.items() if key not in ("embed_dim", "num_heads")}
    return [
        small, small | {"num_kv_heads": 1}, *(small | {"img_size": size} for size in (8 * patch, 56, 128)),
        wide, wide | {"img_size": 224}, narrow, {"depth": 3}, {},
    ]  # fmt: skip


@torch.no_grad()
def built_small(name: str, module: str) -> nn.Module:
    import timm

    for arguments in attempts(name, module):
        with contextlib.suppress(Exception):  # the next arguments may do
            torch.manual_seed(0)
            model = randomised(timm.create_model(name, **arguments)).eval()
            model(**host_of(model).example_inputs(model))
            return model
    raise RuntimeError(f"{name} could not be built")


def randomised(model: nn.Module) -> nn.Module:
    """Gains, biases and tables start at or near zero, and would hide what a layer does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "table" in name or "rel_pos" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class LastWidth:
    """How many tokens the last linear layer of the last block is given."""

    def __init__(self, block: nn.Module):
        linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
        self.tokens = 0
        self.handles = [module.register_forward_hook(self.see) for module in linear]

    def see(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.tokens = inputs[0].shape[-2]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def check(model: nn.Module) -> None:
    """Raises `AssertionError` with what does not hold."""
    host = host_of(model)
    image = torch.randn(2, *host.example_inputs(model)["x"].shape[1:], generator=torch.Generator().manual_seed(0))
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    dense, hooks = model(image), hooks_of(model)
    width = LastWidth(model.get_submodule(host.paths[-1]))
    model(image)
    before = width.tokens
    method = gp.ZeroTPrune(keep=1.0)
    with gp.prune_tokens(model, method) as handle:
        assert torch.equal(model(image), dense), "keep=1 is not bit-identical"
        handle.set(keep={layer: 0.7 for layer in host.scored[:-1][:2] or host.scored})
        short = model(image)
        assert short.shape == dense.shape, f"the output has shape {tuple(short.shape)}, dense {tuple(dense.shape)}"
        assert torch.isfinite(short).all(), "the output is not finite"
        assert not torch.equal(short, dense), "keep=.7 does not change the output"
        assert width.tokens < before, f"the last layer still computes {width.tokens} tokens"
    width.remove()
    assert torch.equal(model(image), dense), "remove() does not restore the output"
    assert hooks_of(model) == hooks, "remove() leaves hooks"
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes, "remove() leaves attributes"


class Shortened:
    """A forward hook that hands on three quarters of the tokens, or of the rows of a grid."""

    def __init__(self):
        self.shape = None

    def hook(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        self.shape = tuple(first.shape)
        dim = -2 if first.ndim == 3 else 2
        short = first.narrow(dim, 0, max(1, 3 * first.shape[dim] // 4))
        return (short, *output[1:]) if isinstance(output, tuple) else short


@torch.no_grad()
def experiment(model: nn.Module) -> str:
    """What happens when a block in the middle of a model hands on three quarters of its tokens."""
    holders = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    blocks = [
        part
        for part in model.modules()
        if part is not model
        and not isinstance(part, holders)
        and any(ATTENDS.search(type(child).__name__) for child in part.children())
    ]
    if not blocks:
        return "no block with an attention in it"
    usual = Counter(type(block) for block in blocks).most_common(1)[0][0]
    blocks = [block for block in blocks if type(block) is usual]
    cutter = Shortened()
    handle = blocks[len(blocks) // 2].register_forward_hook(cutter.hook)
    try:
        model(torch.randn(1, *model.pretrained_cfg["input_size"]))
    except Exception as error:  # whatever the host raises is the result
        words = " ".join(str(error).split())
        outcome = f"{type(error).__name__}: {words[:110]}".removesuffix(": ")
    else:
        rows = len(cutter.shape) == 4
        outcome = "runs on with fewer rows; one patch cannot leave a grid" if rows else "runs on"
    finally:
        handle.remove()
    return f"`{usual.__name__}` gives {cutter.shape}; shortened: {outcome}"


def tried(name: str, module: str) -> tuple[str, str, str]:
    """Class, `works` or `refused` or `fails` or `none`, and the reason."""
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception:  # some compute tables while they are built
        model = timm.create_model(name)
    kind = type(model).__name__
    if not attends(model):
        return kind, "none", ""
    try:
        host_of(model)
    except gp.UnsupportedModel as error:
        return kind, "refused", str(error)
    try:
        check(built_small(name, module))
    except Exception as error:
        return kind, "fails", f"{type(error).__name__}: {error}"
    return kind, "works", ""


def run(quick: bool, only: str | None, known: list[dict[str, Any]]) -> dict[str, Any]:
    """Every entry point, or one of each module (`quick`); modules of the rows `known` are not run again."""
    import timm

    rows: dict[tuple[str, str], dict[str, Any]] = {(row.pop("module"), row.pop("class")): row for row in known}
    done = {module for module, _ in rows}
    for module, names in entry_points().items():
        if (only and only not in module) or module in done:
            continue
        for name in names[:1] if quick else names:
            kind, verdict, reason = tried(name, module)
            row = rows.setdefault((module, kind), {"works": [], "refused": [], "fails": {}, "none": [], "reason": ""})
            if verdict == "fails":
                row["fails"][name] = reason
                print(f"FAILS {name}: {reason}", file=sys.stderr, flush=True)
            else:
                row[verdict].append(name)
            row["reason"] = row["reason"] or reason
        print(f"{module}: done", file=sys.stderr, flush=True)
    for (module, _), row in rows.items():
        if row["refused"] and "experiment" not in row:
            name = min(row["refused"], key=lambda n: (not re.search(r"tiny|nano|small|_xx?s|pico|_t_|_0", n), len(n)))
            try:
                row["experiment"] = f"{name}: {experiment(timm.create_model(name).eval())}"
            except Exception as error:
                row["experiment"] = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:110]}"
            print(f"{module}: {row['experiment']}", file=sys.stderr, flush=True)
    return {"timm": timm.__version__, "rows": [{"module": m, "class": k, **row} for (m, k), row in rows.items()]}


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [row for row in found["rows"] if row["works"] or row["fails"] or row["refused"]]
    works = [row for row in rows if row["works"] or row["fails"]]
    refused = [row for row in rows if row["refused"]]
    count = sum(len(row["works"]) for row in works)
    lines = [
        "# timm transformers whose tokens can be reduced",
        "",
        f"Written by `scripts/list_token_support.py` with timm {found['timm']}: every entry point of a module of timm "
        "that has attention.",
        f"{count} entry points work: at a small size with random weights keep=1 changes no bit, keep=.7 in two layers "
        "changes the output",
        "and shortens the last layer, and `remove()` restores it. "
        f"{sum(len(row['refused']) for row in refused)} are refused by `gp.prune_tokens`, with the reason below.",
        "",
        "| class | works | fails | for example |",
        "|---|---:|---:|---|",
    ]
    for row in sorted(works, key=lambda row: -len(row["works"])):
        lines.append(
            f"| `{row['class']}` ({row['module']}) | {len(row['works'])} | {len(row['fails'])} | "
            f"{', '.join(f'`{name}`' for name in row['works'][:2])} |"
        )
    failing = {name: reason for row in works for name, reason in row["fails"].items()}
    lines += [f"\n`{name}` fails: {reason}" for name, reason in failing.items()]
    lines += [
        "",
        "In SAM's image encoder patches are not taken out of the sequence, because windows and convolutions need the "
        "grid: they skip the MLPs.",
        "Models that hand their patches on (no pooling, `features_only`, Qwen3's and DeepSeek's encoders) get the "
        "full grid back.",
        "",
        "## Refused",
        "",
        "The experiment: a forward pass in which a block in the middle hands on three quarters of its tokens (of the "
        "rows of a grid).",
        "",
        "| class | entry points | reason | experiment |",
        "|---|---:|---|---|",
    ]
    for row in sorted(refused, key=lambda row: row["module"]):
        reason = re.sub(r"^tokens of \w+ cannot be reduced: |\. Expected.*$", "", row["reason"])
        trial = row.get("experiment", "").replace("|", "/")
        lines.append(f"| `{row['class']}` ({row['module']}) | {len(row['refused'])} | {reason} | {trial} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the first entry point of each module")
    parser.add_argument("--only", metavar="TEXT", help="only modules of timm.models whose name contains this")
    parser.add_argument("--out", type=Path, help="Markdown page to write; default: print it")
    parser.add_argument("--json", type=Path, help="also write what was found; what is there is not run again")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    known = (
        json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json and arguments.json.exists() else {}
    )
    found = run(arguments.quick, arguments.only, known.get("rows", []))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.out:
        arguments.out.write_text(page(found), encoding="utf-8")
    else:
        print(page(found))


if __name__ == "__main__":
    main()
