"""The gradients of an optimizer's parameters."""

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from .distributed import full_tensor


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients of all parameters that have one."""
    return [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> float:
    """Scale the gradients down if their total norm is above `max_norm`. Returns the norm before that.

    The gradients may be dense, sparse or DTensors.
    """
    grads = gradients(optimizer)
    norm = full_tensor(get_total_norm([g.coalesce().values() if g.is_sparse else g for g in grads]))
    if max_norm is not None:
        foreach = False if any(g.is_sparse for g in grads) else None
        clip_grads_with_norm_(_parameters(optimizer), max_norm, norm, foreach=foreach)
    return norm.item()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
