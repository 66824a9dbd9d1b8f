"""The accelerator of a training run: the user's own, or one that leaves no state behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from genprune.errors import GenpruneError


@contextlib.contextmanager
def accelerator_of(
    given: Any, method: Any, log_with: str | None, output_dir: str | os.PathLike | None, tracker: str
) -> Iterator[Any]:
    """The user's accelerator, or one of our own for the length of the block.

    Args:
        given: an `accelerate.Accelerator`, or None.
        method: settings with `mixed_precision` and `to_json`.
        tracker: name of the run in `log_with`.

    Raises:
        GenpruneError: the precision of the two differs, or cannot run here.
    """
    if given is not None:
        if given.mixed_precision != method.mixed_precision:
            raise GenpruneError(
                f"the accelerator has mixed_precision='{given.mixed_precision}', the method "
                f"'{method.mixed_precision}'; expected the same. Change one of them."
            )
        yield given
        return
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    before = bool(AcceleratorState._shared_state)
    # what a cut left of a host may have parameters that an output does not read
    spread = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    try:
        accelerator = Accelerator(
            mixed_precision=method.mixed_precision,
            cpu=not torch.cuda.is_available(),
            log_with=log_with,
            project_dir=output_dir,
            kwargs_handlers=[spread],
        )
    except ValueError as error:
        raise GenpruneError(
            f"accelerate refuses mixed_precision='{method.mixed_precision}' here ({error}); expected a precision that "
            "this device and this process can run. Pass mixed_precision='no', or an accelerator of your own."
        ) from None
    try:
        if log_with is not None:
            plain = {name: value for name, value in method.to_json().items() if isinstance(value, (int, float, str))}
            accelerator.init_trackers(tracker, config=plain)
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        if not before:
            AcceleratorState._reset_state()  # or a later call could not choose another precision


def check_accelerator(accelerator: Any, method: Any) -> None:
    """Raises `GenpruneError` for float16 on a CPU, and where weights are split over processes.

    Checkpoints and averages expect whole weights.
    """
    if method.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise GenpruneError(
            "mixed_precision='fp16' on a CPU, where accelerate would run float32 instead; expected a GPU. Pass "
            "mixed_precision='no' or 'bf16'."
        )
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise GenpruneError(
            f"accelerate is set to {kind}; expected one process or data parallelism (MULTI_GPU, MULTI_CPU). Run "
            "`accelerate config` again, and pass lora_rank=16 or gradient_checkpointing=True for less memory."
        )
