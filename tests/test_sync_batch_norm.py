"""SyncBatchNorm over two processes equals batch norm of the whole batch: values, first and second derivatives."""

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
pytestmark = pytest.mark.multiprocess

ROWS = {"uneven": (3, 5), "one row each": (1, 1), "one process without rows": (4, 0)}
MOMENTUM = 0.3


def value_and_derivatives(
    y: Tensor, grad_output: Tensor, tensors: list[Tensor], directions: list[Tensor]
) -> list[Tensor]:
    """The value, its gradients, and the gradients of their directional derivative."""
    first = torch.autograd.grad(y, tensors, grad_output, create_graph=True)
    directional = torch.stack([(a * v).sum() for a, v in zip(first, directions, strict=True)]).sum()
    return [x.detach() for x in (y, *first, *torch.autograd.grad(directional, tensors[:2]))]


def run_process(rank: int, rows: tuple[int, int], rendezvous: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    t = TensorFactory()
    x, grad_output, direction = (t(sum(rows), 3, 2) for _ in range(3))
    affine = [t(3), t(3)]
    affine_directions = [t(3), t(3)]
    local = slice(0, rows[0]) if rank == 0 else slice(rows[0], None)

    def run(part: slice, function: Any) -> list[Tensor]:
        running = [torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)]
        tensors = [x.clone().requires_grad_() for x in (x[part], *affine)]
        y = function(tensors, running)
        directions = [direction[part], *affine_directions]
        return [*value_and_derivatives(y, grad_output[part], tensors, directions), *running]

    synchronized = run(
        local,
        lambda tensors, running: synced(*tensors, *running, 1e-5, MOMENTUM, dist.group.WORLD, 2),
    )
    whole = run(
        slice(None),
        lambda tensors, running: nn.functional.batch_norm(
            tensors[0], *running, *tensors[1:], training=True, momentum=MOMENTUM
        ),
    )
    names = ["y", "input", "weight", "bias", "input, second order", "weight, second order", "mean", "var"]
    for name, found, expected in zip(names, synchronized, whole, strict=True):
        if name.startswith(("weight", "bias")):  # each process has the gradient of the examples that it received
            dist.all_reduce(found)
        elif len(expected) == sum(rows):
            expected = expected[local]
        assert_close(found, expected, msg=lambda m, name=name: f"{name}: {m}")
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_two_processes_match_one_batch(rows: tuple[int, int], tmp_path: Path) -> None:
    mp.spawn(run_process, args=(rows, str(tmp_path / "rendezvous")), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


def test_module_calls_the_rule_and_raises_torchs_error_on_the_cpu(tmp_path: Path) -> None:
    module = nn.SyncBatchNorm(3)
    called = type(module).forward.__globals__["sync_batch_norm"].apply
    assert called.__wrapped__ is sync_batch_norm
    assert_close(module(torch.eye(3)), torch.nn.BatchNorm1d(3)(torch.eye(3)))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
            module(torch.eye(3))
    finally:
        dist.destroy_process_group()
