"""Laws of other parts of PyTorch: autocast, checkpoints, hooks, torch.compile, DistributedDataParallel."""

from __future__ import annotations

import math
import pickle
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from manualgrad.verification.function_under_test import FunctionUnderTest
from manualgrad.verification.gradients import clones, gradients, random_grad_output, with_grad_outputs
from manualgrad.verification.laws.comparison import compare, compare_gradients, format_error
from manualgrad.verification.laws.numerics import input_rounding_errors
from manualgrad.verification.randomness import SameRandomNumbersInAllDtypes, set_seed
from manualgrad.verification.report import LawFailure, NotApplicable, Unsupported, law
from manualgrad.verification.tensors import dtype_name


@law("backward computes in another dtype than forward under autocast: use custom_fwd, or cast in both")
def autocast(fn: FunctionUnderTest) -> None:
    """Under autocast to bfloat16 and float16, gradients are right up to that precision.

    The inputs are float32, grad_output may be of lower precision: the usual case in mixed precision training.
    """
    if not fn.supports_dtype(torch.float32) or any(x.is_complex() for x in fn.primals):
        raise NotApplicable("autocast is for float32, which the function does not accept")
    with SameRandomNumbersInAllDtypes() if fn.draws_random_numbers else nullcontext():
        for dtype in (torch.bfloat16, torch.float16):
            _check_autocast(fn.to_dtype(torch.float32), dtype)


def _check_autocast(fn: FunctionUnderTest, dtype: torch.dtype) -> None:
    condition = f"under autocast to {dtype_name(dtype)}"
    try:
        grad_outputs, grads = _gradients_under_autocast(fn, dtype)
    except RuntimeError as error:
        if "not implemented for" in str(error) or "unsafe to autocast" in str(error):
            return
        if fn.autograd_reference is not None and _fails_under_autocast(fn.autograd_reference, dtype):
            raise Unsupported(f"{condition} torch's own operators raise too: {format_error(error)}") from error
        raise LawFailure(f"{condition}, the function raises {format_error(error)}") from error
    exact = fn.to_dtype(torch.float64)
    try:
        exact_grads = gradients(
            exact, exact.make_inputs(), [u.double() if not u.is_complex() else u for u in grad_outputs]
        )
    except Exception:
        return
    eps = torch.finfo(dtype).eps
    for k, (grad, truth) in enumerate(zip(grads, exact_grads, strict=True)):
        if grad is None or truth is None or not truth.numel() or fn.surrogate:
            continue
        error = (grad.double() - truth).abs().amax().item()
        if error <= 64 * eps * max(truth.abs().amax().item(), 1e-2):
            continue
        if not error <= 8 * _unavoidable_error(fn, dtype, grad_outputs, exact_grads, k):
            name = f"{condition}, gradient of {fn.input_name(k)}"
            compare(name, grad.double(), truth, 64 * eps, ("got", "in float64"))


def _gradients_under_autocast(
    fn: FunctionUnderTest, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor | None]]:
    inputs = fn.make_inputs()
    with torch.autocast(fn.primals[0].device.type, dtype):
        outputs, grad_outputs = with_grad_outputs(fn(*inputs))
    if not outputs:
        return [], [None] * len(inputs)
    return grad_outputs, list(torch.autograd.grad(outputs, inputs, clones(grad_outputs), allow_unused=True))


def _fails_under_autocast(fn: FunctionUnderTest, dtype: torch.dtype) -> bool:
    try:
        _gradients_under_autocast(fn, dtype)
    except RuntimeError:
        return True
    return False


def _unavoidable_error(
    fn: FunctionUnderTest,
    dtype: torch.dtype,
    grad_outputs: Sequence[Tensor],
    exact_grads: Sequence[Tensor | None],
    k: int,
) -> float:
    """The error of torch's own operators under autocast, or that of rounding the inputs: large at a kink."""
    if fn.autograd_reference is None:
        eps = torch.finfo(dtype).eps
        return input_rounding_errors(fn.to_dtype(torch.float64), grad_outputs, exact_grads, eps)[k]
    reference, truth = _gradients_under_autocast(fn.autograd_reference, dtype)[1][k], exact_grads[k]
    if reference is None or truth is None:
        return 0.0
    return (reference.double() - truth).abs().nan_to_num(math.inf, math.inf, math.inf).amax().item()


