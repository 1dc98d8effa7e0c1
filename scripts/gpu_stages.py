"""What scripts/check_gpu.py tries, stage by stage. It needs torch only, but for the training."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import inspect
import math
import os
import platform
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import models
import torch
import torch.distributed as dist
from check_gpu import MEASURED, NOT_RUN, PASSED, WRONG, Row
from models import BERT, Case, ResNet, ViT, classes, gpt, text
from module_inputs import INPUTS, WITHOUT_INPUTS
from steps import Run, operation
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

import manualgrad
from manualgrad import convert, registry, verify
from manualgrad.registry import Op, SampleInput, TensorFactory
from manualgrad.verification.gradients import random_grad_output

Part = Callable[[], Iterable[Row]]
Items = dict[str, Part]
"""The parts of a stage. A name is that of an operation, module or model, then a comma and how it is tried."""

FACTOR, PLACES, PLACES_APART = 2, 4, 16
"""The error that is allowed: so many times torch's plus so many units in the last place. Where torch's result is
the truth, only so many units."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAWS = ("double_backward", "forward_mode", "autocast", "vmap")
LIKELY = (
    *("linear", "layer_norm", "gelu", "scaled_dot_product_attention", "cross_entropy", "softmax", "conv2d"),
    *("batch_norm", "relu", "rms_norm", "silu", "embedding", "dropout", "linear_cross_entropy", "group_norm"),
    *("sigmoid", "tanh", "mse_loss", "log_softmax", "max_pool2d", "binary_cross_entropy_with_logits"),
)
"""The operations that most models call: these come first."""


class DeviceLost(Exception):
    """After an error inside a kernel a process cannot use its GPU any more."""


def check_device(device: str) -> None:
    """Raise what kernels have left behind."""
    try:
        if device != "cpu":
            torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(one_line(error)) from error


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(": ")


# Right or wrong


class Tried(NamedTuple):
    """One function at one place."""

    results: list[tuple[str, Tensor]]
    """Outputs and gradients, each with its name, on the CPU."""
    drew: bool
    """It drew random numbers."""


Subject = tuple[Callable[..., Any], Sequence[Any], dict[str, Any], Sequence[Tensor]]
"""A function, its arguments, those given by name, and the parameters that it has besides."""
Making = Callable[[bool, str, torch.dtype], Subject]
"""Makes the subject, ours (True) or torch's, on a device and in a dtype."""


def tried(subject: Subject, dtype: torch.dtype) -> Tried:
    """Outputs and gradients, from one random state and for the same upstream gradients, rounded to `dtype`."""
    function, args, kwargs, parameters = subject
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    leaves += parameters
    torch.manual_seed(7)
    before = random_states()
    outputs = [y for y in tree_leaves(function(*args, **kwargs)) if isinstance(y, Tensor)]
    drew = not all(map(torch.equal, before, random_states()))
    results = [(f"output {i}", y) for i, y in enumerate(outputs)]
    differentiable = [y for y in outputs if y.requires_grad]
    if differentiable and leaves:
        upstreams = [random_grad_output(y.detach().to(dtype), 3 + i).to(y) for i, y in enumerate(differentiable)]
        found = torch.autograd.grad(differentiable, leaves, upstreams, allow_unused=True)
        for i, (x, g) in enumerate(zip(leaves, found, strict=True)):
            results.append((f"gradient {i} {list(x.shape)}", torch.zeros_like(x) if g is None else g.to_dense()))
    return Tried([(name, x.detach().cpu()) for name, x in results], drew)


