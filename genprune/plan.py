"""`PruningPlan`: which units of which sites stay. Data only; travels without the model's weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genprune.errors import PlanMismatch, nearest
from genprune.files import check_replaceable, whole_file, whole_folder
from genprune.plan_format import packed_bits, read_tensors, read_text, unpacked_bits

FORMAT_VERSION = 1
PLAN_FILE = "genprune_plan.safetensors"  # beside the weights of a pruned model
_METADATA_KEY = "genprune_plan"
_SITES_KEY = "genprune_sites"


@dataclass(frozen=True)
class PlanBase:
    """The model that a plan was made for.

    Args:
        host: its stock class name, such as `UNet2DConditionModel`.
        sites_sha256: fingerprint of its sites and the shapes of the layers that they cut. Fine-tunes of one base share
            it, and so do variants that differ elsewhere, such as an inpainting U-Net or a ViT with another head.
    """

    host: str
    sites_sha256: str


@dataclass(frozen=True)
class PruningPlan:
    """Which units of which sites stay, and an ordered list of operations that are no selection.

    Args:
        base: the model it is for.
        keep: site name -> kept units, bool of shape `(size,)`. A site that is not named keeps everything.
        ops: operations such as `{"op": "replace", "path": ...}`, in the order of application.
        operating_point: input shape that the figures hold at.
        figures: params, MACs and latency, dense and kept.
        made_by: method, settings and what it was scored on.
        tensors: extra tensors that `ops` name.
    """

    base: PlanBase
    keep: Mapping[str, Tensor]
    ops: tuple[dict[str, Any], ...] = ()
    operating_point: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        masks = {}
        for name, mask in self.keep.items():
            mask = torch.as_tensor(mask).detach().cpu()
            if mask.ndim != 1 or mask.dtype != torch.bool:
                raise PlanMismatch(
                    f"keep['{name}'] is {mask.dtype} of shape {tuple(mask.shape)}; expected a bool vector with one "
                    "entry per unit of the site. Pass e.g. scores >= threshold."
                )
            masks[name] = mask
        object.__setattr__(self, "keep", masks)

    def widths(self) -> dict[str, int]:
        """Number of kept units of every site that loses some."""
        return {name: int(mask.sum()) for name, mask in self.keep.items()}

    def removed(self) -> set[tuple[str, int]]:
        """Every removed unit as (site name, index)."""
        return {(n, int(i)) for n, mask in self.keep.items() for i in (~mask).nonzero().flatten()}

    def overlap(self, other: PruningPlan) -> float:
        """Share of the units removed by either plan that both remove: 1 = the same plan, 0 = nothing in common."""
        mine, theirs = self.removed(), other.removed()
        union = mine | theirs
        return len(mine & theirs) / len(union) if union else 1.0

    def then(self, later: PruningPlan) -> PruningPlan:
        """One plan for the dense model that does what this plan and then `later` do.

        Args:
            later: made for the model that this plan leaves; its masks index the units kept here.

        Raises:
            PlanMismatch: `later` has another host, or a mask that does not fit what is left here.
        """
        if later.base.host != self.base.host:
            raise PlanMismatch(
                f"the later plan is for {later.base.host}, this one for {self.base.host}; expected the same host. "
                "Make the later plan on the model that this plan cut."
            )
        keep = dict(self.keep)
        for name, mask in later.keep.items():
            if name not in keep:
                keep[name] = mask
                continue
            left = keep[name].nonzero().flatten()
            if mask.numel() != left.numel():
                raise PlanMismatch(
                    f"the later plan has {mask.numel()} units at '{name}', but {left.numel()} are left there. "
                    "Make it on the model that this plan cut."
                )
            joined = torch.zeros_like(keep[name])
            joined[left[mask]] = True
            keep[name] = joined
        return replace(
            self,
            keep=keep,
            ops=self.ops + later.ops,
            operating_point=later.operating_point or self.operating_point,
            figures=later.figures,
            made_by={"first": dict(self.made_by), "then": dict(later.made_by)},
            tensors={**self.tensors, **later.tensors},
        )

    # ---- JSON + safetensors -------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything but the masks as plain JSON data; each site's width stands as `[kept, size]`."""
        return {
            "format_version": FORMAT_VERSION,
            "base": asdict(self.base),
            "sites": {name: [int(mask.sum()), mask.numel()] for name, mask in self.keep.items()},
            "ops": [dict(op) for op in self.ops],
            "operating_point": dict(self.operating_point),
            "figures": dict(self.figures),
            "made_by": dict(self.made_by),
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write the plan to a folder (`plan.json` + `plan.safetensors`), or to one `.safetensors` file.

        Nothing is left half-written: a failure leaves `path` as it was.

        Raises:
            PlanMismatch: `path` is a folder that holds something else than a plan.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            with whole_file(path) as temporary:
                self._write_tensors(temporary, metadata={_METADATA_KEY: json.dumps(self.to_json())})
            return path
        check_replaceable(path, "plan.json", "a plan")
        with whole_folder(path) as folder:
            (folder / "plan.json").write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
            self._write_tensors(folder / "plan.safetensors", metadata={_SITES_KEY: _digest(self.to_json()["sites"])})
        return path

    def _write_tensors(self, path: Path, metadata: dict[str, str]) -> None:
        from safetensors.torch import save_file

        # One tensor of bits in the order of `sites`: a name and a byte for each unit would be 8 to 10 times larger.
        tensors = {"keep": packed_bits(torch.cat([torch.zeros(0, dtype=torch.bool), *self.keep.values()]))}
        tensors |= {f"tensor.{name}": value.contiguous() for name, value in self.tensors.items()}
        save_file(tensors, str(path), metadata=metadata)  # one key: safetensors writes several in random order

    @classmethod
    def load(cls, path: str | os.PathLike) -> PruningPlan:
        """Read a plan from its folder, its `.safetensors` file, or the folder of a model that it cut.

        Raises:
            PlanMismatch: no plan is there, it is damaged or hand-edited, or a newer genprune wrote it.
        """
        path = Path(path)
        if path.is_dir() and (path / "plan.json").is_file():
            text, tensors = read_text(path / "plan.json"), path / "plan.safetensors"
        else:
            tensors = path / PLAN_FILE if path.is_dir() else path
            text = None
        if not tensors.is_file():
            raise PlanMismatch(
                f"no plan at '{path}': expected a folder with plan.json and plan.safetensors, a .safetensors plan, "
                f"or a pruned model's folder with {PLAN_FILE}. Write one with plan.save(path)."
            )
        bits, extra, metadata = read_tensors(tensors)
        if text is None:
            if _METADATA_KEY not in metadata:
                raise PlanMismatch(
                    f"'{tensors}' is a safetensors file without a plan. Pass a file that plan.save wrote."
                )
            text = metadata[_METADATA_KEY]
        elif _SITES_KEY not in metadata:
            raise PlanMismatch(f"'{tensors}' does not hold the masks of the plan beside it. Make the plan again.")
        return cls._from_json(text, bits, extra, metadata.get(_SITES_KEY), source=path)

    @classmethod
    def _from_json(
        cls, text: str, bits: Tensor, tensors: dict[str, Tensor], digest: str | None, source: Path
    ) -> PruningPlan:
        def refuse(problem: str) -> PlanMismatch:
            return PlanMismatch(f"the plan at '{source}' {problem}. Make it again, or restore the file.")

        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise refuse(f"is not whole JSON ({error.msg} at line {error.lineno})") from None
        if not isinstance(data, dict) or type(version := data.get("format_version")) is not int or version < 1:
            raise refuse("has no format_version; expected the JSON object that plan.save writes")
        if version > FORMAT_VERSION:
            raise PlanMismatch(
                f"the plan at '{source}' has format {version}, this genprune reads up to {FORMAT_VERSION}. "
                "Upgrade with `pip install -U genprune`."
            )
        known = {"format_version", "sites"} | {f.name for f in fields(cls)} - {"keep", "tensors"}
        for key in data:
            if key not in known:
                raise refuse(f"has an unknown key '{key}'{nearest(key, known)}")
        try:
            parts = _checked_parts(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise refuse(f"lacks a part or has one of the wrong type ({error})") from None
        sites = parts.pop("sites")
        sizes = [size for _, size in sites.values()]
        if digest not in (None, _digest(data["sites"])) or bits.numel() != -(-sum(sizes) // 8):
            raise refuse("names other sites or widths than its masks: one of the two was edited")
        masks = unpacked_bits(bits, sum(sizes)).split(sizes)
        return cls(keep=dict(zip(sites, masks)), tensors=tensors, **parts)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PruningPlan)
            and self.to_json() == other.to_json()
            and all(torch.equal(mask, other.keep[name]) for name, mask in self.keep.items())
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(value, other.tensors[name]) for name, value in self.tensors.items())
        )

    __hash__ = None

    def __str__(self) -> str:
        lines = [f"PruningPlan for {self.base.host}"]
        by_kind: dict[str, list[Tensor]] = {}
        for name, mask in self.keep.items():
            by_kind.setdefault(name.rsplit(":", 1)[-1], []).append(mask)
        for kind, masks in by_kind.items():
            gone, total = sum(int((~m).sum()) for m in masks), sum(m.numel() for m in masks)
            lines.append(f"  {kind:<10} {gone:>7,} of {total:,} units go, at {len(masks)} sites")
        operators = Counter(str(op.get("with", op.get("op"))) for op in self.ops)
        lines += [f"  {'operators':<10} {count:>7,} x {name}" for name, count in operators.items()]
        for quantity, unit in (("params", ""), ("macs", ""), ("latency_ms", " ms")):
            if quantity in self.figures and f"dense_{quantity}" in self.figures:
                kept, dense = self.figures[quantity], self.figures[f"dense_{quantity}"]
                device = f" on {self.made_by.get('latency_device', 'an unnamed device')}" if unit else ""
                lines.append(f"  {quantity:<10} {kept:,.6g}{unit} of {dense:,.6g}{unit} ({kept / dense:.1%}){device}")
            elif quantity == "latency_ms" and self.figures:
                lines.append("  latency    not measured (make_plan(..., measure_latency=True) measures it)")
        if "additivity" in self.made_by:
            found = self.made_by["additivity"]
            told = {key: "undefined" if found[key] is None else f"{found[key]:.3f}" for key in ("pearson", "spearman")}
            lines.append(
                f"  additivity Pearson {told['pearson']}, Spearman {told['spearman']} over "
                f"{len(found['true'])} random sets; layers chosen by {self.made_by.get('selection', 'knapsack')}"
            )
        if "budget" in self.made_by:
            budget = self.made_by["budget"]
            lines.append(f"  asked for keep={budget['keep']:g} of {budget['of']}, reached {budget['reached']:.4f}")
        return "\n".join(lines)


