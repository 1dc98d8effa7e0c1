"""The tested versions of torch, the private names of torch that manualgrad uses, and wrappers around them.

This is the lowest layer: it imports nothing of manualgrad. The import fails if torch lacks a private name.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.torch_version import TorchVersion

TESTED_VERSIONS = ("2.11.0", "2.13.0", "2.14.1")
"""In ascending order. `scripts/check_versions.py` runs the tests with each of them."""

CLAMP_PASSES_GRADIENT_AT_BOUND = torch.__version__ < TorchVersion("2.14")
"""The derivative of clamp at its bound is 1 before torch 2.14, and 0 from torch 2.14 on."""

COMPILED_MULTILABEL_MARGIN_IS_WRONG = torch.__version__ < TorchVersion("2.14")
"""torch.compile decomposes multilabel_margin_loss. Before torch 2.14 the decomposition gives wrong values."""

UNPOOL_CHECK_IS_NOT_TRACED = torch.__version__ >= TorchVersion("2.13")
"""With dynamic shapes, torch.compile does not trace the check of the output size in torch's max_unpool. torch 2.11
does."""

INFER_SIZE_IS_NOT_TRACED = torch.__version__ < TorchVersion("2.13")
"""torch.compile passes a plain tuple to `torch._C._infer_size`, which accepts only a torch.Size."""

PACKED_LSTM_RUNS_STEP_BY_STEP = torch.__version__ < TorchVersion("2.13")
"""On the CPU, an LSTM processes packed sequences of equal lengths step by step. torch 2.13 uses oneDNN's
kernel."""

PROGRAMS_HAVE_FIXED_SIZES = torch.__version__ < TorchVersion("2.13")
"""The graph of torch.export has the sizes of the example, also where `dynamic_shapes` names others."""

PRIVATE_NAMES = (
    "torch.Tensor._is_view",
    "torch.Tensor._version",
    "torch._C._are_functorch_transforms_active",
    "torch._C._autograd.CreationMeta",
    "torch._C._autograd._get_creation_meta",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._disabled_torch_function_impl",
    "torch._C._dispatch_has_kernel_for_dispatch_key",
    "torch._C._functorch.get_unwrapped",
    "torch._C._functorch.is_batchedtensor",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._get_tracing_state",
    "torch._C._infer_size",
    "torch._C._is_any_autocast_enabled",
    "torch._C._nn.elu",
    "torch._C._nn.elu_",
    "torch._ctc_loss",
    "torch._functorch.eager_transforms.JVP_NESTING",
    "torch._functorch.utils.unwrap_dead_wrappers",
    "torch._guards.detect_fake_mode",
    "torch._jit_internal.boolean_dispatched",
    "torch._ops.HigherOrderOperator",
    "torch._ops.OpOverload",
    "torch._ops.OpOverloadPacket",
    "torch._prims_common.suggest_memory_format",
    "torch.autograd._get_sequence_nr",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch.nn._reduction.legacy_get_string",
    "torch.nn.modules._functions.CrossMapLRN2d",
    "torch.nn.modules._functions.SyncBatchNorm",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.utils._list_with_default",
    "torch.ops.aten._batch_norm_impl_index",
    "torch.ops.aten._embedding_bag",
    "torch.ops.aten._prelu_kernel",
    "torch.ops.aten._sample_dirichlet",
    "torch.ops.aten._scaled_dot_product_attention_math",
    "torch.ops.aten._sparse_coo_tensor_unsafe",
    "torch.ops.aten._standard_gamma",
    "torch.ops.aten._unsafe_view",
    "torch.overrides._get_current_function_mode_stack",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    "torch.utils._pytree.tree_flatten",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_map_only",
    "torch.utils._pytree.tree_structure",
    "torch.utils._pytree.tree_unflatten",
)
"""The private names that `check` looks for. Names that are imported on first use (DTensor, torch.compile) are not
listed."""


def check(private: Iterable[str] = PRIVATE_NAMES) -> None:
    """Warn if torch is newer than the newest tested version.

    Raises:
        ImportError: torch lacks one of the private names.
    """
    for name in private:
        if not _exists(name):
            raise ImportError(
                f"manualgrad uses {name}, which torch {torch.__version__} does not have. "
                f"Install a tested version of torch ({', '.join(TESTED_VERSIONS)}) or a newer manualgrad."
            )
    newest = TESTED_VERSIONS[-1]
    if _major_minor(torch.__version__) > _major_minor(newest):
        warnings.warn(
            f"manualgrad was not tested with torch {torch.__version__}: the newest tested version is {newest}",
            stacklevel=4,  # the line that imports manualgrad
        )


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def _exists(name: str) -> bool:
    """The dotted name exists. Modules on its path are imported."""
    found: Any = torch
    path = name.split(".")
    for i, part in enumerate(path[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(path[:i]))
            except ImportError:
                return False
        found = getattr(found, part, None)
    return True


check()


# These imports come after the check, which reports a missing name with advice.

from torch._C import _autograd, _functorch  # noqa: E402  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch import eager_transforms  # noqa: E402
from torch._functorch import utils as functorch_utils  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

is_any_autocast_enabled = torch._C._is_any_autocast_enabled
in_functorch_transform = torch._C._are_functorch_transforms_active
"""A transform of torch.func is active."""
unwrap_dead_wrappers = functorch_utils.unwrap_dead_wrappers
"""Unwraps tensors of torch.func transforms that have ended. The function that `torch.func.vjp` returns may be
called after that. Then such tensors are among the saved ones."""


def in_forward_mode() -> bool:
    """A level of forward-mode AD is open, so tensors may have tangents."""
    return forward_ad._current_level >= 0


def in_nested_forward_mode() -> bool:
    return eager_transforms.JVP_NESTING > 1


def in_forward_mode_or_transform() -> bool:
    return in_forward_mode() or in_functorch_transform()


def backward_is_differentiated() -> bool:
    """The running backward may itself be differentiated.

    Grad mode is on in a backward with ``create_graph``. It says nothing about forward mode and transforms.
    """
    return torch.is_grad_enabled() or in_forward_mode_or_transform()


def inplace_is_safe(*tensors: Tensor) -> bool:
    """Operations may write into the temporaries of a computation on these tensors.

    They may if the computation is not differentiated, transformed or compiled, and no tensor is a subclass.
    """
    if backward_is_differentiated():
        return False
    for x in tensors:
        if type(x) is not Tensor and type(x) is not Parameter:
            return False
        if _functorch.is_legacy_batchedtensor(x):  # of torch.autograd.grad(is_grads_batched=True)
            return False
    return True


def is_autocast_on_cuda(operation: str) -> bool:
    """CUDA autocast casts the arguments of this ATen operation. The dispatcher knows this without a GPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operation}", "AutocastCUDA")


