"""The parameters of a version of nanochat, their groups, number formats and optimizer's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from snugpt.errors import BadQuestionError
from snugpt.estimate.stacks.nanochat.versions import Version
from snugpt.spec.shape import ModelShape, ParameterGroup, shape_for

HEAD_DIM = 128
SMALL_ELEMENTS = 1024  # from here on AdamW's state is divided over the ranks


@dataclass(frozen=True, slots=True)
class Tensor:
    """A kind of parameter: how many there are of it, and its size. Vectors have one row."""

    group: ParameterGroup
    count: int
    rows: int
    columns: int
    element_bytes: int

    @property
    def elements(self) -> int:
        """rows x columns."""
        return self.rows * self.columns

    @property
    def num_bytes(self) -> int:
        """Bytes of one of them; its gradient has as many."""
        return self.elements * self.element_bytes


def shape_of(
    version: Version,
    depth: int,
    *,
    seq_len: int = 2048,
    vocab_size: int | None = None,
    window_pattern: str | None = None,
) -> ModelShape:
    """Return the shape at a depth of the version's dial.

    Raises:
        BadQuestionError: October's model does not divide into heads at this depth.
    """
    from msgspec.structs import replace

    width = heads = None
    if not version.whole_heads:
        width, heads = 64 * depth, -(-64 * depth // HEAD_DIM)
        if width % heads or width // heads % 2:
            raise BadQuestionError(
                f"depth = {depth} is not allowed: {version.name} has {heads} heads there, which do"
                f" not divide its width {width}",
                hint=f"snugpt plan --stack {version.name} --gpu h100 --depth {depth + 1}",
            )
    shape = shape_for(
        "nanochat", depth, context_len=seq_len, width=width, heads=heads,
        vocab_size=vocab_size or version.vocab_size,
        window_pattern=window_pattern if version.window_parts else "L",
    )  # fmt: skip
    if not version.value_embeddings:
        shape = replace(
            shape, value_embeddings=False, padded_vocab_size=shape.vocab_size
        )  # October does not pad
    return shape


def adamw_tensors(version: Version, shape: ModelShape) -> tuple[Tensor, ...]:
    """Return what AdamW trains, in the optimizer's order: head, embeddings, then scalars."""
    V, C, L = shape.padded_vocab_size, shape.model_dim, shape.num_layers
    tensors = [
        Tensor("head", 1, V, C, 4),
        Tensor("embedding", 1, V, C, 2),
    ]
    if version.value_embeddings:
        tensors.append(Tensor("value_embedding", num_mixing(shape), V, shape.kv_dim, 2))
    if version.layer_scalars:
        tensors.append(Tensor("scalars", 2, 1, L, 4))
    if version.smear_channels:
        tensors += [Tensor("scalars", 1, 1, version.smear_channels, 4)]
        tensors += [Tensor("scalars", 2, 1, 1, 4)]
    return tuple(tensors)


def muon_tensors(version: Version, shape: ModelShape) -> tuple[Tensor, ...]:
    """Return what Muon trains, one entry per shape, sorted as the optimizer sorts them."""
    C, L = shape.model_dim, shape.num_layers
    sizes = {(C, C): 4 * L, (C, 4 * C): L, (4 * C, C): L}
    if version.value_embeddings:
        gate = (shape.num_kv_heads, version.gate_channels)
        sizes[gate] = sizes.get(gate, 0) + num_mixing(shape)
    return tuple(
        Tensor("matrices", count, rows, columns, 4)
        for (rows, columns), count in sorted(sizes.items())
    )


def all_tensors(version: Version, shape: ModelShape) -> tuple[Tensor, ...]:
    """Return every parameter of the version, once."""
    return adamw_tensors(version, shape) + muon_tensors(version, shape)


def parameter_groups(version: Version, shape: ModelShape) -> dict[ParameterGroup, int]:
    """Count the parameters by group, as nanochat prints them."""
    groups: dict[ParameterGroup, int] = {}
    for tensor in all_tensors(version, shape):
        groups[tensor.group] = groups.get(tensor.group, 0) + tensor.count * tensor.elements
    order = ("embedding", "value_embedding", "head", "matrices", "scalars")
    return {group: groups[group] for group in order if group in groups}


def num_mixing(shape: ModelShape) -> int:
    """How many layers mix a value embedding in."""
    return sum(shape.has_value_embedding(i) for i in range(shape.num_layers))


def flops_per_token(version: Version, shape: ModelShape) -> int:
    """Cost of a token forward and backward: 6 per multiplied weight, 12 x width x window a layer.

    nanochat's `estimate_flops`; attention is counted over its whole window.
    """
    windows = sum(_window(version, shape, i) for i in range(shape.num_layers))
    groups = parameter_groups(version, shape)
    multiplied = groups["matrices"] + groups["head"]
    if version.name != "nanochat@2026-07":  # until then the smear gate was left out
        return 6 * multiplied + 12 * shape.model_dim * windows
    return 6 * (multiplied + version.smear_channels) + 12 * shape.model_dim * windows


def _window(version: Version, shape: ModelShape, layer: int) -> int:
    """Tokens a layer sees. February: half the context. Later a quarter, rounded up to 128."""
    T = shape.context_len
    pattern = shape.window_pattern
    last = layer == shape.num_layers - 1
    if not version.window_parts or last or pattern[layer % len(pattern)] == "L":
        return T
    if version.window_parts == 2:
        return T // 2
    return -(-T // version.window_parts // 128) * 128


def owned(tensor: Tensor, world_size: int) -> int:
    """How many matrices of a shape rank 0 owns: its share, rounded up."""
    return -(-tensor.count // world_size)


def adamw_slices(
    version: Version, shape: ModelShape, world_size: int
) -> Iterator[tuple[Tensor, int]]:
    """Yield each tensor of AdamW with the bytes of what one rank updates of it."""
    for tensor in adamw_tensors(version, shape):
        parts = 1 if tensor.elements < SMALL_ELEMENTS else world_size
        for _ in range(tensor.count):
            yield tensor, tensor.num_bytes // parts
