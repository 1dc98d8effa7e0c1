"""Linear cross entropy in pieces: the laws of the table with room for few scores, and what they do not reach.

The oracle is cross entropy of the scores in one piece: torch's own in pieces has no second derivative (it gives
zero), no smoothing and no class probabilities.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import STRUCTURAL_NODES, nodes
from test_laws import DISTRIBUTED, verify_op
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from manualgrad import nn
from manualgrad.meter import saved_bytes
from manualgrad.ops import linear_cross_entropy as area
from manualgrad.registry import TensorFactory, ops
from manualgrad.verification import LAWS

manual: Any = getattr(nn.functional, "linear_cross_entropy")  # noqa: B009 (torch 2.11 has none)
Options: Any = area.LinearCrossEntropyOptions
OP = ops()["linear_cross_entropy"]
ROOM = 7


@pytest.fixture(autouse=True)
def room_for_few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(area, "MAX_LOGITS_PER_CHUNK", ROOM)


def in_one_piece(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **how: Any
) -> Tensor:
    scores = F.linear(input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
    return F.cross_entropy(scores.reshape(*input.shape[:-1], *linear_weight.shape[:-1]), target, **how)


def problem(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[list[Tensor], Tensor]:
    """Input, weight and bias, of which every gradient is needed, and a target with an ignored row."""
    make = TensorFactory(dtype)
    tensors = [make(5, 2), make(3, 2), make(3)][: 3 if bias else 2]
    return [x.requires_grad_() for x in tensors], torch.tensor([0, 2, -100, 1, 2])


def both(tensors: Sequence[Tensor], target: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """The function and the reference."""
    x, weight, *bias = tensors
    shift = bias[0] if bias else None
    return manual(x, weight, target, linear_bias=shift, **how), in_one_piece(x, weight, target, shift, **how)


def rules(output: Tensor) -> set[str]:
    return {name for name in nodes(output) if name not in STRUCTURAL_NODES}


@pytest.mark.parametrize("law", [law for law in LAWS if law != DISTRIBUTED])
@pytest.mark.parametrize("which", range(len(list(OP.sample_inputs(TensorFactory())))))
def test_law_in_pieces(law: str, which: int, device: str) -> None:
    verify_op(OP, which, device, law).raise_if_failed()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("more", [(), (2,)], ids=["plain", "high-dimensional"])
def test_the_oracles_derivatives_to_second_order(reduction: str, soft: bool, more: tuple[int, ...]) -> None:
    make = TensorFactory()
    for smoothing, weighted, biased in itertools.product((0.0, 0.2), (False, True), (False, True)):
        tensors = [make(5, 2), make(3, *more, 2), *([make(3, *more)] if biased else [])]
        tensors = [x.requires_grad_() for x in tensors]
        target = make(5, 3, *more).softmax(1) if soft else make.index(3, 5, *more)
        if not soft:
            target[1] = -100
        weight = make(3, low=0.5, high=2) if weighted else None
        found = []
        for loss in both(tensors, target, weight=weight, reduction=reduction, label_smoothing=smoothing):
            upstream = torch.linspace(-1, 1, loss.numel(), dtype=loss.dtype).reshape(loss.shape) - 0.3
            plain = torch.autograd.grad(loss, tensors, upstream, retain_graph=True)
            first = torch.autograd.grad(loss, tensors, upstream, create_graph=True)
            second = torch.autograd.grad(sum(x.sin().sum() for x in first), tensors)  # type: ignore[arg-type]
            found.append([loss, *plain, *first, *second])
        assert_close(found[0], found[1])


def test_one_row_alone() -> None:
    make = TensorFactory()
    tensors = [make(2).requires_grad_(), make(9, 2).requires_grad_()]
    for target in (torch.tensor(4), make(9).softmax(0)):
        for reduction in ("mean", "none"):
            a, b = both(tensors, target, reduction=reduction, label_smoothing=0.1)
            assert a.shape == b.shape
            assert_close((a, *torch.autograd.grad(a, tensors)), (b, *torch.autograd.grad(b, tensors)))
            assert "LinearCrossEntropyLossFunctionBackward" in rules(a) or reduction == "mean"


def test_what_is_right_is_differentiable_too() -> None:
    make = TensorFactory()
    tensors = [make(5, 2), make(3, 2), make(5, 3).softmax(1), make(3, low=0.5, high=2)]

    def loss(x: Tensor, weight: Tensor, target: Tensor, classes: Tensor, function: Any = manual) -> Tensor:
        return function(x, weight, target, weight=classes, label_smoothing=0.3)

    tensors = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(loss, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, tensors, check_fwd_over_rev=True)
    results = [torch.autograd.grad(loss(*tensors, function=f), tensors) for f in (manual, in_one_piece)]
    assert_close(results[0], results[1])


# --- gradients that the forward has formed ---


def test_which_rule() -> None:
    """Gradients are formed in the forward where the loss is one number and nothing observes the backward."""
    (x, weight, _), target = problem()
    once, again = "LinearCrossEntropyLossWithGradientsFunctionBackward", "LinearCrossEntropyLossFunctionBackward"
    assert rules(manual(x, weight, target)) == {once}
    assert rules(manual(x, weight, target, reduction="sum")) == {once}
    assert rules(manual(x, weight, target, reduction="none")) == {again}
    assert rules(manual(x, weight, torch.rand(5, 3, dtype=x.dtype, requires_grad=True))) == {again}
    assert rules(manual(x[:1], weight, target[:1])) == {
        "LinearFunctionBackward",
        "CrossEntropyLossFunctionBackward",
    }
    with torch.no_grad():
        assert_close(manual(x, weight, target), in_one_piece(x, weight, target))


def test_only_needed_slopes_are_kept() -> None:
    (x, weight), target = problem(bias=False)
    one = x.element_size()
    always = (x.numel() + weight.numel()) * one + target.numel() * 8  # for higher orders
    for needed, slopes in (((True, True), 10 + 6), ((True, False), 10), ((False, True), 6)):
        tensors = [t.detach().requires_grad_(need) for t, need in zip((x, weight), needed, strict=True)]
        assert saved_bytes(manual, *tensors, target).grand_total == always + slopes * one


def test_scores_are_not_kept() -> None:
    make = TensorFactory(torch.float32)
    tensors = [make(64, 4).requires_grad_(), make(512, 4).requires_grad_()]
    for reduction in ("none", "mean"):
        for target in (make.index(512, 64), make(64, 512).softmax(1)):
            kept = saved_bytes(lambda t=target, how=reduction: manual(*tensors, t, reduction=how)).grand_total
            assert kept - target.nbytes < 64 * 512 * 4 / 3


@pytest.mark.parametrize("scale", [1.0, 0.5, 65536.0])
def test_the_upstream_gradient_counts(scale: float) -> None:
    tensors, target = problem()
    found = []
    for loss in both(tensors, target):
        for tensor in tensors:
            tensor.grad = None
        for _ in range(2):  # the second into a gradient that exists
            (loss * scale).backward(retain_graph=True)
        found.append([tensor.grad for tensor in tensors])
    assert_close(found[0], found[1])


def test_backward_again_and_again() -> None:
    """The slopes are written over in the last backward alone."""
    tensors, target = problem()
    loss, oracle = both(tensors, target)
    expected = torch.autograd.grad(oracle, tensors)
    tripled = [3 * x for x in expected]
    assert_close(torch.autograd.grad(3 * loss, tensors, retain_graph=True), tripled)
    assert_close(torch.autograd.grad(3 * loss, tensors, create_graph=True), tripled)
    rows = torch.autograd.grad(
        loss, tensors, torch.tensor([3.0, 1.0]).double(), retain_graph=True, is_grads_batched=True
    )
    assert_close([x[0] for x in rows], tripled)
    assert_close(torch.autograd.grad(loss, tensors[1:2], retain_graph=True), expected[1:2])
    assert_close(torch.autograd.grad(3 * loss, tensors), tripled)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


def test_two_losses_of_one_head() -> None:
    tensors, target = problem()
    a, expected = both(tensors, target)
    b, more = both(tensors, target, reduction="sum", label_smoothing=0.1)
    found = torch.autograd.grad(2 * a + b * a, tensors)
    assert_close(found, torch.autograd.grad(2 * expected + more * expected, tensors))


def test_the_weights_gradient_is_the_slope_itself() -> None:
    """No second copy of what is as large as the weight; but one where it is read again, or somebody has it."""
    for retain in (False, True):
        (x, weight, _), target = problem()
        loss = manual(x, weight, target)
        kept = {t.data_ptr() for t in loss.grad_fn.saved_tensors if t is not None and t is not weight}
        (2 * loss).backward(retain_graph=retain)
        assert weight.grad is not None
        assert (weight.grad.data_ptr() in kept) is not retain

    tensors, target = problem()
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        loss = manual(*tensors[:2], target)
    copies = [tensor.clone() for tensor in seen]
    (2 * loss).backward()
    assert_close(seen, copies, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    tensors, target = problem()
    x, weight, bias = tensors

    def head(x: Tensor) -> Tensor:
        return manual(x.sin(), weight, target, linear_bias=bias)

    loss = checkpoint(head, x, use_reentrant=reentrant)
    assert isinstance(loss, Tensor)
    (3 * loss).backward()
    expected = torch.autograd.grad(3 * both((x.sin(), weight, bias), target)[1], tensors)
    assert_close([t.grad for t in tensors], list(expected))


def test_a_scaled_loss_keeps_small_gradients_of_float16() -> None:
    """Of 4096 rows each takes 1/4096 of the mean, which would vanish before the scale comes."""
    make = TensorFactory(torch.float16)
    x, weight, target = make(4096, 4), make(64, 4), make.index(64, 4096)
    found = []
    for dtype in (torch.float16, torch.float64):
        tensors = [t.to(dtype).requires_grad_() for t in (x * 1e-3, weight)]
        loss = manual(*tensors, target, options=Options(batch_chunk_size=1000))
        found.append([t.double() for t in torch.autograd.grad(loss, tensors, torch.tensor(16384.0).to(dtype))])
    assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_pieces_are_as_precise_as_one(dtype: torch.dtype) -> None:
    make = TensorFactory(dtype)
    values, target = [make(256, 16), make(64, 16) * 0.3, make(64)], make.index(64, 256)
    exact = [x.double().requires_grad_() for x in values]
    truth = torch.autograd.grad(in_one_piece(exact[0], exact[1], target, exact[2]), exact)
    for reduction in ("mean", "none"):
        errors = []
        functions: list[Any] = [manual, in_one_piece]
        for function in functions:
            tensors = [x.clone().requires_grad_() for x in values]
            more = {"options": Options(batch_chunk_size=4)} if function is manual else {}
            loss = function(*tensors[:2], target, linear_bias=tensors[2], reduction=reduction, **more)
            assert loss.dtype == dtype
            found = torch.autograd.grad(loss.mean(), tensors)
            assert [x.dtype for x in found] == [dtype] * 3
            errors.append([(x.double() - y).norm().item() for x, y in zip(found, truth, strict=True)])
        assert all(a <= 1.1 * b for a, b in zip(*errors, strict=True)), errors


# --- what does not count ---


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_ignored_row_leaves_no_trace(reduction: str, value: float) -> None:
    tensors, target = problem()
    found = []
    for fill in (value, 0.0):
        x = tensors[0].detach().clone()
        x[2] = fill
        leaves = [x.requires_grad_(), *tensors[1:]]
        loss = manual(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction)
        found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert not found[0][1][2].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(reduction: str) -> None:
    """All rows ignored, no weight, no rows: as torch's."""
    tensors, target = problem()
    zero = torch.zeros(3, dtype=torch.float64)
    for given, how in ((torch.full((5,), -100), {}), (target, {"weight": zero})):
        a, b = both(tensors, given, reduction=reduction, **how)
        assert_close(a, b, equal_nan=True)
        pairs = (torch.autograd.grad(loss.sum(), tensors) for loss in (a, b))
        assert_close(*pairs, equal_nan=True)
    x, weight, bias = tensors
    options = Options(batch_chunk_size=2)
    for empty in (target[:0], torch.zeros(0, 3).double()):
        a = manual(x[:0], weight, empty, linear_bias=bias, reduction=reduction, options=options)
        b = in_one_piece(x[:0], weight, empty, bias, reduction=reduction)
        assert_close(a, b, equal_nan=True)
        pairs = (torch.autograd.grad(loss.sum(), tensors) for loss in (a, b))
        assert_close(*pairs, equal_nan=True)


