"""Generation as a timeline: one prefill of the prompt, then the last of the decode steps.

What `run/generate.py` does with `GPT.next_logits`: weights in the generation dtype, a static cache,
logits for the last position only. Decoding is walked at the full cache, where it is largest.
Left out on the CPU: the scratch of oneDNN's bf16 products, its own choice (up to 0.2 MiB was seen).
"""

from __future__ import annotations

from snugpt.estimate import kinds as kind
from snugpt.estimate import scratch
from snugpt.estimate.operations import FP32, INT64, Buffer, Net
from snugpt.estimate.stacks import snugpt as stack
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.estimate.walk import forward, sequence
from snugpt.spec.memory import Phase
from snugpt.spec.recipe import BYTES, GenerationRecipe
from snugpt.spec.runtime import Runtime, mask_columns
from snugpt.spec.shape import ModelShape

DEFAULT_TOP_K = 50  # of `model/sampling.py`


def generation_timeline(shape: ModelShape, recipe: GenerationRecipe, runtime: Runtime) -> Timeline:
    """Return the timeline of `recipe.batch` sequences from the prompt to the last token."""
    placed: list[Placed] = []
    aliases: dict[Buffer, Buffer] = {}
    tokens: Buffer | None = None
    phases: tuple[tuple[Phase, int], ...] = (("prefill", recipe.prompt_tokens), ("decode", 1))
    for phase, num_tokens in phases:
        net = Net(shape, runtime, recipe.weight_dtype, num_tokens, casts_weights=False, drops=False)
        made, tokens = _pass(net, phase, recipe, aliases, tokens)
        placed += made
    assert tokens is not None
    placed.append(Placed("decode", -1, Segment([Event(-1, tokens)], runtime.block_bytes)))
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
    net: Net,
    phase: Phase,
    recipe: GenerationRecipe,
    aliases: dict[Buffer, Buffer],
    tokens: Buffer | None,
) -> tuple[list[Placed], Buffer]:
    """The events of one call of `next_logits` and the choice of a token, which is returned.

    `tokens` are what is read, if they are there already.
    """
    shape, block = net.shape, net.runtime.block_bytes
    placed: list[Placed] = []

    def place(layer: int, events: list[Event]) -> None:
        placed.append(Placed(phase, layer, Segment(events, block)))

    prompt = net.per_token("tokens", 1, "", element_bytes=INT64, category="batch")
    place(-1, [*([Event(1, prompt)] if tokens is None else []), *_new_masks(net)])
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
    chosen = Buffer("tokens", "batch", 0, INT64, "B·8")
    place(shape.num_layers, _head(net, stream, chosen))
    place(-1, [Event(-1, prompt if tokens is None else tokens)])
    return placed, chosen


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


def _head(net: Net, stream: Buffer, chosen: Buffer) -> list[Event]:
    """From the residual stream to one token per sequence: `next_logits` and `sampling.choose`."""
    shape = net.shape
    last = Net(shape, net.runtime, net.compute_dtype, 1, casts_weights=False, drops=False)
    head = stack.head_weight(shape)
    one = Buffer("norm outputs", "activations", 0, shape.model_dim * net.width_bytes, "B·C")
    norm = _last_norm(last, one)
    logits = kind.next_logits(last, one, head)
    events = [*norm, Event(-1, stream), *sequence(logits.forward), Event(-1, one)]
    return [*events, *_choice(shape, logits.result, chosen)]


def _last_norm(net: Net, out: Buffer) -> list[Event]:
    """The last norm, of one position per sequence; its statistics go at once."""
    num_statistics = 2 if net.shape.style == "gpt2" else 1
    statistics = tuple(
        Buffer("norm statistics", "activations", 0, FP32, "B·4") for _ in range(num_statistics)
    )
    fused = net.cuda or net.shape.style == "gpt2"
    made = (out, *statistics) if fused else (*statistics, out)
    return sequence((*made, *statistics))


def _choice(shape: ModelShape, logits: Buffer, chosen: Buffer) -> list[Event]:
    """`sampling.choose` with the default settings: the 50 likeliest, then one of them.

    A top_p, which the recipe does not name, sorts the logits: another 13 bytes per sequence and
    token of the vocabulary.
    """
    V = shape.vocab_size
    cut: tuple[Buffer, ...] = ()
    values: tuple[Buffer, ...] = ()
    if V > DEFAULT_TOP_K:
        best = DEFAULT_TOP_K
        values = (Buffer("sampling scratch", "logits", 0, best * FP32, f"B·{best}·4"),)
        places = Buffer("sampling scratch", "logits", 0, best * INT64, f"B·{best}·8")
        unlikely = Buffer("sampling scratch", "logits", 0, V, "B·V")
        cut = (*values, places, places, unlikely, unlikely)
    probabilities = Buffer("sampling scratch", "logits", 0, V * FP32, "B·V·4")
    inside = Buffer("sampling scratch", "workspace", 0, scratch.multinomial(V), "B·V·4")
    events = sequence((*cut, probabilities, chosen, inside, inside, *values, probabilities))
    return [*events, Event(-1, logits)]
