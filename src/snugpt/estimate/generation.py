"""Generation as a timeline: one prefill of the prompt, then the last of the decode steps.

What `run/generate.py` does with `GPT.next_logits`: weights in the generation dtype, a static cache,
logits for the last position only. Decoding is walked at the full cache, where it is largest.
Left out on the CPU: the scratch of oneDNN's bf16 products, its own choice (up to 0.2 MiB was seen).
"""

from __future__ import annotations

from snugpt.estimate import kinds as kind
from snugpt.estimate.operations import FP32, INT64, Buffer, Net
from snugpt.estimate.stacks import snugpt as stack
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.estimate.walk import forward, sequence
from snugpt.spec.memory import Phase
from snugpt.spec.recipe import BYTES, GenerationRecipe
from snugpt.spec.runtime import Runtime, mask_columns
from snugpt.spec.shape import ModelShape


def generation_timeline(shape: ModelShape, recipe: GenerationRecipe, runtime: Runtime) -> Timeline:
    """Return the timeline of `recipe.batch` sequences from the prompt to the last token."""
    placed: list[Placed] = []
    aliases: dict[Buffer, Buffer] = {}
    phases: tuple[tuple[Phase, int], ...] = (("prefill", recipe.prompt_tokens), ("decode", 1))
    for phase, num_tokens in phases:
        net = Net(shape, runtime, recipe.weight_dtype, num_tokens, casts_weights=False, drops=False)
        placed += _pass(net, phase, recipe, aliases)
    net = Net(shape, runtime, recipe.weight_dtype, 1, casts_weights=False, drops=False)
    resident = (*stack.resident(net, None), *_cache(net, recipe))
    return Timeline(resident, tuple(placed), runtime.block_bytes, aliases)


def _cache(net: Net, recipe: GenerationRecipe) -> tuple[Buffer, ...]:
    """Keys and values of every layer: L x cache_len x K x D each, per sequence."""
    shape, size = net.shape, BYTES[recipe.kv_dtype]
    elements = shape.num_layers * recipe.cache_len * shape.kv_dim
    formula = f"B·L·S·K·D·{size}"
    return tuple(
        Buffer(name, "kv_cache", 0, elements * size, formula) for name in ("keys", "values")
    )


def _pass(
    net: Net, phase: Phase, recipe: GenerationRecipe, aliases: dict[Buffer, Buffer]
) -> list[Placed]:
    """The events of one call of `next_logits` and the choice of a token."""
    shape, block = net.shape, net.runtime.block_bytes
    placed: list[Placed] = []

    def place(layer: int, events: list[Event]) -> None:
        placed.append(Placed(phase, layer, Segment(events, block)))

    tokens = net.per_token("tokens", 1, "", element_bytes=INT64, category="batch")
    place(-1, [Event(1, tokens), *_new_masks(net)])
    stream = net.per_token("residual stream", shape.model_dim, "C")
    embedding = stack.embedding_part(net)
    aliases[embedding.result] = stream
    place(-1, forward(embedding.operations, None, keep=False))
    keys = recipe.prompt_tokens if phase == "prefill" else recipe.cache_len
    segments: dict[tuple[bool, int | None], Segment] = {}
    for layer in range(shape.num_layers):
        window = shape.window_tokens(layer)
        kind_of_layer = shape.has_value_embedding(layer), window
        if kind_of_layer not in segments:
            seen = min(keys, window) if window and phase == "decode" else keys
            part = stack.layer_part(net, layer, cache_tokens=seen)
            assert part.entry is not None
            aliases |= {part.entry: stream, part.result: stream}
            segments[kind_of_layer] = Segment(
                forward(part.operations, part.entry, keep=False), block
            )
        placed.append(Placed(phase, layer, segments[kind_of_layer]))
    place(shape.num_layers, _head(net, stream))
    place(-1, [Event(-1, tokens)])
    return placed


def _new_masks(net: Net) -> list[Event]:
    """`GPT.window_masks` at the first prompt: each mask, and as much again while it is made."""
    shape, tokens = net.shape, net.seq_len
    if net.runtime.attention == "flash" or tokens == 1:
        return []
    events: list[Event] = []
    size = tokens * mask_columns(tokens) * net.width_bytes
    for window in {shape.window_tokens(i) for i in range(shape.num_layers)} - {None}:
        if window is not None and window < tokens:
            mask = net.fixed("window masks", "weights", size, "windows·T·T")
            half = net.fixed("window masks", "weights", size, "windows·T·T")
            events += sequence((mask, half, half))
    return events


def _head(net: Net, stream: Buffer) -> list[Event]:
    """From the residual stream to one token per sequence: `next_logits` and `sampling.choose`.

    Sampling holds the logits, the probabilities and as many random numbers at once. A top_p, which
    the recipe does not name, sorts them: another 13 bytes per sequence and token of the vocabulary.
    """
    shape = net.shape
    last = Net(shape, net.runtime, net.compute_dtype, 1, casts_weights=False, drops=False)
    head = stack.head_weight(shape)
    one = Buffer("norm outputs", "activations", 0, shape.model_dim * net.width_bytes, "B·C")
    statistics = Buffer("norm statistics", "activations", 0, FP32, "B·4")
    logits = kind.next_logits(last, one, head)
    choice = tuple(
        Buffer("sampling scratch", "logits", 0, shape.vocab_size * FP32, "B·V·4") for _ in "pq"
    )
    events = [Event(1, statistics), Event(1, one), Event(-1, statistics), Event(-1, stream)]
    events += sequence(logits.forward)
    events += [Event(-1, one), *sequence((*choice, *choice)), Event(-1, logits.result)]
    return events
