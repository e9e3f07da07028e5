"""The picture of a timeline: one step, stacked by category, as SVG text.

The x axis is the order of events, not time. Areas are the predicted bytes of live tensors and
kernels' workspaces. A second timeline, traced or recorded, is drawn over them as a line, aligned
phase by phase, because the two need not have the same number of events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from snugpt.estimate import picture_svg as svg
from snugpt.estimate.picture_data import (
    STACKED,
    Column,
    Series,
    Span,
    StretchKey,
    columns,
    folded,
    series,
    spans,
    stacks,
)
from snugpt.estimate.timeline import Timeline
from snugpt.spec.memory import BytesBand, Category, Phase
from snugpt.units import gib

WIDTH, HEIGHT = 960, 480
PLOT = Span(66, 826)  # left and right edge of what is drawn
TOP, BOTTOM = 84, 374
BAND = 22  # height of the row of phases
LETTER = 6.6  # widest a letter of 12 px is on average
LONGEST_TITLE = 104  # letters
IN_SIGHT = 1.6  # of the areas' height: a limit further up would squash them
LEGEND_COLUMNS, LEGEND_ROW = 4, 20


def draw(
    predicted: Timeline,
    batch: int,
    *,
    title: str,
    source: str = "predicted",
    capacity_bytes: int | None = None,
    process_bytes: BytesBand | None = None,
    measured: Timeline | None = None,
    measured_batch: int = 1,
    measured_label: str = "traced",
) -> str:
    """Return the picture of one step as the text of an SVG file.

    `source` says where the first timeline comes from: predicted, traced or recorded. `batch` is
    told with a predicted one alone; the bytes of the others are as they are, read at 1.

    `process_bytes` is what the whole process comes to at the peak, the figure that `capacity_bytes`
    has to hold. `measured` is another source's timeline of the same step.
    """
    first = series(predicted, batch)
    second = None if measured is None else series(measured, measured_batch)
    repeats = 0 if second is None else second.num_repeats
    second = None if second is None else folded(second, first)
    places = spans(first, second, PLOT, _label_width)
    thin = columns(first, places)
    return _Picture(
        title=_shortened(title),
        source=source,
        batch=f"batch {batch}" if source == "predicted" else "",
        first=first,
        second=second,
        label=_shortened(measured_label, 24),
        repeats=repeats,
        capacity=capacity_bytes,
        process=process_bytes,
        places=places,
        thin=thin,
        stacked=stacks(predicted, batch, {c.instant for c in thin} | {first.peak_at}),
    ).text()


def _label_width(phase: Phase) -> float:
    return len(phase) * LETTER + 10


def _shortened(words: str, most: int = LONGEST_TITLE) -> str:
    words = " ".join(words.split())
    return words if len(words) <= most else words[: most - 1] + "…"


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """Everything that is shown; each method returns lines of the file."""

    title: str
    source: str
    batch: str  # "batch 8", or nothing
    first: Series
    second: Series | None
    label: str
    repeats: int  # micro-steps that were measured; not all need be shown
    capacity: int | None
    process: BytesBand | None
    places: dict[StretchKey, Span]
    thin: Sequence[Column]
    stacked: dict[int, tuple[int, ...]]

    def text(self) -> str:
        rows = -(-len(self.categories) // LEGEND_COLUMNS)
        height = HEIGHT + LEGEND_ROW * max(0, rows - 2)
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="snugpt-picture" role="img"'
            f' width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
            f"<title>{svg.escaped(self.title)}</title>",
            f"<desc>{svg.escaped(self.said)}</desc>",
            svg.stylesheet(self.categories),
            *self._heading(), *self._axis(), *self._phases(), *self._areas(), *self._limits(),
            *self._peak(), *self._legend(),
            "</svg>",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    @cached_property
    def categories(self) -> list[Category]:
        """Those that anything is drawn of, from the bottom up."""
        shown = zip(STACKED, zip(*self.stacked.values(), strict=True), strict=True)
        return [category for category, sizes in shown if any(sizes)]

    @cached_property
    def at_peak(self) -> dict[Category, int]:
        return dict(zip(STACKED, self.stacked[self.first.peak_at], strict=True))

    @cached_property
    def top_bytes(self) -> float:
        """The bytes at the upper edge: the areas, and the limits that are in sight.

        A limit far above the areas would squash them; it is shown only where it is not kept to.
        """
        highest = max(self.first.peak_bytes, 1)
        if self.second is not None:
            highest = max(highest, self.second.peak_bytes)
        limits = [self.process.high if self.process else 0, self.capacity or 0]
        broken = self.process and self.capacity and self.process.high > self.capacity
        seen = [limit for limit in limits if broken or limit <= IN_SIGHT * highest]
        return 1.05 * max(highest, *seen, 0)

    @cached_property
    def said(self) -> str:
        """The picture in words."""
        phases = ", ".join(f"{p} {gib(n)}" for p, n in self.first.highest_by_phase().items())
        parts = ", ".join(
            f"{_spelled(c)} {gib(self.at_peak[c])}" for c in self.categories if self.at_peak[c]
        )
        batch = f", {self.batch}" if self.batch else ""
        words = (
            f"{self.source.capitalize()} bytes of live tensors and workspaces over the events of"
            f" one step{batch}. Peak {gib(self.first.peak_bytes)} in"
            f" {self.first.peak_phase}: {parts}. Highest of each phase: {phases}."
        )
        if self.process is not None:
            words += f" The process at the peak: {_band(self.process)}."
        if self.capacity is not None:
            words += f" Capacity {gib(self.capacity)}."
        return words + (f" {self._compared()}." if self.second is not None else "")

    def _compared(self) -> str:
        assert self.second is not None
        ratio = self.first.peak_bytes / max(1, self.second.peak_bytes)
        shown = self.second.num_repeats
        few = f"; {shown} of {self.repeats} passes shown" if shown < self.repeats else ""
        return (
            f"{self.label}: peak {gib(self.second.peak_bytes)} in {self.second.peak_phase},"
            f" predicted ÷ {self.label} {ratio:.4f}{few}"
        )

    def y(self, num_bytes: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * num_bytes / self.top_bytes

    def _heading(self) -> list[str]:
        below = (
            f"{self.source} bytes of live tensors and workspaces, event by event;"
            f" {self.batch}{'; ' if self.batch else ''}phases not to scale with each other"
        )
        return [
            svg.text(16, 26, self.title, extra='style="font-size:15px;font-weight:600"'),
            svg.text(16, 45, below, "soft"),
        ]

    def _axis(self) -> list[str]:
        ticks, unit, name = svg.axis(self.top_bytes)
        lines = [svg.text(PLOT.left - 8, TOP - 10, name, "soft", 'text-anchor="end"')]
        for tick in ticks:
            y = self.y(tick * unit)
            lines.append(svg.line(PLOT.left, y, PLOT.right, y, "grid"))
            lines.append(
                svg.text(PLOT.left - 8, y + 4, f"{tick:,.6g}", "soft", 'text-anchor="end"')
            )
        return lines

    def _phases(self) -> list[str]:
        """The row of phases below the plot, and a thin line where one ends."""
        lines = []
        for i, ((phase, _), (left, right)) in enumerate(self.places.items()):
            if i % 2 == 0:
                lines.append(svg.box(left, BOTTOM, right - left, BAND, "band"))
            if right - left >= len(phase) * LETTER:
                middle = (left + right) / 2
                lines.append(svg.text(middle, BOTTOM + 15, phase, extra='text-anchor="middle"'))
        return lines

    def _areas(self) -> list[str]:
        """Each category reaches from the axis to its top, the higher ones painted first."""
        lines: list[str] = []
        for i in reversed(range(len(STACKED))):
            if STACKED[i] in self.categories:
                levels = [
                    (span.left, span.right, self.y(sum(self.stacked[instant][: i + 1])))
                    for span, instant in self.thin
                ]
                lines.append(f'<path class="{STACKED[i]}" d="{svg.area(levels, BOTTOM)}"/>')
        for left, _ in list(self.places.values())[1:]:
            lines.append(svg.line(left, TOP, left, BOTTOM + BAND, "grid"))
        lines.append(svg.line(PLOT.left, BOTTOM, PLOT.right, BOTTOM, "edge"))
        if self.second is not None:
            levels = [
                (span.left, span.right, self.y(self.second.totals[instant]))
                for span, instant in columns(self.second, self.places)
            ]
            path = svg.stepped(levels)
            lines += [f'<path class="{kind}" d="{path}"/>' for kind in ("halo", "measured")]
        return lines

    def _limits(self) -> list[str]:
        """The process's band and the capacity, named to the right of the plot."""
        lines: list[str] = []
        names: list[tuple[float, str, list[str]]] = []
        if self.process is not None:
            low, high = self.y(self.process.low), self.y(self.process.high)
            if high >= TOP:
                lines.append(svg.box(PLOT.left, high, PLOT.right - PLOT.left, low - high, "doubt"))
            at = (low + high) / 2 if high >= TOP else high
            names.append((at, "soft", ["whole process", _band(self.process)]))
        if self.capacity is not None:
            y = self.y(self.capacity)
            if y >= TOP:
                lines += [*self._crossed(y), svg.line(PLOT.left, y, PLOT.right, y, "capacity")]
            names.append((y, "warn", ["capacity", gib(self.capacity)]))
        free = TOP - 4.0
        for y, kind, words in sorted(names):
            free = max(free, y - 3)
            for each in words if y >= TOP else [*words, "above the picture"]:
                lines.append(svg.text(PLOT.right + 8, free, each, kind))
                free += 15
            free += 6
        return lines

    def _crossed(self, y: float) -> list[str]:
        """What lies above the capacity, hatched."""
        assert self.capacity is not None
        levels = [
            (span.left, span.right, min(y, self.y(self.first.totals[instant])))
            for span, instant in self.thin
        ]
        if all(level[2] == y for level in levels):
            return []
        return [
            '<pattern id="snugpt-over" width="6" height="6" patternUnits="userSpaceOnUse"'
            ' patternTransform="rotate(45)"><path d="M0 0V6" class="over"/></pattern>',
            f'<path d="{svg.area(levels, y)}" fill="url(#snugpt-over)"/>',
        ]

    def _peak(self) -> list[str]:
        """A dot on the highest instant and a line up to its figure."""
        span = next(c.span for c in self.thin if c.instant == self.first.peak_at)
        x, y = (span.left + span.right) / 2, self.y(self.first.peak_bytes)
        words = f"peak {gib(self.first.peak_bytes)} in {self.first.peak_phase}"
        half = len(words) * LETTER / 2
        middle = min(max(x, PLOT.left + half), PLOT.right - half)
        return [
            svg.line(x, 76, x, y, "edge"),
            f'<circle cx="{svg.number(x)}" cy="{svg.number(y)}" r="3.5" class="peak"/>',
            svg.text(middle, 70, words, extra='text-anchor="middle" style="font-weight:600"'),
        ]

    def _legend(self) -> list[str]:
        top = BOTTOM + BAND + 28
        lines = [svg.text(PLOT.left, top, "at the peak, from the top:", "soft")]
        if self.second is not None:
            x = PLOT.left + 260
            lines.append(svg.line(x, top - 4, x + 24, top - 4, "measured"))
            lines.append(svg.text(x + 32, top, self._compared()))
        for i, category in enumerate(reversed(self.categories)):
            x = PLOT.left + i % LEGEND_COLUMNS * 196
            y = top + 22 + i // LEGEND_COLUMNS * LEGEND_ROW
            lines.append(svg.box(x, y - 10, 12, 12, category))
            lines.append(svg.text(x + 18, y, _spelled(category)))
            figure = gib(self.at_peak[category])
            lines.append(svg.text(x + 172, y, figure, "soft", 'text-anchor="end"'))
        return lines


def _spelled(category: Category) -> str:
    return category.replace("_", " ")


def _band(band: BytesBand) -> str:
    low, high = gib(band.low), gib(band.high)
    low = low.removesuffix(" GiB") if high.endswith(" GiB") else low
    return f"{low} to {high}" if band.low != band.high else high
