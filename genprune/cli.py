"""The command line: `genprune demo | inspect | prune | recover | tokens | route | bench | methods`. Thin."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from genprune.cli_options import Compensate, Force, Json, Keep, Model, Of, Precision, Quantity, Seed
from genprune.cli_route import route
from genprune.cli_tokens import tokens
from genprune.errors import GenpruneError


class _Group(TyperGroup):
    """Commands whose expected errors are one message and exit code 2, never a traceback."""

    def invoke(self, ctx) -> Any:
        from genprune.console import print_error

        try:
            return super().invoke(ctx)
        except (GenpruneError, ModuleNotFoundError) as error:
            # A missing package of genprune's own says what to install; any other is a bug and keeps its traceback.
            if isinstance(error, ModuleNotFoundError) and "pip install" not in str(error):
                raise
            print_error(error)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="genprune",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Prune text-to-image diffusion models and vision transformers: smaller layers, loaded by stock Diffusers "
    "and timm.\n\nStart with `genprune demo --out demo`; it needs no network and no GPU.",
)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the libraries' log messages.")] = False,
) -> None:
    if version:
        import genprune

        typer.echo(f"genprune {genprune.__version__}")
        raise typer.Exit()
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not verbose:
        for name in ("diffusers", "transformers", "huggingface_hub", "timm"):
            logging.getLogger(name).setLevel(logging.ERROR)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the pruning methods, and what each needs."""
    from dataclasses import asdict

    from genprune import console
    from genprune.methods import methods as cards

    if as_json:
        console.print_json([asdict(card) for card in cards()])
    else:
        console.print_methods(cards())


