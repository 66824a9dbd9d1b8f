"""`genprune tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from genprune.cli_options import Json, Model, Seed, TokenQuantity
from genprune.errors import GenpruneError


def tokens(
    model: Model,
    keep: Annotated[
        float | None, typer.Option(help="Share of the whole dense model that stays, scoring included. [default: 0.65]")
    ] = None,
    of: Annotated[TokenQuantity, typer.Option(help="What --keep is a share of; latency is measured.")] = (
        TokenQuantity.macs
    ),
    counts: Annotated[
        str | None,
        typer.Option(metavar="LAYER:COUNT,...", help="Written out instead of --keep: 2:0.9,5:120 (share or count)."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="zero_tprune, zero_tprune_published (the paper's settings) or tome.")
    ] = "zero_tprune",
    score: Annotated[
        str | None, typer.Option(help="How tokens are ranked: auto, wpr, vote, cls, landmark or random.")
    ] = None,
    layers: Annotated[str | None, typer.Option(metavar="N,...", help="Where tokens may go, counted from 0.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method, repeatable: reduce=drop."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="FILE", help="A preset's file, or a published one's name: deit-.9-.8-.7.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="A folder of pictures to compare on. Default: noise.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures at most.")] = 64,
    search: Annotated[bool, typer.Option("--search", help="Find layers and counts on the images.")] = False,
    trials: Annotated[int, typer.Option(min=1, help="Candidates that --search runs.")] = 100,
    seconds: Annotated[float | None, typer.Option(help="Stop --search earlier, after so long.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the counts there, a preset for gp.prune_tokens.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="A timm model without its weights: for costs and times alone.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a call when latency is measured.")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls of each.")] = 10,
    latency: Annotated[bool, typer.Option(help="Time dense and reduced in turns on --device.")] = True,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run a model with fewer tokens: what it costs, how long it takes, how far its outputs move. Trains nothing."""
    from genprune import console, tokens_run
    from genprune.methods.assignments import assigned
    from genprune.model_source import open_source
    from genprune.tokens.latency import Timing

    console.quiet_hosts()
    if preset is not None:
        named = {"--keep": keep, "--counts": counts, "--score": score, "--layers": layers, "--set": settings or None}
        named |= {"--method": None if method == "zero_tprune" else method, "--of": None if of.value == "macs" else of}
        if given := [name for name, value in named.items() if value is not None]:
            raise GenpruneError(f"--preset and {', '.join(given)} are given; a preset has its own. Leave one out.")
    if keep is not None and counts is not None:
        raise GenpruneError("--keep and --counts are both given; expected one of them. Leave one out.")
    if search and counts is not None:
        raise GenpruneError("--search and --counts are both given; a search finds the counts. Leave one out.")
    chosen: Any = preset
    if preset is None:
        asked = tokens_run.read_counts(counts) if counts is not None else 0.65 if keep is None else keep
        chosen = tokens_run.method_named(method, keep=asked, of=of.value, layers=tokens_run.read_layers(layers))
        chosen = chosen.changed(
            **({} if score is None else {"score": score}),
            **assigned(chosen, settings or (), flags=("keep", "of", "layers", "score")),
        )
    result = tokens_run.reduce_source(
        open_source(model),
        chosen,
        images=images,
        count=count,
        random_weights=random_weights,
        search=search,
        trials=trials,
        seconds=seconds,
        save=save,
        timing=Timing(batch_size=batch_size, rounds=rounds),
        latency=latency,
        device=device,
        seed=seed,
        progress=not as_json,
        say=console.print_step,
    )
    if as_json:
        console.print_json(result.to_json())
    else:
        for line in result.lines():
            console.out.print(line, markup=False, highlight=False)
