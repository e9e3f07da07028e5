"""A plan on one screen of 80 columns: verdict, memory against the card, time, choices, ways out.

Read without colour too: categories differ by shade, and colour only marks the verdict.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import click

from snugpt.planner.levers import SEARCHED, in_words
from snugpt.spec.plan import Alternative, Plan
from snugpt.spec.recipe import GenerationRecipe, TrainingRecipe
from snugpt.units import GIB, count, duration, gib, plural

COLUMNS = 79
LABEL = 9
SHADES = "█▓▒░"
REST_SHADE, DOUBT, FREE = "▚", "╌", " "
SHOWN_REASONS = ("depth", "compute_dtype", "optimizer", "vocab_size", *SEARCHED)


def colour() -> bool | None:
    """False where NO_COLOR is set; None leaves it to whether the stream is a terminal."""
    return False if os.environ.get("NO_COLOR") else None


def print_plan(plan: Plan) -> None:
    """Print the plan on stdout."""
    for line in screen_lines(plan):
        click.echo(line, color=colour())


def screen_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of the screen, each at most 79 columns wide."""
    yield from _head(plan)
    yield ""
    yield from _memory(plan)
    yield from _pace(plan)
    yield ""
    if isinstance(plan.recipe, TrainingRecipe):
        yield from _choices(plan, plan.recipe)
        if plan.stack != "snugpt" and plan.fits:
            yield from row("run", f"with {plan.stack}:")
            yield from command_rows(plan.command)
    yield from _ways_out(plan)
    for note in plan.notes:
        yield from _note(note)


def _note(note: str) -> Iterator[str]:
    """A note in words is wrapped, one that is a shell command stays as it is."""
    if not note.startswith("sed "):
        yield from row("note", note)
        return
    for line in note.split("\n"):
        yield " " * LABEL + line


def row(label: str, text: str) -> Iterator[str]:
    """Yield `text` wrapped behind a label; lines that follow are indented like it."""
    line, start = "", label.ljust(LABEL)
    for word in text.split():
        if line and LABEL + len(line) + 1 + len(word) > COLUMNS:
            yield start + line
            line, start = "", " " * LABEL
        line += (" " if line else "") + word
    yield (start + line).rstrip()


def _items(items: list[str]) -> Iterator[str]:
    """Yield items two spaces apart, none of them cut."""
    line = " " * LABEL + items[0]
    for item in items[1:]:
        if len(line) + 2 + len(item) > COLUMNS:
            yield line
            line = " " * LABEL + item
        else:
            line += "  " + item
    yield line


def command_rows(command: str) -> Iterator[str]:
    """Yield a command that can be copied: a line that is cut ends in a backslash."""
    words = command.replace(" --", "\n--").split("\n")
    line = ""
    for word in words:
        if line and LABEL + len(line) + len(word) + 3 > COLUMNS:
            yield " " * LABEL + line + " \\"
            line = "   " + word
        else:
            line += (" " if line else "") + word
    yield " " * LABEL + line


def _head(plan: Plan) -> Iterator[str]:
    shape, gpu = plan.shape, plan.gpu
    subject = plan.question.preset or plan.question.model or plural(shape.num_layers, "layer")
    task = "generate with" if plan.recipe.__class__ is GenerationRecipe else "train"
    verdict = "FITS" if plan.fits else "DOES NOT FIT"
    first = f"{task} {shape.style} {subject}, {count(plan.parameters.total)} parameters"
    room = COLUMNS - len(verdict) - 2
    style = {"fg": "green" if plan.fits else "red", "bold": True}
    yield _cut(first, room).ljust(room + 2) + click.style(verdict, **style)  # type: ignore[arg-type]
    layout = f"{plural(shape.num_layers, 'layer')} x {shape.model_dim} wide"
    layout += f", {plural(shape.num_heads, 'head')}"
    yield f"{layout}, context {shape.context_len}, vocabulary {shape.vocab_size}"
    yield _cut(f"on {gpu.name} ({gpu.id}), {gib(plan.memory.capacity_bytes)} usable", COLUMNS)


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    process, reserved = memory.process_bytes, memory.reserved_bytes
    room = memory.headroom_bytes
    left = f"{gib(room)} to spare" if room >= 0 else f"{gib(-room)} too much"
    yield from row(
        "memory",
        f"process {gib(process.expected)} ({gib(process.low)} to {gib(process.high)}) of"
        f" {gib(memory.capacity_bytes)}, {left}",
    )
    sizes = _by_category(plan)
    yield " " * LABEL + _bar(plan, sizes)
    legend = [f"{shade} {name} {_bare_gib(size)}" for shade, name, size in sizes]
    yield from _items([*legend[:-1], legend[-1] + " GiB"])
    yield from row(
        "",
        f"peak in {memory.peak_phase}: requested {gib(memory.requested_bytes)}, allocated"
        f" {gib(memory.allocated_bytes)}, reserved {gib(reserved.expected)}"
        + ("" if reserved.low == reserved.high else f" (up to {gib(reserved.high)})"),
    )


def _by_category(plan: Plan) -> list[tuple[str, str, int]]:
    """(shade, category, bytes) at the peak, the largest four and the rest as one."""
    sizes: dict[str, int] = {}
    for term in plan.memory.terms:
        sizes[term.category] = sizes.get(term.category, 0) + term.bytes
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    shown = [(shade, name, size) for shade, (name, size) in zip(SHADES, ordered, strict=False)]
    rest = sum(size for _, size in ordered[len(SHADES) :])
    return [*shown, (REST_SHADE, "rest", rest)] if rest else shown


