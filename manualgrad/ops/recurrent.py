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


def _scan(step: Step, initial: Tensors, batch_sizes: Sizes, reverse: bool) -> tuple[list[Tensor], list[Tensors]]:
    """Carry states from step to step. Step t has ``batch_sizes[t]`` rows, one for each sequence, longest first.

    A sequence has its ``initial`` states before its first step, and its final states after its last step.

    Args:
        step: (t, *states) -> the next states, and outputs.
        reverse: begin with the last step.

    Returns:
        The final states of all sequences; and for each output, its values in all steps.
    """
    order = range(len(batch_sizes))[:: -1 if reverse else 1]
    states: Tensors = [state[: batch_sizes[order[0]]] for state in initial]
    finished: list[Tensors] = []
    outputs: list[Tensors] = [()] * len(batch_sizes)
    for t in order:
        n, before = batch_sizes[t], len(states[0])
        if n < before:
            finished.append([state[n:] for state in states])
            states = [state[:n] for state in states]
        elif n > before:
            states = [torch.cat([state, new[before:n]]) for state, new in zip(states, initial, strict=True)]
        states, outputs[t] = step(t, *states)
    final = [torch.cat(parts) for parts in zip(states, *reversed(finished), strict=True)]
    return final, list(zip(*outputs, strict=True))


