"""What a Function does besides: to its inputs, to memory, to random state, to ctx."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manualgrad.verification.drawing import random_states
from manualgrad.verification.laws.compared import compare, compare_all, described, first_line
from manualgrad.verification.laws.observed import observing
from manualgrad.verification.report import Fails, NotApplicable, Wastes, law
from manualgrad.verification.subject import (
    Subject,
    class_of,
    copies,
    functions_of,
    gradients,
    kind,
    numbers,
    patched,
    position,
    upstream,
    with_upstream,
)


@law("an in-place operation on the input, on input.detach(), .data or a view: all of them are the caller's memory")
def inputs_unchanged(subject: Subject) -> None:
    """Neither forward nor backward writes into an input (one that is declared dirty and returned excepted)."""
    given = subject.leaves[: subject.given]  # a module's buffers are its own to write into
    others = {i: x.clone() for i, x in enumerate(given) if isinstance(x, Tensor) and i not in subject.places}
    subject = subject.replaced(others)
    leaves = subject.tensors()
    tensors = [*leaves, *others.values()]
    before = [x.detach().clone() for x in tensors]
    outputs = subject.call(subject.function, leaves, others_copied=False)
    if not subject.writes_in_place:
        _check_unchanged(tensors, before, "forward")
    chosen, upstreams = with_upstream(outputs)
    if not chosen:
        return
    values = [y.detach().clone() for y in chosen]
    now = [x.detach().clone() for x in tensors]
    torch.autograd.grad(chosen, leaves, upstreams, allow_unused=True)
    _check_unchanged(tensors, now, "backward")
    for i, (y, value) in enumerate(zip(chosen, values, strict=True)):
        if not _equal(y, value):
            raise Fails(f"backward writes into output {i}: {_first_change(y, value)}")


def _check_unchanged(tensors: Sequence[Tensor], before: Sequence[Tensor], phase: str) -> None:
    for i, (x, value) in enumerate(zip(tensors, before, strict=True)):
        if not _equal(x, value):
            raise Fails(f"{phase} writes into {kind(x)} input {i}: {_first_change(x, value)}")


def _first_change(now: Tensor, before: Tensor) -> str:
    a, b = numbers(now.detach()), numbers(before)
    index = int(((a != b) & ~(a.isnan() & b.isnan())).nonzero()[0])
    return f"at {position(now, index)} it was {b[index].item():.6g}, is {a[index].item():.6g}"


def _equal(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return bool(((a == b) | ((a != a) & (b != b))).all())


@law("grad.mul_(...) and its kin, also through .data: the same tensor goes to every other user of this output")
def upstream_unchanged(subject: Subject) -> None:
    """backward does not write into the upstream gradient it is given."""
    tensors = subject.tensors()
    outputs, upstreams = with_upstream(subject(*tensors))
    if not outputs:
        raise NotApplicable("no output requires a gradient")
    before = [u.clone() for u in upstreams]
    versions = [u._version for u in upstreams]
    torch.autograd.grad(outputs, tensors, upstreams, allow_unused=True)
    for u, value, version in zip(upstreams, before, versions, strict=True):
        if not _equal(u, value):
            raise Fails(f"the upstream gradient {kind(u)} is written into: {_first_change(u, value)}")
        if u._version != version:
            raise Fails(f"the upstream gradient {kind(u)} is written into (version {version} became {u._version})")


@law("input.data, from_numpy or set_ handed out as output, or a saved tensor handed out as gradient")
def aliasing(subject: Subject) -> None:
    """An output shares memory with an input only as a view that autograd knows; a gradient with neither."""
    tensors = subject.tensors()
    given = [x.clone() for x in tensors]  # no leaves: they may be written in place
    outputs = subject.call(subject.function, given) if not subject.writes_in_place else ()
    for i, y in enumerate(outputs):
        for k, x in enumerate(given):
            if y is x or not _shares(x, y):
                continue
            version = y._version
            with torch.no_grad():
                x.add_(0)
            # x.detach() is no view, but shares x's version: enough where there is no gradient
            if y._version == version or (y.requires_grad and not y._is_view()):
                raise Fails(
                    f"output {i} lies in the memory of {described(subject, k)}, and autograd does not know: "
                    "writing into one changes the other, unnoticed by what was saved"
                )
    for ones in (False, True):  # a product with 1 is easily left out
        _gradients_own_their_memory(subject, ones)


def _gradients_own_their_memory(subject: Subject, ones: bool) -> None:
    leaves = subject.tensors()
    chosen, upstreams = with_upstream(subject(*leaves))
    if not chosen:
        return
    torch.autograd.backward(chosen, [torch.ones_like(u) for u in upstreams] if ones else upstreams)
    for k, x in enumerate(leaves):
        if x.grad is None:
            continue
        for j, other in enumerate(leaves):
            if _shares(x.grad, other):
                raise Fails(
                    f".grad of {described(subject, k)} lies in the memory of {subject.named(j)} itself: the next "
                    "zero_grad(set_to_none=False) or accumulation overwrites it",
                    "backward returns a saved tensor",
                )
            if other.grad is not None and j != k and _shares(x.grad, other.grad):
                raise Fails(
                    f".grad of {described(subject, k)} and of {subject.named(j)} are the same memory: "
                    "accumulating into one changes the other",
                    "backward returns views of one tensor for two inputs",
                )


def _shares(a: Tensor, b: Tensor) -> bool:
    """Writing into one changes the other (one storage is not enough: they may be its two halves)."""
    if not a.numel() or not b.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    with torch.no_grad():
        kept, before = a.detach().clone(), b.detach().clone()
        try:
            a.data.fill_(0.7182818)
        except RuntimeError:  # it repeats itself: nobody can write into it
            return True
        shares = not _equal(b, before)
        a.data.copy_(kept)
        return shares


@law("ctx.x = tensor: it leaks until the garbage collector runs, skips saved-tensor hooks and version checks")
def no_tensors_on_ctx(subject: Subject) -> None:
    """Tensors are kept by save_for_backward alone; none hangs on ctx, after forward or after backward."""
    tensors = subject.tensors()
    outputs, upstreams = with_upstream(subject(*tensors))
    nodes = functions_of(outputs)
    if not nodes:
        raise NotApplicable("no Python Function in the graph")
    for phase in ("forward", "backward"):
        for node in nodes:
            if class_of(node).__module__.startswith("torch."):
                continue  # torch's own checkpoint keeps a random state there
            for path, tensor in _hanging(vars(node), "ctx", set()):
                role = "an intermediate"
                role = next((f"the input {subject.named(k)}" for k, x in enumerate(tensors) if tensor is x), role)
                role = next((f"output {i}" for i, y in enumerate(outputs) if tensor is y), role)
                size = tensor.numel() * tensor.element_size()
                raise Fails(
                    f"after {phase} {path} of {class_of(node).__name__} holds {role}, {kind(tensor)}: {size} bytes"
                )
        if phase == "forward":
            torch.autograd.grad(outputs, tensors, upstreams, allow_unused=True, retain_graph=True)


def _hanging(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors within a value: in containers and plain objects, but not in modules, functions and classes."""
    if id(value) in seen or len(seen) > 1000:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _hanging(item, f"{path}.{key}" if path == "ctx" else f"{path}[{key!r}]", seen)
    elif isinstance(value, (list, tuple, set)):
        for i, item in enumerate(value):
            yield from _hanging(item, f"{path}[{i}]", seen)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)) and not callable(value):
        yield from _hanging(vars(value), path, seen)