def _bar(plan: Plan, sizes: list[tuple[str, str, int]]) -> str:
    """Shades up to what is allocated, dashes up to the highest process, `│` at the capacity."""
    memory, width = plan.memory, COLUMNS - LABEL - 1
    whole = max(memory.capacity_bytes, memory.process_bytes.high, 1)
    cells, filled = "", 0
    for shade, _, size in sizes:
        filled += size
        cells += shade * (round(filled / whole * width) - len(cells))
    cells += DOUBT * (round(memory.process_bytes.high / whole * width) - len(cells))
    cells = cells.ljust(width, FREE)
    mark = max(0, round(memory.capacity_bytes / whole * width))
    return cells[:mark] + "│" + cells[mark:]


def _pace(plan: Plan) -> Iterator[str]:
    speed, recipe = plan.speed, plan.recipe
    rate = speed.tokens_per_s
    basis = f"{speed.basis}: {speed.source}"
    tokens = f"{_three(rate.expected)} tokens/s ({_three(rate.low)} to {_three(rate.high)})"
    if isinstance(recipe, GenerationRecipe):
        yield from row("speed", f"{tokens}, {1e3 * speed.step_s:.3g} ms a token; {basis}")
        yield from row(
            "task",
            f"{recipe.batch} x ({recipe.prompt_tokens} prompt + {recipe.max_new_tokens} new tokens)"
            f", weights and cache in {recipe.weight_dtype}",
        )
        return
    yield from row("speed", f"{tokens}, {duration(speed.step_s)} a step; {basis}")
    seconds = speed.hours * 3600
    low, high = seconds * rate.expected / rate.high, seconds * rate.expected / rate.low
    yield from row(
        "time",
        f"{duration(seconds)} ({duration(low)} to {duration(high)}):"
        f" {plural(recipe.num_steps, 'step')},"
        f" {count(recipe.total_tokens)} tokens = {plan.reasons['total_tokens']}",
    )
    product = f"{recipe.device_batch_size} x {recipe.seq_len} x "
    product += plural(recipe.grad_accum_steps, "pass", "passes")
    product += f" x {recipe.world_size} GPUs" if recipe.world_size > 1 else ""
    rule = plan.reasons["total_batch_tokens"]
    yield from row("step", f"{recipe.total_batch_tokens:,} tokens = {product}; {rule}")
    if plan.data is not None and plan.data.epochs is not None:
        yield from row("text", f"{count(plan.data.characters or 0)} characters, read about"
                       f" {plan.data.epochs:.3g} times")  # fmt: skip


def _choices(plan: Plan, recipe: TrainingRecipe) -> Iterator[str]:
    searched = ("device_batch_size", "checkpoint", *SEARCHED)
    why = next((plan.reasons[field] for field in searched if field in plan.reasons), "pinned")
    levers = ", ".join([f"device_batch_size {recipe.device_batch_size}", *in_words(recipe)])
    yield from row("chosen", f"{levers}: {why}")
    values = {
        "depth": plan.shape.num_layers,
        "compute_dtype": recipe.compute_dtype,
        "optimizer": recipe.optimizer,
        "vocab_size": plan.shape.vocab_size,
        **{lever: getattr(recipe, lever) for lever in SEARCHED},
    }
    if not plan.fits:
        return
    for field in SHOWN_REASONS:
        if field in plan.reasons:
            yield from row("", f"{field} {values[field]}: {plan.reasons[field]}")
    for rejected in plan.rejected[:1] + plan.rejected[1:][-1:]:
        yield from row("not", f"{rejected.change}: {rejected.because}")


def _ways_out(plan: Plan) -> Iterator[str]:
    shown = plan.alternatives[:1] if plan.fits else plan.alternatives
    for other in shown:
        yield from row("instead", f"{other.change}: {_summary(other)}")
        yield from command_rows(other.command)
    if plan.fits and isinstance(plan.recipe, TrainingRecipe):
        yield from row("keeps", f"{gib(plan.host.checkpoint_bytes)} a checkpoint,"
                       f" {gib(plan.host.disk_bytes)} of disk")  # fmt: skip
        if plan.recipe.offload != "none":
            yield from row("host", f"{gib(plan.host.ram_bytes)} of the computer's own memory")
        if plan.recipe.world_size > 1 and plan.recipe.stack == "snugpt":
            yield from row("start", "with torchrun, one process for each:")
            yield from command_rows(plan.command)


def _summary(other: Alternative) -> str:
    process = f"process {gib(other.memory.process_bytes.expected)}"
    if isinstance(other.recipe, GenerationRecipe):
        return f"{process}, {_three(other.speed.tokens_per_s.expected)} tokens/s"
    return f"{process}, {duration(other.speed.hours * 3600)}"


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: columns - 1] + "…"


def _bare_gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}" if num_bytes < 10 * GIB else f"{num_bytes / GIB:.1f}"


def _three(number: float) -> str:
    """Three significant digits with separators: 75,100."""
    return f"{float(f'{number:.3g}'):,.0f}" if number >= 100 else f"{number:.3g}"
