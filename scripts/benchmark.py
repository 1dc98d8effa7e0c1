"""Time and memory of manualgrad against torch.nn, side by side in one process.

Gradients are compared first, and a difference ends the report. Then forward and backward of both run in turn: the
medians of each are shown, and that of the ratios pair by pair. Below 1 ours is faster, or keeps less.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.testing import assert_close

from manualgrad import nn, registry
from manualgrad.saving import kept_bytes
from manualgrad.training import CommandLine, parse_settings


class Settings(CommandLine):
    """Time and memory of manualgrad against torch.nn, as ratios (below 1: ours is faster, or keeps less)."""

    what: Literal["all", "networks", "operations"] = "all"
    """Whole networks, single operations at the size that real models have, or both."""
    device: str = "cpu"
    """Where to measure: cpu or cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of inputs and parameters."""
    seconds: PositiveFloat = 3.0
    """How long to measure each row."""
    json_file: Path | None = None
    """Write the figures there as well."""


Step = Callable[[], list[Tensor]]  # forward and backward; gives the gradients


class Row(NamedTuple):
    name: str
    ours_ms: float
    torch_ms: float
    time_ratio: float
    kept_ratio: float


def mlp(nn: ModuleType, width: int, batch: int, settings: Settings) -> tuple[Step, Callable[[], Tensor]]:
    """Three linear layers with ReLU between, and the mean squared error."""
    where = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    ).to(**where)
    loss = nn.MSELoss()
    x, target = torch.randn(2, batch, width).to(**where)
    parameters = list(model.parameters())

    def forward() -> Tensor:
        return loss(model(x), target)

    def step() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        forward().backward()
        return [parameter.grad for parameter in parameters]

    return step, forward


def operation(
    op: registry.Op, function: Callable[..., Tensor], settings: Settings
) -> tuple[Step, Callable[[], Tensor]]:
    """One operation on its big sample, and a gradient for every input that has one."""
    call = op.big(registry.Maker(getattr(torch, settings.dtype), settings.device))
    places = call.differentiable()
    tensors = [call[place].requires_grad_() for place in places]
    upstream: list[Tensor] = []

    def forward() -> Tensor:
        torch.manual_seed(0)
        return function(*call.args, **call.kwargs)

    def step() -> list[Tensor]:
        output = forward()
        if not upstream:
            upstream.append(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output))
        return list(torch.autograd.grad(output, tensors, upstream[0]))

    return step, forward


def subjects(settings: Settings) -> Iterator[tuple[str, list[tuple[Step, Callable[[], Tensor]]]]]:
    """Each row's name, with ours and torch's."""
    if settings.what != "operations":
        for width, batch in ((64, 64), (1024, 256)):
            yield (
                f"MLP, 3 layers, width {width}, batch {batch}",
                [mlp(module, width, batch, settings) for module in (nn, torch.nn)],
            )
    if settings.what != "networks":
        for op in registry.ops().values():
            yield op.name, [operation(op, function, settings) for function in (op.function, op.reference)]


def measure(name: str, pair: list[tuple[Step, Callable[[], Tensor]]], settings: Settings) -> Row:
    (ours, our_forward), (torch_s, torch_forward) = pair
    tolerance = 16 * torch.finfo(getattr(torch, settings.dtype)).eps
    found, expected = ours(), torch_s()
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().max().item()
        assert_close(a, b, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: gradients differ: {m}")
    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(times) < 10 or time.perf_counter() - begin < settings.seconds:
        times.append((timed(ours, settings), timed(torch_s, settings)))
    times = times[len(times) // 10 :]  # the first are warm-up
    return Row(
        name,
        1e3 * statistics.median(a for a, _ in times),
        1e3 * statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
        kept_bytes(our_forward) / kept_bytes(torch_forward),
    )


def timed(step: Step, settings: Settings) -> float:
    begin = time.perf_counter()
    step()
    if settings.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    settings = parse_settings(Settings)
    where = "CPU" if settings.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {settings.dtype}\n")
    print("| forward + backward | ours, ms | torch, ms | time, ours / torch | kept for backward, ours / torch |")
    print("|---|---|---|---|---|")
    rows = []
    for name, pair in subjects(settings):
        rows.append(row := measure(name, pair, settings))
        print(f"| {row.name} |", " | ".join(f"{x:.3f}" for x in row[1:3]), end=" | ")
        print(" | ".join(f"{x:.2f}" for x in row[3:]), "|", flush=True)
    if settings.json_file:
        settings.json_file.write_text(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == "__main__":
    main()
