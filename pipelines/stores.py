"""Where the experts of a router keep their weights while they serve: reordered in one copy, or as cut copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from genprune.cut_guards import check_cuttable
from genprune.cutting import check_plan
from genprune.errors import GenpruneError, PlanMismatch
from genprune.families import find_sites
from genprune.gates import gated_sites
from genprune.interrupts import interrupt_deferred
from genprune.pipelines.fine_tuned import (
    LowRankAddition,
    check_fine_tuned,
    load_fine_tuned_,
    read_low_rank,
    read_weights,
)
from genprune.pipelines.reordering import PackedParameter
from genprune.pipelines.skeletons import cut_copy, skeleton_of
from genprune.routers.experts import Expert
from genprune.saving import check_adoptable

_DENSE = -1  # in place of an expert's number


class ExpertStore:
    """K experts of one dense model, of which one runs at a time.

    Args:
        model: the dense denoiser, without gates and adapters. It belongs to the store from here on: ask for it with
            `dense()`.
        experts: what the router chooses among.

    Attributes:
        active: index of the expert that `activate` gave last, or None.
        switches: how often another expert was activated.

    Raises:
        PlanMismatch: a plan or a file of fine-tuned weights is for another model. UnsupportedModel: the model cannot
            be cut. The model is as it was then.
    """

    def __init__(self, model: nn.Module, experts: Sequence[Expert]):
        self.model, self.experts = model, tuple(experts)
        self.active: int | None = None
        self.switches = 0
        if not self.experts:
            raise GenpruneError("there are 0 experts; expected one or more. Pass router.experts.")
        check_free(model)
        check_cuttable(model)
        check_adoptable(model)
        if gated := gated_sites(model):
            raise PlanMismatch(
                f"gates are attached to {len(gated)} sites ('{gated[0]}', ...); expected a model without. Call "
                "handle.remove() first."
            )
        sites = find_sites(model)
        for expert in self.experts:
            check_plan(model, expert.plan, sites)

    def activate(self, expert: int) -> nn.Module:
        """The expert as a model of the class that `gp.cut` gives. Ctrl-C waits for the end of the switch.

        Raises:
            GenpruneError: there is no such expert.
        """
        raise NotImplementedError

    def dense(self) -> nn.Module:
        """The model that the store was made of, as it was to the bit."""
        raise NotImplementedError

    @property
    def current(self) -> nn.Module:
        """The active expert, or the dense model where none is active."""
        return self.model if self.active is None else self.activate(self.active)

    def copy(self, expert: int) -> nn.Module:
        """The expert with weights of its own, its LoRA merged; the store is not part of it."""
        self._check(expert)
        dense = self.dense()
        check_free(dense)
        copy = cut_copy(dense, self.experts[expert].plan)
        load_fine_tuned_(copy, self.experts[expert])
        return copy

    def _check(self, expert: int) -> None:
        if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < len(self.experts):
            raise GenpruneError(
                f"expert {expert!r} is not there; expected a number from 0 to {len(self.experts) - 1}. "
                "router.report() lists the experts."
            )


class MaterialisedStore(ExpertStore):
    """The dense weights, and really cut copies of the experts that ran last. Takes any plan, operators included.

    Args:
        resident: how many cut copies stay in memory. More than one avoids cutting again where experts take turns, at
            the memory of each.
    """

    def __init__(self, model: nn.Module, experts: Sequence[Expert], resident: int = 1):
        super().__init__(model, experts)
        if isinstance(resident, bool) or not isinstance(resident, int) or resident < 1:
            raise GenpruneError(
                f"resident={resident!r}; expected how many cut experts stay in memory. Pass 1 or more."
            )
        self.resident = resident
        self._copies: OrderedDict[int, nn.Module] = OrderedDict()
        for expert in self.experts:
            if expert.lora is not None or expert.weights is not None:
                check_fine_tuned(expert, _empty_cut(model, expert))

    def activate(self, expert: int) -> nn.Module:
        self._check(expert)
        weight = next(self.model.parameters())
        if self._copies:
            own = next(next(iter(self._copies.values())).parameters())
            if (own.device, own.dtype) != (weight.device, weight.dtype):  # the dense model was moved
                self._copies.clear()
        if expert not in self._copies:
            while len(self._copies) >= self.resident:
                self._copies.popitem(last=False)
            self._copies[expert] = self.copy(expert)
        self._copies.move_to_end(expert)
        self.switches += expert != self.active
        self.active = expert
        return self._copies[expert]

    def dense(self) -> nn.Module:
        self.active = None
        return self.model

    def copy(self, expert: int) -> nn.Module:
        active = self.active
        try:
            return super().copy(expert)
        finally:
            self.active = active


def _empty_cut(model: nn.Module, expert: Expert) -> nn.Module:
    """The expert's modules and shapes, for checks."""
    return cut_copy(model, expert.plan) if expert.plan.ops else skeleton_of(model, expert.plan).model


