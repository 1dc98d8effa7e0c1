"""The versions of torch that were tried, the private names of torch that are used, and their check."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.torch_version import TorchVersion

TRIED = ("2.11.0", "2.13.0", "2.14.1")
"""In ascending order. `scripts/check_versions.py` runs the tests on them."""

CLAMP_PASSES_AT_ITS_BOUND = torch.__version__ < TorchVersion("2.14")
"""The derivative of clamp where x is the bound: 1 before torch 2.14, 0 since."""

COMPILED_MULTILABEL_MARGIN_IS_WRONG = torch.__version__ < TorchVersion("2.14")
"""torch.compile replaces its forward by a composition, which gives other values before torch 2.14."""

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
