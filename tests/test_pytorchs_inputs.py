"""PyTorch's own test inputs: OpInfo's for functions, ModuleInfo's for modules.

For all samples values and first derivatives match torch's, and the autograd graph has no derivative of torch. For
all error inputs the error has torch's type. `EXTRA_MODULES` has the modules that ModuleInfo lacks.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from graph import torch_derivatives
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from manualgrad import nn, registry
from manualgrad.rebinding import rebind

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that hypothesis is not installed
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import FunctionInput, ModuleErrorEnum, ModuleInfo, module_db
    from torch.testing._internal.opinfo.core import OpInfo

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "nn.functional."
DTYPE = torch.float64


# --- functions ---


def functions(info: OpInfo) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """manualgrad's and torch's function."""
    name = info.name.removeprefix(PREFIX)
    if name == "embedding":  # the samples have weight and indices in another order
        manual, original = nn.functional.embedding, torch.nn.functional.embedding
        return (lambda w, i, **kwargs: manual(i, w, **kwargs)), (lambda w, i, **kwargs: original(i, w, **kwargs))
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
def test_function_matches_torch(info: OpInfo) -> None:
    function, reference = functions(info)
    for sample in info.sample_inputs("cpu", DTYPE, requires_grad=True):
        arguments = FunctionInput(sample.input, *sample.args, **sample.kwargs)
        expected = run_and_differentiate(reference, arguments)
        arguments.kwargs = tree_map(_to_manual, arguments.kwargs)
        found = run_and_differentiate(function, arguments)
        assert_same_results(found, expected)
        assert not torch_derivatives(found[0]), sample


@pytest.mark.parametrize("info", _infos(with_errors=True))
def test_function_errors(info: OpInfo) -> None:
    function, _ = functions(info)
    for bad in info.error_inputs("cpu"):
        sample = bad.sample_input
        with pytest.raises(bad.error_type):
            function(sample.input, *sample.args, **sample.kwargs)


def run_and_differentiate(
    function: Callable[..., Any], arguments: FunctionInput, parameters: list[Tensor] | None = None
) -> Any:
    """Outputs and gradients, for new leaves with the same values, and the same random numbers in each call."""
    args, kwargs = tree_map(_new_leaf, (arguments.args, arguments.kwargs))
    torch.manual_seed(0)
    outputs = function(*args, **kwargs)
    differentiable, inputs = _leaves(outputs), _leaves((args, kwargs)) + (parameters or [])
    if not differentiable or not inputs:
        return outputs, []
    grad_outputs = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) for y in differentiable]
    gradients = torch.autograd.grad(differentiable, inputs, grad_outputs, allow_unused=True, retain_graph=True)
    return outputs, [torch.zeros(()) if g is None or not g.numel() else g.to_dense() for g in gradients]


def _new_leaf(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _leaves(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.requires_grad]


def assert_same_results(found: Any, expected: Any) -> None:
    (outputs, gradients), (torch_outputs, torch_gradients) = found, expected
    assert_close(outputs, torch_outputs, rtol=1e-12, atol=1e-12, equal_nan=True, check_stride=True)
    for a, b in zip(gradients, torch_gradients, strict=True):
        # a zero gradient may be None
        assert_close(a, b if b.dim() else b.expand_as(a), equal_nan=True)


# --- modules ---


class ExtraModule:
    """A module that ModuleInfo lacks: its constructor's arguments, and its inputs as shapes or tensors."""

    def __init__(self, name: str, arguments: dict[str, Any] | None = None, *inputs: Any) -> None:
        self.name, self.arguments, self.inputs = name, arguments or {}, inputs


def _index(*shape: int, below: int = 6) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).remainder(below).reshape(shape)