def test_nan_and_infinity_of_rows_that_count() -> None:
    tensors, target = problem()
    for value in (math.inf, math.nan):
        x = tensors[0].detach().clone()
        x[1] = value
        a, b = (loss.detach() for loss in both([x, *tensors[1:]], target, reduction="none"))
        assert_close(a, b, equal_nan=True)


# --- how many rows at a time ---


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has it since 2.13")
def test_options_are_read_as_torch_reads_them() -> None:
    methods = (None, "auto", "aspect_ratio", "aspect_ratio:3")
    for rows, method in itertools.product((None, 1, 3, 8, 999), methods):
        options = Options(batch_chunk_size=rows, chunking_method=method)
        for n, features, scores in itertools.product((1, 5, 64), (1, 3, 16), (2, 16, 100)):
            if rows is None and method == "auto":
                continue  # manualgrad chooses
            try:
                expected = options._adjust(n, features, scores, torch.float32).batch_chunk_size
            except ValueError:
                with pytest.raises(ValueError, match="pass one"):
                    area._chunk_size(options, n, features, scores)
            else:
                assert area._chunk_size(options, n, features, scores) == expected


def test_pieces_are_of_one_size_and_within_the_room() -> None:
    for n, scores in itertools.product((1, 2, 5, 64), (1, 3, 7, 100)):
        size = area._chunk_size(None, n, 2, scores)
        assert size == 1 or (size - 1) * scores < ROOM
        assert size * (math.ceil(n / size) - 1) < n


