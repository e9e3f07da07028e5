"""The lever `compile = on`, a function from list to list: a layer becomes two operations.

Read beside `model/compiling.py`, which compiles the two sublayers, each as one graph. The rules,
and where they come from in PyTorch 2.13:

- kept is what the operations keep (`save_for_backward`), but a pointwise result that only matrix
  products read is made again from what it was made of (partitioners.py, the minimal cut with its
  two bans lifted): a norm's output, an activation's output, casts of weights. Statistics are kept;
- a pointwise result that only pointwise results are made of never exists (scheduler.py, fusion):
  rotated heads under a norm, the residual sum's second input;
- a kernel's output takes over an input of its size that nobody else reads (scheduler.py,
  `decide_inplace_update`); what was kept is given up like any other buffer (donated buffers);
- gradients are made in the order in which the walk makes them, but where a product reads what is
  made again, it waits for it: made again it is by the kernel that reads the same inputs, the
  activation's or the norm's own backward;
- all gradients of weights are handed out together, when the call returns.

Held to Inductor's own CUDA plan, `tests/estimate/golden/inductor_blocks.json`. Derived: no compiled
step has run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from snugpt.estimate.operations import FP32, Buffer, Net, Operation, Weight, WeightGradient
from snugpt.estimate.stacks.snugpt import Part
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

ROWS_PER_PARTIAL_SUM = 64  # `mix_order_reduction_split_size` of model/compiling.py


def compiled_layer(net: Net, part: Part) -> Part:
    """A layer's operations as two: attention and mlp, each with its norm and residual sum."""
    end = next(i for i, op in enumerate(part.operations) if op.name == "residual add") + 1
    attention = _attention(net, part.operations[:end])
    return Part(part.entry, (attention, _mlp(net, part.operations[end:])))


def why_not_compiled(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime) -> str | None:
    """What stands against `compile = on`, or None. What was never compared is not compiled."""
    if runtime.device != "cuda":
        return "it is for CUDA"
    if runtime.attention != "flash":
        return "it needs bf16 on CUDA 8.0 and up"
    if shape.dropout:
        return "it has no dropout"
    if shape.style != "nanochat" and recipe.micro_batch_tokens == shape.model_dim:
        # Inductor tells sums over rows from sums over columns by their numbers.
        return f"one pass can't have as many tokens as the model is wide, {shape.model_dim}"
    return None


@dataclass(frozen=True, slots=True)
class Entry:
    """The norm that a sublayer begins with: what it makes, keeps and makes again."""

    x: Buffer
    norm: Operation

    @property
    def output(self) -> Buffer:
        """The norm's output, which every product of the sublayer reads."""
        return self.norm.result

    @property
    def statistics(self) -> tuple[Buffer, ...]:
        """What the norm keeps beside its input or output."""
        return tuple(b for b in self.norm.keeps if b is not self.x and b is not self.output)

    @property
    def weight_gradients(self) -> tuple[WeightGradient, ...]:
        """Of the norm's own weight, if it has one."""
        return self.norm.weight_gradients


def _mlp(net: Net, operations: tuple[Operation, ...]) -> Operation:
    """norm -> one or two products -> activation -> product -> residual sum."""
    norm, *products, activation, down, add = operations
    entry = Entry(norm.reads[0], norm)
    inner = [product.result for product in products]
    forward = (
        *entry.statistics, entry.output,
        *(b for product in products for b in _forward(net, product)),
        entry.output, activation.result, *_forward(net, down, add.result), activation.result,
    )  # fmt: skip
    grad, (weight, grad_weight) = net.gradient_of(activation.result), down.weight_gradients[0]
    again, grads = net.gradient_of(activation.result), [net.gradient_of(b) for b in inner]
    cast, low = net.cast_of(weight), _low(net, weight)
    into: tuple[Buffer, ...]
    if len(inner) > 1:  # the kernel's outputs each have inputs that the others read too
        into = (again, *grads, grad, *inner)
    elif activation.keeps == (activation.result,):  # the derivative comes from the output
        grads, into = [grad], (*inner, again)
    else:
        grads, into = [grad], (again, *inner)
    left, ending = _ending(net, entry, list(zip(products, grads, strict=True)))
    backward = (*cast, grad, *cast, *into, *low, again, grad_weight, *low, *ending)
    return Operation(
        name="compiled mlp",
        reads=(entry.x,),
        result=add.result,
        forward=forward,
        keeps=(entry.x, *entry.statistics, *inner),
        backward=backward,
        gradients=((entry.x, left),),
        weight_gradients=_weight_gradients(operations),
    )


def _attention(net: Net, operations: tuple[Operation, ...]) -> Operation:
    """norm -> three products [-> value gate] [-> rotary] [-> norms] -> attention -> product."""
    norm, query, key, value, *between, attention, output, add = operations
    entry = Entry(norm.reads[0], norm)
    q, k, v = attention.reads
    gate = next((op for op in between if op.name == "gate"), None)
    norms = [op for op in between if op.name == "norm"]
    heads = [(query.result, q), (key.result, k)] if q is not query.result else []
    sums = [next(b for b in op.keeps if b is not op.result) for op in norms]
    forward = [*entry.statistics, entry.output]
    for product in (query, key):
        forward += _forward(net, product)
    forward += _forward(net, value, v)
    extra: tuple[Buffer, ...] = ()
    if gate is not None:
        _, table, mixed = gate.keeps
        extra, cast = (table, mixed), net.cast_of(gate.weight_gradients[0][0])
        forward += [*cast, mixed, *cast, entry.output, table]
    else:
        forward += [entry.output]
    forward += [*sums, *_moved(heads, together=bool(norms))]
    forward += [*attention.forward, *_forward(net, output, add.result)]
    kept = (entry.x, *entry.statistics, *extra, *sums, *attention.keeps)
    left, backward = _attention_backward(net, entry, operations)
    return Operation(
        name="compiled attention",
        reads=(entry.x,),
        result=add.result,
        forward=tuple(forward),
        keeps=kept,
        backward=backward,
        gradients=((entry.x, left),),
        weight_gradients=_weight_gradients(operations),
    )


