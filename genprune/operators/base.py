"""What all operators share: how one is built in a module's place, and how its own tensors come and go."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from genprune.errors import GenpruneError, PlanMismatch, nearest
from genprune.replacements import Tombstone

# Moments of one map, and whether it has a bias -> weight (out, in) and bias (out,).
Ridge = Callable[[Any, bool], tuple[Tensor, Tensor]]


class Operator(Tombstone):
    """Stands where a host module stood: tombstones under the names of its tensors, and cheaper layers of its own.

    The layers are in the sub-module `replacement`, so that their names in the state dict are `replacement.*`. Plain
    numbers, flags and words of the removed module are copied, because hosts read them (`channels`, `in_features`).

    Attributes:
        name: key of the registry.
        options: keys of the settings; `defaults` are those that may be left out.
        moments: what a fit from data measures: `matrix` (second moments of all features), `channels` (of each on its
            own) or nothing (empty).
        argument_names: names of the arguments of the host's `forward`, in order.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    moments: ClassVar[str] = ""
    own: ClassVar[tuple[str, ...]] = ("replacement",)

    settings: dict[str, Any]
    argument_names: tuple[str, ...]

    @classmethod
    def refuses(cls, removed: nn.Module) -> str | None:
        """Why this operator cannot stand in for the module, or None."""
        return None

    @classmethod
    def needs_data(cls, settings: Mapping[str, Any]) -> bool:
        """Whether values for these settings come from calibration data rather than from the module's weights."""
        return bool(cls.moments)

    @classmethod
    def build(cls, removed: nn.Module, settings: Mapping[str, Any]) -> Self:
        """The operator in its shapes, on the device (meta included) and in the dtype of `removed`; values are zero.

        Args:
            removed: what it stands in for; stays as it is. May hold operators, or be one.
            settings: plain JSON data, see each operator.

        Raises:
            GenpruneError: the module is refused, or a setting is unknown, missing or out of range.
        """
        if reason := cls.refuses(removed):
            raise GenpruneError(
                f"'{cls.name}' cannot stand in for this {type(removed).__name__}: {reason}. Choose another operator "
                "of genprune.operators.OPERATORS, or leave the module as it is."
            )
        module = cls()
        module.bury(removed)
        module.settings = cls.checked(settings)
        module.argument_names = argument_names(removed)
        for name, value in vars(removed).items():
            if not name.startswith("_") and _is_plain(value) and not hasattr(module, name):
                setattr(module, name, value)
        layers = module.layers(removed)
        if layers is not None:
            for parameter in layers.parameters():
                if not parameter.is_meta:
                    nn.init.zeros_(parameter)
            module.replacement = layers
        return module.train(removed.training)

    @classmethod
    def checked(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with defaults. Raises `GenpruneError` for an unknown or a missing one."""
        for key in settings:
            if key not in cls.options:
                known = ", ".join(cls.options) or "none"
                raise GenpruneError(
                    f"'{cls.name}' has no setting '{key}'{nearest(str(key), cls.options)}; expected {known}. "
                    "Rename or remove it."
                )
        given = {**cls.defaults, **settings}
        for key in cls.options:
            if key not in given:
                raise GenpruneError(
                    f"'{cls.name}' got no setting '{key}'; expected {', '.join(cls.options)}. Pass it in the settings."
                )
        return given

    @classmethod
    def takes_data(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a fit from calibration data is another one than `from_weights`."""
        return cls.needs_data(settings)

    def layers(self, removed: nn.Module) -> nn.Module | None:
        """The operator's own layers for `self.settings`, of any values; None where it has none."""
        return None

    @classmethod
    def from_weights(cls, removed: nn.Module, settings: Mapping[str, Any]) -> Self:
        """The operator with values that follow from the module's own weights.

        Raises:
            GenpruneError: as `build`; or the values need calibration data.
        """
        module = cls.build(removed, settings)
        if cls.needs_data(module.settings):
            raise GenpruneError(
                f"'{cls.name}' with {dict(settings)} takes its values from calibration data, not from weights; "
                "expected recorded calls. Fit it with genprune.layers.fitting.fitted(model, requests, calls)."
            )
        with torch.no_grad():
            module.take_weights(removed)
        return module

    def take_weights(self, removed: nn.Module) -> None:
        """Set the values of the own layers from the module's weights."""

    def rows(self, given: Mapping[str, Any], output: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each map of the operator its name, what it reads and what it should return for it.

        Args:
            given: arguments of one call of the removed module by name.
            output: what that call returned.

        Returns:
            Name, inputs `(positions, in)` and outputs `(positions, out)`, with positions as tokens or pixels.
        """
        raise NotImplementedError

    def fit(self, removed: nn.Module, moments: Mapping[str, Any], ridge: Ridge) -> None:
        """Set the values of the own layers from the moments of `rows`, by map name; `ridge` solves one map."""
        raise NotImplementedError

    def maps(self) -> dict[str, tuple[int, int]]:
        """Widths of what `rows` gives for each map: name -> (in, out)."""
        return {}

    def measured(self) -> tuple:
        """Operators of one class for one module share moments where this is equal."""
        return (repr(self.settings),)

    def given(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of one call by name: gradient checkpointing passes by position what a host passes by keyword."""
        return {**dict(zip(self.argument_names, args)), **kwargs}

    def first(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The first argument of one call, whatever the host calls it."""
        return args[0] if args else kwargs[self.argument_names[0]]

    def own_tensors(self) -> dict[str, Tensor]:
        """The operator's own tensors, `replacement.*` -> tensor; empty for one without weights."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items() if _is_own(name)}

    @torch.no_grad()
    def load_own(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the own tensors, in the operator's dtype; one built on meta takes the device of the tensors.

        Raises:
            PlanMismatch: a name is missing or unknown, or a shape is another; nothing has changed then.
        """
        held = {name: value for name, value in self.named_parameters() if _is_own(name)}
        for name in [*held, *tensors]:
            if name not in held or name not in tensors:
                found = "is missing" if name in held else f"is unknown{nearest(name, held)}"
                raise PlanMismatch(
                    f"tensor '{name}' of a '{self.name}' {found}; expected {sorted(held) or 'none'}. Take the tensors "
                    "of the plan that names this operator."
                )
            if tensors[name].shape != held[name].shape:
                raise PlanMismatch(
                    f"tensor '{name}' of a '{self.name}' is {tuple(tensors[name].shape)}, expected "
                    f"{tuple(held[name].shape)} for {self.settings}. Take the tensors of the plan that names them."
                )
        for name, old in held.items():
            if not old.is_meta:
                old.copy_(tensors[name])
                continue
            owner, _, leaf = name.rpartition(".")
            value = tensors[name].detach().to(old.dtype, copy=True)
            setattr(self.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def _is_own(name: str) -> bool:
    return name.startswith("replacement.")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):  # sizes such as `kernel_size`, `normalized_shape`
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's `forward`, in order; of an operator those of the module it stands for."""
    if isinstance(module, Operator):
        return module.argument_names
    return tuple(
        name
        for name, parameter in inspect.signature(type(module).forward).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )


def is_host(module: nn.Module, *names: str) -> bool:
    """Whether the module is of a class of this name, or of a subclass; the host need not be imported."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def placement(removed: nn.Module) -> dict[str, Any]:
    """`device` and `dtype` of a module's first float tensor; torch's defaults where it has none."""
    for tensor in [*removed.parameters(), *removed.buffers()]:
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return {"device": torch.get_default_device(), "dtype": torch.get_default_dtype()}


def beside(operator: Operator, removed: nn.Module, model: nn.Module) -> Operator:
    """The operator in the model's dtype and on its device, where its module has no tensors that tell them.

    Values stay where the model is on meta: those of a plan would be lost there.
    """
    if any(True for _ in removed.parameters()) or any(True for _ in removed.buffers()):
        return operator
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return operator
    return operator.to(None if like.is_meta else like.device, like.dtype)


def blank(layer: type[nn.Module], *args, **kwargs) -> nn.Module:
    """A layer without initial values: no numbers of the global generator are drawn."""
    return nn.utils.skip_init(layer, *args, **kwargs)


def whole_number(operator: type[Operator], settings: Mapping[str, Any], key: str, most: int | None = None) -> int:
    """A setting that counts something, from 1 to `most`. Raises `GenpruneError` for another value."""
    value = settings[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        limit = f"1 to {most}" if most is not None else "1 or more"
        raise GenpruneError(
            f"setting '{key}' of '{operator.name}' is {value!r}; expected a whole number, {limit}. Pass such a number."
        )
    return value