def random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def judged(found: Tried, torch_s: Tried, true: Tried, dtype: torch.dtype) -> Row:
    """The worst of the results, next to torch's own."""
    factor, places = (0, PLACES_APART) if true is torch_s else (FACTOR, PLACES)
    eps, largest = torch.finfo(dtype).eps, 0.1 * torch.finfo(dtype).max
    if len(found.results) != len(torch_s.results):
        return {"status": WRONG, "detail": f"{len(found.results)} results, torch's {len(torch_s.results)}"}
    worst, row = 0.0, {"status": PASSED, "ours": 0.0, "torch": 0.0}
    for (what, a), (_, b), (_, exact) in zip(found.results, torch_s.results, true.results, strict=True):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return {
                "status": WRONG,
                "detail": f"{what} is {a.dtype} {list(a.shape)}, torch's {b.dtype} {list(b.shape)}",
            }
        numbers = a.is_floating_point()
        exact = exact.double() if numbers else b.double()  # else indices: torch's
        ours, torchs = ((x.double() - exact).norm().item() for x in (a, b))
        size = exact.norm().item()
        if not size < largest or not math.isfinite(torchs):  # out of the range of the dtype
            continue
        allowed = factor * torchs + places * eps * size * numbers
        excess = ours / allowed if allowed else math.inf if ours else 0.0
        excess = math.inf if math.isnan(excess) else excess
        if excess >= worst:
            worst, ours, torchs = excess, ours / (size or 1), torchs / (size or 1)
            row = {"status": PASSED, "ours": f"{ours:.2g}", "torch": f"{torchs:.2g}", "result": what}
    if worst > 1:
        row["detail"] = f"{row['result']} is off by {row['ours']} of its size, torch's by {row['torch']}"
        row["detail"] += " (random numbers: torch's is the truth)" if torch_s.drew else ""
        row["status"] = WRONG
    return row


def compared(make: Making, device: str, dtype: torch.dtype, wrong: bool = False, truth: str = "cpu") -> Row:
    """Ours and torch's on the device, both against float64: torch's, or ours where torch's gradient is wrong."""
    try:
        torch_s = tried(make(False, device, dtype), dtype)
    except (RuntimeError, ValueError) as error:
        check_device(device)
        return {"status": NOT_RUN, "detail": f"torch refuses it: {one_line(error)}"}
    try:
        found = tried(make(True, device, dtype), dtype)
    except Exception as error:
        check_device(device)
        return {"status": WRONG, "detail": f"it stops with {one_line(error)}"}
    true = tried(make(wrong, truth, torch.float64), dtype)
    if wrong:  # the truth, rounded
        torch_s = Tried([(name, x.to(dtype)) for name, x in true.results], False)
    drew = true.drew or torch_s.drew
    return judged(found, torch_s._replace(drew=drew), torch_s if drew or wrong else true, dtype)


