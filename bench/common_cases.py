"""The cases that `bench/peers.py` asks of everybody, and how its table is laid out."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Case:
    """One training step: AdamW, bf16 over fp32 weights, flash attention, one device."""

    style: str
    layers: int
    width: int
    heads: int
    mlp: int
    vocab: int
    seq_len: int
    batch: int
    tied: bool
    parameters: int


GPT2 = Case("gpt2", 12, 768, 12, 3072, 50257, 1024, 8, True, 124_439_808)
CASES = {
    "A": GPT2,
    "B": Case(**{**asdict(GPT2), "batch": 32}),
    "C": Case("llama", 12, 768, 12, 2048, 32000, 1024, 8, False, 134_105_856),
}
WIDTH = 100


def head() -> str:
    """The first line of the table."""
    return f"{'who':<14} {'asked for':<17}{''.join(f'{c:>10}' for c in CASES)}   leaves out"


def row(who: str, asked_for: str, mib: dict[str, float], leaves_out: str) -> str:
    """One line of the table, MiB by the letter of the case; '-' where there is no figure."""
    cells = "".join(f"{mib[c]:>10,.0f}" if c in mib else f"{'-':>10}" for c in CASES)
    return f"{who:<14} {asked_for:<17}{cells}   {leaves_out}"
