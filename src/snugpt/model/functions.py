"""The operations of a GPT as autograd functions: each says what it keeps for the backward pass.

PyTorch's own functions keep what suits them on each backend; these keep the same tensors
everywhere, so memory can be predicted. `save_for_backward` is the only place where a tensor is
kept. Three ideas save about half of what eager PyTorch would keep, at no loss of exactness beyond
rounding:

- a norm without weights keeps its output, which its consumer keeps anyway, and not its input;
- squared ReLU keeps its output and takes the square root again;
- a linear layer keeps its weight and casts it again, instead of keeping the cast copy.

A weight is fp32, or bf16 where the recipe says so; its gradient has its dtype, and is summed in
fp32 before it is rounded. All between the weights is in the compute dtype.

Where CUDA has a kernel of its own, `device` says whose kernels run: the Runtime's word for it and
not the tensor's, so that a trace without a GPU takes the same way.

Shapes: B batch, T time, C channels, H heads, K key-value heads, D head size, V vocabulary, N = B*T.
The bytes of each function are told once more, torch-free, in `estimate/kinds.py`; contract
tests hold the two together on a real allocator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

aten = torch.ops.aten
EPS = 1e-5


class Embedding(Function):
    """Rows of a table: (V, C), (B, T) int64 -> (B, T, C) in the compute dtype."""

    @staticmethod
    def forward(ctx, table: Tensor, indices: Tensor, dtype: torch.dtype, device: str = "cpu"):
        ctx.save_for_backward(indices)
        ctx.num_rows, ctx.table_dtype, ctx.device = table.shape[0], table.dtype, device
        return torch.embedding(table, indices).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (indices,) = ctx.saved_tensors
        # The gradient of the table is dense, (V, C) whatever the batch, and summed in fp32.
        rows = grad.float().view(-1, grad.shape[-1])
        if ctx.device == "cuda":  # PyTorch's kernel would sort, with up to (N + V) x C fp32 beside
            table = torch.zeros(ctx.num_rows, grad.shape[-1], device=grad.device)
            table.index_add_(0, indices.view(-1), rows)
        else:
            table = aten.embedding_dense_backward(rows, indices.view(-1), ctx.num_rows, -1, False)
        return table.to(ctx.table_dtype), None, None, None


class Positions(Function):
    """Add learned positions: (B, T, C) + (context, C)[start : start + T]."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, start: int) -> Tensor:
        ctx.table_shape, ctx.table_dtype, ctx.start = table.shape, table.dtype, start
        return x + table[start : start + x.shape[1]].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_table = torch.zeros(ctx.table_shape, dtype=ctx.table_dtype, device=grad.device)
        rows = grad_table[ctx.start : ctx.start + grad.shape[1]]
        if rows.dtype == torch.float32:
            torch.sum(grad, 0, dtype=torch.float32, out=rows)
        else:
            rows.copy_(torch.sum(grad, 0, dtype=torch.float32))
        return grad, grad_table, None