@law("a reference cycle through ctx, or a cache outside that outlives the graph")
def no_memory_leaks(subject: Subject) -> None:
    """Without the garbage collector, every tensor is gone when the caller lets go of the output. (A module may
    keep what it made, if the next call replaces it.)"""
    subject = subject.in_use()
    for _ in range(2):  # constants that are cached once stay
        _run_and_forget(subject)
    was_on = gc.isenabled()
    gc.disable()
    gc.freeze()  # all that there is so far: what is found below is new
    try:
        runs = [_run_and_forget(subject) for _ in range(3)]
        refs = [ref for run in (runs if subject.module is None else runs[:-1]) for ref in run]
        names = [name for name, ref in refs if ref() is not None]
        if names:
            raise Fails(
                f"{names[0]} is still alive after the output was let go ({len(names)} of {len(refs)} tensors)"
            )
        left = _new_tensors()
        if left and subject.module is not None:
            before, left = len(left), []
            for _ in range(3):
                _run_and_forget(subject)
            left = _new_tensors()[before:]
        if left:
            raise Fails(f"{kind(left[0])}, made by the function, is still alive after the output was let go")
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _new_tensors() -> list[Tensor]:
    return [x for x in gc.get_objects() if issubclass(type(x), Tensor)]


def _run_and_forget(subject: Subject) -> list[tuple[str, weakref.ref[Tensor]]]:
    tensors = subject.tensors()
    outputs, upstreams = with_upstream(subject(*tensors))
    wanted = [*tensors, *subject.parameters]
    found = torch.autograd.grad(outputs, wanted, upstreams, allow_unused=True) if outputs else ()
    named = [(f"input {subject.named(k)}", x) for k, x in enumerate(tensors)]
    named += [(f"output {i}", y) for i, y in enumerate(outputs)]
    named += [(f"the upstream gradient of output {i}", u) for i, u in enumerate(upstreams)]
    gradients_of_inputs = zip(range(len(tensors)), found, strict=False)
    named += [(f"the gradient of {subject.named(k)}", g) for k, g in gradients_of_inputs if g is not None]
    return [(name, weakref.ref(x)) for name, x in named]


