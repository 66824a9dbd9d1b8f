"""How pruned models are saved and loaded: the Pruned class after a cut, and bare models of either host by folder."""

from __future__ import annotations

from torch import nn

from genprune.cutting import pruned_widths
from genprune.errors import UnsupportedModel
from genprune.families import family_of, host_name
from genprune.widths import PRUNING_KEY, pruning_entry


def check_adoptable(model: nn.Module) -> None:
    """Refuse, before a cut changes anything, a model that could not become its Pruned class afterwards.

    Raises:
        UnsupportedModel: it is of the user's own subclass of a diffusers class, whose code a saved folder would lose.
    """
    if family_of(model).library != "diffusers":
        return
    from genprune.pruned_models import PRUNED

    if type(model) not in PRUNED and type(model) not in PRUNED.values():
        raise UnsupportedModel(
            f"{type(model).__name__} is a subclass of {host_name(model)}; expected exactly {host_name(model)}, because "
            "a pruned model is saved and loaded as that class. Build one with "
            f"{host_name(model)}.from_config(model.config), load the weights into it, and cut that."
        )


def adopt_(model: nn.Module) -> None:
    """Turn a model that was just cut into its Pruned class, in place, with the widths in its configuration.

    The one `__class__` swap of the project; the Pruned class overrides nothing of the forward path. A timm model
    stays as it is (timm has no such hook: `save_model` writes its widths), and so does one that lost nothing.
    """
    widths = pruned_widths(model)
    if family_of(model).library != "diffusers" or not widths:
        return
    from genprune.pruned_models import PRUNED

    check_adoptable(model)
    model.__class__ = PRUNED.get(type(model), type(model))
    model.register_to_config(**{PRUNING_KEY: pruning_entry(widths)})
