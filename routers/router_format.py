"""A router on disk: JSON and safetensors, every part tied to the others by its hash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genprune.errors import GenpruneError, PlanMismatch, nearest
from genprune.files import check_replaceable, whole_folder
from genprune.plan import PlanBase, PruningPlan
from genprune.routers.experts import Expert
from genprune.routers.fingerprints import file_fingerprint

if TYPE_CHECKING:
    from genprune.routers.router import PromptRouter
    from genprune.routers.timestep_router import TimestepRouter

FORMAT_VERSION = 1
CONFIG, TENSORS, EXPERTS = "router_config.json", "router.safetensors", "experts"
LORA, WEIGHTS = "pytorch_lora_weights.safetensors", "weights.safetensors"
_PLAN_FILES = ("plan.json", "plan.safetensors")
_COMMON = ("format_version", "kind", "base", "weights_fingerprint", "training", "made_by", "experts")
_OF_KIND = {
    "prompt": ("encoder", "space", "shift", "familiarity", "tensors_sha256"),
    "timestep": ("boundaries",),
}


def save_router(router: PromptRouter | TimestepRouter, folder: str | os.PathLike) -> Path:
    """Write a router's folder whole, or leave what is there.

    Raises:
        PlanMismatch: `folder` is a file or holds something else than a router, or an expert's file is gone.
    """
    folder = Path(folder)
    for index, expert in enumerate(router.experts):
        for path in (expert.lora, expert.weights):
            if path is not None and not path.is_file():
                raise PlanMismatch(
                    f"expert {index} has its fine-tuned weights at '{path}', where no file is; expected it. Restore "
                    "it, or leave it out with dataclasses.replace(expert, lora=None, weights=None)."
                )
    check_replaceable(folder, CONFIG, "a router")
    with whole_folder(folder) as temporary:
        config = {
            "format_version": FORMAT_VERSION,
            "kind": router.kind,
            "base": asdict(router.base),
            "weights_fingerprint": router.weights_fingerprint,
            "training": router.training,
            "made_by": router.made_by,
            "experts": [_save_expert(each, temporary / place(index)) for index, each in enumerate(router.experts)],
        }
        config |= _save_prompt_parts(router, temporary) if router.kind == "prompt" else {}
        config |= {"boundaries": list(router.boundaries)} if router.kind == "timestep" else {}
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def load_router(
    folder: str | os.PathLike, encoder: Any = None, pipe: Any = None, kind: str | None = None
) -> PromptRouter | TimestepRouter:
    """Read a router of either kind.

    Args:
        folder: what `save_pretrained` wrote.
        encoder: of a prompt router: the encoder of its training, or a folder or hub id of it; None: what the router's
            file names.
        pipe: the pipeline whose text encoder a prompt router reads with, where it does.
        kind: `prompt` or `timestep` where only that will do.

    Raises:
        PlanMismatch: a part is missing, damaged or of another router, the encoder is another or not to be had, or a
            newer genprune wrote it.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if kind not in (None, config["kind"]):
        raise PlanMismatch(
            f"'{folder}' holds a router of kind '{config['kind']}'; expected '{kind}'. Read it with "
            "genprune.routers.load_router(folder)."
        )
    try:
        common = {
            "base": PlanBase(**config["base"]),
            "training": dict(config["training"]),
            "made_by": dict(config["made_by"]),
            "weights_fingerprint": config["weights_fingerprint"],
        }
        experts = [_load_expert(folder / place(index), entry, index) for index, entry in enumerate(config["experts"])]
        if config["kind"] == "timestep":
            from genprune.routers.timestep_router import TimestepRouter

            return TimestepRouter(experts, config["boundaries"], **common)
        return _load_prompt_router(folder, config, experts, common, encoder, pipe)
    except PlanMismatch:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, GenpruneError) and not _of_the_folder(error):
            raise
        raise PlanMismatch(
            f"the router in '{folder}' lacks a part or has one of the wrong type ({error}); expected what "
            "save_pretrained writes. Restore the folder, or train the router again."
        ) from None


def place(index: int) -> str:
    """An expert's folder inside the router's."""
    return f"{EXPERTS}/{index:02d}"


# ---- experts --------------------------------------------------------------------------------------------------------


def _save_expert(expert: Expert, folder: Path) -> dict[str, Any]:
    expert.plan.save(folder)
    entry: dict[str, Any] = {"usage": expert.usage}
    for name, source in ((LORA, expert.lora), (WEIGHTS, expert.weights)):
        if source is not None:
            shutil.copyfile(source, folder / name)
    entry["files"] = {path.name: file_fingerprint(path) for path in sorted(folder.iterdir())}
    return entry


def _load_expert(folder: Path, entry: Mapping[str, Any], index: int) -> Expert:
    files = dict(entry["files"])
    if missing := [name for name in (*_PLAN_FILES, *files) if not (folder / name).is_file() or name not in files]:
        raise PlanMismatch(
            f"expert {index} lacks '{folder / missing[0]}'; expected it, because its prompts would go to another "
            "expert. Fetch the router's folder anew, or restore the file."
        )
    for name in (LORA, WEIGHTS):
        if (folder / name).exists() and name not in files:
            raise PlanMismatch(
                f"'{folder / name}' lies beside expert {index}, and the router does not know it; expected the files "
                "that it was saved with. Remove it, or save the router with it: router.with_experts(...)."
            )
    for name, expected in files.items():
        if (found := file_fingerprint(folder / name)) != expected:
            raise PlanMismatch(
                f"'{folder / name}' is another file than the router was saved with (sha256 {found[:12]}, expected "
                f"{str(expected)[:12]}): it was edited, damaged, or belongs to another expert or router. Fetch the "
                "router's folder anew, or restore the file."
            )
    fine_tuned = {key: folder / name for key, name in (("lora", LORA), ("weights", WEIGHTS)) if name in files}
    return Expert(PruningPlan.load(folder), usage=entry["usage"], **fine_tuned)


