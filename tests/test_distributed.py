"""DDP, FSDP2 and tensor parallelism: two processes have the gradients of one process with the whole batch.

The reference is one process with torch's layers, in float64. Recomputation is enabled for outputs of any size.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import Module, Sequential
from torch.nn import functional as torch_functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

import manualgrad
from manualgrad import recomputation
from manualgrad.nn import LinearCrossEntropyOptions
from manualgrad.nn import functional as manual_functional
from manualgrad.ops.normalization import sync_batch_norm
from manualgrad.registry import Op, SampleInput, TensorFactory

Make = Callable[[Any], Module]

ROWS, LENGTH, WIDTH, WORDS, PIECES = 12, 4, 8, 10, 3

# --- models, with the layers of torch.nn or manualgrad.nn ---


class Block(Module):
    """The linear layers recompute their inputs, from a norm with weights too."""

    def __init__(self, nn: Any) -> None:
        super().__init__()
        self.norm, self.act, self.up = nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        self.last, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.last(self.up(self.act(self.norm(x)))))


class Checkpointed(Module):
    def __init__(self, inner: Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Attentive(Module):
    """Attention with a matrix for each of queries, keys and values."""

    def __init__(self, nn: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, vdim=2 * WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, torch.cat([x, x.sin()], -1))[0]


class Twice(Module):
    """One network called twice, before one backward."""

    def __init__(self, net: Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.net(x.flip(1)).sigmoid()


class Language(Module):
    """Predicts the next word. With manualgrad the linear layer and the loss are computed in chunks."""

    def __init__(self, nn: Any) -> None:
        super().__init__()
        self.words, self.block, self.norm = nn.Embedding(WORDS, WIDTH), Block(nn), nn.LayerNorm(WIDTH)
        self.head = nn.Parameter(torch.randn(WORDS, WIDTH))
        self.is_manual = nn is manualgrad.nn

    def forward(self, x: Tensor) -> Tensor:
        words = (x[..., 0].abs() * 100).long() % WORDS
        hidden = self.norm(self.block(self.words(words)))[:, :-1].flatten(0, 1)
        target = words[:, 1:].flatten()
        if self.is_manual:
            options = LinearCrossEntropyOptions(batch_chunk_size=5)
            return manual_functional.linear_cross_entropy(hidden, self.head, target, options=options)
        return torch_functional.cross_entropy(torch_functional.linear(hidden, self.head), target)


class Unused(Module):
    """Has parameters without a gradient."""

    def __init__(self, nn: Any) -> None:
        super().__init__()
        self.used, self.spare = Block(nn), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def blocks(nn: Any) -> Module:
    return Sequential(Block(nn), Block(nn), nn.Linear(WIDTH, WIDTH))


def transformer(nn: Any) -> Module:
    """Each layer ends with a norm. The next one computes queries, keys and values from its output."""
    return Sequential(
        *[nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, "gelu", batch_first=True) for _ in range(2)]
    )


def checkpointed(make: Make, nn: Any) -> Module:
    return Sequential(*[Checkpointed(layer) for layer in make(nn).children()])


def batch_normed(nn: Any) -> Module:
    return Sequential(
        nn.Flatten(0, 1), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
    )


MODELS: dict[str, Make] = {
    "blocks": blocks,
    "transformer": transformer,
    "attention": Attentive,
    "language model": Language,
    "called twice": lambda nn: Twice(blocks(nn)),
    "checkpointed": partial(checkpointed, blocks),
    "transformer, checkpointed": partial(checkpointed, transformer),
    "checkpointed, called twice": lambda nn: Twice(checkpointed(blocks, nn)),
}


def seeded(make: Make, nn: Any, dtype: torch.dtype = torch.float64) -> Module:
    """Return a model with random weights, also in norms. They are the same for torch.nn and manualgrad.nn."""
    torch.manual_seed(0)
    model = make(nn).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def manual_models(make: Make) -> Iterator[tuple[str, Module]]:
    yield "manualgrad.nn", seeded(make, manualgrad.nn)
    yield "convert", manualgrad.convert(seeded(make, torch.nn), functional=True)


def examples() -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def backward(model: Module, x: Tensor) -> None:
    """Run the backward of a mean over the examples."""
    y = model(x)
    (y if y.dim() == 0 else y.square().mean()).backward()


def gradients(model: Module) -> list[Tensor]:
    """Return the full gradient of every parameter, or zero if it has none."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


