"""PyTorch's own inputs as a second judge: OpInfo's samples and bad inputs for functions, ModuleInfo's for modules.

Over all of them values and first derivatives are torch's, bad input is refused with torch's type of error, and
nothing stands in the autograd graph but our rules and plain movement or arithmetic. Modules that PyTorch does not
list stand in `MORE`.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graph import foreign
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from manualgrad import nn, registry
from manualgrad.rebinding import rebind

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would like to have hypothesis
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import FunctionInput, ModuleErrorEnum, ModuleInfo, module_db
    from torch.testing._internal.opinfo.core import OpInfo

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "nn.functional."
DTYPE = torch.float64


# --- functions ---


def pair(info: OpInfo) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Ours and torch's."""
    name = info.name.removeprefix(PREFIX)
    if name == "embedding":  # whose samples are for another order of arguments
        ours, torch_s = nn.functional.embedding, torch.nn.functional.embedding
        return (lambda w, i, **more: ours(i, w, **more)), (lambda w, i, **more: torch_s(i, w, **more))
    if info.name.startswith(PREFIX):
        return getattr(nn.functional, name), getattr(torch.nn.functional, name)
    return registry.ops()[name].function, registry.ops()[name].reference


def _infos(with_errors: bool) -> list[Any]:
    return [
        pytest.param(info, id="-".join(filter(None, (info.name.removeprefix(PREFIX), info.variant_test_name))))
        for info in op_db
        if info.name.startswith(PREFIX) or ((op := registry.ops().get(info.name)) and op.reference == info.op)
        if DTYPE in info.supported_dtypes("cpu") and (info.error_inputs_func is not None or not with_errors)
    ]


@pytest.mark.parametrize("info", _infos(with_errors=False))
def test_function(info: OpInfo) -> None:
    function, reference = pair(info)
    for sample in info.sample_inputs("cpu", DTYPE, requires_grad=True):
        arguments = FunctionInput(sample.input, *sample.args, **sample.kwargs)
        expected = tried(reference, arguments)
        found = tried(function, FunctionInput(*arguments.args, **tree_map(_as_ours, arguments.kwargs)))
        compare(found, expected)
        assert not foreign(found[0]), sample


@pytest.mark.parametrize("info", _infos(with_errors=True))
def test_function_refuses(info: OpInfo) -> None:
    function, _ = pair(info)
    for bad in info.error_inputs("cpu"):
        sample = bad.sample_input
        with pytest.raises(bad.error_type):
            function(sample.input, *sample.args, **sample.kwargs)


def tried(function: Callable[..., Any], given: FunctionInput, parameters: list[Tensor] | None = None) -> Any:
    """Outputs and gradients: the same random numbers each time, fresh leaves of the given values."""
    args, kwargs = tree_map(_fresh, (given.args, given.kwargs))
    torch.manual_seed(0)
    outputs = function(*args, **kwargs)
    differentiable, inputs = _leaves(outputs), _leaves((args, kwargs)) + (parameters or [])
    if not differentiable or not inputs:
        return outputs, []
    upstream = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) for y in differentiable]
    gradients = torch.autograd.grad(differentiable, inputs, upstream, allow_unused=True, retain_graph=True)
    return outputs, [torch.zeros(()) if g is None or not g.numel() else g.to_dense() for g in gradients]


def _fresh(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _leaves(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.requires_grad]


def compare(ours: Any, torch_s: Any) -> None:
    (found, our_gradients), (expected, gradients) = ours, torch_s
    assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True, check_stride=True)
    for a, b in zip(our_gradients, gradients, strict=True):
        # torch sends zeros or nothing, as it happens
        assert_close(a, b if b.dim() else b.expand_as(a), equal_nan=True)


# --- modules ---


class Extra:
    """A module that PyTorch's list lacks: what it is made with, and shapes (or makers) of its inputs."""

    def __init__(self, name: str, arguments: dict[str, Any] | None = None, *inputs: Any) -> None:
        self.name, self.arguments, self.inputs = name, arguments or {}, inputs