def _digest(sites: Mapping[str, Any]) -> str:
    """Ties masks to the names and widths that they were saved with, in order."""
    return hashlib.sha256(json.dumps(list(sites.items())).encode()).hexdigest()


def _checked_parts(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plan from its JSON data, their types checked. Raises what the conversions raise."""
    base = PlanBase(**data["base"])
    if not all(isinstance(value, str) for value in asdict(base).values()):
        raise TypeError("base names its host and fingerprint as text")
    sites = {str(name): (int(kept), int(size)) for name, (kept, size) in data["sites"].items()}
    if any(not 0 <= kept <= size for kept, size in sites.values()):
        raise ValueError("a site keeps between 0 and all of its units")
    point = {str(name): int(value) for name, value in data.get("operating_point", {}).items()}
    figures = {str(name): value for name, value in data.get("figures", {}).items()}
    if not all(isinstance(value, (int, float)) for value in figures.values()):
        raise TypeError("figures are numbers")
    made_by = dict(data.get("made_by", {}).items())
    budget = made_by.get("budget", {"keep": 1.0, "of": "", "reached": 1.0})
    float(budget["keep"]), str(budget["of"]), float(budget["reached"])
    return {
        "base": base,
        "sites": sites,
        "ops": tuple(dict(op) for op in data.get("ops", ())),
        "operating_point": point,
        "figures": figures,
        "made_by": made_by,
    }
