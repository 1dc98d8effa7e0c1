from __future__ import annotations
import math
from typing import Any
import torch
from torch import Tensor
from manualgrad.rule import Rule
Shape = tuple[int, ...]
FUNCTIONS: dict[str, Any] = {}
def fn(f): FUNCTIONS[f.__name__.strip("_")] = f; return f
def sum_to_shape(t: Tensor, shape: Shape) -> Tensor:
    return t if tuple(t.shape) == tuple(shape) else t.sum_to_size(shape)
def shape_of(x): return tuple(x.shape) if isinstance(x, Tensor) else ()
def flat(s): return tuple(s[0]) if len(s) == 1 and isinstance(s[0], (tuple, list)) else tuple(s)

class ViewFunction(Rule):
    def forward(input: Tensor, shape: Shape, input_shape: Shape) -> Tensor: return input.view(shape)
    def grad_input(grad: Tensor, input_shape: Shape) -> Tensor: return grad.reshape(input_shape)
class ReshapeFunction(ViewFunction):
    def forward(input: Tensor, shape: Shape, input_shape: Shape) -> Tensor: return input.reshape(shape)
@fn
def view(x, *s): return ViewFunction.apply(x, flat(s), tuple(x.shape)) if not isinstance(flat(s)[0], torch.dtype) else NotImplemented
@fn
def reshape(x, *s, shape=None): return ReshapeFunction.apply(x, flat(s) if s else tuple(shape), tuple(x.shape))
@fn
def flatten(x, start_dim=0, end_dim=-1): 
    a, b = start_dim % x.dim(), end_dim % x.dim()
    n = 1
    for k in x.shape[a:b+1]: n = n * k
    return reshape(x, (*x.shape[:a], n, *x.shape[b+1:]))
@fn
def unflatten(x, dim, sizes): dim %= x.dim(); return view(x, (*x.shape[:dim], *sizes, *x.shape[dim+1:]))
@fn
def unsqueeze(x, dim): dim %= x.dim() + 1; return view_like(x, (*x.shape[:dim], 1, *x.shape[dim:]), "unsqueeze", dim)
class UnsqueezeFunction(Rule):
    def forward(input: Tensor, dim: int) -> Tensor: return input.unsqueeze(dim)
    def grad_input(grad: Tensor, dim: int) -> Tensor: return grad.squeeze(dim)
class SqueezeFunction(Rule):
    def forward(input: Tensor, dims: Shape, input_shape: Shape) -> Tensor: return input.squeeze(dims)
    def grad_input(grad: Tensor, input_shape: Shape) -> Tensor: return grad.reshape(input_shape)
def view_like(x, shape, kind, dim): return UnsqueezeFunction.apply(x, dim)
@fn
def squeeze(x, dim=None):
    dims = tuple(i for i, n in enumerate(x.shape) if n == 1) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    return SqueezeFunction.apply(x, dims, tuple(x.shape))
class TransposeFunction(Rule):
    def forward(input: Tensor, dim0: int, dim1: int) -> Tensor: return input.transpose(dim0, dim1)
    def grad_input(grad: Tensor, dim0: int, dim1: int) -> Tensor: return grad.transpose(dim0, dim1)
@fn
def transpose(x, dim0, dim1): return TransposeFunction.apply(x, dim0, dim1)
@fn
def t(x): return transpose(x, 0, 1) if x.dim() == 2 else x
class PermuteFunction(Rule):
    def forward(input: Tensor, dims: Shape) -> Tensor: return input.permute(dims)
    def grad_input(grad: Tensor, dims: Shape) -> Tensor: return grad.permute(tuple(sorted(range(len(dims)), key=lambda i: dims[i] % len(dims))))
@fn
def permute(x, *dims): return PermuteFunction.apply(x, flat(dims))
class ExpandFunction(Rule):
    def forward(input: Tensor, shape: Shape, input_shape: Shape) -> Tensor: return input.expand(shape)
    def grad_input(grad: Tensor, input_shape: Shape) -> Tensor: return sum_to_shape(grad, input_shape)
@fn
def expand(x, *s, implicit=False): return ExpandFunction.apply(x, flat(s), tuple(x.shape))
class SelectFunction(Rule):
    def forward(input: Tensor, dim: int, index: int, input_shape: Shape) -> Tensor: return input.select(dim, index)
    def grad_input(grad: Tensor, dim: int, index: int, input_shape: Shape) -> Tensor: return torch.select_scatter(grad.new_zeros(input_shape), grad, dim, index)