def _index(*shape: int, below: int = 6) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).remainder(below).reshape(shape)


MORE = [
    *(Extra(f"Dropout{n}", {"p": 0.4}, shape) for n, shape in (("", (5, 3)), ("1d", (2, 5, 3)))),
    *(Extra(f"Dropout{n}", {"p": 0.4}, shape) for n, shape in (("2d", (2, 5, 2, 3)), ("3d", (2, 5, 2, 1, 3)))),
    *(Extra(name, {"p": 0.3}, (4, 5, 3)) for name in ("AlphaDropout", "FeatureAlphaDropout")),
    Extra("Hardsigmoid", {}, (5, 3)),
    Extra("RReLU", {}, (5, 3)),
    Extra(
        "AdaptiveLogSoftmaxWithLoss",
        {"in_features": 8, "n_classes": 12, "cutoffs": [3, 7]},
        (6, 8),
        _index(6, below=12),
    ),
    Extra("ChannelShuffle", {"groups": 2}, (2, 6, 3)),
    Extra("PixelShuffle", {"upscale_factor": 2}, (2, 8, 3, 2)),
    Extra("PixelUnshuffle", {"downscale_factor": 2}, (2, 2, 4, 6)),
    Extra("CosineSimilarity", {"dim": 1}, (5, 3, 2), (5, 3, 2)),
    Extra("PairwiseDistance", {"p": 3.0, "keepdim": True}, (5, 3), (5, 3)),
    Extra("CrossMapLRN2d", {"size": 3}, (2, 5, 3, 3)),
    Extra(
        "EmbeddingBag", {"num_embeddings": 6, "embedding_dim": 3, "mode": "sum", "padding_idx": 2}, _index(4, 3)
    ),
    Extra(
        "EmbeddingBag",
        {"num_embeddings": 6, "embedding_dim": 3, "mode": "max"},
        _index(8),
        torch.tensor([0, 3, 5]),
    ),
    Extra("Fold", {"output_size": (4, 5), "kernel_size": (2, 3), "padding": 1, "stride": 2}, (2, 12, 9)),
    Extra("Unfold", {"kernel_size": (2, 3), "padding": 1, "dilation": 2}, (2, 3, 5, 6)),
    *(Extra(f"LazyBatchNorm{n}d", {}, (4, 3, 2, 2, 2)[: n + 2]) for n in (1, 2, 3)),
    *(Extra(f"LazyInstanceNorm{n}d", {"affine": True}, (4, 3, 2, 2, 2)[: n + 2]) for n in (1, 2, 3)),
    Extra("LazyLinear", {"out_features": 4}, (5, 3)),
    *(
        Extra(f"MaxUnpool{n}d", {"kernel_size": 2}, (1, 2, *(2,) * n), _index(1, 2, *(2,) * n, below=2**n) * 2)
        for n in (1, 2, 3)
    ),
    Extra("NLLLoss2d", {}, (2, 3, 2, 2), _index(2, 2, 2, below=3)),
    Extra(
        "TransformerDecoder",
        {"decoder_layer": torch.nn.TransformerDecoderLayer(4, 2, 6), "num_layers": 2},
        (3, 2, 4),
        (5, 2, 4),
    ),
    Extra("TripletMarginLoss", {"swap": True}, (5, 3), (5, 3), (5, 3)),
    Extra("TripletMarginWithDistanceLoss", {"margin": 0.5}, (5, 3), (5, 3), (5, 3)),
    Extra("Upsample", {"scale_factor": 1.5, "mode": "bilinear"}, (2, 3, 4, 5)),
    Extra("UpsamplingBilinear2d", {"scale_factor": 2}, (2, 3, 4, 5)),
    Extra("UpsamplingNearest2d", {"size": (3, 7)}, (2, 3, 4, 5)),
]

Made = tuple[str, FunctionInput, FunctionInput]  # a module's name, what makes it, what it is called with


