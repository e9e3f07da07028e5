"""Attention as an operation, one description per kernel: the twin of `model/attention.py`.

What kernels take for themselves stands in `scratch.py`, with its sources.
"""

from __future__ import annotations

from snugpt.estimate import scratch
from snugpt.estimate.operations import BOOL, FP32, INT64, Buffer, Net, Operation
from snugpt.units import round_up

Scratch = tuple[Buffer, ...]


def attention(net: Net, q: Buffer, k: Buffer, v: Buffer) -> Operation:
    """Causal attention with gradients: (B, T, H, D), (B, T, K, D) twice -> (B, T, H, D)."""
    kernels = {"cpu": _cpu, "flash": _flash, "efficient": _efficient, "math": _math}
    name = net.runtime.attention
    return kernels["cpu" if name == "math" and not net.dropout else name](net, q, k, v)


def cached_attention(net: Net, q: Buffer, key_tokens: int) -> Operation:
    """Attention over what a cache holds, without gradients; keys and values are views of it."""
    shape, size = net.shape, net.width_bytes
    out, statistics = _out(net, q), _statistics(net)
    state = _random_state(net) if net.cuda else ()
    copies: Scratch = ()
    if net.runtime.attention == "efficient" and shape.num_heads > shape.num_kv_heads:
        each, text = key_tokens * shape.model_dim * size, f"B·S·H·D·{size}"
        copies = tuple(
            Buffer("repeated keys and values", "activations", 0, each, text) for _ in "kv"
        )
    inside = () if net.cuda else _cpu_forward_scratch(net, key_tokens)
    return Operation(
        name="attention",
        reads=(q,),
        result=out,
        forward=(
            *copies, out, statistics, *state, *inside, *inside, *copies, statistics, *state
        ),
    )  # fmt: skip


def _out(net: Net, q: Buffer) -> Buffer:
    return Buffer("attention outputs", "activations", 0, q.sequence_bytes, q.formula)


def _statistics(net: Net) -> Buffer:
    """Log-sum-exp of each query and head, fp32; the efficient kernel pads T to 32."""
    T = round_up(net.seq_len, 32) if net.runtime.attention == "efficient" else net.seq_len
    size = T * net.shape.num_heads * FP32
    return Buffer("attention statistics", "activations", 0, size, "B·T·H·4")


def _random_state(net: Net) -> Scratch:
    """Seed and offset of the dropout of a CUDA kernel, one small tensor each."""
    names = ("attention random state", "attention random state")
    return tuple(net.fixed(name, "activations", 2 * INT64, "16") for name in names)


def _cpu(net: Net, q: Buffer, k: Buffer, v: Buffer) -> Operation:
    """The CPU's tiled kernel (FlashAttentionKernel.cpp): one tile of scores per thread."""
    out, statistics = _out(net, q), _statistics(net)
    forward = _cpu_forward_scratch(net, net.seq_len)
    sizes = scratch.cpu_attention_backward(net.seq_len, net.seq_len, net.runtime.num_threads)
    backward = tuple(
        net.fixed("attention scratch", "workspace", size, text)
        for size, text in zip(sizes, ("2·tile·threads·4", "tile rows·4"), strict=True)
    )
    grads = tuple(net.gradient_of(x) for x in (q, k, v))
    return Operation(
        name="attention",
        reads=(q, k, v),
        result=out,
        forward=(out, statistics, *forward, *forward),
        keeps=(q, k, v, out, statistics),
        backward=(*grads, *backward, *backward),
        gradients=tuple(zip((q, k, v), grads, strict=True)),
    )


def _cpu_forward_scratch(net: Net, key_tokens: int) -> Scratch:
    sizes = scratch.cpu_attention_forward(
        net.seq_len, key_tokens, net.shape.head_dim, net.runtime.num_threads
    )
    return tuple(
        net.fixed("attention scratch", "workspace", size, "tile·threads·4") for size in sizes
    )


def _flash(net: Net, q: Buffer, k: Buffer, v: Buffer) -> Operation:
    """FlashAttention-2: windows and grouped heads inside the kernel."""
    shape = net.shape
    out, statistics, state = _out(net, q), _statistics(net), _random_state(net)
    sizes = scratch.flash_backward(
        net.seq_len, shape.num_heads, shape.num_kv_heads, shape.head_dim, net.width_bytes
    )
    inside = _attention_scratch(sizes, ("B·T·H·4", "B·T·H·D·4", "B·T·H·D·2", "B·T·H·D·2"))
    grads = tuple(net.gradient_of(x) for x in (q, k, v))
    return Operation(
        name="attention",
        reads=(q, k, v),
        result=out,
        forward=(out, statistics, *state),
        keeps=(q, k, v, out, statistics, *state),
        backward=(*grads, *inside, *inside),
        gradients=tuple(zip((q, k, v), grads, strict=True)),
    )