@fn
def select(x, dim, index): return SelectFunction.apply(x, dim, index, tuple(x.shape))
class SliceFunction(Rule):
    def forward(input: Tensor, dim: int, start: int, end: int, step: int, input_shape: Shape) -> Tensor: return input[(slice(None),) * dim + (slice(start, end, None if step == 1 else step),)]
    def grad_input(grad: Tensor, dim: int, start: int, end: int, step: int, input_shape: Shape) -> Tensor: return torch.slice_scatter(grad.new_zeros(input_shape), grad, dim, start, end, step)
@fn
def slice_(x, dim=0, start=None, end=None, step=1):
    dim %= x.dim(); n = x.shape[dim]
    start = 0 if start is None else start + n if start < 0 else start
    end = n if end is None or end > n else end + n if end < 0 else end
    if start == 0 and end == n and step == 1: return x
    return SliceFunction.apply(x, dim, start, end, step, tuple(x.shape))
@fn
def narrow(x, dim, start, length): return slice_(x, dim, start, start + length)
@fn
def split(x, split_size, dim=0):
    n = x.shape[dim]
    sizes = [min(split_size, n - i) for i in range(0, n, split_size)] if isinstance(split_size, int) else split_size
    out, at = [], 0
    for s in sizes: out.append(slice_(x, dim, at, at + s)); at += s
    return out
