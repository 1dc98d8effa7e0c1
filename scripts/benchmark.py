"""Time and memory of manualgrad against torch.nn, side by side in one process.

Gradients are compared first, and a difference ends the report. Then forward and backward of both run in turn: the
medians of each are shown, and that of the ratios pair by pair. Below 1 ours is faster, or keeps less.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from manualgrad import nn, registry
from manualgrad.meter import saved_bytes
from manualgrad.training import CommandLine, parse_settings
from manualgrad.verification.derivatives import derivative, line


class Settings(CommandLine):
    """Time and memory of manualgrad against torch.nn, as ratios (below 1: ours is faster, or keeps less)."""

    what: Literal["all", "networks", "operations", "orders"] = "all"
    """Whole networks, single operations at the size that real models have, both of these, or the derivatives of
    layer norm of orders 1 to 4."""
    device: str = "cpu"
    """Where to measure: cpu or cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of inputs and parameters."""
    seconds: PositiveFloat = 3.0
    """How long to measure each row."""
    json_file: Path | None = None
    """Write the figures there as well."""


Step = Callable[[], list[Tensor]]
"""Forward and backward; gives the gradients."""

Subject = tuple[Step, Callable[[], Any]]
"""The step, and its forward alone."""

REPEATS = 5
"""How often a row is made anew: how its memory happens to lie counts for a few percent."""


class Row(NamedTuple):
    name: str
    ours_ms: float
    torch_ms: float
    time_ratio: float
    kept_ratio: float


def mlp(nn: ModuleType, width: int, batch: int, settings: Settings) -> Subject:
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


def operation(op: registry.Op, function: Callable[..., Any], settings: Settings) -> Subject:
    """One operation on its big sample, and a gradient for every input that has one."""
    call = op.big(registry.Maker(getattr(torch, settings.dtype), settings.device))
    args, kwargs = call.marked()
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    upstream: list[Tensor] = []

    def forward() -> list[Tensor]:
        torch.manual_seed(0)
        outputs = tree_leaves(function(*args, **kwargs))
        return [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]

    def step() -> list[Tensor]:
        outputs = forward()
        if not upstream:
            generator = torch.Generator().manual_seed(1)
            upstream.extend(torch.randn(x.shape, generator=generator).to(x) for x in outputs)
        return list(torch.autograd.grad(outputs, tensors, upstream))

    return step, forward


def subjects(settings: Settings) -> Iterator[tuple[str, Callable[[], tuple[Subject, Subject]]]]:
    """Each row's name, and what makes ours and torch's."""
    if settings.what != "operations":
        for width, batch in ((64, 64), (1024, 256)):
            make = partial(mlp, width=width, batch=batch, settings=settings)
            yield f"MLP, 3 layers, width {width}, batch {batch}", lambda make=make: (make(nn), make(torch.nn))
    if settings.what != "networks":
        for op in registry.ops().values():
            make = partial(operation, op, settings=settings)
            yield op.name, lambda op=op, make=make: (make(op.function), make(op.reference))


def measure(name: str, make: Callable[[], tuple[Subject, Subject]], settings: Settings) -> Row:
    times: list[tuple[float, float]] = []
    kept = 1.0
    for _ in range(REPEATS):
        (ours, our_forward), (torch_s, torch_forward) = make()
        op = registry.ops().get(name)
        if op is None or "torchs_gradient_of_each_subset" not in op.lacks:  # or torch's is wrong
            compare(name, ours(), torch_s(), op, settings)
        ours_kept, torchs = (saved_bytes(forward).everything for forward in (our_forward, torch_forward))
        kept = (1 + ours_kept) / (1 + torchs)  # 1: both may keep nothing
        begin = time.perf_counter()
        fresh: list[tuple[float, float]] = []
        while len(fresh) < 5 or time.perf_counter() - begin < settings.seconds / REPEATS:
            fresh.append((timed(ours, settings), timed(torch_s, settings)))
        times += fresh[1 + len(fresh) // 10 :]  # the first are warm-up
    return Row(
        name,
        1e3 * statistics.median(a for a, _ in times),
        1e3 * statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
        kept,
    )


def compare(
    name: str, found: list[Tensor], expected: list[Tensor], op: registry.Op | None, settings: Settings
) -> None:
    """End the report where a gradient differs by more than rounding: unless, in float32, torch's is no nearer to
    its own in float64."""
    tolerance = 16 * torch.finfo(getattr(torch, settings.dtype)).eps
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        scale = b.abs().max().item()
        try:
            assert_close(a, b, rtol=tolerance, atol=tolerance * scale)
        except AssertionError as difference:
            if op is None or settings.dtype != "float32":
                raise AssertionError(f"{name}: gradients differ: {difference}") from None
            exact = operation(op, op.reference, settings.model_copy(update={"dtype": "float64"}))[0]()[i]
            ours, torch_s = ((x.double() - exact).abs().max().item() for x in (a, b))
            if ours > 2 * torch_s:
                raise AssertionError(f"{name}: gradients differ: {difference}") from None


def timed(step: Step, settings: Settings) -> float:
    begin = time.perf_counter()
    step()
    if settings.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def layer_norm_derivatives() -> list[tuple[str, float, float, float]]:
    """Derivatives along a line, by the modes they are taken in ("rf": forward over reverse): of the plain formula,
    whose every step torch differentiates, of ours, and of torch's layer norm."""
    make = registry.Maker()
    points, directions, upstream = [make(4, 6)], [make(4, 6)], make(4, 6)

    def plain(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    functions = [
        plain,
        lambda x: nn.functional.layer_norm(x, (6,)),
        lambda x: torch.nn.functional.layer_norm(x, (6,)),
    ]
    lines = [line(function, points, directions, lambda y: (upstream * y).sum()) for function in functions]
    rows = []
    for modes in ("r", "f", "rr", "rf", "fr", "ff", "rrr", "rrf", "fff", "rrrr", "ffff"):
        plain_s, ours, torch_s = (derivative(along, modes) for along in lines)
        rows.append((modes, plain_s, ours, torch_s))
    return rows


def layer_norm_table() -> str:
    rows = ["| derivative of layer norm | plain formula | ours | torch |", "|---|---|---|---|"]
    for modes, *figures in layer_norm_derivatives():
        words = " over ".join({"r": "reverse", "f": "forward"}[mode] for mode in reversed(modes))
        rows.append(f"| {len(modes)}: {words} | {' | '.join(f'{figure:.4f}' for figure in figures)} |")
    return "\n".join(rows)


def main() -> None:
    settings = parse_settings(Settings)
    if settings.what == "orders":
        print(layer_norm_table())
        return
    where = "CPU" if settings.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {settings.dtype}\n")
    print("| forward + backward | ours, ms | torch, ms | time, ours / torch | kept for backward, ours / torch |")
    print("|---|---|---|---|---|")
    rows = []
    for name, make in subjects(settings):
        rows.append(row := measure(name, make, settings))
        print(f"| {row.name} |", " | ".join(f"{x:.3f}" for x in row[1:3]), end=" | ")
        print(" | ".join(f"{x:.2f}" for x in row[3:]), "|", flush=True)
    if settings.json_file:
        settings.json_file.write_text(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == "__main__":
    main()
