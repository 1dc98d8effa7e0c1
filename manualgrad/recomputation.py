r"""Recompute saved tensors instead of storing them.

Most tensors that a network saves can be computed in one pass from other saved tensors:

    z = linear(x);   y = gelu(z);   linear(y)      gelu saves z, and the second linear would save y = gelu(z)

A rule with a cheap output (`Rule.recomputable`, or a method ``recompute``) attaches a `Recipe` to its autograd
node: a function and weak references to the tensors that it takes. A rule that would save such an output saves the
inputs of its recipe instead. They are saved by another rule already, so this costs no memory. The backward
recomputes the output. A recipe may contain recipes: for dropout(gelu(z)), z and the dropout mask are saved.

    where a recipe is found    on ``tensor.grad_fn``. After an in-place write into the tensor it is not found: the
                               write replaces the node or changes the version of the tensor
    when it is used            if all tensors that it names are alive and unchanged (same version). A write through
                               ``.data`` does not change the version, so neither torch nor a recipe notices it
    what is saved              goes through ``save_for_backward``, so saved-tensor hooks and version checks work
    in the backward            the original tensor if it is still alive and unchanged. A user who holds it may
                               differentiate with respect to it. Otherwise the recipe runs. It consists of rules,
                               so it can be differentiated as well

An in-place activation overwrites its input. It saves no more than torch's does:

    the input has a recipe     the inputs of the recipe, for the gradient of the activation and for its output
    the output is enough       the output, for ReLU, leaky ReLU and ELU. The next layer often saves it as well
    otherwise                  a copy of the input, as torch does. The output is recomputed from it

A boolean mask is saved as bits, by a recipe that unpacks them.

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
"""Smaller tensors are saved as they are: recomputing them costs much time and saves little memory. (A network of
width 256 with batch size 256 has tensors of 2¹⁶ elements. It took 1.34 times torch's time with recipes for them,
and 1.17 times without.)"""

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

    A part is a Recipe, a setting or a tensor. Tensors are `WeakTensor` in a recipe that is attached to a node
    (``grad_fn.recipe``), and `SavedSlot` in a recipe that a backward runs.
    """

    function: Callable[..., Tensor]
    parts: tuple[Any, ...]
    output: WeakTensor | None
    """The original output. The backward takes it if it is alive and unchanged. None for a mask."""
    depth: int
    """The number of nested recipes, including this one. 0 for a mask, which is cheap to unpack."""


def is_large(value: Any) -> bool:
    """A tensor with at least `MIN_ELEMENTS` elements that is not a subclass."""
    return isinstance(value, Tensor) and value.numel() >= MIN_ELEMENTS and type(value) in (Tensor, Parameter)


def find_recipe(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor. None if its rule has none, or if the tensor has been written to.

    Two cases also have none, because of FSDP. It frees the weights of a module after its forward, and gathers them
    in a hook on the module's output. The backward of a later layer runs before that hook, so it must not recompute
    the output: a tensor with a hook has no recipe. A checkpoint runs a module again and must save the same tensors
    as the first time, but FSDP may omit its hooks then: with FSDP, no tensor has a recipe while saved-tensor hooks
    are active.
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
        tensors: what the backward needs. In place of a tensor that has been overwritten, its recipe.
    """

    def __init__(self, tensors: Iterable[Tensor | Recipe | None]) -> None:
        self.tensors: list[Tensor | None] = []
        """The tensors to save."""
        self._recomputes = False
        """A needed tensor is not saved."""
        self.parts = [self._pack(tensor) for tensor in tensors]
        """For each needed tensor its slot, or a recipe of slots."""

    def _save(self, tensor: Tensor | None) -> SavedSlot:
        self.tensors.append(tensor)
        return SavedSlot(len(self.tensors) - 1)

    def _pack(self, tensor: Tensor | Recipe | None) -> SavedSlot | Recipe:
        """Save a tensor, or the inputs of its recipe."""
        if isinstance(tensor, Recipe):
            found = self._pack_recipe(tensor)
            assert found is not None
            self._recomputes = True
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
            del self.tensors[before:]  # what an incomplete recipe has saved
            return self._save(tensor)
        self._recomputes = True
        return found

    def _pack_mask(self, mask: Tensor) -> Recipe | None:
        packed = pack_bits(mask)
        return None if packed is None else Recipe(unpack_bits, (self._save(packed[0]), *packed[1:]), None, 0)

    def _pack_recipe(self, recipe: Recipe) -> Recipe | None:
        """Save the tensors of a recipe. None if one of them was freed or written to."""
        parts: list[Any] = []
        for part in recipe.parts:
            if isinstance(part, Recipe):
                packed = self._pack_recipe(part)
                if packed is None:
                    return None
                parts.append(packed)
            elif isinstance(part, WeakTensor):
                tensor = part.get()
                if tensor is None:
                    return None
                parts.append(self._save(tensor))
            else:  # a setting
                parts.append(part)
        return recipe._replace(parts=tuple(parts))

    def unpack(self) -> Callable[[Sequence[Tensor]], list[Any]] | None:
        """A function from the saved tensors to the needed ones. None if they are the same."""
        if not self._recomputes:
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
        """The recipe of the node's output. None if an argument may be freed early, or the recipe is too deep.

        Args:
            args: the arguments of the function. Each is a value, and its part in `parts` if this node saves it.
            pending_writes: the number of in-place writes that autograd has not yet added to the version of the
                output.
        """
        parts: list[Any] = []
        for value, part in args:
            if part is not None:
                part = self._to_weak(part)
            elif not isinstance(value, Tensor):
                part = value
            elif value.is_leaf:  # a parameter, or an input of the user
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

# A *word* is an integer of eight bytes: eight booleans. The constants are masks and factors for words.
_GATHER_BITS = 0x0102040810204080
"""The product of eight booleans and this factor has them as the bits of its highest byte."""
_REPEAT_BYTE = 0x0101010101010101
_DIFFERENT_BIT_PER_BYTE = 0x8040201008040201 - 2**64  # as a signed integer
_FILL_LOW_BITS = 0x7F7F7F7F7F7F7F7F


def pack_bits(mask: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]] | None:
    """The mask with eight booleans per byte in memory order, its shape and its strides.

    None if the mask has gaps in memory.
    """
    n = mask.numel()
    if mask.is_contiguous():
        flat = mask.view(-1)
    elif torch.empty_like(mask, device="meta").stride() == mask.stride():  # no gaps: empty_like keeps the strides
        flat = mask.as_strided((n,), (1,))
    else:
        return None
    if n % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -n % 8))  # an aligned copy of whole words
    words = flat.view(torch.int64) * _GATHER_BITS
    return words.bitwise_right_shift_(56).to(torch.uint8), tuple(mask.shape), mask.stride()


def unpack_bits(bits: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The mask that `pack_bits` has packed."""
    # Copy the byte eight times. Each copy keeps a different bit.
    words = bits.to(torch.int64).mul_(_REPEAT_BYTE).bitwise_and_(_DIFFERENT_BIT_PER_BYTE)
    # A byte is a boolean, so it must become 1 if it is not 0. Adding 0x7F sets its highest bit then.
    flat = words.add_(_FILL_LOW_BITS).bitwise_right_shift_(7).bitwise_and_(_REPEAT_BYTE).view(torch.bool)
    n = math.prod(shape)
    return (flat if flat.numel() == n else flat[:n]).as_strided(shape, stride)
