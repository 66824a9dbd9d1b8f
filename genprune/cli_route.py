"""`genprune route`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genprune.cli_options import Json, Seed


def route(
    router: Annotated[str, typer.Argument(metavar="ROUTER", help="The folder of a router, or of a routed pipeline.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="More of them, one a line.")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense pipeline, where ROUTER is a router alone and needs it."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="The sentence encoder, where it is not where the router's file says.")
    ] = None,
    unfamiliar: Annotated[
        str, typer.Option(help="What becomes of prompts unlike the training prompts: largest, nearest or error.")
    ] = "largest",
    capacity: Annotated[
        bool,
        typer.Option("--capacity", help="Keep the mean MACs of these prompts within the trained budget."),
    ] = False,
    as_map: Annotated[bool, typer.Option("--map", help="Show the words that mark each expert's prompts.")] = False,
    words: Annotated[int, typer.Option(min=1, help="Words of each expert in --map.")] = 8,
    draw: Annotated[Path | None, typer.Option(metavar="DIR", help="Also draw the prompts, into a new folder.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps a picture.")] = 25,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a call.")] = 16,
    pipeline_options: Annotated[
        list[str] | None,
        typer.Option(
            "--pipeline-option",
            metavar="NAME=VALUE",
            help="An argument of the pipeline's call, repeatable: guidance_scale=3.5.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to draw: cpu, cuda, ...")] = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show which expert of a router each prompt goes to, what it costs, and why; draw them where asked."""
    from genprune import console, prune_run, route_run

    console.quiet_hosts()
    result = route_run.route_prompts(
        router,
        route_run.read_prompts(prompt, prompts),
        base=base,
        encoder=encoder,
        unfamiliar=unfamiliar,
        capacity=capacity,
        words=words if as_map else 0,
        draw=draw,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        device=device,
        options=prune_run.read_options(pipeline_options or ()),
        say=console.print_step,
    )
    if as_json:
        console.print_json(result.to_json())
    else:
        for line in result.lines():
            console.out.print(line, markup=False, highlight=False)
