"""What the tests of masks train: small pipelines, quick settings, and a problem put together by hand."""

from __future__ import annotations

import torch
from tiny_pipelines import vae

from genprune.allocation import Request, fit
from genprune.costs import site_costs
from genprune.families import denoiser, find_sites
from genprune.masks import HardConcrete, MaskLogits, MaskProblem, MaskTraining
from genprune.masks.budget import unit_shares
from genprune.masks.step_gates import LearnedGates
from genprune.untouched import untouched

SIZE = {"height": 16, "width": 16}
OPTIONS = {
    "sd": SIZE,
    "flux": {"max_sequence_length": 16} | SIZE,
    "flux true guidance": {"max_sequence_length": 16, "true_cfg_scale": 2.0, "negative_prompt": "bad"} | SIZE,
    "dit": {},
    "ddpm": {},
}
QUICK = {"denoising_steps": 2, "batch_size": 1, "validate_every": 0}
NARROW = ("heads", "neurons", "channels", "modulation")


def small_dit_pipeline():
    """Class-conditional, two blocks: the quickest to train masks on."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_embeds_ada_norm=3,
    )
    return DiTPipeline(model.eval(), vae(), DDIMScheduler(), id2label={0: "tench", 1: "goldfish", 2: "shark"})


def problem_of(pipe, keep=0.8, prompts=(0, 1, 2), kinds=("heads", "neurons"), options=None, of="params"):
    """A problem as `EcoDiff` makes it."""
    model = denoiser(pipe)
    sites = find_sites(model)
    costs = site_costs(model, sites=sites)
    request = Request(keep, of, kinds)
    chosen = sites.of_kind(*kinds)
    return MaskProblem(
        pipe=pipe,
        sites=sites,
        masked=tuple(chosen),
        shares=unit_shares(chosen, costs, getattr(costs.total, of), of),
        keep=keep,
        whole=1.0,
        prompts=prompts,
        options={"guidance_scale": 1.0} if options is None else options,
        select=lambda logits: fit(logits, costs, costs.total, request, additive=False).keep,
    )


def trained(problem, seed=0, output_dir=None, **settings):
    """`train_masks` with quick settings, on a frozen model."""
    from genprune.masks import train_masks

    run = {name: settings.pop(name) for name in ("resume", "checkpointing_steps") if name in settings}
    with untouched(denoiser(problem.pipe)):
        return train_masks(
            problem, MaskTraining(**(QUICK | settings)), seed, output_dir=output_dir, progress=False, **run
        )


def learned_gates(pipe, kinds=NARROW, seed=0, damping=0.5, spread=1.0):
    """Gates over the sites of these kinds that a pipeline has, logits spread around 1."""
    model = denoiser(pipe)
    sites = find_sites(model)
    chosen = sites.of_kind(*(kind for kind in kinds if kind in sites.kinds()))
    generator = torch.Generator().manual_seed(3)
    logits = MaskLogits({name: 1 + spread * torch.randn(s.size, generator=generator) for name, s in chosen.items()})
    return LearnedGates(model, sites, logits, HardConcrete(damping=damping), seed)


def state_of(pipe):
    """All that a training must leave as it was: weights, flags, modes, hooks, attributes."""
    model = denoiser(pipe)
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(p.requires_grad, p.grad is None, id(p)) for p in model.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        dict(pipe.__dict__),
        type(model),
    )


def same_state(one, other) -> bool:
    weights = one[0].keys() == other[0].keys() and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    return weights and one[1:] == other[1:]


class DenoiserCalls:
    """Counts forwards of a pipeline's denoiser; raises `error` at call number `stop_at`."""

    def __init__(self, pipe, stop_at=None, error=KeyboardInterrupt):
        self.count, self.stop_at, self.error = 0, stop_at, error
        self.handle = denoiser(pipe).register_forward_pre_hook(self.hook)

    def hook(self, module, inputs):
        self.count += 1
        if self.count == self.stop_at:
            raise self.error()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


def relative_error(found, expected) -> float:
    one, other = (torch.cat([tensor.double().flatten() for tensor in both]) for both in (found, expected))
    return float((one - other).norm() / other.norm())