@fn
def split_with_sizes(x, sizes, dim=0): return split(x, list(sizes), dim)
@fn
def chunk(x, chunks, dim=0): return split(x, -(-x.shape[dim] // chunks), dim)
@fn
def unbind(x, dim=0): return [select(x, dim, i) for i in range(x.shape[dim])]
class CatFunction(Rule):
    def forward(first: Tensor, second: Tensor, dim: int, n: int, total: int) -> Tensor: return torch.cat([first, second], dim)
    def grad_first(grad: Tensor, dim: int, n: int) -> Tensor: return grad.narrow(dim, 0, n)
    def grad_second(grad: Tensor, dim: int, n: int, total: int) -> Tensor: return grad.narrow(dim, n, total - n)
@fn
def cat(tensors, dim=0):
    out = tensors[0]
    for x in tensors[1:]: out = CatFunction.apply(out, x, dim, out.shape[dim], out.shape[dim] + x.shape[dim])
    return out
@fn
def stack(tensors, dim=0): d = dim % (tensors[0].dim() + 1); return cat([unsqueeze(x, d) for x in tensors], d)
class ContiguousFunction(Rule):
    def forward(input: Tensor) -> Tensor: return input.contiguous()
    def grad_input(grad: Tensor) -> Tensor: return grad
class CloneFunction(Rule):
    def forward(input: Tensor) -> Tensor: return input.clone()
    def grad_input(grad: Tensor) -> Tensor: return grad
@fn
def contiguous(x, memory_format=None): return x if x.is_contiguous() else ContiguousFunction.apply(x)
@fn
def clone(x, memory_format=None): return CloneFunction.apply(x)
class ToFunction(Rule):
    upcast_gradients = False
    def forward(input: Tensor, dtype: torch.dtype, input_dtype: torch.dtype) -> Tensor: return input.to(dtype)
    def grad_input(grad: Tensor, input_dtype: torch.dtype) -> Tensor: return grad.to(input_dtype)
@fn
def to(x, *a, **k):
    dtype = next((y for y in (*a, *k.values()) if isinstance(y, torch.dtype)), x.dtype)
    return x if dtype == x.dtype else ToFunction.apply(x, dtype, x.dtype)
@fn
def float(x): return to(x, torch.float32)
@fn
def type_as(x, y): return to(x, y.dtype)

class AddFunction(Rule):
    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor: return a + b
    def grad_a(grad: Tensor, a_shape: Shape) -> Tensor: return sum_to_shape(grad, a_shape)
    def grad_b(grad: Tensor, b_shape: Shape) -> Tensor: return sum_to_shape(grad, b_shape)
class AddNumberFunction(Rule):
    def forward(a: Tensor, b: float) -> Tensor: return a + b
    def grad_a(grad: Tensor) -> Tensor: return grad
class MulFunction(Rule):
    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor: return a * b
    def grad_a(grad: Tensor, b: Tensor, a_shape: Shape) -> Tensor: return sum_to_shape(grad * b, a_shape)
    def grad_b(grad: Tensor, a: Tensor, b_shape: Shape) -> Tensor: return sum_to_shape(grad * a, b_shape)
class MulNumberFunction(Rule):
    def forward(a: Tensor, b: float) -> Tensor: return a * b
    def grad_a(grad: Tensor, b: float) -> Tensor: return grad * b
class DivFunction(Rule):
    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor: return a / b
    def grad_a(grad: Tensor, b: Tensor, a_shape: Shape) -> Tensor: return sum_to_shape(grad / b, a_shape)
    def grad_b(grad: Tensor, a: Tensor, b: Tensor, b_shape: Shape) -> Tensor: return sum_to_shape(-grad * a / (b * b), b_shape)
class DivNumberFunction(Rule):
    def forward(a: Tensor, b: float) -> Tensor: return a / b
    def grad_a(grad: Tensor, b: float) -> Tensor: return grad / b
@fn
def add(a, b, alpha=1):
    if alpha != 1: b = mul(b, alpha)
    if not isinstance(a, Tensor): a, b = b, a
    return AddFunction.apply(a, b, tuple(a.shape), tuple(b.shape)) if isinstance(b, Tensor) else AddNumberFunction.apply(a, b)
@fn
def sub(a, b, alpha=1): return add(a, neg(b) if isinstance(b, Tensor) else -b, alpha)
@fn
def rsub(a, b, alpha=1): return add(neg(a), b)
@fn
def mul(a, b):
    if not isinstance(a, Tensor): a, b = b, a
    return MulFunction.apply(a, b, tuple(a.shape), tuple(b.shape)) if isinstance(b, Tensor) else MulNumberFunction.apply(a, b)
@fn
def div(a, b, rounding_mode=None): return DivFunction.apply(a, b, shape_of(a), tuple(b.shape)) if isinstance(b, Tensor) else DivNumberFunction.apply(a, b)
@fn
def rdiv(a, b): return mul(reciprocal(a), b)
class ReciprocalFunction(Rule):
    def forward(a: Tensor) -> Tensor: return a.reciprocal()
    def grad_a(grad: Tensor, output: Tensor) -> Tensor: return -grad * output * output
@fn
def reciprocal(a): return ReciprocalFunction.apply(a)
class NegFunction(Rule):
    def forward(a: Tensor) -> Tensor: return -a
    def grad_a(grad: Tensor) -> Tensor: return -grad
@fn
def neg(a): return NegFunction.apply(a)
class PowFunction(Rule):
    def forward(a: Tensor, n: float) -> Tensor: return a ** n
    def grad_a(grad: Tensor, a: Tensor, n: float) -> Tensor: return grad * (n * a ** (n - 1))
@fn
def pow(a, n): return PowFunction.apply(a, n)
@fn
def square(a): return pow(a, 2)
def unary(name, derivative, ns={}):
    pass
class ExpFunction(Rule):
    def forward(a: Tensor) -> Tensor: return torch.exp(a)
    def grad_a(grad: Tensor, output: Tensor) -> Tensor: return grad * output
class LogFunction(Rule):
    def forward(a: Tensor) -> Tensor: return torch.log(a)
    def grad_a(grad: Tensor, a: Tensor) -> Tensor: return grad / a
class SqrtFunction(Rule):
    def forward(a: Tensor) -> Tensor: return torch.sqrt(a)
    def grad_a(grad: Tensor, output: Tensor) -> Tensor: return grad / (2 * output)
class RsqrtFunction(Rule):
    def forward(a: Tensor) -> Tensor: return torch.rsqrt(a)
    def grad_a(grad: Tensor, output: Tensor) -> Tensor: return -0.5 * grad * output * output * output
class SinFunction(Rule):
    def forward(a: Tensor) -> Tensor: return torch.sin(a)
    def grad_a(grad: Tensor, a: Tensor) -> Tensor: return grad * torch.cos(a)
class CosFunction(Rule):
    def forward(a: Tensor) -> Tensor: return torch.cos(a)
    def grad_a(grad: Tensor, a: Tensor) -> Tensor: return -grad * torch.sin(a)
for _n, _r in dict(exp=ExpFunction, log=LogFunction, sqrt=SqrtFunction, rsqrt=RsqrtFunction, sin=SinFunction, cos=CosFunction).items():
    FUNCTIONS[_n] = _r.apply
class SumFunction(Rule):
    def forward(input: Tensor, dims: Shape, keepdim: bool, kept: Shape, input_shape: Shape) -> Tensor: return input.sum(dims, keepdim)
    def grad_input(grad: Tensor, kept: Shape, input_shape: Shape) -> Tensor: return grad.reshape(kept).expand(input_shape)
class MeanFunction(Rule):
    def forward(input: Tensor, dims: Shape, keepdim: bool, kept: Shape, input_shape: Shape, n: int) -> Tensor: return input.mean(dims, keepdim)
    def grad_input(grad: Tensor, kept: Shape, input_shape: Shape, n: int) -> Tensor: return (grad / n).reshape(kept).expand(input_shape)
def dims_of(x, dim): return tuple(range(x.dim())) if dim is None or dim == [] else ((dim % x.dim()),) if isinstance(dim, int) else tuple(d % x.dim() for d in dim)
@fn
def sum(x, dim=None, keepdim=False, dtype=None):
    d = dims_of(x, dim); return SumFunction.apply(x, d, keepdim, tuple(1 if i in d else n for i, n in enumerate(x.shape)), tuple(x.shape))
@fn
def mean(x, dim=None, keepdim=False, dtype=None):
    d = dims_of(x, dim); n = 1
    for i in d: n = n * x.shape[i]
    return MeanFunction.apply(x, d, keepdim, tuple(1 if i in d else n for i, n in enumerate(x.shape)), tuple(x.shape), n)
class MatmulFunction(Rule):
    def forward(a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor: return a @ b
    def grad_a(grad: Tensor, b: Tensor, a_shape: Shape) -> Tensor: return sum_to_shape(grad @ b.mT, a_shape)
    def grad_b(grad: Tensor, a: Tensor, b_shape: Shape) -> Tensor: return sum_to_shape(a.mT @ grad, b_shape)
@fn
def matmul(a, b): return MatmulFunction.apply(a, b, tuple(a.shape), tuple(b.shape))
@fn
def mm(a, b): return matmul(a, b)
@fn
def addmm(c, a, b, beta=1, alpha=1): return add(matmul(a, b), c)
class WhereFunction2(Rule):
    def forward(mask: Tensor, a: Tensor, b: Tensor, a_shape: Shape, b_shape: Shape) -> Tensor: return torch.where(mask, a, b)
    def grad_a(grad: Tensor, mask: Tensor, a_shape: Shape) -> Tensor: return sum_to_shape(torch.where(mask, grad, 0), a_shape)
    def grad_b(grad: Tensor, mask: Tensor, b_shape: Shape) -> Tensor: return sum_to_shape(torch.where(mask, 0, grad), b_shape)
@fn
def where(m, a, b):
    return WhereFunction2.apply(m, a, b, shape_of(a), shape_of(b))
class MaskedFillFunction(Rule):
    def forward(input: Tensor, mask: Tensor, value: Any) -> Tensor: return input.masked_fill(mask, value)
    def grad_input(grad: Tensor, mask: Tensor) -> Tensor: return grad.masked_fill(mask, 0)
@fn
def masked_fill(x, m, v): return MaskedFillFunction.apply(x, m, v if not isinstance(v, Tensor) else v.item())
class IndexFunction(Rule):
    def forward(input: Tensor, indices: Any, input_shape: Shape) -> Tensor: return input[indices]
    def grad_input(grad: Tensor, indices: Any, input_shape: Shape) -> Tensor: return grad.new_zeros(input_shape).index_put(indices, grad, True)
class IndexSelect(Rule):
    def forward(input: Tensor, dim: int, index: Tensor, input_shape: Shape) -> Tensor: return input.index_select(dim, index)
    def grad_input(grad: Tensor, dim: int, index: Tensor, input_shape: Shape) -> Tensor: return grad.new_zeros(input_shape).index_add(dim, index, grad)
@fn
def index_select(x, dim, index): return IndexSelect.apply(x, dim, index, tuple(x.shape))
@fn
def index(x, indices): return IndexFunction.apply(x, tuple(slice(None) if i is None else i for i in indices), tuple(x.shape))
class GatherFunction(Rule):
    def forward(input: Tensor, dim: int, index: Tensor, input_shape: Shape) -> Tensor: return input.gather(dim, index)
    def grad_input(grad: Tensor, dim: int, index: Tensor, input_shape: Shape) -> Tensor: return grad.new_zeros(input_shape).scatter_add(dim, index, grad)
@fn
def gather(x, dim, index): return GatherFunction.apply(x, dim, index, tuple(x.shape))
@fn
def max(x, dim=None, keepdim=False):
    if dim is None: return NotImplemented
    v, i = torch.max(x.detach(), dim, True)
    out = gather(x, dim, i)
    return (out, i) if keepdim else (squeeze(out, dim), i.squeeze(dim))
class RollFunction(Rule):
    def forward(input: Tensor, shifts: Shape, dims: Shape) -> Tensor: return input.roll(shifts, dims)
    def grad_input(grad: Tensor, shifts: Shape, dims: Shape) -> Tensor: return grad.roll(tuple(-s for s in shifts), dims)
@fn
def roll(x, shifts, dims): return RollFunction.apply(x, tuple(shifts), tuple(dims))
@fn
def var(x, dim=None, unbiased=True, correction=None, keepdim=False):
    m = mean(x, dim, True); n = 1
    for i in dims_of(x, dim): n = n * x.shape[i]
    c = (1 if unbiased else 0) if correction is None else correction
    return mul(sum(pow(sub(x, m), 2), dim, keepdim), 1 / (n - c))
