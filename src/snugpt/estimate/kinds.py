"""The kinds of operation of a GPT: what each outputs, keeps for backward, and needs on the way.

This is the torch-free twin of `model/functions.py` and `model/loss.py` (attention has its own
file): one function here per function there, read side by side. A style is a list of these, the walk
turns the list into a timeline, and nothing else in the house knows how many bytes an operation
takes.

Shapes: B batch, T time, C channels, H heads, K kv heads, D head size, M mlp width, V vocabulary.
"""

from __future__ import annotations

from snugpt.estimate import fp8, scratch
from snugpt.estimate.operations import BOOL, FP32, Buffer, Net, Operation, Weight
from snugpt.spec.shape import GATE_CHANNELS


def embedding(net: Net, table: Weight, *, name: str = "embedded tokens") -> Operation:
    """`functions.Embedding`: gathers rows, casts them; its dense gradient is summed in fp32."""
    out, columns = net.per_token(name, table.columns, "C"), table.columns
    stored = net.per_token("stored rows", columns, "C", element_bytes=net.weight_bytes)
    cast = (stored,) if net.casts else ()
    rows = (net.per_token("fp32 rows", columns, "C", element_bytes=FP32),) if net.lowers else ()
    grad_table, total = net.weight_gradient(table), _fp32_sum(net, table)
    return Operation(
        name="embedding",
        reads=(),
        result=out,
        forward=(*cast, out, *cast),
        backward=(*rows, *total, grad_table, *total, *rows),
        weight_gradients=((table, grad_table),),
    )


def positions(net: Net, x: Buffer, table: Weight) -> Operation:
    """`functions.Positions`: x + the first T rows of a table."""
    out = net.per_token("embedded tokens", table.columns, "C")
    rows = net.seq_len * table.columns * net.width_bytes
    cast = (net.fixed("weight casts", "activations", rows, "T·C"),) if net.casts else ()
    grad_table, total = net.weight_gradient(table), _fp32_sum(net, table, net.seq_len)
    return Operation(
        name="positions",
        reads=(x,),
        result=out,
        forward=(*cast, out, *cast),
        backward=(grad_table, *total, *total),
        gradients=((x, None),),
        weight_gradients=((table, grad_table),),
    )


def linear(net: Net, x: Buffer, weight: Weight, name: str, text: str) -> Operation:
    """`functions.Linear`: keeps x; casts the weight in both directions."""
    if net.fp8:
        return fp8.linear(net, x, weight, name, text)
    out = net.per_token(name, weight.rows, text)
    cast, grad_x, grad_weight = net.cast_of(weight), net.gradient_of(x), net.weight_gradient(weight)
    low = (
        (Buffer("weight casts", "activations", *_half(grad_weight, net), "O·I"),)
        if net.casts
        else ()
    )
    return Operation(
        name="linear",
        reads=(x,),
        result=out,
        forward=(*cast, out, *cast),
        keeps=(x,),
        backward=(*cast, grad_x, *cast, *low, grad_weight, *low),
        gradients=((x, grad_x),),
        weight_gradients=((weight, grad_weight),),
        gives_views=True,
    )


def norm(net: Net, x: Buffer, heads: int, *, name: str, text: str) -> Operation:
    """`functions.RMSNorm`: keeps its output and one fp32 per row; `heads` rows per token."""
    out = Buffer(name, "activations", x.fixed_bytes, x.sequence_bytes, x.formula)
    rstd = net.per_token("norm statistics", heads, text, element_bytes=FP32)
    mean = net.per_token("norm statistics", heads, text)
    grad_x = net.gradient_of(x)
    return Operation(
        name="norm",
        reads=(x,),
        result=out,
        forward=(out, rstd) if net.cuda else (rstd, out),
        keeps=(out, rstd),
        backward=(grad_x, mean, mean),
        gradients=((x, grad_x),),
    )