def _attention_backward(
    net: Net, entry: Entry, operations: tuple[Operation, ...]
) -> tuple[Buffer, tuple[Buffer, ...]]:
    """The gradient of x that is left, and the events."""
    _, query, key, value, *between, attention, output, _ = operations
    gate = next((op for op in between if op.name == "gate"), None)
    norms = [op for op in between if op.name == "norm"]
    q, k, v = attention.reads
    (weight, grad_weight), grad = output.weight_gradients[0], net.gradient_of(attention.result)
    cast, low = net.cast_of(weight), _low(net, weight)
    backward = [*cast, grad, *cast, *low, grad_weight, *low, *attention.backward, grad]
    backward += [b for b in attention.keeps if not norms or b not in (q, k)]
    grads = {buffer: made for buffer, made in attention.gradients if made is not None}
    turned = {q: grads[q], k: grads[k]}
    if q is not query.result:
        turned = {q: net.gradient_of(query.result), k: net.gradient_of(key.result)}
        backward += _moved([(grads[b], turned[b]) for b in (q, k)], together=bool(norms))
    if norms:
        backward += [q, k, *(b for op in norms for b in op.keeps if b is not op.result)]
    channels: tuple[Buffer, ...] = ()
    if gate is not None:
        gated, channels = _gate_backward(net, gate, between)
        backward += gated
    made = [(value, grads[v]), (key, turned[k]), (query, turned[q])]
    left, ending = _ending(net, entry, made, channels)
    return left, (*backward, *ending)


def _gate_backward(
    net: Net, gate: Operation, between: list[Operation]
) -> tuple[list[Buffer], tuple[Buffer, ...]]:
    """The table's gradient is summed by the kernel that makes the slope, from nothing stored."""
    _, table, mixed = gate.keeps
    ((weight, grad_weight),) = gate.weight_gradients
    embedding = next(op for op in between if op.name == "embedding")
    grad_table = embedding.weight_gradients[0][1]
    slope = net.gradient_of(mixed)
    low, cast = _low(net, weight), net.cast_of(weight)
    channels = net.per_token("value gates", weight.columns, str(weight.columns))
    events = [grad_table, slope, mixed, table, *cast, channels, *cast]
    return events, (channels, *low, slope, grad_weight, *low)


def _ending(
    net: Net,
    entry: Entry,
    products: list[tuple[Operation, Buffer]],
    beside: tuple[Buffer, ...] = (),
) -> tuple[Buffer, list[Buffer]]:
    """From the gradients of the first products to that of x; then the products' weights.

    One kernel adds up what reached the norm's output, goes back through the norm and makes the
    output again, which the weights' gradients are waiting for.
    """
    events: list[Buffer] = []
    reached = []
    for product, _ in products:
        cast = net.cast_of(product.weight_gradients[0][0])
        reached.append(net.gradient_of(entry.output))
        events += [*cast, reached[-1], *cast]
    again, left = net.gradient_of(entry.output), reached[0]
    events.append(again)
    if entry.weight_gradients:  # sums over rows as well: nothing is taken over
        ((weight, grad_weight),) = entry.weight_gradients
        left = net.gradient_of(entry.x)
        parts = _partial_sums(net, weight)
        events += [left, parts, grad_weight, parts, *reached]
    else:
        events += reached[1:]
    events += [*entry.statistics, entry.x, *beside]
    for product, grad in products:
        ((weight, grad_weight),) = product.weight_gradients
        low = _low(net, weight)
        last = (again,) if product is products[-1][0] else ()
        events += [*low, grad, *last, grad_weight, *low]
    return left, events


def _forward(net: Net, product: Operation, result: Buffer | None = None) -> tuple[Buffer, ...]:
    """A product with its weight's cast; what is added to it afterwards is added in place."""
    cast = net.cast_of(product.weight_gradients[0][0])
    return (*cast, product.result if result is None else result, *cast)


def _moved(pairs: list[tuple[Buffer, Buffer]], *, together: bool) -> list[Buffer]:
    """Each first buffer becomes the second in one kernel, or both do in the same."""
    if together:
        return [*(b for _, b in pairs), *(b for b, _ in pairs)]
    return [each for before, after in pairs for each in (after, before)]


def _low(net: Net, weight: Weight) -> tuple[Buffer, ...]:
    """A weight's gradient as the product makes it, before it is raised to fp32."""
    if not net.casts:
        return ()
    size = weight.elements * net.width_bytes
    return (net.fixed("weight casts", "activations", size, f"O·I·{net.width_bytes}"),)


def _partial_sums(net: Net, weight: Weight) -> Buffer:
    """The norm's weight gradient, summed over some rows at a time."""
    rows = -(-net.seq_len // ROWS_PER_PARTIAL_SUM)
    return Buffer("norm scratch", "activations", 0, rows * weight.elements * FP32, "B·T/64·C·4")


def _weight_gradients(operations: tuple[Operation, ...]) -> tuple[WeightGradient, ...]:
    return tuple(pair for op in operations for pair in op.weight_gradients)