EXTRA_MODULES = [
    *(ExtraModule(f"Dropout{n}", {"p": 0.4}, shape) for n, shape in (("", (5, 3)), ("1d", (2, 5, 3)))),
    *(
        ExtraModule(f"Dropout{n}", {"p": 0.4}, shape)
        for n, shape in (("2d", (2, 5, 2, 3)), ("3d", (2, 5, 2, 1, 3)))
    ),
    *(ExtraModule(name, {"p": 0.3}, (4, 5, 3)) for name in ("AlphaDropout", "FeatureAlphaDropout")),
    ExtraModule("Hardsigmoid", {}, (5, 3)),
    ExtraModule("RReLU", {}, (5, 3)),
    ExtraModule(
        "AdaptiveLogSoftmaxWithLoss",
        {"in_features": 8, "n_classes": 12, "cutoffs": [3, 7]},
        (6, 8),
        _index(6, below=12),
    ),
    ExtraModule("ChannelShuffle", {"groups": 2}, (2, 6, 3)),
    ExtraModule("PixelShuffle", {"upscale_factor": 2}, (2, 8, 3, 2)),
    ExtraModule("PixelUnshuffle", {"downscale_factor": 2}, (2, 2, 4, 6)),
    ExtraModule("CosineSimilarity", {"dim": 1}, (5, 3, 2), (5, 3, 2)),
    ExtraModule("PairwiseDistance", {"p": 3.0, "keepdim": True}, (5, 3), (5, 3)),
    ExtraModule("CrossMapLRN2d", {"size": 3}, (2, 5, 3, 3)),
    ExtraModule(
        "EmbeddingBag", {"num_embeddings": 6, "embedding_dim": 3, "mode": "sum", "padding_idx": 2}, _index(4, 3)
    ),
    ExtraModule(
        "EmbeddingBag",
        {"num_embeddings": 6, "embedding_dim": 3, "mode": "max"},
        _index(8),
        torch.tensor([0, 3, 5]),
    ),
    ExtraModule("Fold", {"output_size": (4, 5), "kernel_size": (2, 3), "padding": 1, "stride": 2}, (2, 12, 9)),
    ExtraModule("Unfold", {"kernel_size": (2, 3), "padding": 1, "dilation": 2}, (2, 3, 5, 6)),
    *(ExtraModule(f"LazyBatchNorm{n}d", {}, (4, 3, 2, 2, 2)[: n + 2]) for n in (1, 2, 3)),
    *(ExtraModule(f"LazyInstanceNorm{n}d", {"affine": True}, (4, 3, 2, 2, 2)[: n + 2]) for n in (1, 2, 3)),
    ExtraModule("LazyLinear", {"out_features": 4}, (5, 3)),
    *(
        ExtraModule(
            f"MaxUnpool{n}d", {"kernel_size": 2}, (1, 2, *(2,) * n), _index(1, 2, *(2,) * n, below=2**n) * 2
        )
        for n in (1, 2, 3)
    ),
    ExtraModule("NLLLoss2d", {}, (2, 3, 2, 2), _index(2, 2, 2, below=3)),
    ExtraModule(
        "TransformerDecoder",
        {"decoder_layer": torch.nn.TransformerDecoderLayer(4, 2, 6), "num_layers": 2},
        (3, 2, 4),
        (5, 2, 4),
    ),
    ExtraModule("TripletMarginLoss", {"swap": True}, (5, 3), (5, 3), (5, 3)),
    ExtraModule("TripletMarginWithDistanceLoss", {"margin": 0.5}, (5, 3), (5, 3), (5, 3)),
    ExtraModule("Upsample", {"scale_factor": 1.5, "mode": "bilinear"}, (2, 3, 4, 5)),
    ExtraModule("UpsamplingBilinear2d", {"scale_factor": 2}, (2, 3, 4, 5)),
    ExtraModule("UpsamplingNearest2d", {"size": (3, 7)}, (2, 3, 4, 5)),
]

ModuleSample = tuple[str, FunctionInput, FunctionInput]  # name, arguments of the constructor, arguments of forward