def weighted_norm(net: Net, x: Buffer, weight: Weight, *, name: str) -> Operation:
    """`functions.WeightedRMSNorm` (llama) or `functions.LayerNorm` (gpt2): keeps its input."""
    out = Buffer(name, "activations", x.fixed_bytes, x.sequence_bytes, x.formula)
    cast = net.cast_of(weight)
    layer_norm = net.shape.style == "gpt2"
    statistics = tuple(
        net.per_token("norm statistics", 1, "", element_bytes=FP32)
        for _ in range(2 if layer_norm else 1)  # mean and 1 / std, or 1 / rms
    )
    fused = layer_norm or net.cuda
    results = (out, *statistics) if fused else (*statistics, out)
    grad_x, grad_weight = net.gradient_of(x), net.weight_gradient(weight)
    if fused:
        parts = _partial_sums(net, weight)
        low = net.cast_of(weight)  # the kernel's gradient has the dtype of the cast weight
        made = (*cast, grad_x, *low, *parts, *parts)
        last = (*cast, grad_weight, *low) if layer_norm else (grad_weight, *low, *cast)
        backward = (*made, *last)
    else:
        unit, mean = net.gradient_of(x), net.per_token("norm statistics", 1, "", element_bytes=FP32)
        total = _fp32_sum(net, weight)
        backward = (
            *cast, unit, grad_x, *total, grad_weight, *total, mean, unit, mean, *cast,
        )  # fmt: skip
    return Operation(
        name="norm",
        reads=(x,),
        result=out,
        forward=(*cast, *results, *cast),
        keeps=(x, *statistics),
        backward=backward,
        gradients=((x, grad_x),),
        weight_gradients=((weight, grad_weight),),
    )


def rotary(net: Net, x: Buffer) -> Operation:
    """`functions.Rotary`: keeps nothing."""
    out = Buffer("queries and keys", "activations", x.fixed_bytes, x.sequence_bytes, x.formula)
    grad_x = net.gradient_of(x)
    return Operation(
        name="rotary", reads=(x,), result=out, forward=(out,), backward=(grad_x,),
        gradients=((x, grad_x),),
    )  # fmt: skip


def value_gate(net: Net, h: Buffer, v: Buffer, ve: Buffer, weight: Weight) -> Operation:
    """`functions.ValueGate`: keeps h, the value embedding and one gate per head."""
    K = net.shape.num_kv_heads
    out = Buffer("values", "activations", v.fixed_bytes, v.sequence_bytes, v.formula)
    gate = net.per_token("value gates", K, "K")
    cast, grad_weight = net.cast_of(weight), net.weight_gradient(weight)
    low = (
        (Buffer("weight casts", "activations", *_half(grad_weight, net), "K·12"),)
        if net.casts
        else ()
    )
    product, slope = net.gradient_of(v), net.per_token("value gates", K, "K")
    half, rest = (net.per_token("value gates", K, "K") for _ in range(2))
    grad_h, grad_ve = net.gradient_of(h), net.gradient_of(ve)
    channels = net.per_token("value gates", GATE_CHANNELS, "12")
    return Operation(
        name="gate",
        reads=(h, v, ve),
        result=out,
        forward=(*cast, gate, *cast, out),
        keeps=(h, ve, gate),
        backward=(
            product, slope, product, half, rest, half, rest, *low, grad_weight, *low, grad_h,
            *cast, channels, *cast, channels, grad_ve, slope,
        ),
        gradients=((h, grad_h), (v, None), (ve, grad_ve)),
        weight_gradients=((weight, grad_weight),),
    )  # fmt: skip


def relu_squared(net: Net, x: Buffer) -> Operation:
    """`functions.ReluSquared`: keeps its output."""
    out = Buffer("mlp activations", "activations", 0, x.sequence_bytes, x.formula)
    grad_x = net.gradient_of(x)
    return Operation(
        name="activation", reads=(x,), result=out, forward=(out,), keeps=(out,),
        backward=(grad_x,), gradients=((x, grad_x),),
    )  # fmt: skip