def test_options_make_no_difference() -> None:
    tensors, target = problem()
    expected = both(tensors, target)[1]
    for options in (
        Options(),
        Options(batch_chunk_size=2, allow_retain_graph=True),
        Options(chunking_method="aspect_ratio", acc_policy="compact"),
    ):
        found = manual(*tensors[:2], target, linear_bias=tensors[2], options=options)
        assert_close(found, expected)
        assert_close(
            torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors, retain_graph=True)
        )


# --- side effects ---


def test_bad_input_is_refused() -> None:
    (x, weight, bias), target = problem()
    wrong: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (RuntimeError, (x[None], weight, target), {}),
        (RuntimeError, (x, weight[0], target), {}),
        (RuntimeError, (x[:, :1], weight, target), {}),
        (RuntimeError, (x, weight, target), {"linear_bias": bias[:2]}),
        (RuntimeError, (x[0], weight[None], target[0]), {}),
        (RuntimeError, (x, weight.float(), target), {}),
        (RuntimeError, (x, weight, target.int()), {}),
        (RuntimeError, (x, weight, torch.zeros(5, 3).double()), {"ignore_index": 1}),
        (RuntimeError, (x, weight, torch.zeros(5, 3, dtype=torch.int64)), {}),
        (RuntimeError, (x, weight, target), {"weight": torch.ones(2).double()}),
        (RuntimeError, (x, weight, target), {"weight": torch.ones(3).double().requires_grad_()}),
        (RuntimeError, (x, weight, target), {"label_smoothing": 1.5}),
        ((RuntimeError, ValueError), (x, weight, target[:4]), {}),
        (ValueError, (x, weight, target), {"reduction": "most"}),
        (IndexError, (x, weight, target + 1), {}),
    ]
    for error, args, how in wrong:
        with pytest.raises(error):
            manual(*args, **how)


