"""A model that exists, made ours in place, and given back.

What sets a module of `torch.nn` apart from ours is its class alone, so its class alone is exchanged: model,
modules, parameters, buffers, hooks, optimizers and tied weights stay the objects that they are. Its class becomes

    of torch.nn                 ours, `rebinding.derived`
    a subclass of one           a subclass of both, made here, if it overrides nothing that ours does
    parametrized                `torch.nn.utils.parametrize` gives each module a class of its own: the same over
                                what becomes of the one beneath
    known to an adapter         a subclass, made here, with the adapter's forward (`manualgrad.adapters`)
    any other, with a forward   if ``functional``, a subclass that runs inside `override_torch_functions`
    ReLU in place before a pool a subclass, made here, that saves a bit mask: no pool saves what it is given

Functions that modules hold (an ``activation``) are exchanged in the same way. `revert` reads all of it off the
classes; nothing is kept elsewhere, and a converted model can be copied, pickled and sent to another process.
"""

from __future__ import annotations

import copyreg
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from manualgrad import adapters, rebinding
from manualgrad.nn import functional as our_functional
from manualgrad.ops.activation import leaky_relu_with_mask, relu_with_mask
from manualgrad.override import override_torch_functions

Model = TypeVar("Model", bound=nn.Module)
Class = type[nn.Module]


def convert(model: Model, *, functional: bool = False, fused_loss: bool = False) -> Model:
    """Exchange the modules of `torch.nn` in a model for ours, in place.

        model = manualgrad.convert(torchvision.models.resnet18())

    Args:
        model: any module: a network, one layer, a loss; also inside of DataParallel, DDP or torch.compile.
        functional: what the model's own ``forward`` methods call (``F.relu``, ``x.softmax(-1)``) is ours as well:
            they run inside `override_torch_functions`.
        fused_loss: a causal language model of `transformers` that is given labels in training computes its loss by
            `linear_cross_entropy`, which never has more than some of the logits; in its output there are none.

    Returns:
        The same model. `conversion_report` says what became of each module; `revert` undoes it.

    Raises:
        TypeError: `model` is no module.
        ValueError: with ``fused_loss``, it has no causal language model in it that computes its loss as is usual.
        Exception: whatever a module's class or an adapter raises. The model is then unchanged.
    """
    plan = _Plan(model, _our_functions())
    for module in plan.modules:
        plan.give(module, lambda module: _becomes(module, functional).kind)
    for module in plan.modules:
        if isinstance(module, nn.Sequential):
            for activation, following in itertools.pairwise(module):
                if isinstance(following, _POOLS) and getattr(activation, "inplace", False):
                    plan.give(activation, lambda activation: _masked(plan.kinds[activation]))
    if fused_loss:
        language_models = [module for module in plan.modules if adapters.fuses(module)]
        if not language_models:
            raise ValueError(
                f"fused_loss: in this {type(model).__name__} there is no causal language model of transformers "
                "with a linear head and the usual loss"
            )
        for module in language_models:
            head: Any = module.get_output_embeddings()  # pyright: ignore[reportCallIssue]
            plan.give(module, lambda module: _fused_once(plan.kinds[module], adapters.fused_model))
            plan.give(head, lambda head: _fused_once(plan.kinds[head], adapters.fused_head))
    plan.apply()
    return model


def revert(model: Model) -> Model:
    """Make a model torch's own again, in place: what `convert` did, and modules made from `manualgrad.nn`.

    Raises:
        TypeError: `model` is no module.
    """
    plan = _Plan(model, _torchs_functions())
    for module in plan.modules:
        plan.give(module, _was)
    plan.apply()
    return model


class Row(NamedTuple):
    """What became of one module."""

    name: str
    """As in `named_modules`; "" is the model itself."""
    kind: str
    """The name of its class."""
    converted: bool
    note: str
    """Why it is not, or in which way it is."""