def gelu(net: Net, x: Buffer) -> Operation:
    """`functions.Gelu`: keeps its input."""
    out = Buffer("mlp activations", "activations", 0, x.sequence_bytes, x.formula)
    grad_x = net.gradient_of(x)
    return Operation(
        name="activation", reads=(x,), result=out, forward=(out,), keeps=(x,),
        backward=(grad_x,), gradients=((x, grad_x),),
    )  # fmt: skip


def swiglu(net: Net, gate: Buffer, up: Buffer) -> Operation:
    """`functions.SwiGLU`: keeps both inputs."""
    out = Buffer("mlp activations", "activations", 0, up.sequence_bytes, up.formula)
    grad_up, grad_gate = net.gradient_of(up), net.gradient_of(gate)
    return Operation(
        name="activation", reads=(gate, up), result=out, forward=(out,), keeps=(gate, up),
        backward=(grad_up, grad_gate), gradients=((gate, grad_gate), (up, grad_up)),
    )  # fmt: skip


def dropout(net: Net, x: Buffer) -> Operation:
    """`functions.Dropout`: keeps one byte per channel."""
    elements = x.sequence_bytes // (net.seq_len * net.width_bytes)
    dropped = net.per_token("dropout masks", elements, "C", element_bytes=BOOL)
    out = Buffer(x.name, "activations", 0, x.sequence_bytes, x.formula)
    grad_x = net.gradient_of(x)
    return Operation(
        name="dropout", reads=(x,), result=out, forward=(dropped, out), keeps=(dropped,),
        backward=(grad_x,), gradients=((x, grad_x),),
    )  # fmt: skip


def residual_add(net: Net, x: Buffer, y: Buffer) -> Operation:
    """`functions.ResidualAdd`: keeps nothing and hands the same gradient to both."""
    out = Buffer("residual stream", "activations", 0, x.sequence_bytes, x.formula)
    return Operation(
        name="residual add", reads=(x, y), result=out, forward=(out,),
        gradients=((x, None), (y, None)),
    )  # fmt: skip


def head_loss(net: Net, h: Buffer, weight: Weight, chunk_tokens: int | None) -> Operation:
    """`loss.HeadLoss`: makes both gradients chunk by chunk; None is one chunk of all tokens."""
    V, C = net.shape.vocab_size, net.shape.model_dim
    loss = net.fixed("loss", "logits", FP32, "4")
    grad_h, grad_weight, total = (
        net.gradient_of(h), net.weight_gradient(weight), _fp32_sum(net, weight)
    )  # fmt: skip
    low_bytes = V * C * net.width_bytes
    cast = (net.fixed("weight casts", "activations", low_bytes, "V·C"),) if net.casts else ()
    product = (net.fixed("weight casts", "activations", low_bytes, "V·C"),) if net.lowers else ()
    low = (chunk_of(net, chunk_tokens, V, net.width_bytes, "V"),) if net.lowers else ()
    grad_low = (chunk_of(net, chunk_tokens, V, net.width_bytes, "V"),) if net.lowers else ()
    logits = chunk_of(net, chunk_tokens, V, FP32, "V")
    right, highest, sums, ones = (chunk_of(net, chunk_tokens, 1, FP32, "") for _ in range(4))
    capped = (chunk_of(net, chunk_tokens, V, FP32, "V"),) if net.shape.logit_softcap else ()
    chunk_loss = net.fixed("loss", "logits", FP32, "4")
    chunk = (
        *low, logits, *low,
        right, highest, *capped, sums, ones, ones, chunk_loss,
        right, highest, *capped, sums, chunk_loss,
        *grad_low, *((logits,) if net.lowers else ()),
        *product, *product, *(grad_low or (logits,)),
    )  # fmt: skip
    return Operation(
        name="cross-entropy",
        reads=(h,),
        result=loss,
        forward=(
            *cast,
            grad_h,
            *(total or (grad_weight,)),
            loss,
            *chunk,
            *((grad_weight,) if total else ()),
            *total,
            *cast,
        ),
        keeps=(grad_h, grad_weight),
        gradients=((h, grad_h),),
        weight_gradients=((weight, grad_weight),),
    )


