r"""Recompute saved tensors instead of storing them.

Most tensors that a network saves can be computed in one pass from other saved tensors:

    z = linear(x);   y = gelu(z);   linear(y)      gelu saves z, and the second linear would save y = gelu(z)

A rule with a cheap output (`Rule.recomputable`, or a method ``recompute``) attaches a `Recipe` to its autograd
node: a function and weak references to the tensors that it takes. A rule that would save such an output saves the
inputs of its recipe instead. They are saved by another rule already, so this costs no memory. The backward
recomputes the output. A recipe may contain recipes: for dropout(gelu(z)), z and the dropout mask are saved.

    where a recipe is found    on ``tensor.grad_fn``. An in-place write replaces the node or changes the version
    when it is used            if all tensors that it names are alive and unchanged (same version)
    what is saved              goes through ``save_for_backward``, so saved-tensor hooks and version checks work
    in the backward            the original tensor if it is still alive and unchanged, so that whoever holds it can
                               differentiate with respect to it. Otherwise the recipe runs. It consists of rules,
                               so it can be differentiated as well

An in-place activation overwrites its input. It saves no more than torch's does:

    the input has a recipe     the inputs of the recipe, for the gradient of the activation and for its output
    the output is enough       the output, for ReLU, leaky ReLU and ELU. The next layer often saves it as well
    otherwise                  a copy of the input, as torch does. The output is recomputed from it

A boolean mask is saved as bits. That is a recipe too. (A write through ``.data`` does not change the version, so
neither torch nor a recipe notices it.)

Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, recompute whole segments of a
network, including matrix products. Jain et al., "Gist: Efficient Data Encoding for Deep Neural Network Training",
2018, save ReLU's mask as bits.
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

MIN_ELEMENTS = 2**17
"""Smaller tensors are saved as they are. Recomputing them takes longer than the memory is worth. (A network of
width 256 with batch size 256 took 1.34 times torch's time with recipes for its tensors of 2¹⁶ elements, 1.17
without.)"""

_MAX_DEPTH = 3
"""The number of nested recipes. It bounds the time to recompute a tensor."""


class WeakTensor(NamedTuple):
    """A weak reference to a tensor in one version."""

    reference: ReferenceType[Tensor]
    version: int

    @classmethod
    def of(cls, tensor: Tensor, pending_writes: int = 0) -> WeakTensor:
        return cls(ref(tensor), tensor._version + pending_writes)

    def get(self) -> Tensor | None:
        """The tensor. None if it was freed or has been written to."""
        tensor = self.reference()
        return None if tensor is None or tensor._version != self.version else tensor


class SavedSlot(NamedTuple):
    """A position among the saved tensors of a node."""

    index: int


class Recipe(NamedTuple):
    """output = function(*parts)

    A part is a Recipe, a setting or a tensor. A recipe on a node refers to tensors by `WeakTensor`, a recipe in
    `Saved` by `SavedSlot`.
    """

    function: Callable[..., Tensor]
    parts: tuple[Any, ...]
    output: WeakTensor | None
    depth: int


def is_large(value: Any) -> bool:
    """A tensor with at least `MIN_ELEMENTS` elements that is not a subclass."""
    return isinstance(value, Tensor) and value.numel() >= MIN_ELEMENTS and type(value) in (Tensor, Parameter)


def find_recipe(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor. None if its rule has none, or if the tensor has been written to.

    A tensor with a hook has no recipe. FSDP frees the weights of a module after its forward and gathers them in a
    hook on the module's output. The backward of a later layer runs before that hook, so it must not recompute the
    output. FSDP may omit its hooks while a checkpoint reruns a module, but the rerun must save the same tensors as
    the first run: with FSDP, no tensor has a recipe while saved-tensor hooks are active.
    """
    recipe = getattr(tensor.grad_fn, "recipe", None)
    if recipe is None or recipe.output.version != tensor._version or tensor._backward_hooks:
        return None
    if saved_tensor_hooks_active() and _fsdp_is_used():
        return None
    return recipe


