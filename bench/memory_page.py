"""The tables and the picture of docs/concepts/memory.md, from the code that predicts.

    python bench/memory_page.py            print the page as it would be today
    python bench/memory_page.py --write    write it, and memory.svg beside it

What stands between two marks is replaced; a test holds the page to this program's output.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

import snugpt
from snugpt.estimate.levers import why_not
from snugpt.estimate.memory import memory_estimate, runtime_of
from snugpt.estimate.operations import Buffer, Net
from snugpt.estimate.scratch import ASSUMED
from snugpt.estimate.speed import step_time_s, training_rate
from snugpt.estimate.stacks.snugpt import layer_part
from snugpt.planner.command import flag
from snugpt.planner.levers import in_words
from snugpt.planner.picturing import picture_of
from snugpt.planner.pulled import pulled, words
from snugpt.spec.memory import MemoryEstimate
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import Sharding, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, Style, shape_for
from snugpt.units import GIB, MIB, gib

PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "memory.md"
PICTURE = PAGE.with_suffix(".svg")
DEPTH, SEQ_LEN, BATCH = 24, 2048, 4
GPU = "rtx-4090"
FLASH = Runtime(device="cuda", attention="flash", capability=(8, 9))
HEADERS = "2.13.0, as installed"
MODEL = Path(__file__).parents[1] / "src" / "snugpt"
PLAIN = {"loss": "plain", "checkpoint": "none", "offload": "none", "exact": True}
TOGETHER: tuple[dict[str, Any], ...] = (
    {},
    {"device_batch_size": BATCH},
    {"device_batch_size": BATCH, "checkpoint": "none"},
    {"device_batch_size": BATCH, "checkpoint": "none", "offload": "none"},
    {"objective": "memory"},
)
SHARDED: tuple[Sharding, ...] = ("optimizer", "full")
WORLD_SIZES = (2, 4, 8)
DTYPES: dict[str, dict[str, Any]] = {
    "--fp8": {"fp8": "on"}, "--compute-dtype fp16": {"compute_dtype": "fp16"},
}  # fmt: skip
# What decides how much of a category there is, for a person.
DECIDES = {
    "weights": "the model: 4 bytes per parameter, in fp32",
    "gradients": "the model: 4 bytes per parameter, in fp32",
    "optimizer": "the model: AdamW 8 bytes per parameter, Muon 4",
    "activations": "tokens of a micro-batch x layers x width: what backward needs",
    "logits": "tokens of a micro-batch x vocabulary",
    "workspace": "the card: what cuBLAS takes for itself",
    "batch": "tokens of a micro-batch",
    "slack": "the allocator: unsplit rests of blocks",
}
# Where a term comes to be: a file, a class or function in it, and a text in the line.
PLACES = {
    "weights: matrices": ("model/gpt.py", "class Block", "self.query = "),
    "weights: value_embedding": ("model/gpt.py", "class Block", "self.value_embedding = "),
    "weights: embedding": ("model/gpt.py", "class GPT", "self.embedding = "),
    "weights: head": ("model/gpt.py", "class GPT", "self.head = "),
    "gradients": ("model/step.py", "def micro_batch", "backward()"),
    "AdamW moments": ("model/adamw.py", "def empty_state", "def empty_state"),
    "AdamW counters": ("model/adamw.py", "def empty_state", "def empty_state"),
    "Muon momentum": ("model/muon.py", "def empty_state", "def empty_state"),
    "logits": ("model/loss.py", "def capped_logits", "float()"),
    "loss": ("model/loss.py", "class HeadLoss", "torch.zeros(()"),
    "weight casts": ("model/loss.py", "class HeadLoss", "head = "),
    "activation gradients": ("model/loss.py", "class HeadLoss", "empty_like"),
    "mlp activations": ("model/functions.py", "class ReluSquared", "save_for_backward"),
    "norm outputs": ("model/functions.py", "class RMSNorm", "save_for_backward"),
    "norm statistics": ("model/functions.py", "class RMSNorm", "save_for_backward"),
    "value embeddings": ("model/functions.py", "class ValueGate", "save_for_backward"),
    "value gates": ("model/functions.py", "class ValueGate", "save_for_backward"),
    "values": ("model/attention.py", "class FusedAttention", "save_for_backward"),
    "queries": ("model/attention.py", "class FusedAttention", "save_for_backward"),
    "keys": ("model/attention.py", "class FusedAttention", "save_for_backward"),
    "attention outputs": ("model/attention.py", "class FusedAttention", "save_for_backward"),
    "attention statistics": ("model/attention.py", "class FusedAttention", "save_for_backward"),
    "attention random state": ("model/attention.py", "class FusedAttention", "save_for_backward"),
    "residual stream": ("model/gpt.py", "def mlp", "ResidualAdd"),
    "rotary tables": ("model/gpt.py", "class GPT", "angles"),
    "tokens": ("data/loader.py", "def _gather", "inputs = torch"),
    "targets": ("data/loader.py", "def _gather", "targets = torch"),
}


def page(text: str) -> str:
    """Return the page with everything between marks made anew."""
    tables: dict[str, Callable[[], str]] = {f"kept {style}": _kept(style) for style in STYLES}
    tables |= {
        "categories": categories_table, "terms": terms_table, "levers": levers_table,
        "sharding": sharding_table, "dtypes": dtypes_table, "together": together_table,
        "assumed": assumed_table,
    }  # fmt: skip

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


def categories_table() -> str:
    """The peak by category, largest first, and what decides each."""
    memory = example().memory
    sizes: dict[str, int] = {}
    for term in memory.terms:
        sizes[term.category] = sizes.get(term.category, 0) + term.bytes
    rows = [
        f"| {category} | {gib(size)} | {DECIDES[category]} |"
        for category, size in sorted(sizes.items(), key=lambda item: -item[1])
    ]
    return "\n".join(
        ["| | at the peak | what decides it |", "|---|---:|---|", *rows,
         f"| **allocated** | **{gib(memory.allocated_bytes)}** | |"]
    )  # fmt: skip


def terms_table() -> str:
    """The terms of one plan's peak, with the line of code that makes or keeps each."""
    plan = example()
    memory = plan.memory
    rows = [
        f"| {t.name} | {t.category.replace('_', ' ')} | {gib(t.bytes)} | {t.formula} | {t.basis} |"
        f" {place_of(t.name)} |"
        for t in memory.terms
    ]
    return "\n".join(
        ["| term | category | size | formula | basis | line |", "|---|---|---:|---|---|---|", *rows,
         f"| **allocated** | | **{gib(memory.allocated_bytes)}** | | | |"]
    )  # fmt: skip


