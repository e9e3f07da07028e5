"""The `snugpt` stack: our own model as lists of operations, and what lies in memory beside it.

Read beside `model/gpt.py`: the same calls in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from snugpt.estimate import kinds as kind
from snugpt.estimate import scratch
from snugpt.estimate.attending import attention, cached_attention
from snugpt.estimate.operations import Buffer, Call, Net, Operation, Weight
from snugpt.estimate.parameters import (
    all_weights,
    edge_weights,
    group_of,
    layer_kinds,
    layer_weights,
)
from snugpt.estimate.state_on_host import stages, stays
from snugpt.estimate.updating import Updating, int8_tables, optimizer_state
from snugpt.spec.runtime import mask_columns
from snugpt.spec.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the model: its operations, the buffer that enters it, what is made again."""

    entry: Buffer | None
    operations: tuple[Operation, ...]
    made_again: tuple[Call, ...] = ()

    @property
    def result(self) -> Buffer:
        """The buffer that leaves it."""
        return self.operations[-1].result


def embedding_part(net: Net) -> Part:
    """From tokens to the first layer's input: `GPT.embedded`."""
    weights = edge_weights(net.shape)
    operations = [kind.embedding(net, weights["embedding"])]
    x = operations[0].result
    if net.shape.style == "nanochat":
        operations.append(kind.norm(net, x, 1, name="residual stream", text=""))
    if net.shape.style == "gpt2":
        operations.append(kind.positions(net, x, weights["positions"]))
    if net.dropout:
        operations.append(kind.dropout(net, operations[-1].result))
    return Part(None, tuple(operations))


def layer_part(net: Net, layer: int, cache_tokens: int | None = None) -> Part:
    """One layer: `Block.attention` and `Block.mlp`; with a cache its keys and values go there."""
    x = net.per_token("residual stream", net.shape.model_dim, "C")
    weights = layer_weights(net.shape, layer)
    operations: list[Operation] = []
    middle = _attention_sublayer(net, x, weights, operations, cache_tokens)
    _mlp_sublayer(net, middle, weights, operations)
    return Part(x, tuple(operations))


def _attention_sublayer(
    net: Net,
    x: Buffer,
    weights: dict[str, Weight],
    operations: list[Operation],
    cache_tokens: int | None,
) -> Buffer:
    shape = net.shape

    def run(operation: Operation) -> Buffer:
        operations.append(operation)
        return operation.result

    h = run(_norm(net, x, weights.get("attention_norm")))
    q = run(kind.linear(net, h, weights["query"], "queries", "C"))
    k = run(kind.linear(net, h, weights["key"], "keys", "K·D"))
    v = run(kind.linear(net, h, weights["value"], "values", "K·D"))
    held = [h]
    if "value_embedding" in weights:
        ve = run(kind.embedding(net, weights["value_embedding"], name="value embeddings"))
        v = run(kind.value_gate(net, h, v, ve, weights["value_gate"]))
        held.append(ve)
    if shape.style != "gpt2":
        q = run(kind.rotary(net, q))
        k = run(kind.rotary(net, k))
    if shape.style == "nanochat":
        q = run(kind.norm(net, q, shape.num_heads, name="queries", text="H"))
        k = run(kind.norm(net, k, shape.num_kv_heads, name="keys", text="K"))
    # What `Block.heads` is given and what it returns are alive until it returns.
    operations[-1] = replace(operations[-1], reads=(*operations[-1].reads, *held))
    if cache_tokens is None:
        y = run(attention(net, q, k, v))
    else:
        run(kind.cache_write(net, k, v))
        y = run(cached_attention(net, q, cache_tokens))
    y = run(kind.linear(net, y, weights["output"], "sublayer outputs", "C"))
    if net.dropout:
        y = run(kind.dropout(net, y))
    return run(kind.residual_add(net, x, y))


def _mlp_sublayer(
    net: Net, x: Buffer, weights: dict[str, Weight], operations: list[Operation]
) -> Buffer:
    def run(operation: Operation) -> Buffer:
        operations.append(operation)
        return operation.result

    h = run(_norm(net, x, weights.get("mlp_norm")))
    a = run(kind.linear(net, h, weights["up"], "mlp inputs", "M"))
    if net.shape.style == "nanochat":
        a = run(kind.relu_squared(net, a))
    elif net.shape.style == "gpt2":
        a = run(kind.gelu(net, a))
    else:
        gate = run(kind.linear(net, h, weights["gate"], "mlp inputs", "M"))
        a = run(kind.swiglu(net, gate, a))
    y = run(kind.linear(net, a, weights["down"], "sublayer outputs", "C"))
    if net.dropout:
        y = run(kind.dropout(net, y))
    return run(kind.residual_add(net, x, y))


def _norm(net: Net, x: Buffer, weight: Weight | None) -> Operation:
    name = "norm outputs"
    if weight is None:
        return kind.norm(net, x, 1, name=name, text="")
    return kind.weighted_norm(net, x, weight, name=name)


def last_norm(net: Net, x: Buffer) -> Operation:
    """The norm before the head."""
    return _norm(net, x, edge_weights(net.shape).get("norm"))


def head_weight(shape: ModelShape) -> Weight:
    """The output projection: the embedding itself where they are tied."""
    return edge_weights(shape)["embedding" if shape.tied_embeddings else "head"]


def resident(net: Net, updating: Updating | None) -> tuple[Buffer, ...]:
    """What lies in memory between steps: weights, tables, masks, optimizer state, workspace.

    `updating` is None where nothing is trained.
    """
    shape, runtime, mask_tokens = net.shape, net.runtime, net.seq_len
    buffers = _stored(net, edge_weights(shape), updating)
    for layer, repeats in layer_kinds(shape).items():
        buffers += _stored(net, layer_weights(shape, layer), updating) * repeats
    if updating is not None:
        buffers += int8_tables(net, all_weights(shape), updating)
        buffers += stages(net, updating)
    if shape.style != "gpt2":
        size = shape.context_len * (shape.head_dim // 2) * net.width_bytes
        table = net.fixed("rotary tables", "weights", size, "context·D/2 each")
        buffers += [table, net.fixed("rotary tables", "weights", size, "context·D/2 each")]
    if runtime.attention != "flash":
        windows = {shape.window_tokens(i) for i in range(shape.num_layers)} - {None}
        size = mask_tokens * mask_columns(mask_tokens) * net.width_bytes
        for window in windows:
            if window is not None and window < mask_tokens:
                buffers.append(net.fixed("window masks", "weights", size, "windows·T·T"))
    if runtime.device == "cuda":
        buffers += _cublas_workspaces(net, trains=updating is not None)
    return tuple(buffers)


def _stored(net: Net, weights: dict[str, Weight], updating: Updating | None) -> list[Buffer]:
    """Weights as they are stored, each followed by its optimizer state if there is one."""
    buffers: list[Buffer] = []
    width = net.weight_bytes
    for weight in weights.values():
        name, size = f"weights: {group_of(weight.name)}", weight.elements * width
        buffers.append(net.fixed(name, "weights", size, f"parameters·{width}"))
        if updating is not None:
            buffers += stays(weight, optimizer_state(net, weight, updating), updating)
    return buffers


def _cublas_workspaces(net: Net, *, trains: bool) -> list[Buffer]:
    """One for each thread that multiplies: the caller's, and autograd's if there is a backward."""
    size = scratch.cublas_workspace(net.runtime.capability)
    workspace = net.fixed("cuBLAS workspace", "workspace", size, "constant of the card")
    return [workspace] * (2 if trains else 1)