class Report(NamedTuple):
    """What became of a model's modules. As a string: a table, modules of equal fate counted together."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        fates = Counter((row.converted, row.kind, row.note) for row in self.rows)
        first = {(row.converted, row.kind, row.note): row.name or "(the model)" for row in reversed(self.rows)}
        width = max(len(kind) for _, kind, _ in fates)
        return "\n".join(
            f"{'ours' if fate[0] else 'left'} {count:5} {fate[1]:{width}}  "
            + (f"{fate[2]}  ({first[fate]}{', ...' if count > 1 else ''})" if fate[2] else "")
            for fate, count in sorted(fates.items(), key=lambda item: (item[0][0], -item[1]))
        )


def conversion_report(model: nn.Module) -> Report:
    """What became of each module of a model, and why not where nothing did.

    Raises:
        TypeError: `model` is no module.
    """
    _modules(model)
    rows: list[Row] = []
    for name, module in model.named_modules():
        kind, note = _becomes(module, functional=False)
        note = note if kind is type(module) else "can be converted"
        rows.append(Row(name, type(module).__name__, _was(module) is not type(module), note))
    return Report(tuple(rows))


# --- what a module becomes, and what it was ---


class _Fate(NamedTuple):
    kind: Class
    note: str = ""


def _modules(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is asked for, not a {type(model).__name__}")
    return list(model.modules())


class _Plan:
    """What is to change in a model. All of it is found before the first change; `apply` makes all or none."""

    def __init__(self, model: nn.Module, functions: dict[Any, Any]) -> None:
        self.modules = _modules(model)
        self.names = {module: name for name, module in model.named_modules()}
        self.kinds: dict[nn.Module, Class] = {}
        self.functions = functions

    def give(self, module: nn.Module, kind: Callable[[Any], Class]) -> None:
        """The module gets the class that `kind` says, and other functions for those that it holds."""
        with self._about(module):
            self.kinds[module] = kind(module)

    def apply(self) -> None:
        before: list[tuple[nn.Module, Class, dict[str, Any]]] = []
        try:
            for module, kind in self.kinds.items():
                with self._about(module):
                    held, functions = vars(module), self.functions
                    new = {
                        name: functions[x]
                        for name, x in held.items()
                        if isinstance(x, _FUNCTION) and x in functions
                    }
                    before.append((module, type(module), {name: held[name] for name in new}))
                    _set_class(module, kind)
                    held.update(new)
        except BaseException:
            for module, kind, old in reversed(before):
                _set_class(module, kind)
                vars(module).update(old)
            raise

    @contextmanager
    def _about(self, module: nn.Module) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            name = self.names.get(module) or "(the model)"
            error.add_note(f"manualgrad, at {name} ({type(module).__qualname__}): the model is unchanged")
            raise


def _set_class(module: nn.Module, kind: Class) -> None:
    if kind is not type(module):
        object.__setattr__(module, "__class__", kind)  # a user's __setattr__ may do other things
        held = vars(module)
        held["_class_changed"] = True  # torch.compile of torch 2.11 tests no guard before a module's dict changes
        del held["_class_changed"]


def _becomes(module: nn.Module, functional: bool) -> _Fate:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return _Fate(kind, "has been compiled by TorchScript")
    if "forward" in vars(module):
        return _Fate(kind, "has a forward set on the module itself")
    if parametrize.is_parametrized(module):
        beneath, note = _class_becomes(kind.__bases__[0], functional)
        return _Fate(_over(beneath, kind), note)
    if _class_was(kind) is kind and _ours(kind) is kind and (forward := adapters.adapted(module)):
        return _Fate(_adapted(kind, forward))
    return _class_becomes(kind, functional)


def _was(module: nn.Module) -> Class:
    kind = type(module)
    return _over(_class_was(kind.__bases__[0]), kind) if parametrize.is_parametrized(module) else _class_was(kind)


def _class_becomes(kind: Class, functional: bool) -> _Fate:
    if _class_was(kind) is not kind:
        return _Fate(kind, getattr(kind, "_note", ""))
    torchs = next((base for base in kind.__mro__ if _ours(base) is not base), None)
    if torchs is kind:
        return _Fate(_ours(kind))
    overridden = _overridden(kind, torchs) if torchs else []
    if torchs and not overridden:
        return _Fate(_joined(kind))
    if kind.forward.__module__.startswith("torch."):
        return _Fate(kind, "calls nothing that ours replaces")
    if functional:
        return _Fate(_enabling(kind))
    overrides = f" (overrides {', '.join(overridden)} of {torchs.__name__})" if torchs else ""
    return _Fate(kind, f"has a forward of its own{overrides}: functional=True")


def _class_was(kind: Class) -> Class:
    while "_made" in vars(kind):
        kind = vars(kind)["_made"][1][0]
    return next((base for base in kind.__bases__ if _ours(base) is kind), kind)


def _ours(kind: Any) -> Any:
    """Our class for one of torch.nn; itself, if there is none."""
    return rebinding.derived(kind) if rebinding.is_module(kind) else kind


def _overridden(kind: Class, torchs: Class) -> list[str]:
    """What a user's class defines in its own way, of that which ours exchanges."""
    exchanged = {
        name
        for base in _ours(torchs).__mro__
        if base not in torchs.__mro__
        for name, value in vars(base).items()
        if isinstance(value, (FunctionType, type))
    }
    users = {name for base in kind.__mro__[: kind.__mro__.index(torchs)] for name in vars(base)}
    return sorted(exchanged & users - {"__init__"})


# --- classes made here ---


class _Made(type):
    """The class of classes made here. They are pickled by what they were made from, as they stand in no module."""


