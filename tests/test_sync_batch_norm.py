"""Batch norm over two processes is batch norm of both batches as one: values, gradients, and theirs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

from manualgrad import nn
from manualgrad.ops.normalization import sync_batch_norm
from manualgrad.registry import TensorFactory

synced: Any = sync_batch_norm

ROWS = {"uneven": (3, 5), "one each": (1, 1), "one process has none": (4, 0)}
MOMENTUM = 0.3


def taken(y: Tensor, upstream: Tensor, tensors: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    """The value, its gradients, and those of the gradients along a direction."""
    first = torch.autograd.grad(y, tensors, upstream, create_graph=True)
    slope = torch.stack([(a * v).sum() for a, v in zip(first, along, strict=True)]).sum()
    return [x.detach() for x in (y, *first, *torch.autograd.grad(slope, tensors[:2]))]


def process(rank: int, rows: tuple[int, int], rendezvous: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    make = TensorFactory()
    x, upstream, along = (make(sum(rows), 3, 2) for _ in range(3))
    affine = [make(3), make(3)]
    affine_along = [make(3), make(3)]
    here = slice(0, rows[0]) if rank == 0 else slice(rows[0], None)

    def run(part: slice, function: Any) -> list[Tensor]:
        running = [torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)]
        tensors = [t.clone().requires_grad_() for t in (x[part], *affine)]
        y = function(tensors, running)
        return [*taken(y, upstream[part], tensors, [along[part], *affine_along]), *running]

    ours = run(
        here,
        lambda tensors, running: synced(*tensors, *running, 1e-5, MOMENTUM, dist.group.WORLD, 2),
    )
    whole = run(
        slice(None),
        lambda tensors, running: nn.functional.batch_norm(
            tensors[0], *running, *tensors[1:], training=True, momentum=MOMENTUM
        ),
    )
    names = ["y", "input", "weight", "bias", "input, second order", "weight, second order", "mean", "var"]
    for name, found, expected in zip(names, ours, whole, strict=True):
        if name.startswith(("weight", "bias")):  # each process has what its own examples send
            dist.all_reduce(found)
        elif len(expected) == sum(rows):
            expected = expected[here]
        assert_close(found, expected, msg=lambda m, name=name: f"{name}: {m}")
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_two_processes_are_one_batch(rows: tuple[int, int], tmp_path: Path) -> None:
    mp.spawn(process, args=(rows, str(tmp_path / "rendezvous")), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


def test_the_module_calls_ours_and_refuses_the_cpu_as_torch_does(tmp_path: Path) -> None:
    module = nn.SyncBatchNorm(3)
    called = type(module).forward.__globals__["sync_batch_norm"].apply
    assert called.__wrapped__ is sync_batch_norm
    assert_close(module(torch.eye(3)), torch.nn.BatchNorm1d(3)(torch.eye(3)))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
            module(torch.eye(3))
    finally:
        dist.destroy_process_group()
