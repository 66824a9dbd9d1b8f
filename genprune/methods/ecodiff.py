"""EcoDiff: masks learned end to end through the whole denoising chain, and its recipes by model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from genprune.allocation import default_kinds, fit
from genprune.allocation.request import eligible
from genprune.errors import BadCalibrationData, GenpruneError, nearest
from genprune.families import denoiser_slot
from genprune.masks.settings import MaskTraining, as_pairs
from genprune.methods.base import ScoringContext, UnitMethod


@dataclass(frozen=True)
class EcoDiff(MaskTraining, UnitMethod):
    """Logits learned by how the masked pipeline's final latents differ from the dense ones, under the whole budget.

    Needs a pipeline and, for text-to-image, prompts. One run's logits serve plans for every budget: `gp.score` once,
    then `scores.plan(keep=...)`; the ranking is sharpest at the `keep` that it was trained for. Units of all kinds are
    ranked together: the penalty on a logit is weighted by what its unit costs, so that a logit above another means
    more benefit per cost.

    Args:
        All of `genprune.masks.MaskTraining` (how masks are learned) and of `UnitMethod` (the budget).

    Reference:
        EcoDiff, "Learnable Sparsity for Vision Generative Models" (arXiv 2412.02852).
    """

    name: ClassVar[str] = "ecodiff"
    needs: ClassVar[tuple[str, ...]] = ("weights", "gradients", "training")
    additive: ClassVar[bool] = False  # a logit is benefit per cost already
    trains: ClassVar[bool] = True
    summary: ClassVar[str] = "masks learned through the whole denoising chain; needs a pipeline and prompts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "learning_rates", as_pairs(self.learning_rates))
        if isinstance(self.guidance_scale, list):
            object.__setattr__(self, "guidance_scale", tuple(self.guidance_scale))
        super().__post_init__()
        self.check()

    @classmethod
    def recipe(cls, model: str, **changes: Any) -> EcoDiff:
        """The published settings for a model, corrected where the release was wrong; see docs/ecodiff.md.

        Args:
            model: one of `recipes()`.
            changes: fields on top, such as `keep=0.7`.

        Raises:
            GenpruneError: an unknown model or field.
        """
        if model not in RECIPES:
            raise GenpruneError(
                f"no EcoDiff recipe '{model}'{nearest(str(model), RECIPES)}; expected one of {', '.join(RECIPES)}."
            )
        return RECIPES[model].changed(**changes)

    @staticmethod
    def recipes() -> tuple[str, ...]:
        """Names of the recipes."""
        return tuple(RECIPES)

    @classmethod
    def facts(cls) -> type[EcoDiff]:
        return cls

    def values(self, context: ScoringContext) -> tuple[dict, dict[str, Any]]:
        from genprune.masks.batches import checked_conditions
        from genprune.masks.budget import unit_shares
        from genprune.masks.training import MaskProblem, train_masks

        if denoiser_slot(context.target) is None:
            raise BadCalibrationData(
                f"{type(context.target).__name__} is a bare model; EcoDiff learns masks through a pipeline's whole "
                "denoising chain. Pass the pipeline, or use gp.Taylor with data=... for the model."
            )
        if context.data is not None or context.loss_fn is not None:
            raise BadCalibrationData(
                "EcoDiff compares the masked pipeline with itself and takes no data and no loss_fn; expected prompts "
                "alone. Leave them out."
            )
        prompts = checked_conditions(context.target, context.prompts)
        kinds = self.kinds or default_kinds(context.costs.sites)
        sites = context.sites.of_kind(*kinds)
        if self.of == "units":
            dense = whole = sum(site.size for site in sites.values())
        else:
            dense, whole = getattr(context.dense, self.of), getattr(context.costs.total, self.of)
        request = self.request(kinds)
        masked = eligible(context.costs.sites, request)
        problem = MaskProblem(
            pipe=context.target,
            sites=context.costs.sites,
            masked=tuple(masked),
            shares=unit_shares(sites, context.costs, dense, self.of),
            keep=self.keep,
            whole=whole / dense,
            prompts=prompts,
            options=context.options,
            select=lambda logits: fit(logits, context.costs, context.dense, request, self.additive).keep,
        )
        # a budget that no plan meets is refused before the training, not after it
        problem.select({name: torch.zeros(site.size) for name, site in sites.items()})
        trained = train_masks(
            problem,
            self,
            self.seed,
            output_dir=context.output_dir,
            resume=context.resume,
            checkpointing_steps=context.checkpointing_steps,
            progress=context.progress,
        )
        # What is protected was not learned: in a plan that protects less it goes last.
        best = max(float(values.max()) for values in trained.logits.values())
        protected = {name: torch.full((site.size,), best) for name, site in sites.items() if name not in masked}
        return trained.logits | protected, {"training": trained.figures}


# Published: temperature .83, stretch (-.1, 1.1), 100 prompts (256 for SD 3). Corrected everywhere: the budget is a
# share of params that a controller meets (the release's beta and keep ratios of units are no budget); a monotone
# penalty weighted by cost; no weight decay; float32 logits; fresh noise for every prompt; steps after full groups.
# Learning rates are the release's for attention, FFN and norm.
RECIPES: dict[str, EcoDiff] = {
    "sd15": EcoDiff(
        denoising_steps=50,
        guidance_scale=7.5,
        damping=0.5,
        init=2.5,
        learning_rate=0.2,
        train_steps=75,
        batch_size=1,
        gradient_accumulation_steps=4,
        validate_every=15,
    ),
    "sdxl": EcoDiff(
        denoising_steps=50,
        guidance_scale=5.0,
        damping=0.5,
        init=3.0,
        learning_rate=0.1,
        train_steps=100,
        batch_size=1,
        gradient_accumulation_steps=4,
    ),
    # the release starts at 4 with a damping of 1, inside the dead zone, where only the penalty moves a logit
    "sd3": EcoDiff(
        denoising_steps=40,
        guidance_scale=7.0,
        damping=0.5,
        init=3.0,
        learning_rate=0.2,
        train_steps=256,
        batch_size=1,
        gradient_accumulation_steps=4,
    ),
    "flux-dev": EcoDiff(
        denoising_steps=50,
        guidance_scale=3.5,
        damping=0.1,
        init=3.0,
        learning_rate=0.5,
        learning_rates=(("neurons", 0.1),),
        train_steps=100,
        batch_size=1,
        gradient_accumulation_steps=4,
        block_checkpointing=True,
    ),
    "flux-schnell": EcoDiff(
        denoising_steps=5,
        damping=0.1,
        init=3.0,
        learning_rate=0.5,
        learning_rates=(("neurons", 0.1),),
        train_steps=100,
        batch_size=1,
        gradient_accumulation_steps=4,
        block_checkpointing=True,
    ),
}