def place_of(term: str) -> str:
    """The line that keeps a term: its code, where in which file. Empty for what is not ours.

    Raises:
        LookupError: the code is no longer there; say in PLACES where it went.
    """
    if term not in PLACES:
        return ""
    file, owner, text = PLACES[term]
    lines = (MODEL / file).read_text(encoding="utf-8").splitlines()
    first = next((i for i, line in enumerate(lines) if line.strip().startswith(owner)), None)
    if first is not None:
        for line in lines[first:]:
            if text in line:
                code = line.partition("  # ")[0].strip()
                if code.startswith("def "):
                    return f"`{code.partition('(')[0]}` ({file})"
                return f"`{code}` ({file}, {owner.split()[1]})".replace("|", "\\|")
    raise LookupError(f"{term}: {text!r} is not in {owner} of {file}")


def levers_table() -> str:
    """What each lever takes off the example's peak when it is pulled by itself."""
    plan = example()
    whole = plan.memory.allocated_bytes
    rows = [_lever_row("half the micro-batch, twice as often", *_halved(plan), whole, "yes")]
    for each in pulled(plan.shape, training(plan), plan.gpu):
        exact = "yes" if each.exact else "no"
        if each.bytes_saved > 0:
            rows.append(
                _lever_row(f"`{words(each.changes)}`", each.bytes_saved, each.time_factor, whole,
                           exact)
            )  # fmt: skip
    head = "| lever | off the peak | left | counted time | exact |"
    return "\n".join([head, "|---|---:|---:|---:|---|", *rows])


def _lever_row(name: str, saved: int, time_factor: float, whole: int, exact: str) -> str:
    return f"| {name} | {gib(saved)} | {gib(whole - saved)} | x {time_factor:.2f} | {exact} |"


