"""Published measurements of other programs: figures that others printed, each with its source.

The fields are described in `records/README.md`. None: the source does not say.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from snugpt.errors import bad_line

Kind = Literal[
    "train_memory",
    "train_speed",
    "train_cost",
    "generate_memory",
    "generate_speed",
    "fits_or_oom",
    "activation_formula",
]


class PublishedModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sizes of the model of a row."""

    layers: int | None
    dim: int | None
    heads: int | None
    kv_heads: int | None
    ffn: int | None
    vocab: int | None
    tied: bool | None
    style: str | None


class PublishedFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured. Memory in MiB (2**20 bytes), `mfu` in percent."""

    allocated_mib: float | None
    reserved_mib: float | None
    process_mib: float | None
    nvidia_smi_mib: float | None
    outcome: Literal["fits", "oom"] | None
    tokens_per_s: float | None
    step_ms: float | None
    hours: float | None
    usd: float | None
    mfu: float | None


class PublishedRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One published measurement."""

    id: str
    kind: Kind
    source: str
    date: str | None
    gpu: str | None
    num_gpus: int | None
    program: str
    model: PublishedModel
    params: int | None
    seq_len: int | None
    device_batch_size: int | None
    total_batch_tokens: int | None
    grad_accum: int | None
    optimizer: str | None
    weight_dtype: str | None
    compute_dtype: str | None
    compile: bool | None
    activation_checkpointing: str | None
    sharding: str | None
    measured: PublishedFigures
    confidence: Literal["exact", "rounded", "claimed"]
    notes: str | None

    @property
    def program_name(self) -> str:
        """The program without the commit or month behind its @."""
        return self.program.partition("@")[0]


class PublishedRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which stack predicts a row, and how its run was started; None where that is not known.

    `stack` is None where none of ours is the row's version.
    """

    id: str
    stack: str | None
    launcher: Literal["python", "torchrun"] | None
    launcher_is: Literal["stated", "inferred", "unknown"]
    because: str
    capability: tuple[int, int] | None = None  # of a card that the catalogue lacks

    def __post_init__(self) -> None:
        if (self.launcher is None) != (self.launcher_is == "unknown"):
            raise ValueError(f"launcher = {self.launcher!r} is {self.launcher_is}")


Row = TypeVar("Row", PublishedRow, PublishedRun)


def published_lines(text: bytes, kind: type[Row], name: str) -> tuple[Row, ...]:
    """Read the lines of a file of rows; `name` is the file's path, for the error.

    Raises:
        FailedError: a line is not such a row, or an id occurs twice.
    """
    found: dict[str, Row] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = msgspec.json.decode(line, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise bad_line(name, number, error) from error
        if row.id in found:
            raise bad_line(name, number, f"id {row.id!r} is there twice")
        found[row.id] = row
    return tuple(found.values())