@law("state on ctx that backward uses up, or an in-place operation on what was saved")
def backward_twice(subject: Subject) -> None:
    """With retain_graph a second and a third backward give the same bits."""
    tensors = subject.tensors()
    outputs, upstreams = with_upstream(subject(*tensors))
    if not outputs:
        raise NotApplicable("no output requires a gradient")
    state = torch.get_rng_state()
    first = torch.autograd.grad(outputs, tensors, copies(upstreams), allow_unused=True, retain_graph=True)
    first = [None if g is None else g.clone() for g in first]
    for which in ("second", "third"):
        torch.set_rng_state(state)
        try:
            again = torch.autograd.grad(outputs, tensors, copies(upstreams), allow_unused=True, retain_graph=True)
        except Exception as error:
            raise Fails(f"the {which} backward stops with {first_line(error)}") from error
        compare_all(subject, again, first, 0.0, (f"{which} time", "first time"))


@law("an uninitialized buffer, atomics, or random numbers from a private generator")
def deterministic(subject: Subject) -> None:
    """The same call with the same seed gives the same bits, outputs and gradients."""

    def run() -> tuple[list[Tensor], list[Tensor | None]]:
        for x in subject.points:  # what an uninitialized buffer would find
            del x
            [torch.full_like(p, float("nan")) for p in subject.points]
        tensors = subject.tensors()
        outputs, upstreams = with_upstream(subject(*tensors))
        state = torch.get_rng_state()
        found = torch.autograd.grad(outputs, tensors, upstreams, allow_unused=True) if outputs else []
        torch.set_rng_state(state)
        return [y.detach() for y in outputs], list(found)

    first = run()
    for _ in range(3):
        again = run()
        for i, (a, b) in enumerate(zip(again[0], first[0], strict=True)):
            compare(f"output {i}", a, b, 0.0, ("once", "once more"))
        if first[1]:
            compare_all(subject, again[1], first[1], 0.0, ("once", "once more"))


@law("torch.rand or torch.manual_seed in backward: fork the random state, or keep what the forward drew")
def random_state(subject: Subject) -> None:
    """backward leaves every random state as it was, and forward does not reseed."""
    tensors = subject.tensors()
    outputs, upstreams = with_upstream(subject(*tensors))
    if not outputs:
        raise NotApplicable("no output requires a gradient")
    before = random_states()
    torch.autograd.grad(outputs, tensors, upstreams, allow_unused=True)
    for name, state in random_states().items():
        if state != before[name]:
            raise Fails(f"backward moves {name}'s random state")
    after = []
    for seed in (1, 2):
        other = subject.at(subject.points)
        other.seed = seed
        random.seed(seed)
        other(*other.tensors())
        after.append(random_states())
    for name in ("torch", "python"):
        if after[0][name] == after[1][name]:
            raise Fails(f"forward reseeds {name}'s random state: it is the same afterwards whatever it was")


