"""Recurrent layers and their cells, by backpropagation through time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from manualgrad.fallback import ShapeMismatchError
from manualgrad.ops.dropout import dropout
from manualgrad.ops.registration import with_torch_errors
from manualgrad.ops.shapes import rows, unflatten
from manualgrad.registry import SampleInput, TensorFactory, register
from manualgrad.rule import LOWER_PRECISION, Rule
from manualgrad.torch_internals import PACKED_LSTM_RUNS_STEP_BY_STEP, unwrap_functorch

Sizes = tuple[int, ...]
Tensors = tuple[Tensor, ...] | list[Tensor]
Step = Callable[..., tuple[Tensors, Tensors]]


def _through_time(step: Step, first: Tensors, sizes: Sizes, backward: bool) -> tuple[list[Tensor], list[Tensors]]:
    """States carried from step to step. A row is a sequence; step t has ``sizes[t]`` of them, the longest first.

    A sequence takes its ``first`` states where it begins; where it ends they are set aside.

    Args:
        step: (t, *states) -> the next states, and what is to be noted.

    Returns:
        The last states of all sequences; and for each thing noted, what it was in each step.
    """
    order = range(len(sizes))[:: -1 if backward else 1]
    now: Tensors = [state[: sizes[order[0]]] for state in first]
    ended: list[Tensors] = []
    notes: list[Tensors] = [()] * len(sizes)
    for t in order:
        n, before = sizes[t], len(now[0])
        if n < before:
            ended.append([state[n:] for state in now])
            now = [state[:n] for state in now]
        elif n > before:
            now = [torch.cat([state, new[before:n]]) for state, new in zip(now, first, strict=True)]
        now, notes[t] = step(t, *now)
    last = [torch.cat(parts) for parts in zip(now, *reversed(ended), strict=True)]
    return last, list(zip(*notes, strict=True))


class Recurrence(Rule):
    r"""One layer in one direction:      aₜ = Wᵢ xₜ + bᵢ,   mₜ = Wₕ hₜ₋₁ + bₕ,   hₜ = cell(aₜ, mₜ, hₜ₋₁)

    differential      daₜ = dWᵢ xₜ + Wᵢ dxₜ + dbᵢ,   dmₜ = dWₕ hₜ₋₁ + Wₕ dhₜ₋₁ + dbₕ
    pair with         αₜ = ∂L/∂aₜ and μₜ = ∂L/∂mₜ, which a cell finds from ηₜ = ∂L/∂hₜ, back through time:

        ηₜ₋₁ = gₜ₋₁ + μₜ Wₕ + what the cell passes on itself
        ∂L/∂xₜ = αₜ Wᵢ      ∂L/∂Wᵢ = Σₜ αₜᵀ xₜ        ∂L/∂bᵢ = Σₜ αₜ      (each sum is one product, of the rows
                            ∂L/∂Wₕ = Σₜ μₜᵀ hₜ₋₁      ∂L/∂bₕ = Σₜ μₜ       of all steps)

    (For complex numbers all but η, α and μ is conjugated.) Of the cell nothing is kept: a and m follow from
    x and h, for all steps at once. The output is h of all steps, one after the other, a row for each sequence.

    Werbos, "Backpropagation Through Time: What It Does and How to Do It", 1990.
    """

    supports_complex = True
    gates: ClassVar[int] = 1

    def hidden(output: Tensor) -> Tensor:
        return output

    def previous(hidden: Tensor, h0: Tensor, sizes: Sizes, reverse: bool) -> Tensor:
        """hₜ₋₁"""
        after = hidden.split(sizes)
        return torch.cat(_through_time(lambda t, h: ((after[t],), (h,)), (h0,), sizes, reverse)[1][0])

    def a(input: Tensor, w_ih: Tensor, b_ih: Tensor | None) -> Tensor:
        return rows(F.linear(input, w_ih, b_ih))

    def m(previous: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
        return F.linear(previous, w_hh, b_hh)

    def alpha(back: Back) -> Tensor:
        return torch.cat(back.notes[0])

    def mu(alpha: Tensor) -> Tensor:
        return alpha

    def grad_input(alpha: Tensor, w_ih: Tensor, sizes: Sizes, packed: bool) -> Tensor:
        grad = alpha @ w_ih.conj()
        return grad if packed else unflatten(grad, 0, (len(sizes), sizes[0]))

    def grad_h0(back: Back) -> Tensor:
        return back.first[0]

    def grad_w_ih(alpha: Tensor, input: Tensor) -> Tensor:
        return alpha.mT @ rows(input).conj()

    def grad_w_hh(mu: Tensor, previous: Tensor) -> Tensor:
        return mu.mT @ previous.conj()

    def grad_b_ih(alpha: Tensor) -> Tensor:
        return alpha.sum(0)

    def grad_b_hh(mu: Tensor) -> Tensor:
        return mu.sum(0)


class Back(NamedTuple):
    """What a walk back through time finds: the gradients of the first states, notes by step (α is first)."""

    first: Tensors
    notes: Sequence[Tensors]


def _forward(cell: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of a recurrence with one state."""

    def forward(
        input: Tensor,
        h0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        sizes: Sizes,
        reverse: bool,
        packed: bool,
    ) -> Tensor:
        def step(a: Tensor, h: Tensor) -> Tensors:
            return (cell(a, F.linear(h, w_hh, b_hh), h),)

        return _unrolled(step, F.linear(input, w_ih, b_ih), (h0,), sizes, reverse)[0]

    return forward