def token_losses(net: Net, h: Buffer, chunk_tokens: int | None) -> Operation:
    """`loss.token_losses`: the evaluation's loss of each token, without gradients."""
    V, C = net.shape.vocab_size, net.shape.model_dim
    losses = net.per_token("losses", 1, "", element_bytes=FP32, category="logits")
    low_bytes = V * C * net.width_bytes
    cast = (net.fixed("weight casts", "activations", low_bytes, "V·C"),) if net.casts else ()
    low = (chunk_of(net, chunk_tokens, V, net.width_bytes, "V"),) if net.lowers else ()
    logits = chunk_of(net, chunk_tokens, V, FP32, "V")
    right, highest, total = (chunk_of(net, chunk_tokens, 1, FP32, "") for _ in range(3))
    return Operation(
        name="cross-entropy",
        reads=(h,),
        result=losses,
        forward=(
            *cast, losses, *low, logits, *low, right, highest, total,
            logits, right, highest, total, *cast,
        ),
    )  # fmt: skip


def cache_write(net: Net, k: Buffer, v: Buffer) -> Operation:
    """`KVCache.extend`: copies keys and values into storage that is already there."""
    nothing = net.fixed("cache views", "activations", 0, "0")
    return Operation(name="cache", reads=(k, v), result=nothing, forward=(nothing, nothing))


def next_logits(net: Net, h: Buffer, weight: Weight) -> Operation:
    """`GPT.next_logits`: one row of fp32 logits per sequence."""
    V = net.shape.vocab_size
    low_bytes = V * net.width_bytes
    logits = Buffer("logits", "logits", 0, V * FP32, "B·V·4")
    low = (Buffer("logits", "logits", 0, low_bytes, "B·V"),) if net.width_bytes < FP32 else ()
    return Operation(
        name="logits", reads=(h,), result=logits, forward=(*low, logits, *low)
    )  # fmt: skip


def chunk_of(net: Net, chunk_tokens: int | None, elements: int, size: int, text: str) -> Buffer:
    """A tensor of one chunk of the loss: `elements` of `size` bytes per token of the chunk."""
    if chunk_tokens is None:
        return net.per_token("logits", elements, text, element_bytes=size, category="logits")
    return net.fixed("logits", "logits", chunk_tokens * elements * size, f"chunk·{text}·{size}")


def _half(grad: Buffer, net: Net) -> tuple[int, int]:
    """The bytes of a weight's gradient in the compute dtype, as `Buffer` wants them."""
    return grad.fixed_bytes * net.width_bytes // net.weight_bytes, 0


def _fp32_sum(net: Net, weight: Weight, rows: int | None = None) -> tuple[Buffer, ...]:
    """What a gradient is summed in before it is rounded; an fp32 one is summed where it stays."""
    if net.weight_bytes == FP32:
        return ()
    size = (weight.rows if rows is None else rows) * weight.columns * FP32
    return (net.fixed("fp32 sums", "gradients", size, f"{weight.name}·4"),)


def _partial_sums(net: Net, weight: Weight) -> tuple[Buffer, ...]:
    """Scratch of the norm's weight gradient, summed in parts."""
    if net.cuda:  # at most 4 MiB, and only of many narrow rows: see scratch.ASSUMED
        return ()
    sizes = scratch.cpu_layer_norm_backward(weight.elements, net.runtime.num_threads)
    return tuple(net.fixed("norm scratch", "workspace", n, "2·threads·C·4") for n in sizes)