def on(call: SampleInput, device: str, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, on a device and in a dtype, those marked that have a gradient."""
    places = call.tensors()
    tensors = [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in (call[at] for at in places)]
    return call.replace(places, tensors).marked()


def of_operation(op: Op, call: SampleInput, function: Callable[..., Any] | None = None) -> Making:
    ours_is = function or op.function
    return lambda ours, device, dtype: (ours_is if ours else op.reference, *on(call, device, dtype), ())


def torch_is_wrong(op: Op) -> bool:
    return "torchs_gradient_of_each_subset" in op.expected_failures


# 1 and 2: operations and modules


def operations() -> dict[str, Op]:
    found = registry.ops()
    return {name: found[name] for name in dict.fromkeys((*LIKELY, *found)) if name in found}


def stage_operations(options: argparse.Namespace) -> Items:
    def samples(op: Op) -> Iterator[Row]:
        calls = {dtype: list(op.sample_inputs(TensorFactory(dtype))) for dtype in DTYPES.values()}
        for number in range(len(calls[torch.float32])):
            for dtype, samples in calls.items():
                row = compared(of_operation(op, samples[number]), options.device, dtype, torch_is_wrong(op))
                yield {"case": f"sample {number} ({samples[number]})", **row}

    def laws(op: Op) -> Iterator[Row]:
        call = next(iter(op.sample_inputs(TensorFactory())))
        for law in (*LAWS, *(["gradient"] if op.random else [])):
            if reason := op.expected_failures.get(law, op.expected_failures.get(f"{law}-0")):
                yield {"status": NOT_RUN, "case": law, "detail": f"{law} is declared to be lacking: {reason}"}
                continue
            args, kwargs = on(call, options.device, torch.float64)
            report = verify(
                op.function,
                *args,
                kwargs=kwargs,
                reference=op.reference,
                laws=[law],
                require=[law],
                surrogate=not call.gradient_is_derivative,
            )
            detail = "; ".join(row.evidence for row in report.rows if row.law in report.failures)
            yield {"status": PASSED if report.ok else WRONG, "case": law, "detail": detail}

    found = operations()
    items: Items = {name: partial(samples, op) for name, op in found.items()}
    return items | {f"{name}, laws": partial(laws, op) for name, op in found.items()}


def stage_modules(options: argparse.Namespace) -> Items:
    def make(name: str, training: bool, low: torch.dtype, ours: bool, device: str, dtype: torch.dtype) -> Subject:
        making, inputs = INPUTS[name]
        torch.manual_seed(0)
        module = making(manualgrad.nn if ours else torch.nn).train(training)
        if name.startswith("Lazy"):
            module(*inputs(TensorFactory(torch.float32)).args)
        module.to(low).to(device, dtype)
        return module, *on(inputs(TensorFactory(low)), device, dtype), list(module.parameters())

    def rows(name: str) -> Iterator[Row]:
        if name not in INPUTS:
            yield {"status": NOT_RUN, "case": "", "detail": "scripts/module_inputs.py has no inputs for it"}
            return
        for training in (True, False):
            for dtype_name in ("float32", "bfloat16"):
                dtype = DTYPES[dtype_name]
                row = compared(
                    partial(make, name, training, dtype), options.device, dtype, name == "CrossMapLRN2d"
                )
                yield {"case": f"{'training' if training else 'evaluation'}, {dtype_name}", **row}

    names = [
        x for x, kind in vars(torch.nn).items() if inspect.isclass(kind) and issubclass(kind, torch.nn.Module)
    ]
    return {name: partial(rows, name) for name in names if name not in WITHOUT_INPUTS}


# 3: training

PACKAGES = {
    "PIL": "pillow",
    "numpy": "numpy",
    "pandas": "pandas",
    "pydantic_settings": "pydantic-settings",
    "tensorboard": "tensorboard",
    "tqdm": "tqdm",
}
"""What the main job imports besides torch, and the packages that have it."""


def stage_training(options: argparse.Namespace) -> Items:
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not any(importlib.metadata.distributions(name="manualgrad")):
        missing.append("manualgrad")

    def fit(folder: str, **settings: Any) -> Any:
        """Train as the main job does, for two epochs."""
        import train_regression

        settings |= {"device": options.device, "max_epochs": 2, "progress_bar": False, "log_every_n_steps": 5}
        settings |= {"batch_size": 2048} if options.device == "cpu" else {}
        chosen = train_regression.Settings(run_dir=Path(folder), **settings)
        with redirect_stdout(sys.stderr):
            return train_regression.train(chosen.resolved())

    def learned(case: str, ours: Any, torch_s: Any) -> Row:
        scores = [x.summary["test_r2"] for x in (ours, torch_s)]
        detail = "R² of the test rows {:.4f}, with torch.nn {:.4f}".format(*scores)
        return {"status": PASSED if scores[0] > scores[1] - 0.005 else WRONG, "case": case, "detail": detail}

    def resumed() -> Iterator[Row]:
        """The curves of a run that is interrupted and resumed are those of one that is not."""
        updates, at = 0, 0

        def interrupt(*_: Any) -> None:
            nonlocal updates
            updates += 1
            if updates == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        with tempfile.TemporaryDirectory() as folder:
            whole = fit(f"{folder}/whole")
            yield learned("two epochs", whole, fit(f"{folder}/torch", model="torch"))
            stop = whole.steps * 3 // 4
            hook = register_optimizer_step_post_hook(interrupt)
            try:
                fit(f"{folder}/parts")
            except KeyboardInterrupt as interrupted:
                at = getattr(interrupted, "step", 0)
            finally:
                hook.remove()
            fit(f"{folder}/parts", resume_from_checkpoint=True)
            found, expected = curves(f"{folder}/parts"), curves(f"{folder}/whole")
        different = [tag for tag in {**found, **expected} if found.get(tag) != expected.get(tag)]
        detail = (
            f"interrupted after update {at} of {whole.steps}; {len(different)} of {len(expected)} curves differ"
        )
        status = PASSED if stop <= at < whole.steps and not different else WRONG
        yield {"status": status, "case": "interrupted and resumed", "detail": ", ".join([detail, *different[:3]])}

    def mixed(precision: str) -> Iterator[Row]:
        with tempfile.TemporaryDirectory() as folder:
            ours, torch_s = (fit(f"{folder}/{x}", model=x, precision=precision) for x in ("manualgrad", "torch"))
            yield learned(f"two epochs, autocast to {precision}", ours, torch_s)

    def if_possible(case: str, run: Part) -> Iterable[Row]:
        needs = f"it needs {', '.join(missing)}: pip install -e '.[examples]'"
        return [{"status": NOT_RUN, "case": case, "detail": needs}] if missing else run()

    return {
        "train": partial(if_possible, "two epochs, interrupted and resumed", resumed),
        "one_process": partial(one_process, options.device),
        **{f"train, {x}": partial(if_possible, x, partial(mixed, x)) for x in ("bfloat16", "float16")},
    }


def curves(folder: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, but for its speed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def one_process(device: str) -> Iterator[Row]:
    """DDP and FSDP2 in one process, as torchrun starts it, have the gradients of the model itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}
    backend = "gloo" if device == "cpu" else "nccl"

    def gradients(wrap: Callable[[torch.nn.Module], Any]) -> Tried:
        torch.manual_seed(0)
        model = convert(gpt(64, 32, 2, 2, dropout=0.0), functional=True).to(device)
        wrapped = wrap(model)
        torch.manual_seed(1)
        for _ in range(2):  # DDP reuses its buckets in the second step
            wrapped.zero_grad()
            wrapped(*[x.to(device) for x in text(64, 2, 16)()]).backward()
        grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        full = {name: getattr(g, "full_tensor", lambda g=g: g)().cpu() for name, g in grads.items()}
        return Tried([(f"gradient of {name}", g) for name, g in full.items()], False)

    dist.init_process_group(backend)
    try:
        expected = gradients(lambda model: model)
        for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", fully_shard)):
            row = judged(gradients(wrap), expected, expected, torch.float32)
            yield {"case": f"{name}, {backend}", **row}
    finally:
        dist.destroy_process_group()


