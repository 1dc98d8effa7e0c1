r"""What is kept between forward and backward: less.

A network keeps most of its memory for tensors that are made in one pass from others that are kept anyway:

    z = linear(x);   y = gelu(z);   linear(y)      gelu keeps z, and the second linear would keep y

Each rule whose output is so cheap leaves a `Recipe` on its node of the graph: how the output is made, and from
what, by weak references alone. A rule that is to keep such an output keeps what the recipe names instead, which is
no more memory than is kept already, and makes the output again in its backward. Recipes go through one another: of
dropout(gelu(z)) z is kept, and the mask.

    it is found       on ``tensor.grad_fn``, which a write in place replaces, or else leaves with another version
    it is used        if all that it names still lives, in the version that it was made from
    what is kept      goes through ``save_for_backward``, as any tensor: hooks see it, and torch checks its version
    in the backward   the tensor itself is taken if it still lives unchanged, so that whoever holds it can
                      differentiate by it; else it is made again, by rules, so that this can be differentiated too

An activation in place writes over its input, and keeps no more than torch does there:

    the input has a recipe      this is kept, and serves the activation's gradient and its output
    the output is enough        for the gradient of ReLU, leaky ReLU and ELU: kept, as in the next layer
    else                        a copy of the input is kept, as torch keeps one; the output is made again from that

A mask of booleans is kept as bits, which is a recipe as well. (What is written through ``.data`` has no version:
torch does not see it in what it keeps, nor does a recipe.)

Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, do the same with whole
segments of a network, products of matrices included. Jain et al., "Gist: Efficient Data Encoding for Deep Neural
Network Training", 2018, keep ReLU's mask in bits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch._C import _autograd as autograd  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn import Parameter

SMALL = 2**17
"""With fewer elements a tensor is kept as it is: to make it again would take longer than the memory is worth. (A
network of width 256 at batch 256 took 1.34 times torch's time with recipes for its 2¹⁶ numbers, 1.17 without.)"""

_DEEPEST = 3
"""Recipes through more recipes than these are not followed: the time to make a tensor again stays bounded."""


class Kept(NamedTuple):
    """A tensor that a node of the graph keeps, or whoever else, as long as they do."""

    reference: ReferenceType[Tensor]
    version: int

    def tensor(self) -> Tensor | None:
        """The tensor, unless it is gone or was written to since."""
        tensor = self.reference()
        return None if tensor is None or tensor._version != self.version else tensor


def kept(tensor: Tensor) -> Kept:
    return Kept(ref(tensor), tensor._version)


class Slot(NamedTuple):
    """A place among the tensors that a node keeps."""

    place: int


class Recipe(NamedTuple):
    """made = make(*parts)"""

    make: Callable[..., Tensor]
    parts: tuple[Any, ...]  # each a Recipe, a setting, or a tensor: Kept by others, once it is in a node a Slot
    made: Kept | None
    depth: int


def large(value: Any) -> bool:
    """A tensor that is worth the thought, and no subclass, which may hold anything."""
    return isinstance(value, Tensor) and value.numel() >= SMALL and type(value) in (Tensor, Parameter)


def recipe_of(tensor: Tensor) -> Recipe | None:
    """How the tensor is made again, if the rule that made it says so and it was not written to since.

    FSDP frees the weights of a module between its forward and its backward, which it sees begin by a hook on the
    module's output. A layer behind has its backward earlier, and must not make this output again: with a hook, a
    tensor has no recipe. Where a checkpoint runs a module once more FSDP may leave its hooks out, but what is kept
    must be what was kept at first: there no tensor has one.
    """
    recipe = getattr(tensor.grad_fn, "recipe", None)
    if recipe is None or recipe.made.version != tensor._version or tensor._backward_hooks:
        return None
    if keeping_is_seen() and _fully_sharded():
        return None
    return recipe


def usable_recipe_of(tensor: Tensor) -> Recipe | None:
    """The same, if all that it names still lives unchanged. (It does then as long as the tensor's node.)"""

    def lives(part: Any) -> bool:
        if isinstance(part, Recipe):
            return all(map(lives, part.parts))
        return not isinstance(part, Kept) or part.tensor() is not None

    recipe = recipe_of(tensor)
    return recipe if recipe is not None and lives(recipe) else None


def keeping_is_seen() -> bool:
    """A hook of the user's is given what this forward keeps, and may hold on to it."""
    return autograd._top_saved_tensors_default_hooks(True) is not None


def _fully_sharded() -> bool:
    """`torch.distributed.fsdp.fully_shard` is in use: it makes a class for what it is given."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and bool(fsdp.FSDPModule.__subclasses__())


class Pantry:
    """The tensors that a node is going to keep, and how to have from them what its backward names."""

    def __init__(self, tensors: Iterable[Tensor | Recipe | None]) -> None:
        self.tensors: list[Tensor | None] = []
        self._thrifty = False
        self.parts = [self._keep(tensor) for tensor in tensors]

    def _put(self, tensor: Tensor | None) -> Slot:
        self.tensors.append(tensor)
        return Slot(len(self.tensors) - 1)

    def _keep(self, tensor: Tensor | Recipe | None) -> Slot | Recipe:
        """Keep a tensor, or what it is made from (of one that has been written over, that alone is there)."""
        if isinstance(tensor, Recipe):
            found = self._followed(tensor)
            assert found is not None
            self._thrifty = True
            return found
        if tensor is None or tensor.numel() < SMALL:
            return self._put(tensor)
        before = len(self.tensors)
        if tensor.dtype == torch.bool:
            found = self._in_bits(tensor)
        else:
            recipe = recipe_of(tensor)
            found = None if recipe is None else self._followed(recipe)
        if found is None:
            del self.tensors[before:]
            return self._put(tensor)
        self._thrifty = True
        return found

    def _in_bits(self, mask: Tensor) -> Recipe | None:
        packed = in_bits(mask)
        return None if packed is None else Recipe(from_bits, (self._put(packed[0]), *packed[1:]), None, 0)

    def _followed(self, recipe: Recipe) -> Recipe | None:
        parts: list[Any] = []
        for part in recipe.parts:
            if isinstance(part, Recipe):
                part = self._followed(part)
            elif isinstance(part, Kept):
                tensor = part.tensor()
                part = None if tensor is None else self._put(tensor)
            else:
                parts.append(part)
                continue
            if part is None:
                return None
            parts.append(part)
        return recipe._replace(parts=tuple(parts))

    def again(self) -> Callable[[Sequence[Tensor]], list[Any]] | None:
        """What gives, of the kept tensors, those that were to be kept; None if they are the same."""
        if not self._thrifty:
            return None
        parts = self.parts
        return lambda tensors: [_taken(part, tensors) for part in parts]

    def recipe(
        self,
        make: Callable[..., Tensor],
        asked: Iterable[tuple[Any, Slot | Recipe | None]],
        made: Tensor,
        writes: int,
    ) -> Recipe | None:
        """How `made` is made, of values that are either kept here (as the part), or by others; else None. It will
        count so many writes more than it does now."""
        parts: list[Any] = []
        for value, part in asked:
            if part is not None:
                part = self._left_behind(part)
            elif not isinstance(value, Tensor):
                part = value
            elif value.is_leaf:
                part = kept(value)
            elif (part := recipe_of(value)) is None:
                return None
            parts.append(part)
        depth = 1 + max((part.depth for part in parts if isinstance(part, Recipe)), default=0)
        if depth > _DEEPEST:
            return None
        return Recipe(make, tuple(parts), Kept(ref(made), made._version + writes), depth)

    def _left_behind(self, part: Any) -> Any:
        """A part for others to follow: with weak references for the places."""
        if isinstance(part, Slot):
            tensor = self.tensors[part.place]
            return None if tensor is None else kept(tensor)
        if isinstance(part, Recipe):
            return part._replace(parts=tuple(map(self._left_behind, part.parts)))
        return part


def _taken(part: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(part, Slot):
        return tensors[part.place]
    if isinstance(part, Recipe):
        made = None if part.made is None else part.made.tensor()
        return part.make(*[_taken(p, tensors) for p in part.parts]) if made is None else made
    return part


# b · 0x0101…01 is a byte b in each of a word's eight bytes; 0x8040…01 takes another bit of it from each.
_SPREAD, _EACH, _ONES = 0x0101010101010101, 0x8040201008040201 - 2**64, 0x7F7F7F7F7F7F7F7F
_GATHER = 0x0102040810204080
"""The product of a word of eight booleans with this has them as the bits of its highest byte."""


def in_bits(mask: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]] | None:
    """Eight booleans a byte, in the order they lie in memory, and the mask's sizes and strides."""
    n = mask.numel()
    if mask.is_contiguous():
        flat = mask.view(-1)
    elif torch.empty_like(mask, device="meta").stride() == mask.stride():  # without gaps
        flat = mask.as_strided((n,), (1,))
    else:
        return None
    if n % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -n % 8))
    words = flat.view(torch.int64) * _GATHER
    return words.bitwise_right_shift_(56).to(torch.uint8), tuple(mask.shape), mask.stride()


def from_bits(bits: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    words = bits.to(torch.int64).mul_(_SPREAD).bitwise_and_(_EACH)
    flat = words.add_(_ONES).bitwise_right_shift_(7).bitwise_and_(_SPREAD).view(torch.bool)
    n = math.prod(shape)
    return (flat if flat.numel() == n else flat[:n]).as_strided(shape, stride)
