"""Experts by noise level inside one denoising chain: a small module in the denoiser's place that switches them."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor, nn

from genprune.errors import GenpruneError
from genprune.pipelines.stores import ExpertStore


class StepExperts(nn.Module):
    """Stands where the denoiser stood; each call runs the expert of its timestep. Everything else is the denoiser's.

    Args:
        store: of the experts.
        router: a `TimestepRouter`.
        scheduler: of the pipeline; its timesteps say in which unit the denoiser is told of them.

    Attributes:
        experts_of_calls: the expert of each call since `begin`.
    """

    def __init__(self, store: ExpertStore, router: Any, scheduler: Any):
        super().__init__()
        self.__dict__["store"], self.__dict__["router"] = store, router
        self.begin(scheduler)

    def begin(self, scheduler: Any) -> None:
        """A chain starts."""
        self.__dict__["scheduler"] = scheduler
        self.experts_of_calls: list[int] = []
        self._unit: float | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's arguments and output.

        Raises:
            GenpruneError: the call has no timestep, or several.
        """
        expert = self.router.expert_at(self.noise(self._timestep(args, kwargs)))
        model = self.store.activate(expert)
        self.experts_of_calls.append(expert)
        return model(*args, **kwargs)

    def noise(self, timestep: float) -> float:
        """Share of the training timesteps, in [0, 1] (the sigma of a flow), of a timestep as the denoiser is given it.

        Pipelines give either the scheduler's own timesteps, or (FLUX) those as a share. The first call of a chain
        tells: it comes nearest to one of the scheduler's timesteps in the right unit.
        """
        count = float(self.scheduler.config.get("num_train_timesteps") or 1000)
        if self._unit is None:
            known = [float(each) for each in self.scheduler.timesteps if each > 0] or [count]
            own, share = (_apart(value, known) for value in (timestep, timestep * count))
            self._unit = 1.0 if share <= own and timestep > 0 else 1 / count
        return min(max(timestep * self._unit, 0.0), 1.0)

    def _timestep(self, args: tuple, kwargs: dict[str, Any]) -> float:
        given = kwargs.get("timestep")
        if given is None:
            names = [name for name in inspect.signature(type(self.store.model).forward).parameters if name != "self"]
            place = names.index("timestep") if "timestep" in names else len(args)
            given = args[place] if place < len(args) else None
        values = set(given.flatten().tolist()) if isinstance(given, Tensor) else {given}
        if len(values) != 1 or None in values:
            raise GenpruneError(
                f"the denoiser was called with the timesteps {sorted(values - {None})}; expected one for the whole "
                "batch, because one expert runs it. Call it once for each timestep."
            )
        return float(values.pop())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "store" not in self.__dict__:
                raise
            return getattr(self.store.current, name)


def _apart(value: float, known: list[float]) -> float:
    """How far a positive value is from the nearest of these, as the logarithm of their ratio."""
    return min(abs(math.log(value / each)) for each in known) if value > 0 else 0.0