# ---- what prompts are routed by -------------------------------------------------------------------------------------


def _save_prompt_parts(router: PromptRouter, folder: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    parts = {"predictor": router.predictor.state_dict(), "space": router.space.tensors()}
    parts["familiarity"] = {} if router.familiarity is None else router.familiarity.tensors()
    tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    tensors["codes"], tensors["bias"] = router.codes, router.bias
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, str(folder / TENSORS))
    return {
        "encoder": router.encoder.to_json(),
        "space": router.space.to_json(),
        "shift": router.shift,
        "familiarity": None if router.familiarity is None else router.familiarity.to_json(),
        "tensors_sha256": file_fingerprint(folder / TENSORS),
    }


def _load_prompt_router(
    folder: Path, config: Mapping[str, Any], experts: list[Expert], common: Mapping[str, Any], encoder: Any, pipe: Any
) -> PromptRouter:
    from genprune.routers.architecture import ArchitectureSpace
    from genprune.routers.encoders import TransformersEncoder, check_encoder, encoder_of, recorded_encoder
    from genprune.routers.familiarity import Familiarity
    from genprune.routers.predictor import ArchitecturePredictor
    from genprune.routers.router import PromptRouter

    parts = _read_tensors(folder / TENSORS, config["tensors_sha256"])
    space = ArchitectureSpace.from_json(config["space"], parts["space"])
    with torch.random.fork_rng(devices=[]):  # a module is born with random values
        predictor = ArchitecturePredictor(parts["predictor"]["linear.weight"].shape[1], space.lengths)
    predictor.load_state_dict(parts["predictor"])
    familiarity = config["familiarity"]
    if familiarity is not None:
        familiarity = Familiarity.from_json(familiarity, parts["familiarity"])
    if encoder is None:
        encoder = recorded_encoder(config["encoder"], pipe)
    else:
        if isinstance(encoder, (str, Path)):
            encoder = TransformersEncoder(encoder, config["encoder"].get("max_length"))
        encoder = encoder_of(encoder)
        check_encoder(config["encoder"], encoder)
    return PromptRouter(
        encoder,
        space,
        predictor,
        parts["codes"][""],
        experts,
        familiarity=familiarity,
        shift=float(config["shift"]),
        bias=parts["bias"][""],
        **common,
    )


def _read_tensors(path: Path, expected: str) -> dict[str, dict[str, Tensor]]:
    """Part -> name -> tensor; a part of one tensor has it under the empty name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise PlanMismatch(
            f"'{path}' is missing; expected the router's codes and predictor in it. Fetch the router's folder anew."
        )
    if file_fingerprint(path) != expected:
        raise PlanMismatch(
            f"'{path}' is another file than the router was saved with: it was edited, damaged, or belongs to another "
            "router. Fetch the router's folder anew, or restore the file."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PlanMismatch(
            f"'{path}' is not a whole safetensors file ({error}). Fetch the router's folder anew."
        ) from None
    parts: dict[str, dict[str, Tensor]] = {"predictor": {}, "space": {}, "familiarity": {}, "codes": {}, "bias": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return parts


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        found = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise PlanMismatch(
            f"'{folder}' {found}; expected a saved router. Pass a folder that router.save_pretrained wrote."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanMismatch(f"'{path}' is not whole JSON ({error}). Fetch the router's folder anew.") from None
    version = config.get("format_version") if isinstance(config, dict) else None
    if type(version) is not int or version < 1:
        raise PlanMismatch(
            f"'{path}' has no format_version; expected the JSON object that save_pretrained writes. Fetch the "
            "router's folder anew."
        )
    if version > FORMAT_VERSION:
        raise PlanMismatch(
            f"'{path}' has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
            "`pip install -U genprune`."
        )
    kind = config.get("kind")
    if kind not in _OF_KIND:
        raise PlanMismatch(
            f"'{path}' is of kind {kind!r}; expected one of {', '.join(_OF_KIND)}. Fetch the router's folder anew."
        )
    known = (*_COMMON, *_OF_KIND[kind])
    for key in config:
        if key not in known:
            raise PlanMismatch(
                f"'{path}' has an unknown key '{key}'{nearest(key, known)}; expected {', '.join(known)}. Restore it."
            )
    if missing := [key for key in known if key not in config]:
        raise PlanMismatch(
            f"'{path}' lacks '{missing[0]}'; expected {', '.join(known)}. Fetch the router's folder anew."
        )
    return config


def _of_the_folder(error: GenpruneError) -> bool:
    """Whether a constructor refused what the folder holds, and not what the caller passed."""
    from genprune.errors import UnsupportedModel

    return not isinstance(error, UnsupportedModel)
