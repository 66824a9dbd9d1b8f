"""`MaskLogits`: one float32 logit per unit, by site name; saved raw, so that every budget can be planned from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from genprune.errors import GenpruneError, NoMatchingSites, PlanMismatch
from genprune.files import whole_file
from genprune.sites import Sites

FORMAT_VERSION = 1


class MaskLogits(Mapping):
    """Site name -> leaf tensor of shape `(size,)`, float32 whatever the model's type, requiring gradients.

    In bfloat16 the logits of an SDXL run take a few thousand values and tie at the cut (spacing 1/64 near 3).

    Args:
        logits: site name -> tensor of shape `(size,)`; copied.
    """

    def __init__(self, logits: Mapping[str, Tensor]) -> None:
        if not logits:
            raise NoMatchingSites("no site to learn a mask for; expected at least one. See gp.find_sites(model).")
        # sorted by name: what is drawn for a site does not depend on the order of the model's modules
        self.by_name = {
            name: logits[name].detach().to(torch.float32, copy=True).requires_grad_() for name in sorted(logits)
        }

    @classmethod
    def filled(cls, sites: Sites, value: float, device: torch.device | str = "cpu") -> MaskLogits:
        """All logits at one value. Raises `NoMatchingSites` where there is no site."""
        return cls({name: torch.full((site.size,), float(value), device=device) for name, site in sites.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def parameters(self) -> list[Tensor]:
        """The leaf tensors, in order of site names."""
        return list(self.by_name.values())

    def detached(self) -> dict[str, Tensor]:
        """Copies on the CPU."""
        return {name: logits.detach().cpu().clone() for name, logits in self.by_name.items()}

    @torch.no_grad()
    def copy_(self, values: Mapping[str, Tensor]) -> None:
        """Take over values, in place. Raises `PlanMismatch` unless sites and sizes are the same."""
        if set(values) != set(self.by_name):
            other = sorted(set(values) ^ set(self.by_name))
            raise PlanMismatch(
                f"these logits are of other sites than the model's: {len(other)} differ, such as '{other[0]}'. "
                "Load them for the model and the kinds that they were learned on."
            )
        for name, logits in self.by_name.items():
            if values[name].shape != logits.shape:
                raise PlanMismatch(
                    f"'{name}' has {tuple(values[name].shape)} logits; expected {tuple(logits.shape)}. Load them for "
                    "the model that they were learned on."
                )
            logits.copy_(values[name])

    def save(self, path: str | os.PathLike, settings: Mapping | None = None) -> None:
        """Write one safetensors file with the raw logits and, as its metadata, the settings that made them."""
        metadata = {"format_version": str(FORMAT_VERSION), "settings": json.dumps(dict(settings or {}))}
        with whole_file(path) as written:
            save_file(self.detached(), written, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> tuple[MaskLogits, dict]:
        """Logits and their settings, from any folder or file name.

        Raises:
            PlanMismatch: no such file, not a file of logits, or a newer format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                logits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version, settings = int(metadata["format_version"]), json.loads(metadata["settings"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise PlanMismatch(
                f"'{path}' holds no mask logits ({error}); expected a safetensors file written by MaskLogits.save."
            ) from None
        if version > FORMAT_VERSION:
            raise PlanMismatch(
                f"'{path}' has format {version}, this genprune reads up to {FORMAT_VERSION}. Upgrade with "
                "`pip install -U genprune`."
            )
        return cls(logits), settings


def check_finite(logits: Mapping[str, Tensor], step: int) -> None:
    """Raises `GenpruneError` naming the first site whose logits are not finite."""
    for name, values in logits.items():
        if not torch.isfinite(values).all():
            raise GenpruneError(
                f"the logits of '{name}' are not finite after step {step}; expected finite ones. Lower learning_rate, "
                "or run the model in bfloat16 or float32 instead of float16."
            )
