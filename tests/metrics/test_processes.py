"""Two processes, each with half of the pictures, give what one process gives with all."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_extractors import TinyNet, pictures

from genprune.metrics import CMMD, FID, KID, PairedFidelity, psnr


def measure(rank: int, world: int) -> dict[str, tuple[float, int]]:
    """Every metric on this rank's share: uneven shares, so that a mean of means would show."""
    real, fake = pictures(13, 0), pictures(13, 1, high=150)
    share = slice(None) if world == 1 else slice(0, 9) if rank == 0 else slice(9, None)
    results = {}
    for kind in (FID, KID, CMMD):
        metric = kind(TinyNet())
        metric.update(real[share], real=True)
        metric.update(fake[share], real=False)
        result = metric.result()
        results[result.name] = (result.value, result.count)
    metric = PairedFidelity(psnr)
    metric.update(real[share], fake[share])
    result = metric.result()
    results[result.name] = (result.value, result.count)
    return results


def work(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(measure(rank, world), f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(2, port, str(tmp_path)), nprocs=2)
    expected = measure(0, 1)
    assert len(expected) == 4
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (value, count) in expected.items():
            assert found[name][0] == pytest.approx(value, rel=1e-9), name  # sums in another order
            assert found[name][1] == count == 13