class ReorderedStore(ExpertStore):
    """One copy of the weights for all experts: layers are reordered in place so that what the active one keeps leads.

    The active expert's tensors are contiguous views of the dense model's memory. Beside the dense weights a switch
    needs the memory of its largest layer; each expert the Python objects of its modules. Fine-tuned experts are read
    from their files while they are active: a LoRA runs beside its layers, whole tensors take their own memory.

    One model is usable at a time: the one asked for last. The others have empty parameters and refuse to run.

    Raises:
        PlanMismatch: also where a plan replaces operators, which is no selection.
    """

    def __init__(self, model: nn.Module, experts: Sequence[Expert]):
        super().__init__(model, experts)
        for number, expert in enumerate(self.experts):
            if expert.plan.ops:
                raise PlanMismatch(
                    f"the plan of expert {number} replaces {len(expert.plan.ops)} operators; expected selections "
                    "alone, because one copy of the weights serves all experts. Use MaterialisedStore(model, experts) "
                    "(store='materialised' in a RoutedPipeline)."
                )
        self._skeletons = tuple(skeleton_of(model, expert.plan) for expert in self.experts)
        self._own = tuple(check_fine_tuned(e, s.model) for e, s in zip(self.experts, self._skeletons))
        self._packed = self._sliced()
        self._taken = False
        self._extra: list[Any] = []  # handles of the LoRA hooks of the active expert
        self._idle: dict[int, Any] = {}  # expert, or _DENSE -> handles that refuse its model's use
        for number in range(len(self._skeletons)):
            self._retire(number)

    def _sliced(self) -> dict[str, PackedParameter]:
        """Every parameter that some expert narrows, by its full name."""
        names = {s.full for k in self._skeletons for s in k.sources if s.rows is not None or s.columns is not None}
        count = {}
        for _, parameter in self.model.named_parameters(remove_duplicate=False):
            count[id(parameter)] = count.get(id(parameter), 0) + 1
        packed = {}
        for full in sorted(names):
            path, _, name = full.rpartition(".")
            module = self.model.get_submodule(path)
            if count[id(module._parameters[name])] > 1:
                raise PlanMismatch(
                    f"'{full}' is the same tensor as another of the model, and an expert narrows it; expected a "
                    "tensor of its own. Use MaterialisedStore(model, experts)."
                )
            packed[full] = PackedParameter(module, name)
        return packed

    def activate(self, expert: int) -> nn.Module:
        self._check(expert)
        if expert == self.active:
            return self._skeletons[expert].model
        with interrupt_deferred():
            own = self._read_own(expert)
            if not self._taken:
                check_free(self.model)
            self._leave_active()
            if not self._taken:
                self._take()
            self._link(expert, own)
            self._employ(expert)
            self.active = expert
            self.switches += 1
        return self._skeletons[expert].model

    def dense(self) -> nn.Module:
        with interrupt_deferred():
            self._leave_active()
            for packed in self._packed.values():
                packed.give_back()
            self._taken = False
            self._employ(_DENSE)
        return self.model

    def copy(self, expert: int) -> nn.Module:
        active = self.active
        copy = super().copy(expert)
        if active is not None:
            self.activate(active)
        return copy

    # ---- one switch -------------------------------------------------------------------------------------------------

    def _read_own(self, expert: int) -> tuple[dict[str, torch.Tensor], Any]:
        """Fine-tuned tensors and LoRA from their files: before anything changes, because a file may be gone."""
        chosen, model = self.experts[expert], self._skeletons[expert].model
        weights = {} if chosen.weights is None else read_weights(chosen.weights)
        return weights, {} if chosen.lora is None else read_low_rank(chosen.lora, model)

    def _leave_active(self) -> None:
        while self._extra:
            self._extra.pop().remove()
        if self.active is not None:
            self._retire(self.active)
            skeleton, self.active = self._skeletons[self.active], None
            skeleton.empty_()

    def _take(self) -> None:
        self._retire(_DENSE)
        for packed in self._packed.values():
            packed.take()
        self._taken = True

    def _link(self, expert: int, own: tuple[dict[str, torch.Tensor], Any]) -> None:
        skeleton, (weights, low_rank) = self._skeletons[expert], own
        dense = dict(self.model.named_parameters(remove_duplicate=False))
        like = None
        try:
            for source in skeleton.sources:
                packed = self._packed.get(source.full)
                parameter = dense[source.full] if packed is None else packed.parameter
                like = parameter if like is None else like
                if source.full in weights:
                    value = weights[source.full].to(parameter.device, parameter.dtype)
                    parameter = nn.Parameter(value, requires_grad=parameter.requires_grad)
                elif packed is not None:
                    value = packed.arrange(source.rows, source.columns)
                    parameter = nn.Parameter(value, requires_grad=parameter.requires_grad)
                source.module._parameters[source.name] = parameter
            skeleton.link_buffers_(self.model, like)
            for path, (down, up) in low_rank.items():
                layer = skeleton.model.get_submodule(path)
                down, up = (half.to(layer.weight.device, layer.weight.dtype) for half in (down, up))
                self._extra.append(LowRankAddition(down, up).attach(layer))
        except BaseException:
            while self._extra:
                self._extra.pop().remove()
            skeleton.empty_()
            raise

    def _retire(self, place: int) -> None:
        """Have a model without weights say so, rather than fail inside a layer."""
        if place not in self._idle:
            model = self.model if place == _DENSE else self._skeletons[place].model
            self._idle[place] = (
                model.register_forward_pre_hook(refuse_idle),
                model.register_state_dict_pre_hook(refuse_idle),
            )

    def _employ(self, place: int) -> None:
        for handle in self._idle.pop(place, ()):
            handle.remove()


def refuse_idle(model: nn.Module, *ignored: Any) -> None:
    """Hook of a model whose weights serve another expert now. Raises `GenpruneError`."""
    raise GenpruneError(
        f"this {type(model).__name__} is not the active one: its weights serve another expert of the same store; "
        "expected the model that the store gave last. Call store.activate(expert) or store.dense(), and use what that "
        "returns."
    )


def check_free(model: nn.Module) -> None:
    """Refuse a model whose weights are in another store's order. Raises `GenpruneError`."""
    if refuse_idle in model._forward_pre_hooks.values():
        raise GenpruneError(
            f"the weights of this {type(model).__name__} serve an expert of another store; expected the dense model. "
            "Call dense() of that store (`unwrapped` of its routed pipeline) first."
        )