def test_nothing_is_written_into() -> None:
    tensors, target = problem()
    weight = torch.rand(3, dtype=torch.float64)
    copies = [x.detach().clone() for x in (*tensors, target, weight)]
    x, w, bias = tensors
    manual(x, w, target, linear_bias=bias, weight=weight, label_smoothing=0.1).backward()
    assert_close([x.detach() for x in (*tensors, target, weight)], copies, rtol=0, atol=0)


def test_parameters_of_every_layout() -> None:
    tensors, target = problem(bias=False)
    x, weight = (t.detach().mT.contiguous().mT for t in tensors)
    leaves = [torch.nn.Parameter(x), torch.nn.Parameter(weight)]
    found, oracle = both(leaves, target)
    assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(oracle, leaves))


def test_compiled_in_pieces() -> None:
    tensors, target = problem(torch.float32)
    for how in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):

        def loss(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, how: Any = how) -> Tensor:
            return manual(x, weight, target, linear_bias=bias, **how).sum()

        compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found = compiled(*tensors, target)
        expected = both(tensors, target, **how)[1].sum()
        assert_close(found, expected)
        assert_close(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors))


def test_traced_and_without_data() -> None:
    tensors, target = problem(bias=False)
    expected = torch.autograd.grad(both(tensors, target)[1], tensors)
    traced = make_fx(lambda *given: torch.autograd.grad(manual(*given, target), given))(*tensors)
    assert_close(traced(*tensors), expected)
    on_meta = [x.detach().to("meta").requires_grad_() for x in tensors]
    assert manual(*on_meta, target.to("meta")).shape == ()


def test_module() -> None:
    """Also where torch has none."""
    torch.manual_seed(0)
    space: Any = nn
    for more in ((), (2,)):
        module = space.LinearCrossEntropyLoss(2, 3, out_features=more, bias=True, label_smoothing=0.1).double()
        x, target = TensorFactory()(5, 2).requires_grad_(), TensorFactory().index(3, 5, *more)
        linear = module.linear
        shape = (3, *more)
        weight, bias = linear.weight.view(*shape, 2), linear.bias.view(shape)
        expected = in_one_piece(x, weight, target, bias, label_smoothing=0.1)
        leaves = [x, *module.parameters()]
        gradients = torch.autograd.grad(expected, leaves)
        for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            found = same(x, target)
            assert_close(found, expected)
            assert_close(torch.autograd.grad(found, [x, *same.parameters()]), gradients)
        assert list(module.state_dict()) == ["linear.weight", "linear.bias"]
    with pytest.raises(RuntimeError):
        space.LinearCrossEntropyLoss(2, 3, weight=torch.ones(2))
    with pytest.raises(RuntimeError):
        space.LinearCrossEntropyLoss(2, 3, label_smoothing=2.0)
