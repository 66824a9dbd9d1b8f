"""Stage "distill": a student of miniature B that draws in 4 steps without guidance, as FLUX schnell does.

Rectified-flow distillation (InstaFlow, arXiv 2309.06380): the guided teacher turns noise into latents once, and the
student learns the straight line between the two, at the 4 timesteps that it will be called at.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from .data import EmojiScenes, shuffled_rows
from .denoiser import decode
from .loop import process_state
from .mmdit import TextConditions, draw_flow_latents, pack
from .pictures import contact_sheet
from .text import tokenize

STEPS = 4
TEACHER_STEPS, TEACHER_GUIDANCE = 12, 3.5
PAIR_SEED = 5_000_000  # of the noise; far from the seeds that pictures are judged with


@torch.no_grad()
def teacher_pairs(
    denoiser: nn.Module,
    conditions: TextConditions,
    tokenizers: dict,
    captions: list[str],
    path: Path,
    batch_size: int = 128,
) -> Tensor:
    """The teacher's latents `(N, 4, 16, 16)`, float16; the noise of caption i is seeded by `PAIR_SEED + i`."""
    if path.is_file():
        return load_file(path)["latents"]
    state = process_state()
    rank, world = state.process_index, state.num_processes
    parts = {}
    for number, start in enumerate(tqdm(range(0, len(captions), batch_size), desc="pairs", disable=rank > 0)):
        if number % world == rank:
            chosen = captions[start : start + batch_size]
            latents = draw_flow_latents(
                denoiser, conditions, tokenizers, chosen, PAIR_SEED + start, TEACHER_STEPS, TEACHER_GUIDANCE
            )
            parts[str(number)] = latents.half().contiguous()
    files = [path.with_suffix(f".part-{number}-of-{world}") for number in range(world)]
    save_file(parts, files[rank])
    state.wait_for_everyone()
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    latents = torch.cat([found[str(number)] for number in range(len(found))])
    state.wait_for_everyone()
    if state.is_main_process:
        save_file({"latents": latents}, path)
        for file in files:
            file.unlink()
    state.wait_for_everyone()
    return latents


class DistillationStage:
    """Trains the denoiser alone, in place, from the teacher's weights.

    Args:
        denoiser: starts as the teacher.
        conditions: with the teacher's frozen text encoders.
        tokenizers: of both text encoders.
        vae: decodes previews.
        captions, latents: the teacher's pairs.
        batch_size: of all processes.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        conditions: TextConditions,
        tokenizers: dict,
        vae: nn.Module,
        captions: list[str],
        latents: Tensor,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.modules = nn.ModuleDict({"denoiser": denoiser})
        self.denoiser, self.conditions, self.tokenizers, self.vae = denoiser, conditions, tokenizers, vae
        self.latents, self.seed, self.batch_size = latents, seed, batch_size
        self.tokens = {name: tokenize(tokenizer, captions) for name, tokenizer in tokenizers.items()}
        self.preview_captions = EmojiScenes().preview_captions(32)

    def loss(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, dict[str, float]]:
        device = next(self.denoiser.parameters()).device
        rows = shuffled_rows(step, self.batch_size, len(self.latents), self.seed)[rank::world]
        noise = torch.stack(
            [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(PAIR_SEED + int(row))) for row in rows]
        )
        clean, noise = pack(self.latents[rows].float().to(device)), pack(noise).to(device)
        times = (torch.arange(len(rows)) % STEPS + 1).to(device) / STEPS  # each of the 4 timesteps alike
        mixed = times.view(-1, 1, 1)
        with torch.no_grad():
            conditions = self.conditions(self.tokens["tokenizer"][rows], self.tokens["tokenizer_2"][rows])
        predicted = self.denoiser(
            hidden_states=(1 - mixed) * clean + mixed * noise, timestep=times, return_dict=False, **conditions
        )[0]
        return functional.mse_loss(predicted.float(), noise - clean), {}

    @torch.no_grad()
    def preview(self, folder: Path, step: int) -> None:
        latents = draw_flow_latents(
            self.denoiser, self.conditions, self.tokenizers, self.preview_captions, steps=STEPS, guidance_scale=1.0
        )
        path = folder / f"preview-{step:06d}.png"
        contact_sheet(decode(self.vae, latents), path, columns=8, zoom=2, captions=self.preview_captions)
