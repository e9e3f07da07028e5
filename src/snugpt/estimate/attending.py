"""Attention as an operation, one description per kernel: the twin of `model/attention.py`.

Scratch inside a kernel can't be seen from outside it; each figure names the source it was read
from. Those of CUDA are derived from the sources and assumed until a CUDA record exists.
"""

from __future__ import annotations

from snugpt.estimate.operations import BOOL, FP32, INT64, Buffer, Net, Operation
from snugpt.spec.memory import Category
from snugpt.units import round_up

Scratch = tuple[Buffer, ...]


def attention(net: Net, q: Buffer, k: Buffer, v: Buffer) -> Operation:
    """Causal attention with gradients: (B, T, H, D), (B, T, K, D) twice -> (B, T, H, D)."""
    kernels = {"cpu": _cpu, "flash": _flash, "efficient": _efficient, "math": _math}
    name = net.runtime.attention
    return kernels["cpu" if name == "math" and not net.dropout else name](net, q, k, v)


def cached_attention(net: Net, q: Buffer, key_tokens: int) -> Operation:
    """Attention over what a cache holds, without gradients; keys and values are views of it."""
    out, statistics = _out(net, q), _statistics(net)
    if net.runtime.attention == "efficient" and net.shape.num_heads > net.shape.num_kv_heads:
        H, D, size = net.shape.num_heads, net.shape.head_dim, net.width_bytes
        keys = Buffer(
            "repeated keys", "activations", 0, key_tokens * H * D * size, f"B·S·H·D·{size}"
        )
        values = Buffer("repeated values", "activations", 0, keys.sequence_bytes, keys.formula)
        scratch: Scratch = (keys, values)
    else:
        scratch = _cpu_forward_scratch(net, key_tokens) if net.runtime.device == "cpu" else ()
    return Operation(
        name="attention",
        reads=(q,),
        result=out,
        forward=(out, statistics, *scratch, *scratch, statistics),
    )


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
    queries, keys = attention_tile(net.seq_len, net.seq_len)
    forward = _cpu_forward_scratch(net, net.seq_len)
    tile = 2 * queries * keys * FP32 * net.runtime.num_threads
    backward = (
        net.fixed("attention scratch", "workspace", tile, "2·tile·threads·4"),
        net.fixed("attention scratch", "workspace", queries * FP32, "tile rows·4"),
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
    """Scores, row maxima and sums, and the output of one tile, for each thread, in fp32."""
    queries, keys = attention_tile(net.seq_len, key_tokens)
    elements = queries * (keys + 2 + net.shape.head_dim)
    size = elements * FP32 * net.runtime.num_threads
    return (net.fixed("attention scratch", "workspace", size, "tile·threads·4"),)


def attention_tile(query_tokens: int, key_tokens: int) -> tuple[int, int]:
    """Tile of the CPU's kernel in queries and keys (FlashAttentionKernel.cpp)."""
    queries = 256 if query_tokens >= 768 else 64 if query_tokens >= 192 else 32
    return min(queries, query_tokens), min(512, key_tokens)


def _flash(net: Net, q: Buffer, k: Buffer, v: Buffer) -> Operation:
    """FlashAttention-2 (flash_api.cpp, mha_bwd): an fp32 query gradient and one sum per row.

    T is rounded up to 128, D to 32; with grouped heads dk and dv are first made for every head.
    """
    shape = net.shape
    out, statistics, state = _out(net, q), _statistics(net), _random_state(net)
    T, H, D = round_up(net.seq_len, 128), shape.num_heads, round_up(shape.head_dim, 32)
    sums = Buffer("attention scratch", "workspace", 0, T * H * FP32, "B·T·H·4")
    grad_queries = Buffer("attention scratch", "workspace", 0, T * H * D * FP32, "B·T·H·D·4")
    expanded = _expanded_gradients(net, "workspace") if shape.num_kv_heads < H else ()
    scratch = (sums, grad_queries, *expanded)
    grads = tuple(net.gradient_of(x) for x in (q, k, v))
    return Operation(
        name="attention",
        reads=(q, k, v),
        result=out,
        forward=(out, statistics, *state),
        keeps=(q, k, v, out, statistics, *state),
        backward=(*grads, *scratch, *scratch),
        gradients=tuple(zip((q, k, v), grads, strict=True)),
    )


def _efficient(net: Net, q: Buffer, k: Buffer, v: Buffer) -> Operation:
    """The memory-efficient kernel (attention_backward.cu): below fp32 an fp32 query gradient."""
    shape = net.shape
    out, statistics, state = _out(net, q), _statistics(net), _random_state(net)
    grads = tuple(net.gradient_of(x) for x in (q, k, v))
    repeats = shape.num_heads > shape.num_kv_heads
    copies = _expanded_gradients(net, "activations") if repeats else ()
    wide = _expanded_gradients(net, "activations") if repeats else ()
    rows = round_up(net.seq_len, 32) * shape.num_heads
    scratch = [Buffer("attention scratch", "workspace", 0, rows * FP32, "B·T·H·4")]
    if net.width_bytes < FP32:
        size = rows * shape.head_dim * FP32
        scratch.append(Buffer("attention scratch", "workspace", 0, size, "B·T·H·D·4"))
    if repeats:
        backward = (
            *copies,
            grads[0],
            *wide,
            *scratch,
            *scratch,
            grads[1],
            grads[2],
            *wide,
            *copies,
        )
    else:
        backward = (*grads, *scratch, *scratch)
    return Operation(
        name="attention",
        reads=(q, k, v),
        result=out,
        forward=(*copies, out, statistics, *state, *copies),
        keeps=(q, k, v, out, statistics, *state),
        backward=backward,
        gradients=tuple(zip((q, k, v), grads, strict=True)),
    )


def _expanded_gradients(net: Net, category: Category) -> Scratch:
    """Keys and values, or their gradients, for every head instead of every kv head."""
    H, D, size = net.shape.num_heads, net.shape.head_dim, net.width_bytes
    each = net.seq_len * H * D * size
    name = "attention scratch" if category == "workspace" else "repeated keys and values"
    return tuple(Buffer(name, category, 0, each, f"B·T·H·D·{size}") for _ in range(2))


def _math(net: Net, q: Buffer, k: Buffer, v: Buffer) -> Operation:
    """`attention.MathAttention`: copies by head, the weights, and what was dropped of them."""
    T, H, size = net.seq_len, net.shape.num_heads, net.width_bytes
    grads = tuple(net.gradient_of(x) for x in (q, k, v))
    copies = tuple(
        Buffer("queries, keys, values by head", "activations", 0, x.sequence_bytes, x.formula)
        for x in (q, k, v)
    )
    out = _out(net, q)

    def square(name: str, element_bytes: int) -> Buffer:
        bytes_per_sequence = H * T * T * element_bytes
        return Buffer(name, "activations", 0, bytes_per_sequence, f"B·H·T·T·{element_bytes}")

    weights, dropped = square("attention weights", size), square("dropout masks", BOOL)
    kept, slope, product = (square("attention weights", size) for _ in range(3))
    future = net.fixed("future mask", "activations", T * T * BOOL, "T·T")
    sums = Buffer("attention statistics", "activations", 0, H * T * size, f"B·H·T·{size}")
    by_head, grad = net.gradient_of(q), net.gradient_of(q)
    parts = tuple(net.gradient_of(x) for x in (v, q, k))
    grad_q, grad_k, grad_v = grads
    return Operation(
        name="attention",
        reads=(q, k, v),
        result=out,
        forward=(
            *copies, weights, future, dropped, kept, by_head, out, by_head, future, kept
        ),
        keeps=(*copies, weights, dropped),
        backward=(
            grad, slope, parts[0], grad_v, parts[0], product, sums, sums, product,
            parts[1], grad_q, parts[1], parts[2], grad_k, parts[2], slope, grad,
        ),
        gradients=((q, grad_q), (k, grad_k), (v, grad_v)),
    )  # fmt: skip