def reference_gradients(make: Make, x: Tensor) -> list[Tensor]:
    model = seeded(make, torch.nn)
    backward(model, x)
    return gradients(model)


@contextlib.contextmanager
def case(*names: object) -> Iterator[None]:
    """Add the names of the case to an exception."""
    try:
        yield
    except Exception as error:
        error.add_note(f"the case: {', '.join(map(str, names))}")
        raise


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    assert_close(list(found), list(expected), rtol=1e-10, atol=1e-12)


# --- data parallelism ---


def data_parallel(rank: int) -> None:
    """DistributedDataParallel."""
    x = examples()
    here = x.chunk(2)[rank]
    options: tuple[dict[str, bool], ...] = ({}, {"static_graph": True, "gradient_as_bucket_view": True})
    ways = [(name, make, option) for name, make in MODELS.items() for option in options]
    for name, make, option in [*ways, ("unused", Unused, {"find_unused_parameters": True})]:
        for origin, model in manual_models(make):
            with case("DDP", name, option, origin):
                backward(DistributedDataParallel(model, **option), here)
                same(gradients(model), reference_gradients(make, x))
    for origin, model in manual_models(blocks):
        with case("DDP", "accumulation", origin):
            replica = DistributedDataParallel(model)
            for i, piece in enumerate(here.chunk(PIECES)):
                with contextlib.nullcontext() if i == PIECES - 1 else replica.no_sync():
                    backward(replica, piece)
            same(gradients(model), [PIECES * g for g in reference_gradients(blocks, x)])
    halves = [seeded(batch_normed, torch.nn) for _ in range(2)]
    for half, part in zip(halves, x.chunk(2), strict=True):
        backward(half, part)
    for origin, model in manual_models(batch_normed):
        with case("DDP", "batch norm of each half", origin):
            backward(DistributedDataParallel(model), here)
            same(gradients(model), [(a + b) / 2 for a, b in zip(*map(gradients, halves), strict=True)])
            assert_close(dict(model.named_buffers()), dict(halves[rank].named_buffers()))
    for origin, model in manual_models(batch_normed):
        with case("DDP", "batch norm of both", origin):
            model.get_submodule("2").forward = partial(sync_forward, model.get_submodule("2"))
            backward(DistributedDataParallel(model), here)
            same(gradients(model), reference_gradients(batch_normed, x))


def sync_forward(norm: Any, x: Tensor) -> Tensor:
    """Do what SyncBatchNorm does: the module itself refuses the CPU."""
    synced: Any = sync_batch_norm
    statistics = norm.running_mean, norm.running_var
    return synced(x, norm.weight, norm.bias, *statistics, norm.eps, norm.momentum, dist.group.WORLD, 2)


WRAPPING: dict[str, Callable[[Module], bool]] = {
    "whole": lambda layer: False,
    "by block": lambda layer: isinstance(layer, (Block, torch.nn.TransformerEncoderLayer)),
    "by checkpoint": lambda layer: isinstance(layer, Checkpointed),
    "by layer": lambda layer: (
        any(True for _ in layer.parameters(recurse=False))
        and not isinstance(layer, NonDynamicallyQuantizableLinear)  # the attention around it reads its weight
    ),
    "norms only": lambda layer: isinstance(layer, (torch.nn.LayerNorm, torch.nn.RMSNorm)),
}


def sharded(model: Module, select: Callable[[Module], bool], **options: Any) -> Any:
    for layer in list(model.modules()):
        if layer is not model and select(layer):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def wrappings(model: Module) -> dict[str, Callable[[Module], bool]]:
    """Return the ways that differ for this model."""
    layers = list(model.modules())[1:]
    return {way: select for way, select in WRAPPING.items() if way == "whole" or any(map(select, layers))}