def module_inputs(entry: ModuleInfo | Extra, training: bool) -> Iterator[Made]:
    if isinstance(entry, Extra):
        generator = torch.Generator().manual_seed(0)
        inputs = [
            x if isinstance(x, Tensor) else torch.randn(x, dtype=DTYPE, generator=generator).requires_grad_()
            for x in entry.inputs
        ]
        yield entry.name, FunctionInput(**entry.arguments), FunctionInput(*inputs)
        return
    for made in entry.module_inputs_func(entry, "cpu", DTYPE, True, training):
        yield entry.module_cls.__name__, made.constructor_input, made.forward_input


def _as_ours(value: Any) -> Any:
    """A layer to stack, or a function to call, as one would give it to our modules."""
    if not isinstance(value, torch.nn.Module):
        return rebind(value)
    for module in value.modules():
        module.__class__ = rebind(type(module))
        for name, function in vars(module).items():
            if callable(function):
                setattr(module, name, rebind(function))
    return value


def both(name: str, made: FunctionInput) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, from the same seed."""
    pair = []
    for space in (nn, torch.nn):
        torch.manual_seed(0)
        args, kwargs = copy.deepcopy((made.args, made.kwargs))
        if space is nn:
            args, kwargs = tree_map(_as_ours, (args, kwargs))
        pair.append(getattr(space, name)(*args, **kwargs).to(DTYPE))
    return pair[0], pair[1]


@pytest.mark.parametrize("entry", [pytest.param(x, id=x.name.removeprefix("nn.")) for x in (*module_db, *MORE)])
def test_module(entry: ModuleInfo | Extra) -> None:
    for training in (True, False):
        for name, made, given in module_inputs(entry, training):
            ours, torch_s = (module.train(training) for module in both(name, made))
            results = [tried(module, given, list(module.parameters())) for module in (ours, torch_s)]
            if name == "CrossMapLRN2d":  # torch's gradient is not the derivative of its values
                results = [(output, []) for output, _ in results]
            compare(*results)
            assert not foreign(results[0][0])
            assert_close(dict(ours.state_dict()), dict(torch_s.state_dict()), rtol=0, atol=0, equal_nan=True)
            assert list(ours.state_dict()) == list(torch_s.state_dict())
            assert isinstance(ours, type(torch_s))
            assert repr(ours) == repr(torch_s)
            again = pickle.loads(pickle.dumps(ours))
            assert type(again) is type(ours)
            assert_close(dict(again.state_dict()), dict(ours.state_dict()), equal_nan=True)


@pytest.mark.parametrize(
    "entry", [pytest.param(x, id=x.name.removeprefix("nn.")) for x in module_db if x.module_error_inputs_func]
)
def test_module_refuses(entry: Any) -> None:
    for training in (True, False):
        for bad in entry.module_error_inputs_func(entry, "cpu", DTYPE, True, training):
            made, given = bad.module_error_input.constructor_input, bad.module_error_input.forward_input
            if bad.error_on == ModuleErrorEnum.FORWARD_ERROR:
                module = getattr(nn, entry.module_cls.__name__)(*made.args, **made.kwargs)
                with pytest.raises(bad.error_type):
                    module(*given.args, **given.kwargs)
            else:
                with pytest.raises(bad.error_type):
                    getattr(nn, entry.module_cls.__name__)(*made.args, **made.kwargs)


WITHOUT_INPUTS = {
    *("Container", "Flatten", "Identity", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList"),
    *("RNNBase", "RNNCellBase", "Sequential", "Unflatten", "DataParallel"),
    "SyncBatchNorm",  # needs several processes: tests/test_distributed.py
}


def test_every_module_is_tried() -> None:
    tried_here = {info.module_cls.__name__ for info in module_db} | {extra.name for extra in MORE}
    every = {
        name
        for name, value in vars(torch.nn).items()
        if inspect.isclass(value) and issubclass(value, torch.nn.Module)
    }
    assert every - tried_here == WITHOUT_INPUTS