def module_samples(entry: ModuleInfo | ExtraModule, training: bool) -> Iterator[ModuleSample]:
    if isinstance(entry, ExtraModule):
        generator = torch.Generator().manual_seed(0)
        inputs = [
            x if isinstance(x, Tensor) else torch.randn(x, dtype=DTYPE, generator=generator).requires_grad_()
            for x in entry.inputs
        ]
        yield entry.name, FunctionInput(**entry.arguments), FunctionInput(*inputs)
        return
    for sample in entry.module_inputs_func(entry, "cpu", DTYPE, True, training):
        yield entry.module_cls.__name__, sample.constructor_input, sample.forward_input


def _to_manual(value: Any) -> Any:
    """manualgrad's module or function, for an argument that is torch's."""
    if not isinstance(value, torch.nn.Module):
        return rebind(value)
    for module in value.modules():
        module.__class__ = rebind(type(module))
        for name, function in vars(module).items():
            if callable(function):
                setattr(module, name, rebind(function))
    return value


def make_modules(name: str, arguments: FunctionInput) -> tuple[torch.nn.Module, torch.nn.Module]:
    """manualgrad's and torch's module, from the same seed."""
    modules = []
    for namespace in (nn, torch.nn):
        torch.manual_seed(0)
        args, kwargs = copy.deepcopy((arguments.args, arguments.kwargs))
        if namespace is nn:
            args, kwargs = tree_map(_to_manual, (args, kwargs))
        modules.append(getattr(namespace, name)(*args, **kwargs).to(DTYPE))
    return modules[0], modules[1]


@pytest.mark.parametrize(
    "entry", [pytest.param(x, id=x.name.removeprefix("nn.")) for x in (*module_db, *EXTRA_MODULES)]
)
def test_module_matches_torch(entry: ModuleInfo | ExtraModule) -> None:
    for training in (True, False):
        for name, arguments, inputs in module_samples(entry, training):
            manual, original = (module.train(training) for module in make_modules(name, arguments))
            results = [run_and_differentiate(x, inputs, list(x.parameters())) for x in (manual, original)]
            if name == "CrossMapLRN2d":  # torch's gradient is not the derivative of its values
                results = [(output, []) for output, _ in results]
            assert_same_results(*results)
            assert not torch_derivatives(results[0][0])
            assert_close(dict(manual.state_dict()), dict(original.state_dict()), rtol=0, atol=0, equal_nan=True)
            assert list(manual.state_dict()) == list(original.state_dict())
            assert isinstance(manual, type(original))
            assert repr(manual) == repr(original)
            unpickled = pickle.loads(pickle.dumps(manual))
            assert type(unpickled) is type(manual)
            assert_close(dict(unpickled.state_dict()), dict(manual.state_dict()), equal_nan=True)


@pytest.mark.parametrize(
    "entry", [pytest.param(x, id=x.name.removeprefix("nn.")) for x in module_db if x.module_error_inputs_func]
)
def test_module_errors(entry: Any) -> None:
    for training in (True, False):
        for bad in entry.module_error_inputs_func(entry, "cpu", DTYPE, True, training):
            arguments, inputs = bad.module_error_input.constructor_input, bad.module_error_input.forward_input
            make = partial(getattr(nn, entry.module_cls.__name__), *arguments.args, **arguments.kwargs)
            if bad.error_on == ModuleErrorEnum.FORWARD_ERROR:
                module = make()
                with pytest.raises(bad.error_type):
                    module(*inputs.args, **inputs.kwargs)
            else:
                with pytest.raises(bad.error_type):
                    make()


WITHOUT_INPUTS = {
    *("Container", "Flatten", "Identity", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList"),
    *("RNNBase", "RNNCellBase", "Sequential", "Unflatten", "DataParallel"),
    "SyncBatchNorm",  # needs several processes: test_sync_batch_norm.py
}


def test_every_module_is_tested() -> None:
    tested = {info.module_cls.__name__ for info in module_db} | {extra.name for extra in EXTRA_MODULES}
    every = {
        name
        for name, value in vars(torch.nn).items()
        if inspect.isclass(value) and issubclass(value, torch.nn.Module)
    }
    assert every - tested == WITHOUT_INPUTS