def fully_sharded(rank: int) -> None:
    """FSDP2: `fully_shard`."""
    mesh, x = init_device_mesh("cpu", (2,)), examples()
    here = x.chunk(2)[rank]
    for name, make in MODELS.items():
        expected = reference_gradients(make, x)
        for way, select in wrappings(make(torch.nn)).items():
            for reshard, (origin, model) in zip((True, False), manual_models(make), strict=True):
                with case("FSDP2", name, way, f"{reshard=}", origin):
                    backward(sharded(model, select, mesh=mesh, reshard_after_forward=reshard), here)
                    same(gradients(model), expected)
    expected = reference_gradients(blocks, x)
    for way, select in wrappings(blocks(torch.nn)).items():
        for reshard in (True, False):
            with case("FSDP2", way, f"{reshard=}"):
                model = seeded(blocks, manualgrad.nn)
                shards: FSDPModule = sharded(model, select, mesh=mesh, reshard_after_forward=reshard)
                for i, piece in enumerate(here.chunk(PIECES)):  # accumulated, then reduced
                    shards.set_requires_gradient_sync(i == PIECES - 1)
                    backward(model, piece)
                loss = model(here).square().mean()
                loss.backward(retain_graph=True)  # two backwards of one graph
                loss.backward()
                same(gradients(model), [(PIECES + 2) * g for g in expected])
    mixed_precision(mesh, x, here)


def mixed_precision(mesh: DeviceMesh, x: Tensor, here: Tensor) -> None:
    """bfloat16, with sums over processes in float32: the error is at most 1.1 times that of torch's layers."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in ("blocks", "transformer", "language model"):
        make = MODELS[name]
        exact = torch.cat([g.flatten() for g in reference_gradients(make, x)])
        for way, select in wrappings(make(torch.nn)).items():

            def error(nn: Any, make: Make = make, select: Any = select, exact: Tensor = exact) -> float:
                model = sharded(seeded(make, nn, torch.float32), select, mesh=mesh, mp_policy=policy)
                backward(model, here.float())
                found = gradients(model)
                assert {g.dtype for g in found} == {torch.float32}
                return float((torch.cat([g.flatten() for g in found]) - exact).norm())

            with case("FSDP2 in bfloat16", name, way):
                assert error(manualgrad.nn) <= 1.1 * error(torch.nn)


# --- tensor parallelism: weights are sharded, and rules get DTensors ---


class Gated(Module):
    def __init__(self, nn: Any) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(WIDTH, 16),
            nn.Linear(WIDTH, 16, bias=False),
            nn.Linear(16, WIDTH),
        )
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Attention(Module):
    def __init__(self, nn: Any, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.causal = causal
        self.attend = nn.functional.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        return self.out(self.attend(*heads, is_causal=self.causal).transpose(1, 2).contiguous().flatten(-2))


class Layer(Module):
    def __init__(self, nn: Any, causal: bool) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(WIDTH), Attention(nn, causal)
        self.between, self.mlp = nn.RMSNorm(WIDTH), Gated(nn)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Words(Module):
    """Predicts the next word."""

    def __init__(self, nn: Any, causal: bool) -> None:
        super().__init__()
        self.words, self.layer, self.norm = nn.Embedding(WORDS, WIDTH), Layer(nn, causal), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.loss = nn.functional.cross_entropy

    def forward(self, x: Tensor) -> Tensor:
        words = (x[..., 0].abs() * 100).long() % WORDS
        scores = self.head(self.norm(self.layer(self.words(words))))
        return self.loss(scores.flatten(0, 1), words.roll(-1, 1).flatten())


def mlp(nn: Any) -> Module:
    return Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))


def plans(local: bool) -> dict[str, tuple[Make, dict[str, Any]]]:
    """Return models and their sharding plans. Activations between layers are DTensors unless `local`."""
    columns = partial(ColwiseParallel, use_local_output=local)
    gated = {"gate": columns(), "up": columns(), "down": RowwiseParallel()}
    attention = {"query": columns(), "key": columns(), "value": columns(), "out": RowwiseParallel()}
    # between attention and MLP the positions of a text are sharded
    places, everywhere = (Shard(1),), (Replicate(),)
    gathered = PrepareModuleInput(input_layouts=places, desired_input_layouts=everywhere)
    layer = {
        "before": SequenceParallel(),
        "attention": gathered,
        **{f"attention.{name}": style for name, style in attention.items()},
        "attention.out": RowwiseParallel(output_layouts=Shard(1), use_local_output=local),
        "between": SequenceParallel(),
        "mlp": gathered,
        **{f"mlp.{name}": style for name, style in gated.items()},
        "mlp.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=local),
    }
    words = {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=local),
        **{f"layer.{name}": style for name, style in layer.items()},
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    return {
        "MLP": (mlp, {"0": columns(), "2": RowwiseParallel()}),
        "gated MLP": (Gated, gated),
        "attention": (partial(Attention, causal=local), attention),  # torch makes a causal mask that is no DTensor
        "words": (partial(Words, causal=local), words),
    }


def tensor_parallel(rank: int) -> None:
    """`parallelize_module`: the gradients of sharded weights and of the input."""
    mesh, x = init_device_mesh("cpu", (2,)), examples()
    kernel = partial(sdpa_kernel, SDPBackend.MATH)  # the only backend that torch can shard on the CPU
    for local in (True, False):
        for name, (make, plan) in plans(local).items():
            if name in ("attention", "words") and torch.__version__ < TorchVersion("2.13"):
                continue  # these versions cannot flatten a sharded axis
            expected = seeded(make, torch.nn)
            backward(expected, there := x.clone().requires_grad_())
            for origin, model in manual_models(make):
                with case("tensor parallel", name, f"{local=}", origin), loss_parallel(), kernel():
                    backward(parallelize_module(model, mesh, dict(plan)), here := x.clone().requires_grad_())
                    same(gradients(model), gradients(expected))
                    assert_close(here.grad, there.grad)
    make, plan = plans(local=True)["gated MLP"]
    expected = reference_gradients(make, x)
    for shape in ((2, 1), (1, 2)):
        with case("FSDP2 and tensor parallel", shape):
            grid = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
            model = parallelize_module(seeded(make, manualgrad.nn), grid["tensor"], plan)
            fully_shard(model, mesh=grid["data"])
            backward(model, x.chunk(shape[0])[grid.get_local_rank("data")])
            same(gradients(model), expected)


GROUPS = (data_parallel, fully_sharded, tensor_parallel)


def process(rank: int, group: Callable[[int], None], rendezvous: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # a linear layer does
    torch.set_num_threads(1)
    recomputation.MIN_ELEMENTS = 0
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    group(rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_two_processes_have_the_gradients_of_one(group: Callable[[int], None], tmp_path: Path) -> None:
    arguments = (group, str(tmp_path / "rendezvous"))
    mp.spawn(process, args=arguments, nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


# --- every operation with DTensors ---


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A mesh of one process. The sharding of operations is decided like for many."""
    rendezvous = tmp_path_factory.mktemp("mesh") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