class _Quiet(nn.Module):
    """Keeps a class made here from the hook by which a user's class hears of its subclasses."""

    def __init_subclass__(cls) -> None:
        pass


_lock = RLock()
_Contents = tuple[tuple[type, ...], dict[str, Any]]


def _maker(make: Callable[..., _Contents]) -> Callable[..., Class]:
    """One class for each class and what else is given: `make` says with which bases and contents."""

    @functools.cache
    def made(*given: Any) -> Class:
        kind, (bases, contents) = given[0], make(*given)
        bases = bases if issubclass(kind, _Quiet) else (_Quiet, *bases)
        about = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        about |= {"_made": (maker, given), "_note": "", **rebinding.NOT_SCRIPTABLE}
        return _metaclass(type(kind))(kind.__name__, bases, about | contents)

    @functools.wraps(make)
    def maker(*given: Any) -> Class:
        with _lock:
            return made(*given)

    return maker


@functools.cache
def _metaclass(users: type) -> Any:
    """`_Made`, and with it the metaclass that a user's class has."""
    if issubclass(users, _Made):
        return users
    found = _Made if users is type else type("_Made", (_Made, users), {})
    copyreg.pickle(found, _pickled)  # pyright: ignore[reportArgumentType]
    return found


def _pickled(kind: Any) -> Any:
    return vars(kind).get("_made", kind.__qualname__)  # a name: others have made it from one of ours


@_maker
def _joined(kind: Class) -> _Contents:
    """A user's subclass of a class of torch's, which calls what ours calls."""
    torchs = next(base for base in kind.__mro__ if _ours(base) is not base)
    return (kind, _ours(torchs)), {}


@_maker
def _enabling(kind: Class) -> _Contents:
    """A class whose forward calls ours when it calls torch's functions."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with override_torch_functions():
            return kind.forward(self, *args, **kwargs)

    return (kind,), {"forward": forward, "_note": "its forward runs inside override_torch_functions()"}


@_maker
def _adapted(kind: Class, adapter: Callable[[Any, Tensor], Tensor]) -> _Contents:
    """A class with an adapter's forward."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return adapter(self, *args, *kwargs.values())

    return (kind,), {"forward": forward, "_note": f"its forward is {adapter.__module__}.{adapter.__qualname__}"}


_POOLS = tuple(
    getattr(nn, f"{kind}Pool{n}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for n in (1, 2, 3)
)


def _masked(kind: Class) -> Class:
    """What saves a bit mask, if there is such a class for this one of ours."""
    if kind is _ours(nn.ReLU):
        return _saving_mask(kind, _relu_with_mask)
    return _saving_mask(kind, _leaky_relu_with_mask) if kind is _ours(nn.LeakyReLU) else kind


def _relu_with_mask(self: Any, input: Tensor) -> Tensor:
    return relu_with_mask(input) if self.inplace else our_functional.relu(input)


def _leaky_relu_with_mask(self: Any, input: Tensor) -> Tensor:
    if not self.inplace:
        return our_functional.leaky_relu(input, self.negative_slope)
    return leaky_relu_with_mask(input, self.negative_slope)


@_maker
def _saving_mask(kind: Class, forward: Callable[..., Tensor]) -> _Contents:
    """An activation in place before a pool."""
    return (kind,), {"forward": forward, "_note": "saves a bit mask, as the pool that follows saves no input"}


def _fused_once(kind: Class, contents: Callable[[Class], dict[str, Any]]) -> Class:
    return kind if vars(kind).get("_made", (None,))[0] is _fused else _fused(kind, contents)


@_maker
def _fused(kind: Class, contents: Callable[[Class], dict[str, Any]]) -> _Contents:
    """A class that takes part in computing a loss without logits."""
    return (kind,), contents(kind) | {"_note": "its loss is computed without logits"}


def _over(beneath: Class, kind: Class) -> Class:
    """A parametrized module's class with another class beneath: that which it was made over, if it still fits."""
    if beneath is kind.__bases__[0]:
        return kind
    before = vars(kind).get("_made_over")
    if before and before.__bases__[0] is beneath and vars(before).keys() | {"_made_over"} == vars(kind).keys():
        return before
    contents = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(beneath)
    return metaclass(kind.__name__, (beneath,), contents | {"_made_over": kind})


# --- functions that modules hold ---

_FUNCTION = (FunctionType, BuiltinFunctionType)


@functools.cache
def _our_functions() -> dict[Any, Any]:
    """By a function of torch.nn.functional, ours of this name."""
    return {
        theirs: ours
        for name, ours in vars(our_functional).items()
        if isinstance(theirs := getattr(F, name, None), _FUNCTION)
        and ours is not theirs
        and not name.startswith("_")
    }


@functools.cache
def _torchs_functions() -> dict[Any, Any]:
    return {ours: theirs for theirs, ours in _our_functions().items()}