def find_usable_recipe(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor, if all tensors that it names are alive and unchanged."""

    def is_usable(part: Any) -> bool:
        if isinstance(part, Recipe):
            return all(map(is_usable, part.parts))
        return not isinstance(part, WeakTensor) or part.get() is not None

    recipe = find_recipe(tensor)
    return recipe if recipe is not None and is_usable(recipe) else None


def saved_tensor_hooks_active() -> bool:
    """`torch.autograd.graph.saved_tensors_hooks` receive what this forward saves."""
    return autograd._top_saved_tensors_default_hooks(True) is not None


def _fsdp_is_used() -> bool:
    """`torch.distributed.fsdp.fully_shard` has been called. It creates a class for each module class."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and bool(fsdp.FSDPModule.__subclasses__())


class SavedTensorPacker:
    """Chooses the tensors that a node saves, and makes the function that recomputes the others.

    Args:
        tensors: what the backward needs. A Recipe stands for a tensor that has been overwritten.
    """

    def __init__(self, tensors: Iterable[Tensor | Recipe | None]) -> None:
        self.tensors: list[Tensor | None] = []
        """The tensors to save."""
        self._memory_saving = False
        self.parts = [self._pack(tensor) for tensor in tensors]
        """For each needed tensor its slot, or its recipe on slots."""

    def _save(self, tensor: Tensor | None) -> SavedSlot:
        self.tensors.append(tensor)
        return SavedSlot(len(self.tensors) - 1)

    def _pack(self, tensor: Tensor | Recipe | None) -> SavedSlot | Recipe:
        """Save a tensor, or the inputs of its recipe."""
        if isinstance(tensor, Recipe):
            found = self._pack_recipe(tensor)
            assert found is not None
            self._memory_saving = True
            return found
        if tensor is None or tensor.numel() < MIN_ELEMENTS:
            return self._save(tensor)
        before = len(self.tensors)
        if tensor.dtype == torch.bool:
            found = self._pack_mask(tensor)
        else:
            recipe = find_recipe(tensor)
            found = None if recipe is None else self._pack_recipe(recipe)
        if found is None:
            del self.tensors[before:]
            return self._save(tensor)
        self._memory_saving = True
        return found

    def _pack_mask(self, mask: Tensor) -> Recipe | None:
        packed = pack_bits(mask)
        return None if packed is None else Recipe(unpack_bits, (self._save(packed[0]), *packed[1:]), None, 0)

    def _pack_recipe(self, recipe: Recipe) -> Recipe | None:
        """Save the tensors of a recipe. None if one of them was freed or written to."""
        parts: list[Any] = []
        for part in recipe.parts:
            if isinstance(part, Recipe):
                part = self._pack_recipe(part)
            elif isinstance(part, WeakTensor):
                tensor = part.get()
                part = None if tensor is None else self._save(tensor)
            else:
                parts.append(part)
                continue
            if part is None:
                return None
            parts.append(part)
        return recipe._replace(parts=tuple(parts))

    def unpack(self) -> Callable[[Sequence[Tensor]], list[Any]] | None:
        """A function from the saved tensors to the needed ones. None if they are the same."""
        if not self._memory_saving:
            return None
        parts = self.parts
        return lambda tensors: [_unpack(part, tensors) for part in parts]

    def recipe(
        self,
        function: Callable[..., Tensor],
        args: Iterable[tuple[Any, SavedSlot | Recipe | None]],
        output: Tensor,
        pending_writes: int,
    ) -> Recipe | None:
        """The recipe of an output. None if an argument is saved nowhere.

        Args:
            args: the arguments of the function. Each is a value, and its part in this packer if it is saved here.
            pending_writes: in-place writes that autograd has not counted yet in the version of the output.
        """
        parts: list[Any] = []
        for value, part in args:
            if part is not None:
                part = self._to_weak(part)
            elif not isinstance(value, Tensor):
                part = value
            elif value.is_leaf:
                part = WeakTensor.of(value)
            elif (part := find_recipe(value)) is None:
                return None
            parts.append(part)
        depth = 1 + max((part.depth for part in parts if isinstance(part, Recipe)), default=0)
        if depth > _MAX_DEPTH:
            return None
        return Recipe(function, tuple(parts), WeakTensor.of(output, pending_writes), depth)

    def _to_weak(self, part: Any) -> Any:
        """The part with weak references in place of slots."""
        if isinstance(part, SavedSlot):
            tensor = self.tensors[part.index]
            return None if tensor is None else WeakTensor.of(tensor)
        if isinstance(part, Recipe):
            return part._replace(parts=tuple(map(self._to_weak, part.parts)))
        return part


def _unpack(part: Any, tensors: Sequence[Tensor]) -> Any:
    """The value of a part: a saved tensor, the original tensor if it is alive, or a recomputed one."""
    if isinstance(part, SavedSlot):
        return tensors[part.index]
    if isinstance(part, Recipe):
        output = None if part.output is None else part.output.get()
        return part.function(*[_unpack(p, tensors) for p in part.parts]) if output is None else output
    return part


# --- masks as bits ---

# b · 0x0101…01 has the byte b in each of its eight bytes, and 0x8040…01 selects another bit of each byte.
_REPEAT_BYTE, _ONE_BIT_PER_BYTE, _CARRY = 0x0101010101010101, 0x8040201008040201 - 2**64, 0x7F7F7F7F7F7F7F7F
_GATHER_BITS = 0x0102040810204080
"""The product of a word of eight booleans and this number has them as the bits of its highest byte."""


def pack_bits(mask: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]] | None:
    """Eight booleans per byte in memory order, the shape and the strides. None if the mask has gaps in memory."""
    n = mask.numel()
    if mask.is_contiguous():
        flat = mask.view(-1)
    elif torch.empty_like(mask, device="meta").stride() == mask.stride():  # no gaps
        flat = mask.as_strided((n,), (1,))
    else:
        return None
    if n % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -n % 8))
    words = flat.view(torch.int64) * _GATHER_BITS
    return words.bitwise_right_shift_(56).to(torch.uint8), tuple(mask.shape), mask.stride()


def unpack_bits(bits: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    words = bits.to(torch.int64).mul_(_REPEAT_BYTE).bitwise_and_(_ONE_BIT_PER_BYTE)
    flat = words.add_(_CARRY).bitwise_right_shift_(7).bitwise_and_(_REPEAT_BYTE).view(torch.bool)
    n = math.prod(shape)
    return (flat if flat.numel() == n else flat[:n]).as_strided(shape, stride)