@law(
    "mark_dirty, mark_non_differentiable, save_for_backward: each keeps its last call, and takes inputs or outputs"
)
def declarations(subject: Subject) -> None:
    """What is told to ctx is true: dirty is what was written and is returned, non-differentiable are outputs,
    nothing is declared twice, and some output that depends on the inputs is differentiable."""
    tensors = subject.tensors()
    nodes = functions_of(subject(*tensors))
    _check_differentiable(subject)
    if not nodes:
        raise NotApplicable("no Python Function in the graph")
    for cls in {class_of(node) for node in nodes}:
        calls: dict[str, list[tuple[Any, ...]]] = {
            "mark_dirty": [],
            "mark_non_differentiable": [],
            "save_for_backward": [],
        }
        forwards: list[tuple[tuple[Any, ...], list[Tensor], Any]] = []
        with ExitStack() as stack:
            for name in calls:
                stack.enter_context(patched(FunctionCtx, name, _recorded(name, calls[name], cls)))
            stack.enter_context(patched(cls, "forward", staticmethod(_with_record(cls.forward, forwards))))
            subject(*tensors)
        for name, found in calls.items():
            if len(found) > len(forwards) and len(forwards) > 0:
                raise Fails(
                    f"{cls.__name__} calls ctx.{name} {len(found)} times: the last call replaces the others"
                )
        if not forwards:
            continue  # a class made anew in every call
        args, written, result = forwards[0]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in [x for call in calls["mark_dirty"] for x in call]:
            if not any(x is a for a in args):
                raise Fails(f"{cls.__name__} marks {kind(x)} as dirty, which is no input")
            if not any(x is y for y in outputs):
                raise Fails(f"{cls.__name__} marks an input, {kind(x)}, as dirty and does not return it")
            if not any(x is y for y in written):
                raise Fails(f"{cls.__name__} marks an input, {kind(x)}, as dirty that forward does not write into")
        for y in [y for call in calls["mark_non_differentiable"] for y in call]:
            if isinstance(y, Tensor) and not any(y is z for z in outputs):
                what = "an input" if any(y is a for a in args) else "a tensor"
                raise Fails(f"{cls.__name__} marks {what}, {kind(y)}, as non-differentiable, which is no output")


def _recorded(name: str, calls: list[tuple[Any, ...]], cls: type[Function]) -> Any:
    """The method of ctx of this name, noting the calls in `cls`, among other Functions of the same graph."""
    original = getattr(FunctionCtx, name)

    def run(ctx: Any, *tensors: Any) -> None:
        if getattr(ctx, "_forward_cls", cls) is cls:
            calls.append(tensors)
        original(ctx, *tensors)

    return run