def enable_outer_forward_mode() -> AbstractContextManager[None]:
    """Enable forward mode for the outer levels while a ``jvp`` runs.

    torch disables forward mode while it calls ``jvp``. That loses the tangents of the outer levels
    (pytorch#197867).
    """
    return forward_ad._set_fwd_grad_enabled(True) if in_nested_forward_mode() else nullcontext()


def unpack_primal(tensor: Any) -> Any:
    """The tensor without its tangent of the innermost level. Tangents of outer levels stay."""
    if isinstance(tensor, Tensor) and in_nested_forward_mode() and not _functorch.is_batchedtensor(tensor):
        return forward_ad.unpack_dual(tensor, level=0).primal
    return tensor


def unwrap_functorch(tensor: Tensor) -> Tensor:
    """The tensor inside all wrappers of torch.func, for checks that read values."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def is_vmapped(tensor: Tensor) -> bool:
    """One of the tensor's wrappers is a batched tensor of `torch.vmap`. Its memory format cannot be queried."""
    if torch.compiler.is_compiling() or not in_functorch_transform():
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def is_last_backward() -> bool:
    """The running backward frees the graph, so it reads saved tensors for the last time."""
    return not torch.compiler.is_compiling() and not _autograd._get_current_graph_task_keep_graph()


def is_dtensor(tensor: Tensor) -> bool:
    """The tensor is a DTensor. (The import takes half a second. A process that has a DTensor has imported it.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def can_write_inplace(tensor: Tensor, allow_view: bool) -> bool:
    """A rule may write its output into this input. False in forward mode, transforms and torch.compile.

    torch refuses writes into a leaf that requires a gradient, and into some views, for example those of
    ``unbind``. Its own in-place functions raise the error before they write. A Function would write first, so this
    function checks the same.
    """
    if type(tensor) is not Tensor or in_forward_mode_or_transform() or torch.compiler.is_compiling():
        return False
    if not tensor._is_view():
        return not (tensor.is_leaf and tensor.requires_grad)
    base: Any = tensor._base
    is_plain_view = _autograd._get_creation_meta(tensor) == _autograd.CreationMeta.DEFAULT
    return allow_view and is_plain_view and not (base.is_leaf and base.requires_grad)


def as_non_view(output: Tensor, inputs: Iterable[Any]) -> Tensor:
    """The output as a tensor that is not a view, unless it is a view of an input.

    Some torch operations return a view of a temporary (a product of 3-d tensors is a view of a product of 2-d
    tensors). autograd refuses in-place writes into a view that a Function returns. ``.data`` shares the memory,
    and is not a view.
    """
    if not output._is_view() or any(_shares_base(x, output) for x in inputs if isinstance(x, Tensor)):
        return output
    return output.data


def _shares_base(input: Tensor, view: Tensor) -> bool:
    return view._base is (input._base if input._is_view() else input)