@app.command()
def inspect(
    model: Model,
    height: Annotated[
        int | None, typer.Option(help="Count MACs at this height: latent pixels, image for a ViT.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Likewise the width.")] = None,
    text_length: Annotated[int | None, typer.Option(help="Text tokens.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of one call.")] = None,
    as_json: Json = False,
) -> None:
    """Show what can be cut from a model, what it costs, and how small it can get. Reads no weights."""
    from genprune import console
    from genprune.inspection import inspect_model
    from genprune.model_source import open_source

    source = open_source(model)
    point = {"height": height, "width": width, "text_length": text_length, "batch": batch}
    found = inspect_model(source.skeleton(), **{name: value for name, value in point.items() if value is not None})
    if as_json:
        console.print_json({"model": source.name, "source": source.kind, **found.to_json()})
    else:
        console.print_inspection(source, found)


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; it appears whole or not at all.")],
    method: Annotated[str, typer.Option(help="One of `genprune methods`.")] = "taylor",
    keep: Keep = 0.7,
    of: Of = Quantity.macs,
    prompts: Annotated[
        Path | None, typer.Option(help="Calibration prompts, one a line, for methods that score.")
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(help="Kinds of sites that may go, repeatable or comma-separated; see `genprune inspect`."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method, repeatable: train_steps=50."),
    ] = None,
    pipeline_options: Annotated[
        list[str] | None,
        typer.Option(
            "--pipeline-option",
            metavar="NAME=VALUE",
            help="An argument of the pipeline's call while it calibrates, repeatable: max_sequence_length=256.",
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Where a method that trains keeps its checkpoints and curve; a second run goes on there."),
    ] = None,
    compensate: Annotated[
        Compensate | None, typer.Option(help="Refit what reads removed units, on the prompts, before the cut.")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Write the plan, a small file, and leave the model.")
    ] = False,
    stock: Annotated[
        bool,
        typer.Option("--stock", help="Write a stock configuration (depth or uniform plans), no genprune to load."),
    ] = False,
    seed: Seed = 0,
    dtype: Annotated[Precision, typer.Option(help="Precision to score in and to save.")] = Precision.float32,
    device: Annotated[str, typer.Option(help="Where to score and time: cpu, cuda, ...")] = "cpu",
    latency: Annotated[bool, typer.Option(help="Time dense and pruned on --device, where both fit in memory.")] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Prune a model for real and save it where stock Diffusers, or `gp.load_model`, loads it."""
    import torch

    from genprune import console, prune_run
    from genprune.methods import method_named
    from genprune.methods.assignments import assigned
    from genprune.model_source import open_source

    refit = None if compensate is None or plan_only else compensate.value  # a plan holds no weights
    prune_run.check_free(out, force)
    console.quiet_hosts()
    chosen = tuple(kind.strip() for item in kinds or () for kind in item.split(",") if kind.strip()) or None
    named = method_named(method, keep=keep, of=of.value, kinds=chosen, seed=seed)
    named = named.changed(**assigned(named, settings or (), flags=("keep", "of", "kinds", "seed")))
    options = prune_run.read_options(pipeline_options or ())
    source = open_source(model)
    plan = prune_run.prune_to_folder(
        source,
        named,
        out,
        prompts=prune_run.read_prompts(prompts, source, named, refit),
        pipeline_options=options,
        checkpoints=checkpoints,
        plan_only=plan_only,
        stock=stock,
        compensate=refit,
        device=device,
        dtype=getattr(torch, dtype.value),
        latency=latency,
        say=console.print_step,
    )
    if as_json:
        console.print_json(prune_run.summary(plan, out))
    else:
        console.print_plan(plan)
        console.print_saved(source, out, plan_only)


@app.command()
def recover(
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="The folder of a pruned pipeline.")],
    teacher: Annotated[
        str, typer.Option(help="The dense pipeline that it was pruned from: a folder, a hub id, or `miniature`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it appears whole or not at all.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts, one a line, that the teacher draws; the miniature has data of its own."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps. [default: 1000, with the miniature as teacher 300]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of gp.NormalizedDistillation: batch_size=16."),
    ] = None,
    pipeline_options: Annotated[
        list[str] | None,
        typer.Option(
            "--pipeline-option",
            metavar="NAME=VALUE",
            help="An argument of the teacher's call, repeatable: max_sequence_length=256.",
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Where checkpoints and the curve stay; a second run goes on there.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="The plan, where PRUNED is a stock export with renumbered blocks.")
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[Precision, typer.Option(help="Precision to save in; weights train in float32.")] = (
        Precision.float32
    ),
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a pruned pipeline against the dense one, and save it where stock Diffusers loads it."""
    import torch

    from genprune import console, prune_run, recover_run
    from genprune.methods.assignments import assigned
    from genprune.model_source import open_source
    from genprune.plan import PruningPlan

    prune_run.check_free(out, force)
    console.quiet_hosts()
    options = prune_run.read_options(pipeline_options or ())
    student, dense = open_source(pruned), open_source(teacher)
    recover_run.check_pair(student, dense)
    given = {"seed": seed} if steps is None else {"seed": seed, "steps": steps}
    given |= assigned(recover_run.default_method(dense), settings or (), flags=("steps", "seed"))
    method = recover_run.default_method(dense, **given)
    told = recover_run.recover_to_folder(
        student,
        dense,
        method,
        out,
        data=recover_run.read_data(prompts, dense, method),
        plan=None if plan is None else PruningPlan.load(plan),
        pipeline_options=options,
        checkpoints=checkpoints,
        device=device,
        dtype=getattr(torch, dtype.value),
        say=console.print_step,
    )
    if as_json:
        console.print_json(told)
    else:
        for line in recover_run.lines(told, out):
            console.out.print(line, markup=False, highlight=False)


app.command()(tokens)
app.command()(route)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; it appears whole or not at all.")] = Path("demo"),
    keep: Keep = 0.7,
    of: Of = Quantity.macs,
    prompts: Annotated[int | None, typer.Option(help="Pictures each candidate draws. [default: 48, quick: 8]")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps a picture. [default: 20, quick: 8]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look; its quality figures mean little.")] = False,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Prune the embedded miniature, compare before and after, and write a page to look at. Offline."""
    from genprune import console
    from genprune.demo import DemoSettings, run_demo

    given = {"keep": keep, "of": of.value, "seed": seed, "prompts": prompts, "steps": steps}
    given = {name: value for name, value in given.items() if value is not None}
    settings = DemoSettings.quick(**given) if quick else DemoSettings(**given)
    console.quiet_hosts()
    result = run_demo(out, settings, force=force, say=console.print_step)
    if as_json:
        console.print_json(result)
    else:
        console.print_demo(result, out)


@app.command()
def bench(
    candidates: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=MODEL...", help="NAME=FOLDER, NAME=HUB_ID or NAME=BASE@PLAN, the dense one first."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for pictures, result.json and report.html; a second run resumes.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line. Default: the miniature's test split, with its grader.")
    ] = None,
    coco_captions: Annotated[
        Path | None, typer.Option(help="MS-COCO captions, such as captions_val2014.json.")
    ] = None,
    coco_images: Annotated[Path | None, typer.Option(help="The folder of the pictures it lists.")] = None,
    count: Annotated[int, typer.Option(help="Prompts to draw.")] = 64,
    reference: Annotated[str | None, typer.Option(help="What the others are compared with. [default: dense]")] = None,
    extractors: Annotated[
        list[str] | None, typer.Option(help="What set distances are measured on, repeatable; see docs/metrics.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps a picture.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    batch_size: Annotated[int, typer.Option(help="Pictures a call.")] = 4,
    dtype: Annotated[Precision, typer.Option(help="Precision to draw in.")] = Precision.float32,
    seed: Seed = 0,
    rounds: Annotated[int, typer.Option(help="Timed rounds; 0 leaves latency out.")] = 10,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each candidate in a fresh process.")] = True,
    device: Annotated[str | None, typer.Option(help="Where to draw: cpu, cuda, ... Default: an accelerator.")] = None,
    as_json: Json = False,
) -> None:
    """Compare pipelines on the same prompts and seeds: quality, distance to dense, latency, memory."""
    from genprune import console
    from genprune.bench import Sampling, run_benchmark

    console.quiet_hosts()
    result = run_benchmark(
        candidates,
        out,
        data=_bench_data(prompts, coco_captions, coco_images, count, seed),
        reference=reference,
        sampling=Sampling(
            num_inference_steps=steps, guidance_scale=guidance, seed=seed, batch_size=batch_size, dtype=dtype.value
        ),
        extractors=extractors or None,
        latency_rounds=rounds,
        memory=memory,
        device=device,
    )
    if result is None:  # not the first process of an accelerate launch
        return
    if as_json:
        console.print_json(result)
    else:
        console.print_bench(result, out)


def _bench_data(prompts: Path | None, captions: Path | None, images: Path | None, count: int, seed: int):
    from genprune.bench import coco_data, miniature_data, prompt_data
    from genprune.bench.data import first

    if prompts is not None and captions is not None:
        raise GenpruneError("both --prompts and --coco-captions are given; expected one of them. Leave one out.")
    if (captions is None) != (images is None):
        raise GenpruneError("--coco-captions and --coco-images belong together; expected both. Pass the other one.")
    if captions is not None:
        return coco_data(captions, images, count, seed)
    return miniature_data("test", count, seed) if prompts is None else first(prompt_data(prompts), count)


if __name__ == "__main__":
    app()
