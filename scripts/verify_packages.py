"""Run `manualgrad.verify` on autograd.Functions of published packages, and print a table of the laws they break.

Each package is installed into a separate folder, without its dependencies. Each Function is tested in a separate
process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from pydantic import PositiveFloat
from pydantic_settings import CliSuppress
from torch import Tensor, nn

from manualgrad.training import CliSettings, parse_settings


class Settings(CliSettings):
    """Verify the autograd.Functions of published packages, and print a table of the laws they break."""

    only: str = ""
    """Test only Functions with this text in `package module:Function`."""
    packages_dir: Path | None = None
    """Install packages here, and use those that exist. Default: a temporary folder."""
    seconds: PositiveFloat = 600.0
    """Time limit for each Function."""
    json_file: Path | None = None
    """Also write all results to this file."""
    target: CliSuppress[str] = ""
    """Internal: the Function to verify in this process."""


class Target(NamedTuple):
    package: str
    """A key of PACKAGES."""
    function: str
    """The Function, as module:name."""
    make_call: Callable[[Any], tuple[Any, ...]]
    """From the Function to what is verified and its arguments."""
    surrogate: bool = False
    """The gradient is not the derivative by definition."""
    import_parents: bool = False
    """Import the parent packages of the module. Otherwise they are replaced by empty ones."""
    empty_packages: tuple[str, ...] = ()
    """Other packages to replace by empty ones."""

    @property
    def name(self) -> str:
        return f"{self.package} {self.function}"


PACKAGES: dict[str, list[str]] = {
    "bitorch": ["bitorch==0.4.1"],
    "brevitas": ["brevitas==0.13.4"],
    "compressai": ["compressai==1.2.8"],
    "diffsort": ["diffsort==0.2.0"],
    "e3nn": ["e3nn==0.6.0"],
    "efficientnet-pytorch": ["efficientnet-pytorch==0.7.1"],
    "entmax": ["entmax==1.3"],
    "geffnet": ["geffnet==1.0.2"],
    "gpytorch": ["gpytorch==1.15.2", "linear-operator==0.6.1"],
    "kornia": ["kornia==0.9.0"],
    "linear-operator": ["linear-operator==0.6.1"],
    "magic-clamp": ["magic-clamp==0.0.4"],
    "mambapy": ["mambapy==1.2.0"],
    "memcnn": ["memcnn==1.5.2"],
    "memory-efficient-attention-pytorch": ["memory-efficient-attention-pytorch==0.1.6", "einops==0.8.2"],
    "norse": ["norse==1.1.0"],
    "pysdtw": ["pysdtw==0.0.5", "numba==0.68.1", "llvmlite==0.50.0"],
    "pytorch-revgrad": ["pytorch-revgrad==0.2.0"],
    "pytorch-tabnet": ["pytorch-tabnet==4.1.0"],
    "pytorch-wavelets": ["pytorch-wavelets==1.3.0", "pywavelets==1.9.0"],
    "qpth": ["qpth==0.0.18"],
    "reformer-pytorch": ["reformer-pytorch==1.4.4"],
    "sinabs": ["sinabs==3.1.3"],
    "snntorch": ["snntorch==1.0.0"],
    "sparsemax": ["sparsemax==0.1.9"],
    "speechbrain": ["speechbrain==1.1.2", "scipy==1.17.1"],
    "spikingjelly": ["spikingjelly==2.0.0"],
    "timm": ["timm==1.0.31"],
    "torch-struct": ["torch-struct==0.5"],
    "torchdiffeq": ["torchdiffeq==0.2.5", "scipy==1.17.1"],
    "torchlpc": ["torchlpc==0.7.2", "numba==0.68.1", "llvmlite==0.50.0"],
    "tslearn": [
        "tslearn==0.10.0",
        "numba==0.68.1",
        "llvmlite==0.50.0",
        "scipy==1.17.1",
        "scikit-learn==1.9.1",
        "joblib==1.6.0",
        "threadpoolctl==3.8.0",
        "cloudpickle==3.1.2",
        "narwhals==2.10.0",
    ],
}
"""The requirements to install for each package: the package, then what its Function imports."""


# --- inputs ---

_random = torch.Generator().manual_seed(3)


def normal(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=_random, dtype=torch.float64).to(dtype)


def differentiable(x: Tensor) -> Tensor:
    """For Functions of which not all tensor arguments are differentiable."""
    return x.requires_grad_()


def positive_definite(n: int) -> Tensor:
    root = normal(n, n)
    return root @ root.mT + n * torch.eye(n, dtype=root.dtype)


def spikes(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Zeros and ones, with at least one spike along the first axis everywhere."""
    x = (normal(*size) > 0).to(dtype)
    x[-1] = 1
    return x


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).pow(2).sum(-1)