def _with_record(forward: Any, forwards: list[Any]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        before = [(x._version, x) for x in args if isinstance(x, Tensor)]
        result = forward(*args, **kwargs)
        forwards.append((args, [x for version, x in before if x._version > version], result))
        return result

    return run


def _check_differentiable(subject: Subject) -> None:
    """Some output requires a gradient if any moves with the inputs."""
    subject = subject.exact
    if subject.differentiable_places:
        return
    outputs = subject(*subject.tensors())
    places = [i for i, y in enumerate(outputs) if y.is_floating_point() or y.is_complex()]
    other = subject.at(subject.points)
    other.__dict__["differentiable_places"] = places
    for k, x in enumerate(subject.points):
        slope, error = other.difference({k: upstream(numbers(x), 5)})
        told = (error <= 1e-3 * (1 + slope.abs())) & (slope.abs() > 1e-3)
        if told.any():
            raise Fails(
                f"no output requires a gradient, but output moves with {subject.named(k)}: its finite difference "
                f"along a random line is {slope[told][0].item():.6g}",
                "mark_non_differentiable on the output itself, or a forward that detaches it",
            )


class _Foreign(TorchDispatchMode):
    """Collects tensors that require a gradient and are neither arguments nor made inside."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.held: list[Any] = list(known)
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.requires_grad and x.untyped_storage()._cdata not in self.known:
                self.found.append(x)
        result = func(*args, **(kwargs or {}))
        for y in tree_leaves(result):
            if isinstance(y, Tensor):
                self.held.append(y)  # alive, or its address is used again
                self.known.add(y.untyped_storage()._cdata)
        return result


@law("a weight reached through a closure, an attribute, a global or a list instead of an argument of its own")
def captured_tensors(subject: Subject) -> None:
    """A Function computes with no tensor that requires a gradient but its own tensor arguments: the gradient of
    any other is silently lost."""
    tensors = subject.tensors()
    outputs = subject(*tensors)
    nodes = functions_of(outputs)
    if not nodes:
        raise NotApplicable("no Python Function in the graph")

    def watched(cls: type[Function], forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _Foreign([x for x in args if isinstance(x, Tensor)]) as mode:
                result = forward(*args, **kwargs)
            for x in mode.found:
                nested = next((i for i, a in enumerate(args) if any(x is y for y in tree_leaves(a))), None)
                how = (
                    "inside another argument, where autograd does not look"
                    if nested is not None
                    else "not an argument"
                )
                raise Fails(
                    f"{cls.__name__}.forward computes with {kind(x)}, which requires a gradient and is {how}"
                )
            return result

        return run

    with ExitStack() as stack:
        for cls in {class_of(node) for node in nodes}:
            stack.enter_context(patched(cls, "forward", staticmethod(watched(cls, cls.forward))))
        subject(*tensors)


@law("ctx.needs_input_grad is not asked")
def no_unneeded_gradients(subject: Subject) -> None:
    """No gradient is computed that nobody needs."""
    n = len(subject.places)
    if n == 1:
        raise NotApplicable("one differentiable input")
    full = _seconds(subject, [True] * n)
    for k in range(n):
        needed = [i == k for i in range(n)]
        tensors = subject.tensors(needed)
        outputs = subject.differentiable(subject(*tensors))
        if not functions_of(outputs):
            continue
        with observing(outputs) as seen:
            gradients(subject, tensors)
        for call in seen:
            for i, (g, edge) in enumerate(zip(call.results, call.edges, strict=False)):
                if g is not None and edge is not None and edge[0] is None:
                    share = _seconds(subject, needed) / full
                    raise Wastes(
                        f"when only {subject.named(k)} requires one, {call.name}.backward computes gradient {i} "
                        f"too, {kind(g)}: {g.numel() * g.element_size()} bytes; backward takes {share:.2f} of the "
                        "time that all gradients take"
                    )


def _seconds(subject: Subject, needed: Sequence[bool]) -> float:
    """The fastest of a few backwards."""
    best = 1e9
    tensors = subject.tensors(needed)
    wanted = [x for x in tensors if x.requires_grad]
    for _ in range(5):
        outputs, upstreams = with_upstream(subject(*tensors))
        begin = time.perf_counter()
        torch.autograd.grad(outputs, wanted, upstreams, allow_unused=True)
        best = min(best, time.perf_counter() - begin)
    return best


@law("everything is saved whatever ctx.needs_input_grad says")
def no_unused_saved_tensors(subject: Subject) -> None:
    """No more is kept than the needed gradients use (a saved tensor whose every value may change is not used)."""
    n = len(subject.places)
    for needed in [[True] * n] + ([[i == k for i in range(n)] for k in range(n)] if n > 1 else []):
        sizes, changed = _effect_of_saved(subject, needed)
        unused = [i for i, c in enumerate(changed) if not c]
        if unused and any(changed):
            names = ", ".join(subject.named(k) for k in range(n) if needed[k])
            extra = sum(sizes[i][1] for i in unused)
            raise Wastes(
                f"for the gradient of {names} {sum(b for _, b in sizes)} bytes are kept, of which {extra} are not "
                f"used: {', '.join(sizes[i][0] for i in unused)}"
            )


def _effect_of_saved(subject: Subject, needed: Sequence[bool]) -> tuple[list[tuple[str, int]], list[bool]]:
    """What the Functions save (name, bytes), and whether each has any effect on the gradients."""
    tensors = subject.tensors(needed)
    sizes: list[tuple[str, int]] = []

    def run(spoiled: int | None) -> list[Tensor | None] | None:
        count = -1

        def pack(x: Tensor) -> tuple[int, Tensor]:
            nonlocal count
            count += 1
            if spoiled is None:
                sizes.append((kind(x), x.numel() * x.element_size()))
            return count, x

        def unpack(packed: tuple[int, Tensor]) -> Tensor:
            i, x = packed
            return _spoiled(x) if i == spoiled else x

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            outputs, upstreams = with_upstream(subject(*tensors))
        try:
            wanted = [x for x in tensors if x.requires_grad]
            return list(torch.autograd.grad(outputs, wanted, upstreams, allow_unused=True)) if outputs else []
        except Exception:
            return None  # it is used, that much is sure

    plain = run(None)
    changed = []
    for i in range(len(sizes)):
        found = run(i)
        changed.append(
            found is None
            or plain is None
            or any(
                (a is None) != (b is None) or (a is not None and b is not None and not _equal(a, b))
                for a, b in zip(found, plain, strict=True)
            )
        )
    return sizes, changed


def _spoiled(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.full_like(tensor, float("nan"))
    return tensor.logical_not() if tensor.dtype == torch.bool else torch.zeros_like(tensor) + (tensor == 0)