def _unrolled(
    cell: Callable[..., Tensors], a: Tensor, first: Tensors, sizes: Sizes, reverse: bool
) -> tuple[Tensor, Tensors]:
    """h of all steps, and the last states."""
    given = rows(a).split(sizes)

    def step(t: int, *now: Tensor) -> tuple[Tensors, Tensors]:
        now = tuple(cell(given[t], *now))
        return now, now[:1]

    last, (hidden,) = _through_time(step, first, sizes, reverse)
    return torch.cat(hidden), last


def _walked_back(step: Step, grad: Tensor, sizes: Sizes, reverse: bool, *last: Tensor) -> Back:
    """`step` from the last step to the first: (t, η, ...) -> the gradients of the states before, notes."""
    given, zero = grad.split(sizes), torch.zeros_like(grad[: sizes[0]])
    received = lambda t, eta, *more: step(t, eta + given[t], *more)  # noqa: E731
    return Back(*_through_time(received, (zero, *last), sizes, not reverse))


class RNNFunction(Recurrence):
    r"""hₜ = tanh(aₜ + mₜ)      αₜ = μₜ = (1 - hₜ)(1 + hₜ) ηₜ      (1 - hₜ² would cancel where hₜ is almost 1)

    Elman, "Finding Structure in Time", 1990.
    """

    autocast = LOWER_PRECISION
    forward = _forward(lambda a, m, h: (m + a).tanh())

    def back(grad: Tensor, hidden: Tensor, w_hh: Tensor, sizes: Sizes, reverse: bool) -> Back:
        return _back(lambda eta, h: (1 - h) * (1 + h) * eta, grad, hidden, w_hh, sizes, reverse)


class ReLURNNFunction(Recurrence):
    r"""hₜ = max(0, aₜ + mₜ)      αₜ = μₜ = ηₜ where hₜ ≠ 0, else 0"""

    autocast = LOWER_PRECISION
    forward = _forward(lambda a, m, h: (m + a).relu())

    def back(grad: Tensor, hidden: Tensor, w_hh: Tensor, sizes: Sizes, reverse: bool) -> Back:
        return _back(lambda eta, h: torch.where(h != 0, eta, 0), grad, hidden, w_hh, sizes, reverse)


def _back(
    pull: Callable[..., Tensor], grad: Tensor, hidden: Tensor, w_hh: Tensor, sizes: Sizes, reverse: bool
) -> Back:
    after, w = hidden.conj().split(sizes), w_hh.conj()

    def step(t: int, eta: Tensor) -> tuple[Tensors, Tensors]:
        alpha = pull(eta, after[t])
        return (alpha @ w,), (alpha,)

    return _walked_back(step, grad, sizes, reverse)


def _gru_cell(a: Tensor, m: Tensor, h: Tensor) -> Tensor:
    _, z, n, _ = _gru_gates(a, m)
    return (h - n) * z + n