def _attention_scratch(sizes: tuple[int, ...], texts: tuple[str, ...]) -> Scratch:
    return tuple(
        Buffer("attention scratch", "workspace", 0, size, text)
        for size, text in zip(sizes, texts, strict=False)
    )


def _efficient(net: Net, q: Buffer, k: Buffer, v: Buffer) -> Operation:
    """The memory-efficient kernel: grouped heads by repeated keys and values."""
    shape = net.shape
    out, statistics, state = _out(net, q), _statistics(net), _random_state(net)
    grads = tuple(net.gradient_of(x) for x in (q, k, v))
    repeats = shape.num_heads > shape.num_kv_heads
    copies = _repeated(net) if repeats else ()
    wide = _repeated(net) if repeats else ()
    sizes = scratch.efficient_backward(
        net.seq_len, shape.num_heads, shape.head_dim, net.width_bytes, net.runtime.capability
    )
    inside = _attention_scratch(sizes, ("B·T·H·4", "B·T·H·D·4", "B·T·H·4"))
    if repeats:
        backward = (*copies, grads[0], *wide, *inside, *inside, grads[1], grads[2], *wide, *copies)
    else:
        backward = (*grads, *inside, *inside)
    return Operation(
        name="attention",
        reads=(q, k, v),
        result=out,
        forward=(*copies, out, statistics, *state, *copies),
        keeps=(q, k, v, out, statistics, *state),
        backward=backward,
        gradients=tuple(zip((q, k, v), grads, strict=True)),
    )  # fmt: skip


def _repeated(net: Net) -> Scratch:
    """Keys and values, or their gradients, for every head instead of every kv head."""
    H, D, size = net.shape.num_heads, net.shape.head_dim, net.width_bytes
    each = net.seq_len * H * D * size
    return tuple(
        Buffer("repeated keys and values", "activations", 0, each, f"B·T·H·D·{size}")
        for _ in range(2)
    )


def _math(net: Net, q: Buffer, k: Buffer, v: Buffer) -> Operation:
    """`attention.MathAttention`: copies by head, the weights, and what was dropped of them.

    What is already in order is not copied: a single head, a single kv head's sum.
    """
    T, H, K, size = net.seq_len, net.shape.num_heads, net.shape.num_kv_heads, net.width_bytes

    def by_head(x: Buffer) -> Buffer:
        name = "queries, keys, values by head"
        return x if H == 1 else Buffer(name, "activations", 0, q.sequence_bytes, q.formula)

    def square(name: str, element_bytes: int) -> Buffer:
        bytes_per_sequence = H * T * T * element_bytes
        return Buffer(name, "activations", 0, bytes_per_sequence, f"B·H·T·T·{element_bytes}")

    heads = tuple(by_head(x) for x in (q, k, v))
    copies = () if H == 1 else heads
    out = _out(net, q)
    result = by_head(out)
    made = (out,) if H == 1 else (result, out, result)
    weights, dropped = square("attention weights", size), square("dropout masks", BOOL)
    kept, slope, product = (square("attention weights", size) for _ in range(3))
    future = net.fixed("future mask", "activations", T * T * BOOL, "T·T")
    rows, text = H * T * size, f"B·H·T·{size}"
    sums, highest, totals = (
        Buffer("attention statistics", "activations", 0, rows, text) for _ in range(3)
    )
    grad_q, grad_k, grad_v = (net.gradient_of(x) for x in (q, k, v))
    by_head_grad = () if H == 1 else (net.gradient_of(q),)

    def by_token(grad: Buffer, heads_there: int) -> Scratch:
        """The gradient of each query head, a sum where heads share, and a copy by token."""
        each, total = net.gradient_of(q), net.gradient_of(grad)
        if heads_there == H:
            return (grad,) if H == 1 else (each, grad, each)
        return (each, grad, each) if heads_there == 1 else (each, total, each, grad, total)

    return Operation(
        name="attention",
        reads=(q, k, v),
        result=out,
        forward=(
            *copies, weights, future, highest, highest, totals, totals, dropped, kept,
            *made, future, kept,
        ),
        keeps=(*heads, weights, dropped),
        backward=(
            *by_head_grad, slope, *by_token(grad_v, K), product, sums, sums, product,
            *by_token(grad_q, H), *by_token(grad_k, K), slope, *by_head_grad,
        ),
        gradients=((q, grad_q), (k, grad_k), (v, grad_v)),
    )  # fmt: skip