# 4 and 5: time and memory

Step = Callable[[], Any]


def interleaved(steps: dict[str, Step], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of a step of each, turn by turn; of short ones several steps are one turn."""

    def turn(step: Step, calls: int) -> float:
        if device == "cpu":
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            return (time.perf_counter() - begin) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    for step in steps.values():  # warm-up
        turn(step, 3)
    calls = max(1, min(50, round(2e-3 / min(turn(step, 1) for step in steps.values()))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    names, begin = list(steps), time.perf_counter()
    while len(times[names[0]]) < 5 or time.perf_counter() - begin < seconds:
        names = [*names[1:], names[0]]
        for name in names:
            times[name].append(turn(steps[name], calls))
    return times


def peak(step: Step, device: str) -> int | None:
    """Bytes that a step needs at most above those that are there before it; not measured on the CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measured(makers: dict[str, Callable[[], Step]], device: str, seconds: float, case: str) -> Iterator[Row]:
    """A row for each pair of ours (a name that begins with "ours") and another's."""
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        try:
            step = make()
            step()
        except Exception as error:
            check_device(device)
            status = WRONG if name.startswith("ours") else NOT_RUN
            yield {"status": status, "case": case, "detail": f"{name} stops with {one_line(error)}"}
        else:
            steps[name] = step
    if not steps:
        return
    times = interleaved(steps, device, seconds)
    peaks = {name: peak(step, device) for name, step in steps.items()}
    for ours in (name for name in steps if name.startswith("ours")):
        for other in (name for name in steps if not name.startswith("ours")):
            ratio = statistics.median(a / b for a, b in zip(times[ours], times[other], strict=True))
            ms = [1e3 * statistics.median(times[name]) for name in (ours, other)]
            figures = {"ms": ms, "ratio": ratio, "peak": [peaks[ours], peaks[other]]}
            yield {"status": MEASURED, "case": case, "compared": f"{ours} / {other}", **figures}


def stage_speed(options: argparse.Namespace) -> Items:
    device, seconds = options.device, 0.02 * options.minutes

    def made(op: Op, function: Callable[..., Any], dtype: torch.dtype) -> Step:
        return operation(op, function, device, dtype)[0]

    def eager(op: Op, name: str) -> Iterator[Row]:
        dtype = DTYPES[name]
        call = op.benchmark_input(TensorFactory(dtype))
        row = compared(of_operation(op, call), device, dtype, torch_is_wrong(op), truth=device)
        yield {"case": str(call), **row}
        functions = {"ours": op.function, "torch": op.reference}
        makers = {who: partial(made, op, function, dtype) for who, function in functions.items()}
        yield from measured(makers, device, seconds, name)

    def compiled(op: Op, name: str) -> Iterator[Row]:
        torch.compiler.reset()
        dtype = DTYPES[name]
        functions = {"ours": op.function, "torch.compile": torch.compile(op.reference)}
        if "compile" not in op.expected_failures:
            functions["ours compiled"] = torch.compile(op.function)
            if not op.random:  # compiled code draws other numbers
                making = of_operation(op, op.benchmark_input(TensorFactory(dtype)), functions["ours compiled"])
                row = compared(making, device, dtype, torch_is_wrong(op), truth=device)
                yield {"case": f"ours compiled, {name}", **row}
        makers = {who: partial(made, op, function, dtype) for who, function in functions.items()}
        yield from measured(makers, device, seconds, name)

    def liger(case: Case, name: str) -> Iterator[Row]:
        if device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
            needs = "CUDA" if device == "cpu" else "pip install liger-kernel"
            yield {"status": NOT_RUN, "case": case.title, "detail": f"Liger-Kernel needs {needs}"}
            return
        runs = {"ours": "ours", "torch": "torch", "Liger-Kernel": "liger"}
        yield from measured(stepping(case, runs, device, DTYPES[name]), device, seconds, f"{case.title}, {name}")

    found: Items = {}
    for name in ["float32"] if device == "cpu" else ["bfloat16", "float32"]:
        found |= {f"{op}, {name}": partial(eager, op, name) for op in operations().values()}
        found |= {f"{case.name}, {name}": partial(liger, case, name) for case in models.LAYERS}
        found |= {f"{op}, compiled, {name}": partial(compiled, op, name) for op in operations().values()}
    return found


def stepping(case: Case, runs: dict[str, str], device: str, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    """A training step without an optimizer, for each of the contestants of scripts/steps.py."""

    def make(contestant: str) -> Step:
        run = Run(case, contestant, device, dtype)
        return lambda: (run.clear(), run.step())

    return {title: partial(make, contestant) for title, contestant in runs.items()}


def stage_models(options: argparse.Namespace) -> Items:
    device = options.device
    name = "float32" if device == "cpu" else "bfloat16"
    dtype = DTYPES[name]

    def labelled(below: int, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (torch.randint(below, shape), torch.randint(2, shape[:1]))

    cases = [
        Case("gpt_small", "GPT, width 128, 2 blocks", lambda: gpt(256, 128, 2, 4), text(256, 4, 64)),
        Case("bert_small", "BERT, width 128, 2 blocks", lambda: BERT(1000, 128, 2, 4), labelled(1000, 4, 64)),
        Case("vit_small", "ViT, width 128, 2 blocks", lambda: ViT(64, 8, 128, 2, 4), classes(4, 3, 64, 64)),
        Case("resnet_small", "ResNet, batch 8, 32x32", ResNet, classes(8, 3, 32, 32)),
    ]
    if device == "cpu":
        found = {f"{x}_large": models.NAMED[x] for x in ("gpt", "bert", "vit", "resnet")}
        cases += [Case(large, case.title, case.make, case.batch) for large, case in found.items()]
    else:
        big_gpt, big_bert = partial(gpt, 50257, 1024, 12, 16), partial(BERT, 30522, 1024, 12, 16)
        big_vit = partial(ViT, 128, 8, 768, 12, 12)
        cases += [
            Case("gpt_large", "GPT, width 1024, 12 blocks, V=50257", big_gpt, text(50257, 8, 256)),
            Case("bert_large", "BERT, width 1024, 12 blocks", big_bert, labelled(30522, 16, 256)),
            Case("vit_large", "ViT, width 768, 12 blocks", big_vit, classes(32, 3, 128, 128)),
            Case("resnet_large", "ResNet, batch 256, 64x64", ResNet, classes(256, 3, 64, 64)),
        ]

    def gradients(case: Case, contestant: str, dtype: torch.dtype) -> Tried:
        """Without dropout, which draws other numbers in another dtype."""
        run = Run(case, contestant, device, dtype)
        for module in run.model.modules():
            for rate in ("p", "dropout"):
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        names = [f"gradient of {x}" for x, _ in run.model.named_parameters()]
        return Tried(list(zip(names, [g.cpu() for g in run.gradients()], strict=True)), False)

    def eager(case: Case) -> Iterator[Row]:
        found, torch_s = (gradients(case, contestant, dtype) for contestant in ("ours", "torch"))
        row = judged(found, torch_s, gradients(case, "torch", torch.float64), dtype)
        yield {"case": f"{case.title}, {name}", **row}
        yield from times(case, {"ours": "ours", "torch": "torch"})

    def times(case: Case, runs: dict[str, str]) -> Iterator[Row]:
        torch.compiler.reset()
        seconds = 0.1 * options.minutes
        yield from measured(stepping(case, runs, device, dtype), device, seconds, f"{case.title}, {name}")

    compiled = {"ours compiled": "ours_compiled", "torch.compile": "compiled"}
    items: Items = {f"{case.name}, eager": partial(eager, case) for case in cases}
    return items | {f"{case.name}, compiled": partial(times, case, compiled) for case in cases}


# The work of a process

STAGES = {1: stage_operations, 2: stage_modules, 3: stage_training, 4: stage_speed, 5: stage_models}


def environment(device: str) -> dict[str, Any]:
    prefixes = ("MANUALGRAD", "CUDA", "TORCH", "NVIDIA_TF32", "PYTORCH")
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "manualgrad in": str(Path(manualgrad.__file__).parent),
        "threads": torch.get_num_threads(),
        **{name: value for name, value in os.environ.items() if name.startswith(prefixes)},
    }
    if device == "cpu":
        return {"device": "the CPU", **found}
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "device": f"{torch.cuda.get_device_name()} ({memory:.0f} GiB)",
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "TF32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        **found,
    }


def has(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_available()


def tries(run: Part, device: str, put: Callable[..., None]) -> bool:
    """Put each result of a part; whether the device is lost."""
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    lost = False
    try:
        for row in run():
            put(**row)
        check_device(device)
    except Exception as error:
        put(status=WRONG, case="", detail=one_line(error))
        try:
            check_device(device)
        except DeviceLost:
            lost = True
    gc.collect()
    if device != "cpu" and not lost:
        torch.cuda.empty_cache()
    return lost
