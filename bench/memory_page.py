"""The tables and the picture of docs/concepts/memory.md, from the code that predicts.

    python bench/memory_page.py            print the page as it would be today
    python bench/memory_page.py --write    write it, and memory.svg beside it

What stands between two marks is replaced; a test holds the page to this program's output.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import snugpt
from snugpt.estimate.operations import Buffer, Net
from snugpt.estimate.scratch import ASSUMED
from snugpt.estimate.stacks.snugpt import layer_part
from snugpt.planner.picturing import picture_of
from snugpt.spec.plan import Plan
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, Style, shape_for
from snugpt.units import gib

PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "memory.md"
PICTURE = PAGE.with_suffix(".svg")
DEPTH, SEQ_LEN = 12, 2048
GPU = "rtx-4090"
FLASH = Runtime(device="cuda", attention="flash", capability=(8, 9))
HEADERS = "2.13.0, as installed"


def page(text: str) -> str:
    """Return the page with everything between marks made anew."""
    tables: dict[str, Callable[[], str]] = {f"kept {style}": _kept(style) for style in STYLES}
    tables |= {"terms": terms_table, "assumed": assumed_table}

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{tables[match[2]]()}\n\n{match[3]}"

    return re.sub(r"(<!-- made: ([\w ]+) -->).*?(<!-- end -->)", made, text, flags=re.DOTALL)


def _kept(style: Style) -> Callable[[], str]:
    return lambda: kept_table(style)


def kept_table(style: Style) -> str:
    """What the operations of one layer keep for backward, in bytes per token."""
    shape = shape_for(style, DEPTH, context_len=SEQ_LEN)
    net = Net(shape, FLASH, "bf16", SEQ_LEN)
    layer = next(i for i in range(DEPTH) if style != "nanochat" or shape.has_value_embedding(i))
    keepers: dict[Buffer, list[str]] = {}
    for operation in layer_part(net, layer).operations:
        for buffer in operation.keeps:
            names = keepers.setdefault(buffer, [])
            if operation.name not in names:
                names.append(operation.name)
    merged: dict[tuple[str, str, str], list[Buffer]] = {}
    for buffer, names in keepers.items():
        merged.setdefault((buffer.name, buffer.formula, ", ".join(names)), []).append(buffer)
    rows = []
    for (name, formula, by), buffers in merged.items():
        if not buffers[0].sequence_bytes:
            continue  # a few bytes of a dropout's random state
        each = buffers[0].sequence_bytes // SEQ_LEN
        many = f"{len(buffers)} x " if len(buffers) > 1 else ""
        rows.append(f"| {by} | {many}{name} | {formula} | {len(buffers) * each:,} |")
    total = sum(b.sequence_bytes for b in keepers) // SEQ_LEN
    sizes = f"C {shape.model_dim}, H {shape.num_heads}, K {shape.num_kv_heads}"
    head = f"{style}, {sizes}, D {shape.head_dim}, M {shape.mlp_dim}, bf16, flash attention:"
    return "\n".join(
        [head, "", "| kept by | tensor | bytes | per token |", "|---|---|---|---:|", *rows,
         f"| | **one layer** | | **{total:,}** |"]
    )  # fmt: skip


def terms_table() -> str:
    """The terms of one plan's peak."""
    plan = example()
    memory = plan.memory
    rows = [
        f"| {t.name} | {t.category.replace('_', ' ')} | {gib(t.bytes)} | {t.formula} | {t.basis} |"
        for t in memory.terms
    ]
    return "\n".join(
        ["| term | category | size | formula | basis |", "|---|---|---:|---|---|", *rows,
         f"| **allocated** | | **{gib(memory.allocated_bytes)}** | | |"]
    )  # fmt: skip


def assumed_table() -> str:
    """Every kernel whose bytes are told and not observed."""
    rows = []
    for row in ASSUMED:
        where = "not opened" if not row.lines else row.lines.rstrip(".")
        if row.lines.endswith("."):
            where += f" ({HEADERS})"
        status = "assumed" if row.device == "cuda" else "observed"
        cells = row.operation, row.device, row.bytes, f"`{row.source}`", where, status
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        ["| operation | on | bytes | source | lines | status |", "|---|---|---|---|---|---|", *rows]
    )


def example() -> Plan:
    """The plan that the page speaks of."""
    return snugpt.plan(gpu=GPU, depth=DEPTH)


def main() -> None:
    text = page(PAGE.read_text(encoding="utf-8"))
    if "--write" not in sys.argv[1:]:
        print(text, end="")
        return
    PAGE.write_text(text, encoding="utf-8")
    PICTURE.write_text(picture_of(example()), encoding="utf-8")


if __name__ == "__main__":
    main()