@law("backward reads ctx.saved_tensors twice, or forward keeps tensors by other means than save_for_backward")
def checkpoint(fn: FunctionUnderTest) -> None:
    """torch.utils.checkpoint, reentrant or not, does not change the gradients.

    Large models trade time for memory with it.
    """
    fn = fn.highest_precision
    expected = gradients(fn, fn.make_inputs())
    for use_reentrant in (False, True):
        inputs = fn.make_inputs()
        condition = f"with checkpoint(use_reentrant={use_reentrant}), "
        try:
            all_outputs = torch_checkpoint(fn, *inputs, use_reentrant=use_reentrant)
            assert isinstance(all_outputs, tuple)
            # by index: with a reentrant checkpoint every floating output requires a gradient
            outputs = [all_outputs[i] for i in fn.output_indices]
            grad_outputs = [random_grad_output(all_outputs[i], 3 + i) for i in fn.output_indices]
            torch.autograd.backward(outputs, grad_outputs)
        except Exception as error:
            raise LawFailure(f"{condition}the function raises {format_error(error)}") from error
        grads = [x.grad for x in inputs]
        compare_gradients(fn, grads, expected, fn.rounding_tolerance, ("got", "without"), prefix=condition)


@law("backward relies on the identity, address or storage of a saved tensor")
def saved_tensors_hooks(fn: FunctionUnderTest) -> None:
    """torch.autograd.graph.saved_tensors_hooks that copy or pickle saved tensors do not change the gradients.

    Offloading and compression of activations use these hooks.
    """
    fn = fn.highest_precision
    expected = gradients(fn, fn.make_inputs())
    hooks: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
        "copy": (lambda x: x.detach().clone(), lambda x: x.clone()),
        "pickle": (lambda x: pickle.dumps((x.detach().clone(),)), lambda b: pickle.loads(b)[0]),
    }
    for name, (pack, unpack) in hooks.items():
        condition = f"with hooks that {name} saved tensors"
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                grads = gradients(fn, fn.make_inputs())
        except Exception as error:
            raise LawFailure(f"{condition}, the function raises {format_error(error)}") from error
        compare_gradients(fn, grads, expected, fn.rounding_tolerance, ("got", "without"), prefix=f"{condition}, ")


@law("a branch on data, print, numpy or Python state, which Dynamo cannot trace or treats as constant", True)
def compile(fn: FunctionUnderTest) -> None:
    """torch.compile(fullgraph=True) traces one graph with the same outputs and gradients.

    A graph break slows training down, and a wrong constant is silent.
    """
    _check_compile(fn, dynamic=False)


@law("Python code that needs a size as an int: divmod, a list of that length, an f-string", True)
def compile_dynamic(fn: FunctionUnderTest) -> None:
    """torch.compile(fullgraph=True, dynamic=True) traces one graph with the same outputs and gradients.

    Without dynamic sizes, each new sequence length compiles again.
    """
    # integer and float arguments stay constants
    with torch._dynamo.config.patch(specialize_int=True, specialize_float=True):
        _check_compile(fn, dynamic=True)


def _check_compile(fn: FunctionUnderTest, dynamic: bool) -> None:
    torch._dynamo.reset()
    fn = fn.highest_precision

    def eager(*inputs: Tensor) -> Any:
        return fn.call(fn.function, inputs)

    compiled = torch.compile(_traceable(fn), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for function in (eager, compiled):
        inputs = fn.make_inputs()
        set_seed(fn.seed)
        try:
            all_outputs = function(*inputs)
            outputs, grad_outputs = with_grad_outputs(all_outputs)
            grads = list(torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True))
        except Exception as error:
            raise LawFailure(format_error(error)) from error
        results.append((all_outputs, grads))
    labels = ("compiled", "eager")
    (eager_outputs, eager_grads), (compiled_outputs, compiled_grads) = results
    for i, (a, b) in enumerate(zip(compiled_outputs, eager_outputs, strict=True)):
        compare(f"output {i}", a, b, fn.rounding_tolerance, labels)
    compare_gradients(fn, compiled_grads, eager_grads, fn.rounding_tolerance, labels)
    torch._dynamo.reset()