class Linear(Function):
    """x @ weight.T without bias: (..., I), (O, I) -> (..., O). Keeps x; recasts the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.view(-1, x.shape[-1])  # (N, I)
        return (rows @ weight.to(x.dtype).t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.view(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = (grad_rows @ weight.to(x.dtype)).view(x.shape)
        grad_weight = (grad_rows.t() @ rows).to(weight.dtype)  # (O, I)
        return grad_x, grad_weight


class RMSNorm(Function):
    """x / rms(x) over the last axis, without weights. Keeps its output and one fp32 per row."""

    @staticmethod
    def forward(ctx, x: Tensor, device: str = "cpu") -> Tensor:
        if device == "cuda":
            out, rstd = aten._fused_rms_norm(x, [x.shape[-1]], None, EPS)
        else:
            rstd = inverse_rms(x)
            out = torch.mul(x, rstd, out=torch.empty_like(x))
        ctx.save_for_backward(out, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        out, rstd = ctx.saved_tensors
        # With y = x * rstd:  dx = rstd * (g - y * mean(g * y))
        grad_x = grad * out
        mean = grad_x.mean(-1, keepdim=True)
        torch.mul(out, mean, out=grad_x)
        return torch.sub(grad, grad_x, out=grad_x).mul_(rstd), None


class WeightedRMSNorm(Function):
    """x / rms(x) * weight. Keeps its input, because the weight may be zero."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, device: str = "cpu") -> Tensor:
        ctx.device = device
        scale = weight.to(x.dtype)
        if device == "cuda":
            out, rstd = aten._fused_rms_norm(x, [x.shape[-1]], scale, EPS)
        else:
            rstd = inverse_rms(x)
            out = torch.mul(x, rstd, out=torch.empty_like(x)).mul_(scale)
        ctx.save_for_backward(x, rstd, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, rstd, weight = ctx.saved_tensors
        scale = weight.to(x.dtype)
        if ctx.device == "cuda":
            grad_x, grad_weight = aten._fused_rms_norm_backward(
                grad, x, [x.shape[-1]], rstd, scale, [True, True]
            )
            return grad_x, grad_weight.to(weight.dtype), None
        # With u = x * rstd:  dw = sum(g * u),  dx = rstd * (g * w - u * mean(g * w * u))
        unit = torch.mul(x, rstd, out=torch.empty_like(x))
        grad_x = grad * unit
        grad_weight = grad_x.view(-1, x.shape[-1]).sum(0, dtype=torch.float32).to(weight.dtype)
        mean = grad_x.mul_(scale).mean(-1, keepdim=True)
        unit.mul_(mean)
        torch.mul(grad, scale, out=grad_x)
        return grad_x.sub_(unit).mul_(rstd), grad_weight, None


class LayerNorm(Function):
    """(x - mean) / std * weight, without bias. Keeps its input and two fp32 per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight.to(x.dtype), None, EPS)
        ctx.save_for_backward(x, mean, rstd, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, mean, rstd, weight = ctx.saved_tensors
        grad_x, grad_weight, _ = aten.native_layer_norm_backward(
            grad, x, [x.shape[-1]], mean, rstd, weight.to(x.dtype), None, [True, True, False]
        )
        return grad_x, grad_weight.to(weight.dtype)


class Rotary(Function):
    """Turn pairs of channels by the angle of their position. Keeps nothing: backward turns back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin  # tables of the model, (T, 1, D / 2)
        return turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return turn(grad, *ctx.angles, -1), None, None


class ReluSquared(Function):
    """relu(x) ** 2. Keeps its output: the derivative 2 * relu(x) is 2 * sqrt(output)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = torch.relu(x).square_()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (out,) = ctx.saved_tensors
        return out.sqrt().mul_(2).mul_(grad)


class Gelu(Function):
    """x * Phi(x). Keeps its input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.nn.functional.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return aten.gelu_backward(grad, x)


class SwiGLU(Function):
    """silu(gate) * up. Keeps both inputs."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad_up = grad * up
        if torch.compiler.is_compiling():  # knows no storage to reuse
            return aten.silu_backward(grad_up, gate), torch.nn.functional.silu(gate).mul_(grad)
        grad_gate = aten.silu_backward(grad_up, gate)
        aten.silu.out(gate, out=grad_up)
        return grad_gate, grad_up.mul_(grad)


class ValueGate(Function):
    """v + 2 * sigmoid(h[..., :G] @ weight.T) * value_embedding, one gate per key-value head.

    h (B, T, C), weight (K, G), v and value_embedding (B, T, K, D).
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, v: Tensor, value_embedding: Tensor) -> Tensor:
        channels = h.view(-1, h.shape[-1])[:, : weight.shape[1]]  # (N, G)
        gate = (channels @ weight.to(h.dtype).t()).sigmoid_().mul_(2)  # (N, K)
        ctx.save_for_backward(h, weight, value_embedding, gate)
        return torch.addcmul(v, gate.view(*v.shape[:3], 1), value_embedding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, weight, value_embedding, gate = ctx.saved_tensors
        channels = h.view(-1, h.shape[-1])[:, : weight.shape[1]]
        slope = (grad * value_embedding).sum(-1).view(gate.shape)  # d loss / d gate, (N, K)
        slope.mul_(gate).mul_(1 - gate / 2)
        grad_weight = (slope.t() @ channels).to(weight.dtype)
        grad_h = torch.zeros_like(h)
        grad_h.view(-1, h.shape[-1])[:, : weight.shape[1]] = slope @ weight.to(h.dtype)
        grad_embedding = grad * gate.view(*grad.shape[:3], 1)
        return grad_h, grad_weight, grad, grad_embedding


class Dropout(Function):
    """Zero a share of the channels and scale the rest up. Keeps one byte per channel."""

    @staticmethod
    def forward(ctx, x: Tensor, share: float) -> Tensor:
        dropped = torch.empty_like(x, dtype=torch.bool).bernoulli_(share)
        ctx.save_for_backward(dropped)
        ctx.scale = 1 / (1 - share)
        return x.masked_fill(dropped, 0).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (dropped,) = ctx.saved_tensors
        return grad.masked_fill(dropped, 0).mul_(ctx.scale), None


class ResidualAdd(Function):
    """x + y. Keeps nothing; both get the same gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad, grad


def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x ** 2) + eps) over the last axis, in fp32: (..., C) -> (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()


def turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotate the two halves of the last axis against each other: (B, T, H, D), (T, 1, D / 2)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    if torch.compiler.is_compiling():  # one kernel, but not into a slice
        sin = sin * direction
        return torch.cat((first * cos + second * sin, second * cos - first * sin), -1)
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=direction)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=-direction)
    return out
