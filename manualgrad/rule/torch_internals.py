"""The versions of torch that were tried, its private names that are used, and what is done with them.

Each private name has one place: here, if a rule needs it; else where `PRIVATE` says by its name.
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

TRIED = ("2.11.0", "2.13.0", "2.14.1")
"""In ascending order. `scripts/check_versions.py` runs the tests on them."""

CLAMP_PASSES_AT_ITS_BOUND = torch.__version__ < TorchVersion("2.14")
"""The derivative of clamp where x is the bound: 1 before torch 2.14, 0 since."""

COMPILED_MULTILABEL_MARGIN_IS_WRONG = torch.__version__ < TorchVersion("2.14")
"""torch.compile replaces its forward by a composition, which gives other values before torch 2.14."""

UNPOOL_CHECK_IS_NOT_TRACED = torch.__version__ >= TorchVersion("2.13")
"""With dynamic shapes torch.compile does not trace torch's own check of the output size; torch 2.11 does."""

INFER_SIZE_IS_NOT_TRACED = torch.__version__ < TorchVersion("2.13")
"""torch.compile passes a plain tuple to `torch._C._infer_size`, which takes only a torch.Size."""

PACKED_LSTM_BY_STEPS = torch.__version__ < TorchVersion("2.13")
"""On the CPU an LSTM takes packed sequences of equal lengths step by step; since then by oneDNN's kernel."""

PRIVATE = (
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
    "torch._jit_internal.boolean_dispatched",
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
    "torch.utils._pytree.tree_unflatten",
)
"""What the import and the rules need. What is imported on use only (of DTensor, torch.compile) is not checked."""


def check(private: Iterable[str] = PRIVATE) -> None:
    """Warn of a newer torch than the newest that was tried.

    Raises:
        ImportError: torch lacks a private name that is used here.
    """
    for name in private:
        if not _exists(name):
            raise ImportError(
                f"manualgrad uses {name}, which torch {torch.__version__} does not have. "
                f"Install a version of torch that it was tried with ({', '.join(TRIED)}), or a newer manualgrad."
            )
    newest = TRIED[-1]
    if _minor(torch.__version__) > _minor(newest):
        warnings.warn(
            f"manualgrad was not tried with torch {torch.__version__}: the newest version tried is {newest}",
            stacklevel=4,  # who imports manualgrad
        )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def _exists(name: str) -> bool:
    """The dotted name is there, its modules imported if need be."""
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


# After the check, which names what is missing.

from torch._C import _autograd, _functorch  # noqa: E402  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch import eager_transforms  # noqa: E402
from torch._functorch.utils import unwrap_dead_wrappers  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

is_any_autocast_enabled = torch._C._is_any_autocast_enabled
is_transformed = torch._C._are_functorch_transforms_active
"""A transform of torch.func is active."""
without_dead_wrappers = unwrap_dead_wrappers
"""Tensors without the wrappers of torch.func transforms that have ended: a pullback called later receives some."""


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def in_nested_forward_mode() -> bool:
    return eager_transforms.JVP_NESTING > 1


def beyond_reverse_mode() -> bool:
    """A level of forward mode is open, or a transform of torch.func is active."""
    return in_forward_mode() or is_transformed()


def backward_is_differentiated() -> bool:
    """The backward that runs now may itself be differentiated. Grad mode alone does not show this."""
    return torch.is_grad_enabled() or beyond_reverse_mode()


def inplace_is_safe(*tensors: Tensor) -> bool:
    """Nothing observes the computation: it is not differentiated, transformed or compiled, and the tensors are
    ordinary. Then an operation may write into a tensor that the computation has made."""
    if backward_is_differentiated():
        return False
    for x in tensors:
        if (type(x) is not Tensor and type(x) is not Parameter) or _functorch.is_legacy_batchedtensor(
            x
        ):  # of grad(is_grads_batched=True)
            return False
    return True


def cuda_autocasts(operation: str) -> bool:
    """CUDA's autocast casts the arguments of this operation (the dispatcher says so, with or without a GPU)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operation}", "AutocastCUDA")


def outer_forward_mode() -> AbstractContextManager[None]:
    """Forward mode for the levels around the one whose ``jvp`` runs.

    torch turns forward mode off while it calls ``jvp``, which loses the tangents of the levels around it
    (pytorch#197867).
    """
    return forward_ad._set_fwd_grad_enabled(True) if in_nested_forward_mode() else nullcontext()


def primal(tensor: Any) -> Any:
    """The tensor without its tangent of the innermost level, but with those of the levels around it."""
    if isinstance(tensor, Tensor) and in_nested_forward_mode() and not _functorch.is_batchedtensor(tensor):
        return forward_ad.unpack_dual(tensor, level=0).primal
    return tensor


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside torch.func's wrappers: what it holds, for a check that may not depend on a batch."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def is_batched(tensor: Tensor) -> bool:
    """One of the wrappers around the tensor is that of `torch.vmap`, which has no memory format."""
    if torch.compiler.is_compiling() or not is_transformed():
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def is_last_backward() -> bool:
    """The graph is not retained: saved tensors are read now for the last time."""
    return not torch.compiler.is_compiling() and not _autograd._get_current_graph_task_keep_graph()


def is_distributed(tensor: Tensor) -> bool:
    """A DTensor. (Its module takes half a second to import; a process that has a DTensor has imported it.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def may_be_overwritten(tensor: Tensor, as_view: bool) -> bool:
    """A rule may write its output over this input, in reverse mode only.

    torch refuses it for a leaf that requires a gradient, and for some views: its own functions raise before they
    write.
    """
    if type(tensor) is not Tensor or beyond_reverse_mode() or torch.compiler.is_compiling():
        return False
    if not tensor._is_view():
        return not (tensor.is_leaf and tensor.requires_grad)
    base: Any = tensor._base
    usual = _autograd._get_creation_meta(tensor) == _autograd.CreationMeta.DEFAULT
    return as_view and usual and not (base.is_leaf and base.requires_grad)


def without_view(output: Tensor, inputs: Iterable[Any]) -> Tensor:
    """The output as a tensor that is no view, unless it is a view of an input.

    torch's own operations return such views (a product of three axes is one of a product of two) and allow writes
    into them. Autograd refuses a write into a view that was made inside a Function. ``.data`` shares the memory.
    """
    if not output._is_view() or any(_shares_base(x, output) for x in inputs if isinstance(x, Tensor)):
        return output
    return output.data


def _shares_base(input: Tensor, view: Tensor) -> bool:
    return view._base is (input._base if input._is_view() else input)