Placed = Callable[[Tensor], Tensor]


def derived(
    function: Callable[..., Any], call: SampleInput, first: Placed, differentiable: Placed, others: Placed
) -> list[Tensor]:
    """Return the value and the gradients for these placements of the arguments."""
    leaves = call.differentiable_paths()
    values = {place: (differentiable if place in leaves else others)(call[place]) for place in call.tensor_paths()}
    values[leaves[0]] = first(call[leaves[0]])
    for place in leaves:
        values[place] = values[place].detach().clone().requires_grad_()
    placed = call.replace(values.keys(), values.values())
    y = function(*placed.args, **placed.kwargs)
    y = y[0] if isinstance(y, tuple) else y
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    upstream = differentiable(upstream)
    found = torch.autograd.grad(y, [values[place] for place in leaves], upstream)
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in (y.detach(), *found)]


@pytest.mark.filterwarnings("ignore")  # torch warns about the cost of redistribution
def test_rules_take_dtensors_wherever_torch_does(op: Op, mesh: DeviceMesh) -> None:
    def replicated(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Replicate()])

    def sharded_first(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0) if tensor.dim() else Replicate()])

    def plain(tensor: Tensor) -> Tensor:
        return tensor

    call = next(iter(op.sample_inputs(TensorFactory())))
    if op.random or not call.differentiable_paths():
        pytest.skip("nothing to compare")
    compared = 0
    for way in (
        (replicated, replicated, replicated),
        (sharded_first, replicated, replicated),
        (replicated, replicated, plain),
    ):
        try:
            derived(op.reference, call, *way)
        except Exception:
            continue
        same(derived(op.function, call, *way), derived(op.function, call, plain, plain, plain))
        compared += 1
    if not compared:
        pytest.skip("torch supports no DTensors here")