def _gru_gates(a: Tensor, m: Tensor) -> Tensors:
    """r, z, n, mⁿ      (r and z out of columns of one tensor, as in torch: the last bit of a sigmoid may depend on
    how its numbers lie in memory)"""
    (*_, an), (*_, mn) = a.chunk(3, 1), m.chunk(3, 1)
    k = 2 * (m.shape[1] // 3)
    r, z = (x.sigmoid() for x in (m[:, :k] + a[:, :k]).chunk(2, 1))
    return r, z, (an + mn * r).tanh(), mn


class GRUFunction(Recurrence):
    r"""r = σ(aʳ + mʳ),   z = σ(aᶻ + mᶻ),   n = tanh(aⁿ + r mⁿ),   hₜ = n + z (hₜ₋₁ - n)

    αⁿ = (1 - n)(1 + n)(1 - z) ηₜ     αᶻ = z (1 - z)(hₜ₋₁ - n) ηₜ     αʳ = r (1 - r) mⁿ αⁿ
    μⁿ = r αⁿ                         μᶻ = αᶻ                         μʳ = αʳ             and passes z ηₜ on itself

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014.
    """

    autocast = {"cuda": "lower_precision"}
    gates = 3
    forward = _forward(_gru_cell)

    def back(
        grad: Tensor, a: Tensor, m: Tensor, previous: Tensor, w_hh: Tensor, sizes: Sizes, reverse: bool
    ) -> Back:
        w, (a_of, m_of, before) = w_hh.conj(), (x.conj().split(sizes) for x in (a, m, previous))

        def step(t: int, eta: Tensor) -> tuple[Tensors, Tensors]:
            r, z, n, m = _gru_gates(a_of[t], m_of[t])
            alpha_n = (1 - n) * (1 + n) * (1 - z) * eta
            alpha_z = z * (1 - z) * (before[t] - n) * eta
            alpha_r = r * (1 - r) * m * alpha_n
            mu = torch.cat([alpha_r, alpha_z, r * alpha_n], 1)
            return (torch.addmm(z * eta, mu, w),), (torch.cat([alpha_r, alpha_z, alpha_n], 1), mu)

        return _walked_back(step, grad, sizes, reverse)

    def mu(back: Back) -> Tensor:
        return torch.cat(back.notes[1])


def _lstm_gates(sum: Tensor) -> Tensors:
    i, f, g, o = sum.chunk(4, 1)
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


class LSTMFunction(Recurrence):
    r"""i, f, g, o = σ, σ, tanh, σ of aₜ + mₜ,   cₜ = f cₜ₋₁ + i g,   hₜ = o τ  or  V (o τ),   τ = tanh cₜ

    With γₜ = ∂L/∂cₜ, which the next step passes on, and δ = ηₜ  or  ηₜ V:

        γₜ = γ + (1 - τ)(1 + τ) o δ,   of which γ = f γₜ is passed on
        αₜ = μₜ = (i (1 - i) g γₜ,   f (1 - f) cₜ₋₁ γₜ,   (1 - g)(1 + g) i γₜ,   o (1 - o) τ δ)
        ∂L/∂V = Σₜ ηₜᵀ (o τ)

    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers et al., "Learning to Forget", 2000; Sak et
    al., "Long Short-Term Memory Recurrent Neural Network Architectures", 2014 (V).
    """

    autocast = LOWER_PRECISION
    gates = 4

    def forward(
        input: Tensor,
        h0: Tensor,
        c0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        sizes: Sizes,
        reverse: bool,
        packed: bool,
        recorded: bool | None,
    ) -> Tensor:
        def cell(a: Tensor, h: Tensor, c: Tensor) -> Tensors:
            i, f, g, o = _lstm_gates(F.linear(h, w_hh, b_hh) + a)
            c = f * c + i * g
            h = o * c.tanh()
            return (h if w_hr is None else h @ w_hr.mT), c

        tensors = [x for x in (input, h0, c0, w_ih, w_hh, b_ih, b_hh) if x is not None]
        if recorded is not None and w_hr is None and _has_kernel(tensors):
            return _by_kernel(*tensors, sizes=sizes, reverse=reverse, recorded=recorded)
        hidden, (_, c) = _unrolled(cell, F.linear(input, w_ih, b_ih), (h0, c0), sizes, reverse)
        return _joined(hidden, c)

    def hidden(output: Tensor, w_hh: Tensor, sizes: Sizes) -> Tensor:
        return _parted(output, sizes, w_hh)[0]

    def back(
        grad: Tensor,
        a: Tensor,
        previous: Tensor,
        c0: Tensor,
        w_hh: Tensor,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        sizes: Sizes,
        reverse: bool,
    ) -> Back:
        upstream, of_last = _parted(grad, sizes, w_hh)
        sums = torch.addmm(a if b_hh is None else a + b_hh, previous, w_hh.mT).conj().split(sizes)
        w, v = w_hh.conj(), None if w_hr is None else w_hr.conj()

        def forth(t: int, c: Tensor) -> tuple[Tensors, Tensors]:
            i, f, g, _ = gates = _lstm_gates(sums[t])
            after = f * c + i * g
            return (after,), (*gates, c, after.tanh())

        steps = list(zip(*_through_time(forth, (c0.conj(),), sizes, reverse)[1], strict=True))

        def step(t: int, eta: Tensor, gamma: Tensor) -> tuple[Tensors, Tensors]:
            i, f, g, o, c, tau = steps[t]
            delta = eta if v is None else eta @ v
            gamma = gamma + (1 - tau) * (1 + tau) * o * delta
            alpha = torch.cat(
                [
                    i * (1 - i) * g * gamma,
                    f * (1 - f) * c * gamma,
                    (1 - g) * (1 + g) * i * gamma,
                    o * (1 - o) * tau * delta,
                ],
                1,
            )
            return (alpha @ w, f * gamma), (alpha, eta, o * tau)

        return _walked_back(step, upstream, sizes, reverse, of_last)

    def grad_c0(back: Back) -> Tensor:
        return back.first[1]

    def grad_w_hr(back: Back) -> Tensor:
        return torch.cat(back.notes[1]).mT @ torch.cat(back.notes[2])


class SteppedLSTMFunction(LSTMFunction):
    """The same where torch goes step by step; there autocast on the CPU does not lower the states."""

    autocast = {"cuda": "lower_precision"}


def _has_kernel(tensors: Tensors) -> bool:
    """On the CPU torch has oneDNN's kernel; whoever looks on gets the steps."""
    plainly = all(x.is_cpu and type(x) in (Tensor, Parameter) and unwrap_functorch(x) is x for x in tensors)
    return plainly and tensors[0].dtype in (torch.float32, torch.bfloat16, torch.float16)


def _by_kernel(
    input: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor, sizes: Sizes, reverse: bool, recorded: bool
) -> Tensor:
    given = input.detach().reshape(len(sizes), sizes[0], input.shape[-1])
    given = given.flip(0) if reverse else given
    states = [h0.detach().unsqueeze(0), c0.detach().unsqueeze(0)]
    of_layer = ([x.detach() for x in weights], len(weights) == 4, 1)
    with torch.set_grad_enabled(recorded):  # by which torch chooses between the kernels for training and inference
        hidden, _, c = torch.lstm(given, states, *of_layer, 0.0, recorded, False, False)
    return _joined(hidden.flip(0) if reverse else hidden, c)


def _joined(hidden: Tensor, c: Tensor) -> Tensor:
    """A rule has one output: h of all steps and the last c in one vector."""
    return torch.cat([hidden.reshape(-1), c.reshape(-1)])


def _parted(joined: Tensor, sizes: Sizes, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    wide, width = w_hh.shape
    hidden, c = joined.tensor_split([sum(sizes) * width])
    return hidden.view(sum(sizes), width), c.view(sizes[0], wide // 4)


# --- the functions ---


def _fit(rule: Any, input: Tensor, states: Tensors, weights: Sequence[Any], n: int) -> bool:
    """All shapes are right, for n sequences."""
    h, c = states[0].shape[-1], states[-1].shape[-1]
    wide = rule.gates * c
    shapes = [(wide, input.shape[-1]), (wide, h), (wide,), (wide,), (h, c)]
    fit = [x is None or x.shape == shape for x, shape in zip(weights, shapes, strict=False)]
    return all(fit) and all(x.dim() == 2 and len(x) == n for x in states)


def _run(rule: Any, input: Tensor, states: Tensors, weights: Sequence[Any], *steps: Any) -> list[Tensor]:
    """One layer in one direction, its steps of these (sizes, reverse, packed): h of all steps, the last states."""
    sizes = steps[0]
    if rule.gates == 4:
        weights = [*weights, *[None] * (5 - len(weights))]
        steps = (*steps, torch.is_grad_enabled() if rule is LSTMFunction else None)
    tensors = [input, *states, *weights]
    if "cpu" not in rule.autocast and input.is_cpu and torch.is_autocast_enabled("cpu"):
        # There torch lowers the products of each step, but not the states: we lower neither.
        lower = torch.get_autocast_dtype("cpu")
        tensors = [x.to(torch.promote_types(x.dtype, lower)) if isinstance(x, Tensor) else x for x in tensors]
    output, c = rule.apply(*tensors, *steps), []
    if rule.gates == 4:
        output, *c = _parted(output, sizes, weights[1])
    return [output, _last(output, sizes, steps[1]), *c]


def _last(hidden: Tensor, sizes: Sizes, reverse: bool) -> Tensor:
    """The last h of each sequence."""
    n = sizes[0]
    if reverse or sizes[-1] == n:
        return hidden[:n] if reverse else hidden[-n:]
    ends = {k: sum(sizes[:t]) + k for t, size in enumerate(sizes) for k in range(size)}
    return hidden.index_select(0, torch.tensor([ends[k] for k in range(n)], device=hidden.device))


_NAMES = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")


def _layers(rule: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Layers upon layers, each of one or two directions, with dropout between them."""
    packed = "data" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
    names = ("data", "batch_sizes", *_NAMES) if packed else ("input", *_NAMES, "batch_first")
    given = dict(zip(names, args, strict=True) if args else (), **kwargs)
    input, batch_first = given[names[0]], not packed and given["batch_first"]
    hx, params, biased, layers, p, train, both = (given[name] for name in _NAMES)
    flags = (biased, train, both, batch_first)
    if any(type(flag) is not bool for flag in flags) or not isinstance(p, (int, float)):
        raise TypeError("has_biases, train, bidirectional and batch_first are booleans, dropout is a number")
    states = [hx] if isinstance(hx, Tensor) else hx
    input = input.transpose(0, 1) if batch_first else input
    if not packed and input.dim() == 2 and rule is not GRUFunction:  # torch lets one sequence stand for all
        input = input.unsqueeze(1).expand(-1, states[0].shape[1], -1)
    if input.dim() != 3 - packed:
        raise RuntimeError(f"an input of {3 - packed} axes expected, but got {input.dim()}")
    sizes = tuple(given["batch_sizes"].tolist()) if packed else (input.shape[1],) * len(input)
    widths = [x.shape[2] for x in states]
    projected = widths[0] != widths[-1]
    each, directions = 2 + 2 * biased + projected, 1 + both
    if not sizes or len(params) != each * directions * layers:
        raise RuntimeError("at least one step and as many weights as layers and directions expected")
    by_steps = len(set(sizes)) > 1 or (packed and PACKED_LSTM_RUNS_STEP_BY_STEP)
    if rule is LSTMFunction and by_steps and not projected:
        rule = SteppedLSTMFunction
    if any(len(x) != directions * layers for x in states):
        raise ShapeMismatchError(f"hidden states of {directions * layers} layers and directions expected")
    last: list[Tensors] = []
    for layer in range(layers):
        outputs = []
        for reverse in (False, True)[:directions]:
            k = len(last)
            weights: list[Any] = list(params[each * k : each * (k + 1)])
            if not biased:
                weights[2:2] = [None, None]
            before = [x[k] for x in states]
            if not _fit(rule, input, before, weights, sizes[0]):
                # torch's kernel would read past their end
                raise ShapeMismatchError("weights or states that do not fit")
            hidden, *final = _run(rule, input, before, weights, sizes, reverse, packed)
            if projected:  # autocast lowers only h
                h, c = final
                final = [h, c.to(torch.promote_types(c.dtype, hx[1].dtype))]
            outputs.append(hidden if packed else hidden.unflatten(0, (len(sizes), sizes[0])))
            last.append(final)
        input = torch.cat(outputs, -1)
        if p and train and layer < layers - 1:
            input = dropout(input, p)
    output = input.transpose(0, 1) if batch_first else input
    return output, *map(torch.stack, zip(*last, strict=True))


def _of_layers(name: str, rule: type[Recurrence], what: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return _layers(rule, *args, **kwargs)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = f"""{what}, as `torch.{name}`: the output of the last layer, and the last states of all.

    Takes (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first), or of packed
    sequences (data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional).

    Shapes: input (T, N, in), with batch_first (N, T, in), data (Σ batch_sizes, in); hx (layers · directions, N,
    size), of an LSTM a pair (h, c); params, for each layer and direction: W of input and h, their biases, and
    where h has another size than c, V. The output has directions · size features.

    Raises:
        RuntimeError: no step, or tensors that do not fit.
    """
    return with_torch_errors(run)


def _of_cell(name: str, rule: type[Recurrence], layer: str) -> Callable[..., Any]:
    def run(
        input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        states = [hx] if isinstance(hx, Tensor) else hx
        biases = [
            b if b is None or b.dim() == 1 else b.broadcast_to(1, len(w_hh)).squeeze(0) for b in (b_ih, b_hh)
        ]
        if input.dim() != 2 or not _fit(rule, input, states, [w_ih, w_hh, *biases], len(input)):
            raise RuntimeError("weights or states that do not fit")
        _, *after = _run(rule, input, states, [w_ih, w_hh, *biases], (len(input),), False, True)
        after = [x.clone() for x in after]  # of their own memory
        return after[0] if isinstance(hx, Tensor) else tuple(after)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = (
        f"""One step of `{layer}`, as `torch.{name}`. Shapes: input (N, in), hx and the result (N, size)."""
    )
    return with_torch_errors(run)


rnn_tanh = _of_layers("rnn_tanh", RNNFunction, "Elman's recurrence with tanh")
rnn_relu = _of_layers("rnn_relu", ReLURNNFunction, "Elman's recurrence with ReLU")
gru = _of_layers("gru", GRUFunction, "Gated recurrent units")
lstm = _of_layers("lstm", LSTMFunction, "Long short-term memory")
rnn_tanh_cell = _of_cell("rnn_tanh_cell", RNNFunction, "rnn_tanh")
rnn_relu_cell = _of_cell("rnn_relu_cell", ReLURNNFunction, "rnn_relu")
gru_cell = _of_cell("gru_cell", GRUFunction, "gru")
lstm_cell = _of_cell("lstm_cell", SteppedLSTMFunction, "lstm")


def _weights(t: TensorFactory, gates: int, width: int, h: int, size: int, bias: bool) -> list[Tensor]:
    shapes = [(gates * size, width), (gates * size, h), *[(gates * size,)] * (2 * bias)]
    return [t(*shape) / size**0.5 for shape in shapes] + [t(h, size)] * (h != size)


def _small(gates: int, t: TensorFactory) -> list[SampleInput]:
    h = 1 if gates == 4 else 2  # with a projection
    first = [t(2, 2, 2), t(2, 2, 2)], [t(2, 2, h), t(2, 2, 2)]
    hx = [pair if gates == 4 else pair[0] for pair in first]
    both = [*_weights(t, gates, 1, 2, 2, True), *_weights(t, gates, 1, 2, 2, True)]
    two = [*_weights(t, gates, 2, h, 2, False), *_weights(t, gates, h, h, 2, False)]
    return [
        SampleInput(t(3, 2, 1), hx[0], both, True, 1, 0.0, True, True, False),
        SampleInput(t(2, 2, 2), hx[1], two, False, 2, 0.5, True, False, True),
    ]


def _big(gates: int, t: TensorFactory) -> SampleInput:
    hx = [t(1, 32, 256), t(1, 32, 256)] if gates == 4 else t(1, 32, 256)
    return SampleInput(
        t(32, 32, 128), hx, _weights(t, gates, 128, 256, 256, True), True, 1, 0.0, True, False, False
    )


def _of_a_cell(gates: int, t: TensorFactory, n: int, width: int, size: int, bias: bool) -> SampleInput:
    hx = [t(n, size), t(n, size)] if gates == 4 else t(n, size)
    return SampleInput(t(n, width), hx, *_weights(t, gates, width, size, size, bias))


_SATURATED = "as in torch: an infinite weight saturates the cell, and the previous step's gradient is 0 · ∞ = nan"
_COMPUTED = "for only a bias's gradient, inputs and weights are saved, to compute the gates that torch saves"

for _layer, _cell in ((rnn_tanh, rnn_tanh_cell), (rnn_relu, rnn_relu_cell), (gru, gru_cell), (lstm, lstm_cell)):
    _gates = {gru: 3, lstm: 4}.get(_layer, 1)
    register(
        _layer,
        sample_inputs=partial(_small, _gates),
        benchmark_input=partial(_big, _gates),
        random=True,
        expected_failures={"special_values": _SATURATED} if _layer is not rnn_relu else {},
    )
    register(
        _cell,
        sample_inputs=lambda t, gates=_gates: [
            _of_a_cell(gates, t, 2, 3, 2, True),
            _of_a_cell(gates, t, 3, 1, 2, False),
        ],
        benchmark_input=lambda t, gates=_gates: _of_a_cell(gates, t, 128, 128, 256, True),
        expected_failures={"saves_no_more_than_torch": _COMPUTED},
    )