def distance(x: Tensor, y: Tensor) -> Tensor:
    return squared_distance(x, y).sqrt()


# --- wrappers around a Function ---


def additive_coupling(function: Any) -> tuple[Any, ...]:
    """An additive coupling of two linear layers with tanh. Their weights are arguments."""
    layers = [nn.Linear(2, 2).double(), nn.Linear(2, 2).double()]

    def coupling(x: Tensor, *weights: Tensor) -> Tensor:
        first, second = weights[:2], weights[2:]
        return function.apply(x, TanhLinear(*first), TanhLinear(*second), *weights)

    return (coupling, normal(3, 4), *(p.detach() for layer in layers for p in layer.parameters()))


class TanhLinear(nn.Module):
    """tanh(W x + b). Its parameters are the given tensors."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.tensors = [weight, bias]

    def parameters(self, recurse: bool = True) -> Any:
        return iter(self.tensors)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, *self.tensors))


def reversible(function: Any) -> tuple[Any, ...]:
    """Two reversible blocks of tanh. Only the input is differentiated."""
    block = sys.modules[function.__module__].ReversibleBlock
    blocks = [block(nn.Tanh(), nn.Softplus()) for _ in range(2)]
    return lambda x: function.apply(x, blocks, {"f_args": {}, "g_args": {}}), normal(2, 3, 4)


def adjoint_ode(function: Any) -> tuple[Any, ...]:
    """dy/dt = tanh(W y), solved by the Runge-Kutta method with fixed steps."""
    solve = sys.modules[function.__module__].odeint_adjoint

    def final(weight: Tensor, y: Tensor) -> Tensor:
        t = torch.linspace(0, 1, 41, dtype=y.dtype)
        options = {"method": "rk4", "adjoint_params": (weight,)}
        return solve(lambda _, y: torch.tanh(weight @ y), y, t, **options)[-1]

    return final, normal(3, 3), normal(3)


def quadratic_program(factory: Any) -> tuple[Any, ...]:
    """min ½ zᵀQz + pᵀz with G z ≤ h, for a batch of two p."""
    empty = torch.zeros(0, dtype=torch.float64)

    def solve(q: Tensor, p: Tensor, g: Tensor, h: Tensor) -> Tensor:
        return factory(verbose=-1)(q + q.mT, p, g, h, empty, empty)

    return solve, positive_definite(3) / 2, normal(2, 3), normal(2, 3), torch.full((2,), 0.3, dtype=torch.float64)


def linear_solve(function: Any) -> tuple[Any, ...]:
    """A⁻¹ b, with A as a linear operator."""
    operator = importlib.import_module("linear_operator").to_linear_operator

    def solve(matrix: Tensor, rhs: Tensor) -> Tensor:
        a = operator(matrix + matrix.mT)
        return function.apply(a.representation_tree(), False, rhs, *a.representation())

    return solve, positive_definite(4) / 2, normal(4, 2)


def operator_matmul(function: Any) -> tuple[Any, ...]:
    operator = importlib.import_module("linear_operator").to_linear_operator

    def product(matrix: Tensor, rhs: Tensor) -> Tensor:
        a = operator(matrix)
        return function.apply(a.representation_tree(), rhs, *a.representation())

    return product, normal(3, 4), normal(4, 2)


def quadratic_form(function: Any) -> tuple[Any, ...]:
    """The Function is for symmetric matrices only."""
    return lambda matrix, rhs: function.apply(matrix + matrix.mT, rhs), normal(3, 3), normal(3, 5)


def soft_dtw(function: Any) -> tuple[Any, ...]:
    """The lengths must be those of the matrices: if they are larger, the Function writes out of bounds."""

    def value(costs: Tensor) -> Tensor:
        return function.apply(costs, torch.tensor([costs.shape[1:]] * len(costs)).view(-1, 2), 1.0, 0.0)

    return value, normal(2, 4, 3).exp()


TARGETS = [
    # activations
    *(
        Target("timm", f"timm.layers.activations_me:{name}AutoFn", lambda f: (f, normal(4, 6)))
        for name in ("Swish", "Mish", "HardSigmoid", "HardSwish", "HardMish")
    ),
    Target("geffnet", "geffnet.activations.activations_me:MishJitAutoFn", lambda f: (f, normal(4, 6))),
    Target("efficientnet-pytorch", "efficientnet_pytorch.utils:SwishImplementation", lambda f: (f, normal(4, 6))),
    Target("e3nn", "e3nn.math._soft_unit_step:_SoftUnitStep", lambda f: (f, normal(4, 6))),
    Target("diffsort", "diffsort.functional:NormalCDF", lambda f: (f, normal(4, 6), 0.1)),
    Target(
        "pytorch-wavelets",
        "pytorch_wavelets.scatternet.lowlevel:SmoothMagFn",
        lambda f: (f, normal(4, 6), normal(4, 6), 0.5),
    ),
    # sparse softmaxes and their losses
    Target("entmax", "entmax.activations:SparsemaxFunction", lambda f: (f, normal(4, 6), -1)),
    Target("entmax", "entmax.activations:Entmax15Function", lambda f: (f, normal(4, 6), -1)),
    Target(
        "entmax",
        "entmax.root_finding:EntmaxBisectFunction",
        lambda f: (f, normal(4, 6), torch.tensor([[1.4], [1.5], [1.7], [2.2]], dtype=torch.float64), -1),
    ),
    Target(
        "entmax",
        "entmax.root_finding:BudgetBisectFunction",
        lambda f: (f, normal(4, 6), torch.full((4, 1), 2.0, dtype=torch.float64), -1),
    ),
    Target(
        "entmax",
        "entmax.losses:SparsemaxLossFunction",
        lambda f: (f, normal(4, 6), torch.tensor([0, 2, 1, 5])),
    ),
    Target(
        "entmax",
        "entmax.losses:Entmax15LossFunction",
        lambda f: (f, normal(4, 6), torch.tensor([0, 2, 1, 5])),
    ),
    Target("sparsemax", "sparsemax.sparsemax:SparsemaxFunction", lambda f: (f, normal(4, 3, 6), 1)),
    Target("pytorch-tabnet", "pytorch_tabnet.sparsemax:SparsemaxFunction", lambda f: (f, normal(4, 3, 6), -1)),
    Target("pytorch-tabnet", "pytorch_tabnet.sparsemax:Entmax15Function", lambda f: (f, normal(4, 6), -1)),
    Target("pytorch-tabnet", "pytorch_tabnet.sparsemax:Entmoid15", lambda f: (f, normal(4, 6))),
    Target("torch-struct", "torch_struct.semirings.sparse_max:_SimplexProject", lambda f: (f, normal(4, 6), -1)),
    Target(
        "kornia",
        "kornia.losses.focal:_TargetLogSoftmax",
        lambda f: (f, normal(2, 3, 4), torch.randint(3, (2, 1, 4), generator=_random), None),
    ),
    # Gaussian processes
    Target(
        "gpytorch",
        "gpytorch.functions.rbf_covariance:RBFCovariance",
        lambda f: (f, normal(4, 2), normal(5, 2), differentiable(normal(1, 1).exp()), squared_distance),
    ),
    Target(
        "gpytorch",
        "gpytorch.functions.matern_covariance:MaternCovariance",
        lambda f: (f, normal(4, 2), normal(5, 2), differentiable(normal(1, 1).exp()), 2.5, distance),
    ),
    Target("gpytorch", "gpytorch.functions._log_normal_cdf:LogNormalCDF", lambda f: (f, 2 * normal(4, 6))),
    Target(
        "gpytorch",
        "gpytorch.variational.large_batch_variational_strategy:QuadFormDiagonal",
        quadratic_form,
        import_parents=True,
    ),
    Target("linear-operator", "linear_operator.functions._solve:Solve", linear_solve, import_parents=True),
    Target("linear-operator", "linear_operator.functions._matmul:Matmul", operator_matmul, import_parents=True),
    # sequences, attention, reversible blocks, solvers
    Target(
        "memory-efficient-attention-pytorch",
        "memory_efficient_attention_pytorch.flash_attention:FlashAttentionFunction",
        lambda f: (f, *(normal(1, 2, 5, 3, dtype=torch.float32) for _ in "qkv"), None, True, 2, 2),
    ),
    Target("mambapy", "mambapy.pscan:PScan", lambda f: (f, normal(1, 5, 2, 3), normal(1, 5, 2, 3))),
    Target(
        "torchlpc",
        "torchlpc.core:LPC",
        lambda f: (f, normal(2, 5), normal(2, 5, 2) / 2, normal(2, 2)),
        import_parents=True,
    ),
    Target(
        "torchlpc",
        "torchlpc.recurrence:Recurrence",
        lambda f: (f, normal(2, 5) / 2, normal(2, 5), normal(2)),
        import_parents=True,
    ),
    Target("reformer-pytorch", "reformer_pytorch.reversible:_ReversibleFunction", reversible),
    Target("memcnn", "memcnn.models.additive:AdditiveBlockFunction", additive_coupling),
    Target("torchdiffeq", "torchdiffeq._impl.adjoint:OdeintAdjointMethod", adjoint_ode),
    Target("qpth", "qpth.qp:QPFunction", quadratic_program, empty_packages=("qpth.solvers",)),
    Target("pysdtw", "pysdtw.sdtw_cpu:SoftDTWcpu", soft_dtw),
    Target(
        "tslearn",
        "tslearn.metrics.soft_dtw_loss_pytorch:_SoftDTWLossPyTorch",
        lambda f: (f, normal(2, 4, 3).exp(), 1.0),
        import_parents=True,
    ),
    Target(
        "speechbrain",
        "speechbrain.nnet.quaternion_networks.q_ops:QuaternionLinearCustomBackward",
        lambda f: (f, normal(3, 8), *(normal(2, 1) for _ in range(4)), normal(4)),
    ),
    # quantizers and gradient reversal
    Target(
        "brevitas",
        "brevitas.ops.autograd_ste_ops:RoundSteFn",
        lambda f: (f, normal(4, 6)),
        surrogate=True,
        import_parents=True,
    ),
    Target(
        "brevitas",
        "brevitas.ops.autograd_ste_ops:InplaceTensorClampSteFn",
        lambda f: (f, differentiable(2 * normal(4, 6)), torch.full((1,), -1.0), torch.full((1,), 1.0)),
        surrogate=True,
        import_parents=True,
    ),
    Target(
        "brevitas",
        "brevitas.ops.autograd_ste_ops:AbsBinarySignGradFn",
        lambda f: (f, normal(4, 6)),
        import_parents=True,
    ),
    Target(
        "bitorch",
        "bitorch.layers.pact:PactActFn",
        lambda f: (f, normal(4, 6), torch.tensor(0.7, dtype=torch.float64), 4),
        surrogate=True,
    ),
    Target(
        "compressai",
        "compressai.ops.bound_ops:LowerBoundFunction",
        lambda f: (f, normal(4, 6), 0.1 + 0 * normal(1)),
        surrogate=True,
    ),
    Target(
        "magic-clamp",
        "magic_clamp.autograd:ClampWithConditionalSTEFunction",
        lambda f: (f, normal(4, 6), -1.0, 1.0, True),
        surrogate=True,
    ),
    Target("sinabs", "sinabs.activation.quantize:StochasticRounding", lambda f: (f, normal(4, 6)), surrogate=True),
    Target(
        "spikingjelly", "spikingjelly.activation_based.quantize:ClampATGF", lambda f: (f, normal(4, 6), -0.5, 0.5)
    ),
    Target(
        "pytorch-revgrad",
        "pytorch_revgrad.functional:RevGrad",
        lambda f: (f, differentiable(normal(4, 6)), torch.tensor(0.5, dtype=torch.float64)),
        surrogate=True,
    ),
    # spikes
    Target("snntorch", "snntorch.surrogate:ATan", lambda f: (f, normal(4, 6), 2.0), surrogate=True),
    Target(
        "snntorch", "snntorch.functional.loss:SpikeTime.FirstSpike", lambda f: (f, spikes(5, 2, 3)), surrogate=True
    ),
    Target(
        "spikingjelly",
        "spikingjelly.activation_based.surrogate:atan",
        lambda f: (f, normal(4, 6), 2.0),
        surrogate=True,
    ),
    Target(
        "norse", "norse.torch.functional.superspike:SuperSpike", lambda f: (f, normal(4, 6), 100.0), surrogate=True
    ),
    Target(
        "norse", "norse.torch.functional.threshold:HeaviTanh", lambda f: (f, normal(4, 6), 2.0), surrogate=True
    ),
    Target(
        "norse",
        "norse.torch.functional.spikes_to_times_decoder:ToSpikeTimes",
        lambda f: (f, spikes(5, 2, 3, dtype=torch.float32), 1),  # float64 crashes
        surrogate=True,
    ),
]


# --- in the process of one Function ---


def load(target: Target) -> Any:
    """Import the Function. Its parent packages are empty: what they import is often not installed."""
    module, _, path = target.function.partition(":")
    parents = module.split(".")[:-1]
    empty = [] if target.import_parents else [".".join(parents[: i + 1]) for i in range(len(parents))]
    for name in (*empty, *target.empty_packages):
        sys.modules[name] = package = ModuleType(name)
        package.__path__ = [str(Path(folder, *name.split("."))) for folder in sys.path]
    result: Any = importlib.import_module(module)
    for name in path.split("."):
        result = getattr(result, name)
    return result


def run_in_this_process(target: Target) -> None:
    """Verify the Function and print the report as JSON, in one line."""
    from manualgrad import verify

    function, *args = target.make_call(load(target))
    report = verify(function, *args, surrogate=target.surrogate)
    keys = ("law", "verdict", "evidence", "likely_cause")
    rows = [{key: getattr(row, key) for key in keys} for row in report.rows]
    print(json.dumps({"ok": report.ok, "failures": report.failures, "rows": rows}))


# --- all Functions ---


class Result(NamedTuple):
    function: str
    package: str
    seconds: float
    failures: list[str]
    rows: list[dict[str, str]]
    error: str
    """Why the Function could not be verified."""

    def cells(self) -> list[str]:
        """Each failed law with the first line of its evidence."""
        if self.error:
            return [f"could not run: {self.error}"]
        evidence = {row["law"]: row["evidence"].strip().partition("\n")[0] for row in self.rows}
        return [f"**{law}**: {evidence[law]}" for law in self.failures] or ["no law fails"]


def install(requirement: str, packages: Path) -> Path:
    """Install the requirement unless its folder exists. Returns the folder."""
    folder = packages / requirement
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        with tempfile.TemporaryDirectory(dir=packages) as temporary:
            subprocess.run([*command, "--target", f"{temporary}/installed", requirement], check=True)
            Path(temporary, "installed").rename(folder)
    return folder


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def run_in_new_process(target: Target, packages: Path, seconds: float) -> Result:
    """Install the requirements and verify the Function in a new process."""
    requirements = PACKAGES[target.package]
    rows, failures, error = [], [], ""
    begin = time.perf_counter()
    try:
        folders = [install(requirement, packages) for requirement in requirements]
        begin = time.perf_counter()
        path = os.pathsep.join(map(str, [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--target", target.name],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if done.returncode:
            error = last_line(done.stderr)
        else:
            report = json.loads(last_line(done.stdout))
            failures, rows = report["failures"], report["rows"]
    except subprocess.TimeoutExpired:
        error = f"took more than {seconds:.0f} s"
    except (subprocess.CalledProcessError, ValueError) as exception:
        error = str(exception)
    elapsed = time.perf_counter() - begin
    return Result(target.function, requirements[0], elapsed, failures, rows, error)


def main() -> None:
    settings = parse_settings(Settings)
    if settings.target:
        run_in_this_process(next(target for target in TARGETS if target.name == settings.target))
        return
    results = []
    print("| Function | package | failed laws | seconds |", "|---|---|---|---|", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        packages = (settings.packages_dir or Path(temporary)).resolve()
        packages.mkdir(parents=True, exist_ok=True)
        for target in TARGETS:
            if settings.only in target.name:
                results.append(result := run_in_new_process(target, packages, settings.seconds))
                cells = "<br>".join(result.cells()).replace("|", "\\|")
                print(f"| `{result.function}` | {result.package} | {cells} | {result.seconds:.0f} |", flush=True)
    if settings.json_file:
        settings.json_file.write_text(json.dumps([result._asdict() for result in results], indent=1))


if __name__ == "__main__":
    main()