class Recurrence(Rule):
    r"""One layer in one direction:      aₜ = Wᵢ xₜ + bᵢ,   mₜ = Wₕ hₜ₋₁ + bₕ,   hₜ = cell(aₜ, mₜ, hₜ₋₁)

    differential      daₜ = dWᵢ xₜ + Wᵢ dxₜ + dbᵢ,   dmₜ = dWₕ hₜ₋₁ + Wₕ dhₜ₋₁ + dbₕ
    pair with         αₜ = ∂L/∂aₜ and μₜ = ∂L/∂mₜ, which the cell computes from ηₜ = ∂L/∂hₜ, from the last step on:

        ηₜ₋₁ = gₜ₋₁ + μₜ Wₕ + what the cell passes back to its third argument
        ∂L/∂xₜ = αₜ Wᵢ      ∂L/∂Wᵢ = Σₜ αₜᵀ xₜ        ∂L/∂bᵢ = Σₜ αₜ
                            ∂L/∂Wₕ = Σₜ μₜᵀ hₜ₋₁      ∂L/∂bₕ = Σₜ μₜ

    The output is h, the rows of all steps in order. So each Σₜ αₜᵀ xₜ is one matrix product. The inside of the
    cell is not saved: the backward computes a and m again from x and h. Complex numbers: everything except η, α
    and μ is conjugated.

    Werbos, "Backpropagation Through Time: What It Does and How to Do It", 1990.
    """

    supports_complex = True
    gates: ClassVar[int] = 1

    def hidden(output: Tensor) -> Tensor:
        return output

    def previous(hidden: Tensor, h0: Tensor, batch_sizes: Sizes, reverse: bool) -> Tensor:
        """hₜ₋₁ of all steps, by a scan that outputs the state before each step"""
        h = hidden.split(batch_sizes)
        _, (h_before,) = _scan(lambda t, before: ((h[t],), (before,)), (h0,), batch_sizes, reverse)
        return torch.cat(h_before)

    def a(input: Tensor, w_ih: Tensor, b_ih: Tensor | None) -> Tensor:
        return rows(F.linear(input, w_ih, b_ih))

    def m(previous: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
        return F.linear(previous, w_hh, b_hh)

    def alpha(backward_scan: BackwardScan) -> Tensor:
        return torch.cat(backward_scan.outputs[0])

    def mu(alpha: Tensor) -> Tensor:
        return alpha

    def grad_input(alpha: Tensor, w_ih: Tensor, batch_sizes: Sizes, packed: bool) -> Tensor:
        grad = alpha @ w_ih.conj()
        return grad if packed else unflatten(grad, 0, (len(batch_sizes), batch_sizes[0]))

    def grad_h0(backward_scan: BackwardScan) -> Tensor:
        return backward_scan.grad_initial[0]

    def grad_w_ih(alpha: Tensor, input: Tensor) -> Tensor:
        return alpha.mT @ rows(input).conj()

    def grad_w_hh(mu: Tensor, previous: Tensor) -> Tensor:
        return mu.mT @ previous.conj()

    def grad_b_ih(alpha: Tensor) -> Tensor:
        return alpha.sum(0)

    def grad_b_hh(mu: Tensor) -> Tensor:
        return mu.sum(0)


class BackwardScan(NamedTuple):
    """The result of the method ``backward_scan`` of each rule: a scan from the last step to the first."""

    grad_initial: Tensors  # ∂L/∂(initial states)
    outputs: Sequence[Tensors]  # for each output, its values in all steps. The first output is α.


def _scan_backward(
    step: Step, grad: Tensor, batch_sizes: Sizes, reverse: bool, *grad_final: Tensor
) -> BackwardScan:
    """``step``: (t, ηₜ, gradients of other states) -> gradients of the states before, without gₜ₋₁; outputs."""
    g, zeros = grad.split(batch_sizes), torch.zeros_like(grad[: batch_sizes[0]])
    with_upstream = lambda t, eta, *others: step(t, eta + g[t], *others)  # noqa: E731
    return BackwardScan(*_scan(with_upstream, (zeros, *grad_final), batch_sizes, not reverse))


def _scan_forward(
    cell: Callable[..., Tensors], a: Tensor, initial: Tensors, batch_sizes: Sizes, reverse: bool
) -> tuple[Tensor, Tensors]:
    """h of all steps, and the final states. ``cell``: (aₜ, states) -> states, of which h is the first."""
    a_of = rows(a).split(batch_sizes)

    def step(t: int, *states: Tensor) -> tuple[Tensors, Tensors]:
        states = tuple(cell(a_of[t], *states))
        return states, states[:1]

    final, (hidden,) = _scan(step, initial, batch_sizes, reverse)
    return torch.cat(hidden), final


def _forward_of(cell: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of a recurrence with the state h."""

    def forward(
        input: Tensor,
        h0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        batch_sizes: Sizes,
        reverse: bool,
        packed: bool,
    ) -> Tensor:
        def cell_of_states(a: Tensor, h: Tensor) -> Tensors:
            return (cell(a, F.linear(h, w_hh, b_hh), h),)

        return _scan_forward(cell_of_states, F.linear(input, w_ih, b_ih), (h0,), batch_sizes, reverse)[0]

    return forward


class RNNFunction(Recurrence):
    r"""hₜ = tanh(aₜ + mₜ)      αₜ = μₜ = (1 - hₜ)(1 + hₜ) ηₜ      (1 - hₜ² would lose digits where |hₜ| is near 1)

    Elman, "Finding Structure in Time", 1990.
    """

    autocast = LOWER_PRECISION
    forward = _forward_of(lambda a, m, h: (m + a).tanh())

    def backward_scan(
        grad: Tensor, hidden: Tensor, w_hh: Tensor, batch_sizes: Sizes, reverse: bool
    ) -> BackwardScan:
        return _backward_scan_of_rnn(
            lambda eta, h: (1 - h) * (1 + h) * eta, grad, hidden, w_hh, batch_sizes, reverse
        )


class ReLURNNFunction(Recurrence):
    r"""hₜ = max(0, aₜ + mₜ)      αₜ = μₜ = ηₜ where hₜ ≠ 0, else 0"""

    autocast = LOWER_PRECISION
    forward = _forward_of(lambda a, m, h: (m + a).relu())

    def backward_scan(
        grad: Tensor, hidden: Tensor, w_hh: Tensor, batch_sizes: Sizes, reverse: bool
    ) -> BackwardScan:
        return _backward_scan_of_rnn(
            lambda eta, h: torch.where(h != 0, eta, 0), grad, hidden, w_hh, batch_sizes, reverse
        )


def _backward_scan_of_rnn(
    alpha_of: Callable[..., Tensor], grad: Tensor, hidden: Tensor, w_hh: Tensor, batch_sizes: Sizes, reverse: bool
) -> BackwardScan:
    h, w = hidden.conj().split(batch_sizes), w_hh.conj()

    def step(t: int, eta: Tensor) -> tuple[Tensors, Tensors]:
        alpha = alpha_of(eta, h[t])
        return (alpha @ w,), (alpha,)

    return _scan_backward(step, grad, batch_sizes, reverse)


def _gru_cell(a: Tensor, m: Tensor, h: Tensor) -> Tensor:
    _, z, n, _ = _gru_gates(a, m)
    return (h - n) * z + n


def _gru_gates(a: Tensor, m: Tensor) -> Tensors:
    """r, z, n, mⁿ"""
    k = 2 * (m.shape[1] // 3)
    an, mn = a[:, k:], m[:, k:]
    # r and z are columns of one tensor, as in torch, because the last bit of a sigmoid may depend on the layout
    r, z = (x.sigmoid() for x in (m[:, :k] + a[:, :k]).chunk(2, 1))
    return r, z, (an + mn * r).tanh(), mn


class GRUFunction(Recurrence):
    r"""r = σ(aʳ + mʳ),   z = σ(aᶻ + mᶻ),   n = tanh(aⁿ + r mⁿ),   hₜ = n + z (hₜ₋₁ - n)

    αⁿ = (1 - n)(1 + n)(1 - z) ηₜ     αᶻ = z (1 - z)(hₜ₋₁ - n) ηₜ     αʳ = r (1 - r) mⁿ αⁿ
    μⁿ = r αⁿ                         μᶻ = αᶻ                         μʳ = αʳ
    ηₜ₋₁ = gₜ₋₁ + μₜ Wₕ + z ηₜ

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014.
    """

    autocast = {"cuda": "lower_precision"}
    gates = 3
    forward = _forward_of(_gru_cell)

    def backward_scan(
        grad: Tensor, a: Tensor, m: Tensor, previous: Tensor, w_hh: Tensor, batch_sizes: Sizes, reverse: bool
    ) -> BackwardScan:
        w, (a_of, m_of, h_before) = w_hh.conj(), (x.conj().split(batch_sizes) for x in (a, m, previous))

        def step(t: int, eta: Tensor) -> tuple[Tensors, Tensors]:
            r, z, n, mn = _gru_gates(a_of[t], m_of[t])
            alpha_n = (1 - n) * (1 + n) * (1 - z) * eta
            alpha_z = z * (1 - z) * (h_before[t] - n) * eta
            alpha_r = r * (1 - r) * mn * alpha_n
            mu = torch.cat([alpha_r, alpha_z, r * alpha_n], 1)
            return (torch.addmm(z * eta, mu, w),), (torch.cat([alpha_r, alpha_z, alpha_n], 1), mu)

        return _scan_backward(step, grad, batch_sizes, reverse)

    def mu(backward_scan: BackwardScan) -> Tensor:
        return torch.cat(backward_scan.outputs[1])


class LSTMFunction(Recurrence):
    r"""i, f, g, o = σ, σ, tanh, σ of aₜ + mₜ,   cₜ = f cₜ₋₁ + i g,   τ = tanh cₜ,   hₜ = o τ  or  V (o τ)

    With γₜ = ∂L/∂cₜ and δ = ∂L/∂(o τ) = ηₜ  or  ηₜ V:

        γₜ = fₜ₊₁ γₜ₊₁ + (1 - τ)(1 + τ) o δ
        αₜ = μₜ = (i (1 - i) g γₜ,   f (1 - f) cₜ₋₁ γₜ,   (1 - g)(1 + g) i γₜ,   o (1 - o) τ δ)
        ∂L/∂V = Σₜ ηₜᵀ (o τ)

    The output is one vector: h of all steps, then the final c.

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
        batch_sizes: Sizes,
        reverse: bool,
        packed: bool,
        grad_enabled: bool | None,
    ) -> Tensor:
        def cell(a: Tensor, h: Tensor, c: Tensor) -> Tensors:
            i, f, g, o = _lstm_gates(F.linear(h, w_hh, b_hh) + a)
            c = f * c + i * g
            h = o * c.tanh()
            return (h if w_hr is None else h @ w_hr.mT), c

        tensors = [x for x in (input, h0, c0, w_ih, w_hh, b_ih, b_hh) if x is not None]
        if grad_enabled is not None and w_hr is None and _onednn_supports(tensors):
            return _lstm_by_onednn(*tensors, batch_sizes=batch_sizes, reverse=reverse, grad_enabled=grad_enabled)
        hidden, (_, c) = _scan_forward(cell, F.linear(input, w_ih, b_ih), (h0, c0), batch_sizes, reverse)
        return _concatenate(hidden, c)

    def hidden(output: Tensor, w_hh: Tensor, batch_sizes: Sizes) -> Tensor:
        return _split(output, batch_sizes, w_hh)[0]

    def backward_scan(
        grad: Tensor,
        a: Tensor,
        previous: Tensor,
        c0: Tensor,
        w_hh: Tensor,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        batch_sizes: Sizes,
        reverse: bool,
    ) -> BackwardScan:
        grad_hidden, grad_c = _split(grad, batch_sizes, w_hh)
        a_plus_m = torch.addmm(a if b_hh is None else a + b_hh, previous, w_hh.mT).conj().split(batch_sizes)
        w, v = w_hh.conj(), None if w_hr is None else w_hr.conj()

        def forward_step(t: int, c_before: Tensor) -> tuple[Tensors, Tensors]:
            i, f, g, _ = gates = _lstm_gates(a_plus_m[t])
            c = f * c_before + i * g
            return (c,), (*gates, c_before, c.tanh())

        _, values = _scan(forward_step, (c0.conj(),), batch_sizes, reverse)
        inside = list(zip(*values, strict=True))  # by step

        def step(t: int, eta: Tensor, gamma: Tensor) -> tuple[Tensors, Tensors]:
            i, f, g, o, c_before, tau = inside[t]
            delta = eta if v is None else eta @ v
            gamma = gamma + (1 - tau) * (1 + tau) * o * delta
            alpha = torch.cat(
                [
                    i * (1 - i) * g * gamma,
                    f * (1 - f) * c_before * gamma,
                    (1 - g) * (1 + g) * i * gamma,
                    o * (1 - o) * tau * delta,
                ],
                1,
            )
            return (alpha @ w, f * gamma), (alpha, eta, o * tau)

        return _scan_backward(step, grad_hidden, batch_sizes, reverse, grad_c)

    def grad_c0(backward_scan: BackwardScan) -> Tensor:
        return backward_scan.grad_initial[1]

    def grad_w_hr(backward_scan: BackwardScan) -> Tensor:
        _, eta, o_tau = backward_scan.outputs
        return torch.cat(eta).mT @ torch.cat(o_tau)


class StepwiseLSTMFunction(LSTMFunction):
    """For inputs that torch computes step by step. Autocast on the CPU then does not cast the states."""

    autocast = {"cuda": "lower_precision"}


def _lstm_gates(a_plus_m: Tensor) -> Tensors:
    i, f, g, o = a_plus_m.chunk(4, 1)
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


def _concatenate(hidden: Tensor, c: Tensor) -> Tensor:
    """h of all steps and the final c as one vector, because a rule has one output."""
    return torch.cat([hidden.reshape(-1), c.reshape(-1)])


def _split(output: Tensor, batch_sizes: Sizes, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_concatenate`."""
    gates_size, h_size = w_hh.shape
    hidden, c = output.tensor_split([sum(batch_sizes) * h_size])
    return hidden.view(sum(batch_sizes), h_size), c.view(batch_sizes[0], gates_size // 4)


def _onednn_supports(tensors: Tensors) -> bool:
    """The tensors are plain and on the CPU, and no transform wraps them: it cannot transform oneDNN's kernel."""
    plain = all(x.is_cpu and type(x) in (Tensor, Parameter) and unwrap_functorch(x) is x for x in tensors)
    return plain and tensors[0].dtype in (torch.float32, torch.bfloat16, torch.float16)


def _lstm_by_onednn(
    input: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor, batch_sizes: Sizes, reverse: bool, grad_enabled: bool
) -> Tensor:
    """The output of the rule by torch's kernel, which runs a step after the other in one call."""
    x = input.detach().reshape(len(batch_sizes), batch_sizes[0], input.shape[-1])
    x = x.flip(0) if reverse else x
    states = [h0.detach().unsqueeze(0), c0.detach().unsqueeze(0)]
    has_biases = len(weights) == 4
    with torch.set_grad_enabled(grad_enabled):  # by grad mode torch chooses the kernel for training or inference
        hidden, _, c = torch.lstm(
            x, states, [w.detach() for w in weights], has_biases, 1, 0.0, grad_enabled, False, False
        )
    return _concatenate(hidden.flip(0) if reverse else hidden, c)


# --- the functions ---


def _run_direction(
    rule: Any,
    input: Tensor,
    states: Tensors,
    weights: Sequence[Any],
    batch_sizes: Sizes,
    reverse: bool,
    packed: bool,
) -> list[Tensor]:
    """One layer in one direction: h of all steps, and the final states."""
    settings: tuple[Any, ...] = (batch_sizes, reverse, packed)
    if rule.gates == 4:  # an LSTM
        weights = [*weights, *[None] * (5 - len(weights))]
        settings = (*settings, torch.is_grad_enabled() if rule is LSTMFunction else None)
    tensors = [input, *states, *weights]
    if "cpu" not in rule.autocast and input.is_cpu and torch.is_autocast_enabled("cpu"):
        # torch casts the products of each step to the lower precision, but not the states. Here neither is cast.
        lower = torch.get_autocast_dtype("cpu")
        tensors = [x.to(torch.promote_types(x.dtype, lower)) if isinstance(x, Tensor) else x for x in tensors]
    output = rule.apply(*tensors, *settings)
    if rule.gates == 4:
        hidden, c = _split(output, batch_sizes, weights[1])
        return [hidden, _final_hidden(hidden, batch_sizes, reverse), c]
    return [output, _final_hidden(output, batch_sizes, reverse)]


def _final_hidden(hidden: Tensor, batch_sizes: Sizes, reverse: bool) -> Tensor:
    """The final h of each sequence."""
    n = batch_sizes[0]
    if reverse or batch_sizes[-1] == n:
        return hidden[:n] if reverse else hidden[-n:]
    lengths = [sum(size > k for size in batch_sizes) for k in range(n)]
    last_rows = [sum(batch_sizes[: length - 1]) + k for k, length in enumerate(lengths)]
    return hidden.index_select(0, torch.tensor(last_rows, device=hidden.device))


def _shapes_match(rule: Any, input: Tensor, states: Tensors, weights: Sequence[Any], n: int) -> bool:
    """The weights have the shapes that the input and the states need. ``n``: the number of sequences."""
    h, c = states[0].shape[-1], states[-1].shape[-1]
    gates_size = rule.gates * c
    shapes = [(gates_size, input.shape[-1]), (gates_size, h), (gates_size,), (gates_size,), (h, c)]
    match = [x is None or x.shape == shape for x, shape in zip(weights, shapes, strict=False)]
    return all(match) and all(x.dim() == 2 and len(x) == n for x in states)


_PARAMETERS = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")


class Layers(NamedTuple):
    """The arguments of a recurrent function, checked and in one form."""

    rule: Any
    input: Tensor  # (T, N, in), or packed (Σ batch_sizes, in)
    states: Tensors  # each (layers · directions, N, size)
    weights: list[list[Any]]  # by layer and direction
    batch_sizes: Sizes
    packed: bool
    directions: int
    dropout: float
    batch_first: bool
    projected: bool


def _parse(rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layers:
    """Read the arguments of one of torch's two signatures: for a padded tensor, or for packed sequences."""
    # the fourth argument is has_biases, or for packed sequences params
    packed = "data" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
    names = ("data", "batch_sizes", *_PARAMETERS) if packed else ("input", *_PARAMETERS, "batch_first")
    given = dict(zip(names, args, strict=True) if args else (), **kwargs)
    input, batch_first = given[names[0]], not packed and given["batch_first"]
    hx, params, has_biases, num_layers, p, train, bidirectional = (given[name] for name in _PARAMETERS)
    flags = (has_biases, train, bidirectional, batch_first)
    if any(type(flag) is not bool for flag in flags) or not isinstance(p, (int, float)):
        raise TypeError("has_biases, train, bidirectional and batch_first must be bools, dropout a number")
    states = [hx] if isinstance(hx, Tensor) else hx
    input = input.transpose(0, 1) if batch_first else input
    if not packed and input.dim() == 2 and rule is not GRUFunction:  # torch expands one sequence to all states
        input = input.unsqueeze(1).expand(-1, states[0].shape[1], -1)
    if input.dim() != 3 - packed:
        raise RuntimeError(f"expected an input with {3 - packed} axes, got {input.dim()}")
    batch_sizes = tuple(given["batch_sizes"].tolist()) if packed else (input.shape[1],) * len(input)
    projected = states[0].shape[2] != states[-1].shape[2]
    per_direction, directions = 2 + 2 * has_biases + projected, 1 + bidirectional
    count = directions * num_layers
    if not batch_sizes or len(params) != per_direction * count:
        raise RuntimeError(
            f"expected at least one step and {per_direction * count} weights, got {len(batch_sizes)} steps and "
            f"{len(params)} weights"
        )
    if any(len(x) != count for x in states):
        raise ShapeMismatchError(f"expected hidden states of {count} layers and directions")
    stepwise = len(set(batch_sizes)) > 1 or (packed and PACKED_LSTM_RUNS_STEP_BY_STEP)
    if rule is LSTMFunction and stepwise and not projected:
        rule = StepwiseLSTMFunction
    weights = [list(params[per_direction * k : per_direction * (k + 1)]) for k in range(count)]
    if not has_biases:
        weights = [[*w[:2], None, None, *w[2:]] for w in weights]
    p = p if train else 0.0
    return Layers(rule, input, states, weights, batch_sizes, packed, directions, p, batch_first, projected)


def _run_layers(rule: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Layers, each of one or two directions, with dropout between them."""
    layers = _parse(rule, args, kwargs)
    input, batch_sizes = layers.input, layers.batch_sizes
    final: list[Tensors] = []
    while len(final) < len(layers.weights):
        if final and layers.dropout:
            input = dropout(input, layers.dropout)
        outputs = []
        for reverse in (False, True)[: layers.directions]:
            weights, states = layers.weights[len(final)], [x[len(final)] for x in layers.states]
            if not _shapes_match(layers.rule, input, states, weights, batch_sizes[0]):
                # torch's kernel would read beyond the end of a tensor
                raise ShapeMismatchError("the shapes of input, hidden states and weights do not match")
            hidden, *last = _run_direction(
                layers.rule, input, states, weights, batch_sizes, reverse, layers.packed
            )
            if layers.projected:  # autocast casts h, but not c
                h, c = last
                last = [h, c.to(torch.promote_types(c.dtype, layers.states[1].dtype))]
            outputs.append(hidden if layers.packed else hidden.unflatten(0, (len(batch_sizes), batch_sizes[0])))
            final.append(last)
        input = torch.cat(outputs, -1)
    output = input.transpose(0, 1) if layers.batch_first else input
    return output, *map(torch.stack, zip(*final, strict=True))


def _make_layers(name: str, rule: type[Recurrence], description: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return _run_layers(rule, *args, **kwargs)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = f"""{description}, as `torch.{name}`: the output of the last layer, and all final states.

    Takes (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first), or for packed
    sequences (data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional).

    Shapes: input (T, N, in), with batch_first (N, T, in), data (Σ batch_sizes, in); hx (layers · directions, N,
    size), for an LSTM a pair (h, c); params, for each layer and direction: the weights of input and h, their
    biases, and V if h and c have different sizes. The output has directions · size features.

    Raises:
        RuntimeError: there is no step, or shapes do not match.
    """
    return with_torch_errors(run)


def _make_cell(name: str, rule: type[Recurrence], layer: str) -> Callable[..., Any]:
    def run(
        input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        states = [hx] if isinstance(hx, Tensor) else hx
        biases = [
            b if b is None or b.dim() == 1 else b.broadcast_to(1, len(w_hh)).squeeze(0) for b in (b_ih, b_hh)
        ]
        weights = [w_ih, w_hh, *biases]
        if input.dim() != 2 or not _shapes_match(rule, input, states, weights, len(input)):
            raise RuntimeError("the shapes of input, hidden states and weights do not match")
        _, *final = _run_direction(rule, input, states, weights, (len(input),), False, True)
        final = [x.clone() for x in final]  # so that each has its own memory
        return final[0] if isinstance(hx, Tensor) else tuple(final)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = (
        f"""One step of `{layer}`, as `torch.{name}`. Shapes: input (N, in), hx and the result (N, size)."""
    )
    return with_torch_errors(run)


rnn_tanh = _make_layers("rnn_tanh", RNNFunction, "Elman's recurrence with tanh")
rnn_relu = _make_layers("rnn_relu", ReLURNNFunction, "Elman's recurrence with ReLU")
gru = _make_layers("gru", GRUFunction, "Gated recurrent units")
lstm = _make_layers("lstm", LSTMFunction, "Long short-term memory")
rnn_tanh_cell = _make_cell("rnn_tanh_cell", RNNFunction, "rnn_tanh")
rnn_relu_cell = _make_cell("rnn_relu_cell", ReLURNNFunction, "rnn_relu")
gru_cell = _make_cell("gru_cell", GRUFunction, "gru")
lstm_cell = _make_cell("lstm_cell", StepwiseLSTMFunction, "lstm")


def _sample_weights(t: TensorFactory, gates: int, width: int, h: int, size: int, bias: bool) -> list[Tensor]:
    shapes = [(gates * size, width), (gates * size, h), *[(gates * size,)] * (2 * bias)]
    return [t(*shape) / size**0.5 for shape in shapes] + [t(h, size)] * (h != size)


def _sample_inputs_of_layers(gates: int, t: TensorFactory) -> list[SampleInput]:
    h = 1 if gates == 4 else 2  # an LSTM with a projection
    pairs = [t(2, 2, 2), t(2, 2, 2)], [t(2, 2, h), t(2, 2, 2)]
    hx = [pair if gates == 4 else pair[0] for pair in pairs]
    two_directions = [*_sample_weights(t, gates, 1, 2, 2, True), *_sample_weights(t, gates, 1, 2, 2, True)]
    two_layers = [*_sample_weights(t, gates, 2, h, 2, False), *_sample_weights(t, gates, h, h, 2, False)]
    return [
        SampleInput(t(3, 2, 1), hx[0], two_directions, True, 1, 0.0, True, True, False),
        SampleInput(t(2, 2, 2), hx[1], two_layers, False, 2, 0.5, True, False, True),
    ]


def _benchmark_input_of_layers(gates: int, t: TensorFactory) -> SampleInput:
    hx = [t(1, 32, 256), t(1, 32, 256)] if gates == 4 else t(1, 32, 256)
    return SampleInput(
        t(32, 32, 128), hx, _sample_weights(t, gates, 128, 256, 256, True), True, 1, 0.0, True, False, False
    )


def _sample_input_of_cell(gates: int, t: TensorFactory, n: int, width: int, size: int, bias: bool) -> SampleInput:
    hx = [t(n, size), t(n, size)] if gates == 4 else t(n, size)
    return SampleInput(t(n, width), hx, *_sample_weights(t, gates, width, size, size, bias))


_SATURATED_CELL = (
    "as in torch: an infinite weight saturates the cell, and the previous step's gradient is 0 · ∞ = nan"
)
_GATES_COMPUTED = "for only a bias's gradient, inputs and weights are saved, to compute the gates that torch saves"

for _layer, _cell in ((rnn_tanh, rnn_tanh_cell), (rnn_relu, rnn_relu_cell), (gru, gru_cell), (lstm, lstm_cell)):
    _gates = {gru: 3, lstm: 4}.get(_layer, 1)
    register(
        _layer,
        sample_inputs=partial(_sample_inputs_of_layers, _gates),
        benchmark_input=partial(_benchmark_input_of_layers, _gates),
        random=True,
        expected_failures={"special_values": _SATURATED_CELL} if _layer is not rnn_relu else {},
    )
    register(
        _cell,
        sample_inputs=lambda t, gates=_gates: [
            _sample_input_of_cell(gates, t, 2, 3, 2, True),
            _sample_input_of_cell(gates, t, 3, 1, 2, False),
        ],
        benchmark_input=lambda t, gates=_gates: _sample_input_of_cell(gates, t, 128, 128, 256, True),
        expected_failures={"saves_no_more_than_torch": _GATES_COMPUTED},
    )
