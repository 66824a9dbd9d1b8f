"""Which prompts, starting noises and guidance an optimiser step trains on: functions of its number alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from genprune.denoising.capture import checked_prompts
from genprune.errors import BadCalibrationData, GenpruneError
from genprune.masks.settings import MaskTraining


def checked_conditions(pipe, prompts: Sequence | None) -> tuple | None:
    """What a pipeline is told to draw: text, class labels, or None for an unconditional one.

    Raises:
        BadCalibrationData: missing, empty, of the wrong type, or given to an unconditional pipeline.
    """
    found = checked_prompts(pipe, prompts)
    if found is None and prompts is not None:
        raise BadCalibrationData(
            f"{type(pipe).__name__} draws without prompts, got {len(prompts)}; expected none. Leave them out."
        )
    return None if found is None else tuple(found)


@dataclass(frozen=True)
class TrajectoryBatch:
    """One process's rows of one trajectory.

    Attributes:
        prompts: one per row, text or class labels; None for an unconditional pipeline.
        seeds: of the starting noise, one per row.
        rows: of all processes together.
        guidance_scale: of this trajectory; None: the pipeline's default.
        key: names the dense targets of this batch where it comes again; None where it does not.
    """

    prompts: tuple | None
    seeds: tuple[int, ...]
    rows: int
    guidance_scale: float | None = None
    key: tuple | None = None


@dataclass(frozen=True)
class PromptBatches:
    """Fixed batches of prompts, in another order every epoch, with other noise every epoch.

    Nothing is remembered between steps, so a resumed run sees what an uninterrupted one does; and because batches are
    fixed, dense targets that were kept are those that would be computed again, to the bit.

    Args:
        prompts: all of them; None for an unconditional pipeline.
        settings: of the training.
        seed: of the run.
        rank, world: this process among all.
    """

    prompts: tuple | None
    settings: MaskTraining
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.prompts is not None and not self.prompts:
            raise BadCalibrationData('no prompts to learn masks on; pass e.g. prompts=["a red fox in the snow", ...].')
        if not 0 <= self.rank < self.world:
            raise GenpruneError(f"process {self.rank} of {self.world}; expected a rank below the number of processes.")

    def batch(self, step: int, micro_batch: int) -> TrajectoryBatch:
        """This process's rows of trajectory `micro_batch` of optimiser step `step`."""
        rows = self.settings.batch_size * self.world
        total = len(self.prompts) if self.prompts is not None else rows
        per_epoch = -(-total // rows)
        epoch, place = divmod(step * self.settings.gradient_accumulation_steps + micro_batch, per_epoch)
        order = list(range(per_epoch))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        chosen = [(order[place] * rows + row) % total for row in range(rows)][self.rank :: self.world]
        noises = self.settings.noises_per_prompt
        noise = epoch if noises is None else epoch % noises
        guidance, kept = self.settings.guidance_scale, noises is not None
        if isinstance(guidance, tuple):
            guidance, kept = random.Random(f"{self.seed} {step} {micro_batch}").uniform(*guidance), False
        return TrajectoryBatch(
            prompts=tuple(self.prompts[index] for index in chosen) if self.prompts is not None else None,
            # a prompt that fills a batch twice gets two noises; 0 to 2^31 - 1 leaves the user's small seeds alone
            seeds=tuple(
                random.Random(f"{self.seed} {noise} {order[place]} {index} {row}").randrange(2**31)
                for row, index in zip(range(self.rank, rows, self.world), chosen)
            ),
            rows=rows,
            guidance_scale=guidance,
            key=(order[place], noise) if kept else None,
        )