def _traceable(fn: FunctionUnderTest) -> Callable[..., Any]:
    """`FunctionUnderTest.call` without seeds and pytree operations, which Dynamo does not trace."""
    function, input_indices, treespec = fn.function, fn.input_indices, fn.treespec
    leaves = list(fn.leaves)
    arg_indices, kwarg_indices = tree_unflatten(list(range(len(leaves))), treespec)
    clone = fn.writes_in_place
    flat = all(isinstance(i, int) for i in [*arg_indices, *kwarg_indices.values()])

    def run(*inputs: Tensor) -> Any:
        values = list(leaves)
        for i, x in zip(input_indices, inputs, strict=True):
            values[i] = x.clone() if clone else x
        if flat:
            kwargs = {name: values[i] for name, i in kwarg_indices.items()}
            result = function(*[values[i] for i in arg_indices], **kwargs)
        else:
            args, kwargs = tree_unflatten(values, treespec)
            result = function(*args, **kwargs)
        if isinstance(result, Tensor):
            return (result,)
        return tuple(x for x in tree_leaves(result) if isinstance(x, Tensor))

    return run


class _InputsAsParameters(nn.Module):
    """A module that the function's inputs are the parameters of, for DistributedDataParallel."""

    def __init__(self, fn: FunctionUnderTest) -> None:
        super().__init__()
        self.inputs = nn.ParameterList([nn.Parameter(x) for x in fn.primals])
        self.fn = fn

    def forward(self, scale: float) -> Tensor:
        outputs = self.fn(*self.inputs)
        return sum(
            (
                (random_grad_output(outputs[i], 3 + i) * outputs[i]).real.sum() * scale
                for i in self.fn.output_indices
            ),
            torch.zeros(()),
        )


def _run_ddp_worker(rank: int, port: int, pickled: bytes, queue: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model = nn.parallel.DistributedDataParallel(_InputsAsParameters(pickle.loads(pickled)))
        for _ in range(2):  # the second step reuses the buckets of the first
            model.zero_grad()
            model(1.0 + rank).backward()
        grads = [None if p.grad is None else p.grad.tolist() for p in model.module.inputs]
        queue.put((rank, grads, None))
    except Exception as error:
        queue.put((rank, None, format_error(error)))
    finally:
        dist.destroy_process_group()


@law("a gradient that depends on the rank, is None on one rank, or is modified after backward returned it", True)
def distributed(fn: FunctionUnderTest) -> None:
    """With DistributedDataParallel both processes have the same gradient, the mean over the processes.

    Otherwise the replicas of the model diverge, or the processes wait for each other forever.
    """
    fn = fn.highest_precision
    if any(x.is_complex() for x in fn.primals):
        raise NotApplicable("DistributedDataParallel does not support complex parameters")
    try:
        pickled = pickle.dumps(fn)
    except Exception as error:
        raise NotApplicable(f"another process cannot unpickle the function: {format_error(error)}") from error
    outputs = fn(*fn.make_inputs())
    # the ranks scale the loss by 1 and 2
    grad_outputs = [1.5 * random_grad_output(outputs[i], 3 + i) for i in fn.output_indices]
    expected = gradients(fn, fn.make_inputs(), grad_outputs)
    results = _run_two_processes(pickled)
    if len(results) < 2:
        raise LawFailure("a process hangs or crashes within two steps under DistributedDataParallel")
    for rank, grads, error in sorted(results, key=lambda result: result[0]):
        if error is not None:
            raise LawFailure(f"under DistributedDataParallel, rank {rank} raises {error}")
        for k, (grad, truth) in enumerate(zip(grads, expected, strict=True)):
            if grad is not None:
                result = torch.tensor(grad, dtype=fn.dtype).reshape(fn.primals[k].shape)
                name = f"under DistributedDataParallel, gradient of {fn.input_name(k)} on rank {rank}"
                compare(name, result, truth, 1e-6, ("got", "mean over ranks"))


def _run_two_processes(pickled: bytes) -> list[Any]:
    """What the processes put into the queue within 60 seconds: rank, gradients, error."""
    import torch.multiprocessing as mp

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = mp.get_context("spawn")
    queue: Any = context.SimpleQueue()
    processes = [context.Process(target=_run_ddp_worker, args=(rank, port, pickled, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    results: list[Any] = []
    while not queue.empty():
        results.append(queue.get())
    for process in processes:
        if process.is_alive():
            process.kill()
    return results
