"""What the tests of recovery train: tiny teachers, students cut from them, quick settings."""

from __future__ import annotations

import copy

import torch
from tiny_hosts import vit

import genprune as gp
from genprune.cutting import plan_base
from genprune.families import denoiser, family_of, find_sites
from genprune.recovery import NormalizedDistillation, recover

SIZE = {"height": 16, "width": 16}
QUICK = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "teacher_steps": 1}
PROMPTS = ["abc", "cde", "foo"]


def removing(model, *names) -> gp.PruningPlan:
    """The plan that removes all of some sites."""
    sites = find_sites(model)
    keep = {name: torch.zeros(sites[name].size, dtype=torch.bool) for name in names}
    return gp.PruningPlan(plan_base(model), keep)


def student_of(teacher, *names):
    """A copy of a pipeline or model with these sites removed."""
    student = copy.deepcopy(teacher)
    return gp.cut(student, removing(denoiser(teacher), *names))


def quick(**changes) -> NormalizedDistillation:
    return NormalizedDistillation(**(QUICK | changes))


def recovered(target, teacher, settings=None, **run):
    return recover(target, teacher, settings or quick(), **({"progress": False} | run))


def weights_of(target) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in denoiser(target).state_dict().items()}


def same_weights(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state_of(target):
    """All that a recovery must leave as it was in a teacher."""
    model = denoiser(target)
    return (
        [(p.requires_grad, p.grad is None, id(p)) for p in model.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        type(model),
    )


def denoiser_batches(model, count=3, rows=2):
    """`(inputs, target)` batches for a bare denoiser."""
    family = family_of(model)
    point = family.operating_point(model, height=8, width=8, batch=rows, text_length=3)
    batches = []
    for seed in range(count):
        torch.manual_seed(seed)
        inputs = family.example_inputs(model, point, "cpu", torch.float32)
        with torch.no_grad():
            batches.append((inputs, torch.randn_like(model(**inputs).sample)))
    return batches


def labelled_images(count=3, rows=4):
    source = torch.Generator().manual_seed(5)
    return [
        (torch.randn(rows, 3, 32, 32, generator=source), torch.randint(5, (rows,), generator=source))
        for _ in range(count)
    ]


def small_vit():
    """A ViT whose outputs are far from zero, so that its features and logits say something."""
    model = vit()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()
