"""A denoiser whose weights FSDP2 split over processes (here: one) is counted and learned on like a whole one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from tiny_pipelines import flux_pipeline

import genprune as gp

FAST = {"train_steps": 1, "batch_size": 1, "denoising_steps": 2, "validate_every": 0}
CALL = {"prompts": ["a cat"], "operating_point": {"height": 4, "width": 4}, "progress": False}
CALL |= {"pipeline_options": {"max_sequence_length": 16}}


@pytest.fixture
def shard(tmp_path):
    """`fully_shard` on each block and on the model, as accelerate's configuration for FLUX does."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))

    def split(model):
        model.requires_grad_(False)
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    yield split
    dist.destroy_process_group()


@pytest.mark.parametrize("block_checkpointing", [False, True])
def test_masks_are_learned_on_a_sharded_denoiser(shard, tmp_path, block_checkpointing):
    pipe = flux_pipeline(tmp_path)
    method = gp.EcoDiff(keep=0.8, **FAST, block_checkpointing=block_checkpointing)
    whole = gp.score(pipe, method, **CALL)
    split = copy.copy(pipe)
    split.transformer = shard(copy.deepcopy(pipe.transformer))
    scores = gp.score(split, method, **CALL)
    assert scores.base == whole.base and scores.costs.total == whole.costs.total
    for name, logits in whole.values.items():
        torch.testing.assert_close(scores.values[name], logits)
    assert scores.plan() == whole.plan()


def test_a_pruned_and_sharded_model_is_not_counted(shard, tmp_path):
    model = flux_pipeline(tmp_path).transformer
    gp.cut(model, gp.make_plan(model, gp.Magnitude(keep=0.8)))
    with pytest.raises(gp.UnsupportedModel, match="was pruned and then split over processes"):
        gp.count_costs(shard(model))
