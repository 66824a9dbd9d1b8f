"""The Markdown page of a chain result; regenerate it, never edit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genprune.files import whole_file

_NAMES = {"sd15": "SD 1.5 U-Net", "sdxl": "SDXL U-Net"}
_SPEED = {"unet": "U-Net (SD 1.5 shape)", "dit": "DiT (FLUX blocks, moderate size)", "vit": "ViT (DeiT-S)"}
_RATIOS = {
    "cut_time_ratio_vs_torch_pruning": "a plan applied / trace and one pruning step, which scores as well",
    "known_cut_time_ratio_vs_torch_pruning": "a plan applied / trace and the change of the layers alone",
    "end_to_end_time_ratio_vs_torch_pruning": "from a dense model to a cut one, scoring included on both sides",
}


def write_table(path: Path, result: dict[str, Any]) -> None:
    """Write the page whole."""
    device, parts = result["device"], result["parts"]
    lines = [
        "# Benchmarks: the chain",
        "",
        "Generated from the result JSON by `scripts/bench_chain.py --table`; do not edit.",
        f"Device: {device['name']}, {device['threads']} threads, load {result['load_average']:.1f} at the end; "
        f"torch {result['versions']['torch']}, diffusers {result['versions']['diffusers']}.",
        "Random weights: cost, memory and speed only, no word about quality.",
        "",
        "## Find, plan, cut, save, reload (bfloat16, magnitude, keep 70 % of the MACs)",
        "",
        "| host | phase | seconds | extra peak memory | share of the model |",
        "|---|---|---:|---:|---:|",
    ]
    for name in ("sd15", "sdxl"):
        if name in parts:
            for phase, row in parts[name]["phases"].items():
                extra, share = row["extra_bytes"] / 2**20, parts[name]["extra_memory_ratio"][phase]
                lines.append(f"| {_NAMES[name]} | {phase} | {row['seconds']:.2f} | {extra:,.0f} MiB | {share:.1%} |")
    lines += ["", "A reload's share leaves out the loaded model itself.", "", *_aims(result["figures"])]
    lines += [*_rival(result), *_speed(parts)]
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _aims(figures: dict[str, float]) -> list[str]:
    """Each aim beside what was measured; a miss is called one."""
    aims = {
        "extra_memory_ratio": ("extra peak memory, the worst phase of the worst host", "<=", 0.1),
        "cut_time_ratio_vs_torch_pruning": ("time of a cut / Torch-Pruning's", "<=", 0.1),
        "macs_saving_seen_unet": ("MACs saving seen as time, U-Net", ">=", 0.9),
        "macs_saving_seen_dit": ("MACs saving seen as time, DiT", ">=", 0.9),
        "macs_saving_seen_vit": ("MACs saving seen as time, ViT", ">=", 0.9),
    }
    lines = ["## Aims", "", "| figure | aim | measured | |", "|---|---|---:|---|"]
    for name, (told, sign, aim) in aims.items():
        if name in figures:
            met = figures[name] <= aim if sign == "<=" else figures[name] >= aim
            lines.append(f"| {told} | {sign} {aim} | {figures[name]:.3f} | {'met' if met else 'missed'} |")
    return [*lines, ""]


def _rival(result: dict[str, Any]) -> list[str]:
    rival, figures = result["parts"].get("torch_pruning", {}), result["figures"]
    lines = ["## Beside Torch-Pruning, the same SD 1.5", ""]
    if "phases" not in rival:
        return [*lines, rival.get("skipped", "Not run."), ""]
    ours, trace, step = result["parts"]["sd15"]["phases"], *rival["phases"].values()
    lines += [
        f"| step | genprune | Torch-Pruning {rival['version']} |",
        "|---|---:|---:|",
        f"| find sites, or trace | {_seconds(ours['find'])} | {_seconds(trace)} |",
        f"| score and choose | {_seconds(ours['plan'])} | {_seconds(step, rival['cut_alone'])} |",
        f"| change the layers | {_seconds(ours['cut'])} | {_seconds(rival['cut_alone'])} |",
        f"| extra peak memory | {_mib(ours['plan'], ours['cut'])} | {_mib(trace, step)} |",
        "",
        "Seconds, in brackets CPU seconds. Both score by magnitude and narrow every layer; the sizes left differ:",
        f"Torch-Pruning's ratio is one of channels: {rival['params_after'] / 1e6:.0f} M parameters stay there, "
        f"{result['parts']['sd15']['figures']['params'] / 1e6:.0f} M here.",
        "",
        "| genprune's time / Torch-Pruning's | time | CPU time |",
        "|---|---:|---:|",
    ]
    for key, told in _RATIOS.items():
        lines.append(f"| {told} | {figures[key]:.3f} | {figures['cpu_' + key]:.3f} |")
    lines.append("")
    return lines


def _seconds(phase: dict[str, Any], without: dict[str, Any] | None = None) -> str:
    seconds, cpu = (phase[unit] - (without[unit] if without else 0) for unit in ("seconds", "cpu_seconds"))
    return f"{seconds:.2f} ({cpu:.2f})"


def _mib(*phases: dict[str, Any]) -> str:
    return f"{max(phase['extra_bytes'] for phase in phases) / 2**20:,.0f} MiB"


def _speed(parts: dict[str, Any]) -> list[str]:
    lines = [
        "## MACs saved and time saved (uniform widths)",
        "",
        "`seen` = (1 - latency ratio) / (1 - MACs ratio): 1 means that all of the saving shows up as time.",
        "Latency is the median over rounds of the ratio within a round, dense and cut in turns, with 95 % interval.",
        "CPU time is what the process computed; a busy machine lengthens it less.",
        "",
        "| host | input | width | MACs | latency | CPU time | seen | seen in CPU time |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for name, label in _SPEED.items():
        if name not in parts:
            continue
        point = parts[name]["setting"]["operating_point"]
        shape = f"{point['batch']} x {point['height']} x {point['width']}, {point['text_length']} tokens"
        for row in parts[name]["rows"]:
            ratio = row["latency_ratio"]
            lines.append(
                f"| {label} | {shape} | {row['width']} | {row['macs_ratio']:.3f} | {ratio['estimate']:.3f} "
                f"[{ratio['low']:.3f}, {ratio['high']:.3f}] | {row['cpu_time_ratio']:.3f} | "
                f"{row['macs_saving_seen']:.2f} | {row['macs_saving_seen_in_cpu_time']:.2f} |"
            )
        seen, computed = parts[name]["macs_saving_seen"], parts[name]["macs_saving_seen_in_cpu_time"]
        lines.append(f"| **{label}** | | median | | | | **{seen:.2f}** | **{computed:.2f}** |")
    return [*lines, ""]