def _halved(plan: Plan) -> tuple[int, float]:
    recipe = training(plan)
    half = msgspec.structs.replace(
        recipe, device_batch_size=recipe.device_batch_size // 2,
        grad_accum_steps=recipe.grad_accum_steps * 2,
    )  # fmt: skip
    rate = training_rate(plan.gpu, recipe).flops_per_s.expected
    times = [step_time_s(plan.shape, each, plan.gpu, rate) for each in (half, recipe)]
    memory = memory_estimate(plan.shape, half, plan.gpu)
    return plan.memory.allocated_bytes - memory.allocated_bytes, times[0] / times[1]


def sharding_table() -> str:
    """What one card holds of the example's step where several of its kind take it together."""
    plan = example()
    whole = plan.memory.allocated_bytes
    rows = []
    for sharding in SHARDED:
        for world_size in WORLD_SIZES:
            memory = _sharded(plan, sharding, world_size)
            off, left = gib(whole - memory.allocated_bytes), gib(memory.allocated_bytes)
            if sharding == "full":
                off, left = "", f"{left} to {gib(memory.reserved_bytes.high)}, reserved"
            high = gib(memory.process_bytes.high)
            rows.append(
                f"| `--num-gpus {world_size} --sharding {sharding}` | {off} | {left} | {high} |"
            )
    head = "| lever | off the peak of a card | left | process, at most |"
    return "\n".join([head, "|---|---:|---:|---:|", *rows])


def _sharded(plan: Plan, sharding: Sharding, world_size: int) -> MemoryEstimate:
    recipe = msgspec.structs.replace(
        training(plan), sharding=sharding, world_size=world_size, launcher="torchrun",
        grad_accum_steps=training(plan).grad_accum_steps // world_size,
    )  # fmt: skip
    runtime = runtime_of(plan.shape, recipe, plan.gpu, 1)
    assert why_not(plan.shape, recipe, runtime) is None
    return memory_estimate(plan.shape, recipe, plan.gpu)


def dtypes_table() -> str:
    """The peak of the example with products in FP8, and computed in fp16."""
    plan = example()
    whole = plan.memory.allocated_bytes
    rows = []
    for name, changes in DTYPES.items():
        recipe = msgspec.structs.replace(training(plan), **changes)
        assert why_not(plan.shape, recipe, runtime_of(plan.shape, recipe, plan.gpu, 1)) is None
        left = memory_estimate(plan.shape, recipe, plan.gpu).allocated_bytes
        assert abs(whole - left) < 16 * MIB, f"{name} changes the peak: say so in the page"
        rows.append(f"| `{name}` | {abs(whole - left) / GIB:.1f} GiB | {gib(left)} |")
    return "\n".join(["| lever | off the peak | left |", "|---|---:|---:|", *rows])


def together_table() -> str:
    """What the planner pulls for the same model on the same card, asked in several ways."""
    rows = []
    for asked in TOGETHER:
        found = snugpt.plan(gpu=GPU, depth=DEPTH, **asked)
        recipe, memory = training(found), found.memory
        fits = "fits" if found.fits else "does not fit"
        chosen = ", ".join(in_words(recipe))
        batch = f"{recipe.device_batch_size} x {recipe.grad_accum_steps}"
        sizes = f"{gib(memory.allocated_bytes)} | {gib(memory.process_bytes.high)}"
        rows.append(f"| {flags(asked)} | {batch} | {chosen} | {sizes} | {fits} |")
    head = "| asked for | batch x passes | chosen | allocated | process, at most | card |"
    return "\n".join([head, "|---|---:|---|---:|---:|---|", *rows])


def flags(asked: dict[str, Any]) -> str:
    """What is said on the command line besides the card and the depth."""
    said = " ".join(flag(field, value) for field, value in asked.items())
    return f"`{said}`" if said else "nothing else"


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


@cache
def example() -> Plan:
    """The plan that the page speaks of: nothing pulled, and too large for the card."""
    return snugpt.plan(gpu=GPU, depth=DEPTH, device_batch_size=BATCH, **PLAIN)


def training(plan: Plan) -> TrainingRecipe:
    """The recipe of a plan to train."""
    assert isinstance(plan.recipe, TrainingRecipe)
    return plan.recipe


def main() -> None:
    text = page(PAGE.read_text(encoding="utf-8"))
    if "--write" not in sys.argv[1:]:
        print(text, end="")
        return
    PAGE.write_text(text, encoding="utf-8")
    PICTURE.write_text(picture_of(example()), encoding="utf-8")


if __name__ == "__main__":
    main()
