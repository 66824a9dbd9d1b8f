"""One entry of a comparison: a pipeline folder, a base with a plan, or a pipeline in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from genprune.bench.errors import BadCandidate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Candidate:
    """What to draw with.

    Attributes:
        name: folder- and column-name, letters, digits, `.`, `_`, `-`.
        model: pipeline folder, hub id or `miniature` (the embedded one), None for a pipeline in memory.
        plan: plan folder or file cut into `model` while loading, or None.
        pipeline: a stock (or cut) pipeline that is already loaded, or None.
    """

    name: str
    model: str | None = None
    plan: str | None = None
    pipeline: object | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise BadCandidate(
                f"'{self.name}' is no candidate name, expected letters, digits, '.', '_' or '-'. Write NAME=FOLDER."
            )
        if (self.model is None) == (self.pipeline is None):
            raise BadCandidate(f"candidate '{self.name}' needs either a folder or hub id, or a loaded pipeline.")

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """From `NAME=FOLDER_OR_HUB_ID` or `NAME=BASE@PLAN`.

        Raises:
            BadCandidate: there is no `=`, or a side is empty.
        """
        name, equals, source = text.partition("=")
        model, at, plan = source.partition("@") if not Path(source).exists() else (source, "", "")
        if not (equals and name and model) or (at and not plan):
            raise BadCandidate(
                f"'{text}' is no candidate, expected NAME=FOLDER, NAME=HUB_ID or NAME=BASE@PLAN, "
                "e.g. dense=base pruned=base@plan."
            )
        return cls(name, model=model, plan=plan or None)

    @property
    def folder(self) -> str:
        """`model`, with `miniature` resolved to the embedded pipeline."""
        if self.model == "miniature":
            from genprune.miniature import pipeline_dir

            return str(pipeline_dir())
        return self.model

    def load(self, dtype: str = "float32", device: torch.device | str = "cpu"):
        """The pipeline, in eval mode on the device; one in memory is returned as it is.

        Raises:
            BadCandidate: the folder does not exist or holds no pipeline.
        """
        if self.pipeline is not None:
            return self.pipeline
        import genprune

        source = self.folder
        if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
            raise BadCandidate(
                f"candidate '{self.name}': {source} has no model_index.json, expected a folder written by "
                "pipe.save_pretrained(...). For a plan, write NAME=BASE@PLAN."
            )
        try:
            pipeline = genprune.load_pipeline(source, plan=self.plan, torch_dtype=DTYPES[dtype])
        except OSError as error:  # diffusers' answer to a folder that is not there and to an unreachable hub
            raise BadCandidate(
                f"candidate '{self.name}': no pipeline at '{self.model}' ({type(error).__name__}). "
                "Expected a local folder or a reachable hub id."
            ) from error
        return pipeline.to(device)


def read_candidates(candidates: Mapping[str, object] | list[str]) -> list[Candidate]:
    """Candidates from `{"dense": folder_or_pipeline, ...}` or `["dense=FOLDER", ...]`; names must differ.

    Raises:
        BadCandidate: fewer than one, or a name twice.
    """
    if isinstance(candidates, Mapping):
        read = [
            source
            if isinstance(source, Candidate)
            else Candidate.parse(f"{name}={source}")
            if isinstance(source, str | Path)
            else Candidate(name, pipeline=source)
            for name, source in candidates.items()
        ]
    else:
        read = [item if isinstance(item, Candidate) else Candidate.parse(item) for item in candidates]
    names = [candidate.name for candidate in read]
    if not read or len(set(names)) != len(names):
        raise BadCandidate(f"got the candidates {names}, expected at least one and every name once.")
    return read


def fingerprint(pipeline) -> str:
    """`sha256:...` over names, shapes, dtypes and a sample of the values of every tensor of the pipeline.

    At most 64 values a tensor, evenly spread: a second for a 12 B pipeline, and enough to tell two models apart that
    live at the same path.
    """
    digest = hashlib.sha256()
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for component, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{component}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().reshape(-1)
            digest.update(flat[:: max(1, len(flat) // 64)].double().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
