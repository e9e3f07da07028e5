"""The versions of nanochat that are planned, as data. Read in its repository at the commit named.

Nothing here is memory arithmetic: what a version keeps is in `kept.py`, what its optimizer holds in
`optimizer.py`, how its command is spelled in `command.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class Version:
    """One tree of nanochat.

    Attributes:
        gate_channels: inputs of a value gate; 0 where there are no value embeddings.
        smear_channels: inputs of the smear gate; 0 where the model has none.
        layer_scalars: whether every layer has a residual and an x0 factor.
        window_parts: a short window is the context divided by this; 0 where there is none.
        whole_heads: whether the width is rounded up to the head size (else it is 64 x depth).
        optimizer: `lists`: one collective per `world_size` matrices, AdamW apart; `stacked`: one
            per shape, two classes for one rank and several; `unified`: the same, one class.
        ratio: tokens per parameter of a run that says nothing; `ratio_of` says of which.
        total_batch_tokens: tokens of a step that says nothing; None: the rule by the horizon.
        clips: whether gradients are clipped.
        fp8: whether it can train in FP8, and that is derived.
        options: its flags for our fields, as they are typed; what is absent it lacks.
        lacks: fields that are lacking for a reason worth saying, each with it.
    """

    name: str
    date: str
    commit: str
    vocab_size: int
    gate_channels: int
    smear_channels: int
    layer_scalars: bool
    window_parts: int
    whole_heads: bool
    optimizer: Literal["lists", "stacked", "unified"]
    ratio: float
    ratio_of: Literal["all parameters", "matrices + head"]
    total_batch_tokens: int | None
    clips: bool
    fp8: bool
    options: Mapping[str, str]
    lacks: tuple[tuple[str, str], ...] = ()

    @property
    def value_embeddings(self) -> bool:
        """Whether every other layer has one."""
        return self.gate_channels > 0

    def communicates(self, launcher: str, world_size: int) -> bool:
        """Whether the optimizer goes through NCCL: under torchrun, until July also on one card."""
        return launcher == "torchrun" and (world_size > 1 or self.optimizer != "unified")


# nanochat's name of each field of ours. October's are set by its configurator, with underscores.
_OCTOBER = {
    "depth": "depth",
    "seq_len": "max_seq_len",
    "num_iterations": "num_iterations",
    "tokens_per_param": "target_param_data_ratio",
    "device_batch_size": "device_batch_size",
    "total_batch_tokens": "total_batch_size",
    "matrix_learning_rate": "matrix_lr",
    "weight_decay": "weight_decay",
    "warmup_fraction": "warmup_ratio",
    "cooldown_fraction": "warmdown_ratio",
    "clip_norm": "grad_clip",
    "eval_every": "eval_every",
}
_HYPHENS = {field: flag.replace("_", "-") for field, flag in _OCTOBER.items()}
_FEBRUARY = {
    **{field: flag for field, flag in _HYPHENS.items() if field != "clip_norm"},
    "window_pattern": "window-pattern",
    "save_every": "save-every",
}
_MARCH = {
    **{field: flag for field, flag in _FEBRUARY.items() if field != "warmup_fraction"},
    "fp8": "fp8",
}

_EAGER_UNDER_AUTOCAST = "compile", "without its compiler it runs under autocast, not derived"
OCTOBER = Version(
    name="nanochat@2025-10",
    date="2025-10-24",
    commit="fca2b8c",
    vocab_size=65536,
    gate_channels=0,
    smear_channels=0,
    layer_scalars=False,
    window_parts=0,
    whole_heads=False,
    optimizer="lists",
    ratio=20.0,
    ratio_of="all parameters",
    total_batch_tokens=524_288,
    clips=True,
    fp8=False,
    options=MappingProxyType(_OCTOBER),
    lacks=(_EAGER_UNDER_AUTOCAST,),
)
FEBRUARY = Version(
    name="nanochat@2026-02",
    date="2026-02-06",
    commit="685271d",
    vocab_size=32768,
    gate_channels=32,
    smear_channels=0,
    layer_scalars=True,
    window_parts=2,
    whole_heads=True,
    optimizer="stacked",
    ratio=10.5,
    ratio_of="matrices + head",
    total_batch_tokens=None,
    clips=False,
    fp8=False,
    options=MappingProxyType(_FEBRUARY),
    lacks=(("fp8", "its FP8 is torchao's, whose memory is not derived"), _EAGER_UNDER_AUTOCAST),
)
MARCH = Version(
    name="nanochat@2026-03",
    date="2026-03-14",
    commit="1b1cc3c",
    vocab_size=32768,
    gate_channels=12,
    smear_channels=24,
    layer_scalars=True,
    window_parts=4,
    whole_heads=True,
    optimizer="stacked",
    ratio=10.5,
    ratio_of="matrices + head",
    total_batch_tokens=None,
    clips=False,
    fp8=True,
    options=MappingProxyType(_MARCH),
)
JULY = Version(
    name="nanochat@2026-07",
    date="2026-07-03",
    commit="92d63d4",
    vocab_size=32768,
    gate_channels=12,
    smear_channels=24,
    layer_scalars=True,
    window_parts=4,
    whole_heads=True,
    optimizer="unified",
    ratio=12.0,
    ratio_of="matrices + head",
    total_batch_tokens=None,
    clips=False,
    fp8=True,
    options=MappingProxyType(_MARCH),
)
VERSIONS = (OCTOBER, FEBRUARY, MARCH, JULY)  # the newest last
