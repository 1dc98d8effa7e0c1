"""Tensors as vectors of real numbers, and how messages describe them."""

from __future__ import annotations

import torch
from torch import Tensor


def real_vector(tensor: Tensor) -> Tensor:
    """All real numbers in a tensor, as a vector. A complex element gives two: real and imaginary part."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


def from_real_vector(vector: Tensor, like: Tensor) -> Tensor:
    """The inverse of `real_vector`, with the shape of `like`."""
    if like.is_complex():
        return torch.view_as_complex(vector.reshape(*like.shape, 2).contiguous())
    return vector.reshape(like.shape)


def element_position(tensor: Tensor, index: int) -> str:
    """The multi-dimensional index of one number of `real_vector(tensor)`: "[2, 0]" or "[2, 0].imag"."""
    part = ""
    if tensor.is_complex():
        index, part = index // 2, (".real", ".imag")[index % 2]
    indices = []
    for size in reversed(tensor.shape):
        index, remainder = divmod(index, size)
        indices.append(str(remainder))
    return f"[{', '.join(reversed(indices))}]{part}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_and_shape(tensor: Tensor) -> str:
    """For messages: "float64[3, 4]"."""
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def is_differentiable(tensor: Tensor) -> bool:
    """Whether tensors of this dtype can require a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in `dtype`, a complex one in the complex dtype of that precision, others unchanged."""
    if tensor.is_complex():
        return tensor.to({torch.float64: torch.complex128}.get(dtype, torch.complex64))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def clone_with_strides(tensor: Tensor) -> Tensor:
    """A detached copy with the same strides, including gaps and stride 0."""
    source = tensor.detach()
    if source.device.type == "meta" or not source.numel():
        return source.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True))
    storage = torch.as_strided(source, (extent,), (1,)).clone()
    return torch.as_strided(storage, source.shape, source.stride())
