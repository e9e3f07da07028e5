"""The picture: well-formed, true to the reader's bytes, and nothing over anything else."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_timeline import every_instant, rounded, timelines
from training_questions import levers, question

from snugpt.estimate.generation import generation_timeline
from snugpt.estimate.operations import Buffer
from snugpt.estimate.picture import BOTTOM, PLOT, TOP, WIDTH, draw
from snugpt.estimate.picture_data import STACKED, Span, columns, folded, series, spans, stacks
from snugpt.estimate.picture_svg import area, axis, stepped
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.estimate.training import TrainingStep
from snugpt.spec.memory import BytesBand
from snugpt.spec.recipe import GenerationRecipe
from snugpt.spec.shape import shape_for
from snugpt.units import GIB, gib

SVG = "{http://www.w3.org/2000/svg}"
BATCH = 4
thorough = settings(max_examples=150, deadline=None, derandomize=True)


def step(**asked: object) -> Timeline:
    return TrainingStep(*question({"style": "nanochat", "runtime": "flash", **asked})).timeline()


def generation() -> Timeline:
    _, _, runtime = question({"style": "gpt2", "runtime": "efficient"})
    recipe = GenerationRecipe(
        batch=2, prompt_tokens=64, max_new_tokens=32, weight_dtype="bf16", kv_dtype="bf16"
    )
    return generation_timeline(shape_for("gpt2", 2, context_len=128), recipe, runtime)


def words(picture: str) -> list[str]:
    """Every text of the picture, in the order of the file."""
    root = ElementTree.fromstring(picture)
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def paths(picture: str) -> dict[str, str]:
    """The first path of each class."""
    root = ElementTree.fromstring(picture)
    found: dict[str, str] = {}
    for element in root.iter(f"{SVG}path"):  # the legend repeats a line of the plot
        found.setdefault(element.get("class", element.get("fill", "")), element.get("d", ""))
    return found


def levels(path: str) -> list[tuple[float, float, float]]:
    """(left, right, y) of a stepped line, read back from its path; areas end in V H Z."""
    found, x, y = [], 0.0, 0.0
    for piece in path.split("M")[1:]:
        parts = re.findall(r"([HV]?)(-?[\d.]+)", piece.removesuffix("Z"))
        x, y = float(parts[0][1]), float(parts[1][1])
        for kind, value in parts[2:]:
            if kind == "H":
                found.append((x, float(value), y))
                x = float(value)
            else:
                y = float(value)
        if piece.endswith("Z"):
            found.pop()
    return found


def height_at(path: str, x: float) -> float:
    return next(y for left, right, y in levels(path) if left <= x < right)


def label_width(phase: str) -> float:
    return 7.0 * len(phase)


ALL = {
    "nanochat": step(accumulation=2),
    "llama": step(style="llama", checkpoint="blocks", runtime="cpu"),
    "gpt2": step(style="gpt2", dropout=0.1, optimizer="adamw", loss="plain"),
    "generation": generation(),
}


@pytest.mark.parametrize("name", ALL)
def test_a_picture_is_well_formed_names_its_peak_and_shows_every_phase_in_order(name: str) -> None:
    timeline = ALL[name]
    alive, highest = timeline.read(BATCH)
    picture = draw(timeline, BATCH, title=name)
    shown = words(picture)
    assert f"peak {gib(alive.bytes)} in {alive.phase}" in shown
    in_order = [phase for phase, *_ in timeline.placed]
    stretches = [p for i, p in enumerate(in_order) if i == 0 or p != in_order[i - 1]]
    legend = shown.index("at the peak, from the top:")
    assert [word for word in shown[:legend] if word in highest] == stretches
    said = ElementTree.fromstring(picture).findtext(f"{SVG}desc") or ""
    assert all(f"{phase} {gib(size)}" in said for phase, size in highest.items())
    assert picture == draw(timeline, BATCH, title=name)


@pytest.mark.parametrize("name", ALL)
def test_the_legend_sums_to_the_peak_by_category(name: str) -> None:
    timeline = ALL[name]
    alive, _ = timeline.read(BATCH)
    sizes: dict[str, int] = {}
    for buffer, number in alive.buffers.items():
        size = number * timeline.bytes_of(buffer, BATCH)
        sizes[buffer.category] = sizes.get(buffer.category, 0) + size
    assert sum(sizes.values()) == alive.bytes
    shown = words(draw(timeline, BATCH, title=name))
    shown = shown[shown.index("at the peak, from the top:") + 1 :]
    legend = dict(zip(shown[::2], shown[1::2], strict=True))
    for category, size in sizes.items():
        assert legend[category.replace("_", " ")] == gib(size)


@thorough
@given(timelines(), st.integers(1, 50))
def test_a_series_is_every_instant_and_its_stacks_sum_to_it(timeline: Timeline, batch: int) -> None:
    shown, instants = series(timeline, batch), every_instant(timeline, batch)
    assert shown.totals == instants
    assert shown.peak_bytes == timeline.read(batch)[0].bytes
    found = stacks(timeline, batch, set(range(len(instants))))
    assert [sum(found[i]) for i in range(len(instants))] == instants
    at = STACKED.index("workspace")
    without = every_instant(timeline, batch, workspace=False)
    assert [found[i][at] for i in range(len(instants))] == [
        whole - less for whole, less in zip(instants, without, strict=True)
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(levers(), st.integers(1, 64), st.integers(200, 900))
def test_thinning_out_keeps_the_highest_instant_of_every_stretch(asked, batch, width) -> None:
    shown = series(TrainingStep(*question(asked)).timeline(), batch)
    places = spans(shown, None, Span(0, width), label_width)
    thin = columns(shown, places)
    assert len(thin) <= width + len(shown.stretches)
    for key, start, stop in shown.stretches:
        own = [c for c in thin if start <= c.instant < stop]
        assert max(shown.totals[c.instant] for c in own) == max(shown.totals[start:stop])
        edges = [c.span.left for c in own] + [own[-1].span.right]
        assert (edges[0], edges[-1]) == places[key]
        assert edges == sorted(edges)
        assert all(one.span.right == other.span.left for one, other in pairwise(own))
    assert shown.peak_at in [c.instant for c in thin]


@pytest.mark.parametrize("name", ALL)
def test_the_areas_are_as_high_as_the_bytes_of_their_categories(name: str) -> None:
    timeline = ALL[name]
    shown = series(timeline, BATCH)
    picture = paths(draw(timeline, BATCH, title=name))
    by_class = {c: picture[c] for c in STACKED if c in picture}
    places = spans(shown, None, PLOT, lambda phase: len(phase) * 6.6 + 10)
    for span, instant in columns(shown, places)[::37]:
        held = dict.fromkeys(STACKED, 0)
        for buffer in timeline.resident:
            held[buffer.category] += rounded(buffer, BATCH, timeline.block_bytes)
        for _, _, (sign, buffer) in list(timeline.events())[:instant]:
            held[buffer.category] += sign * rounded(buffer, BATCH, timeline.block_bytes)
        below = 0
        for category in STACKED:
            below += held[category]
            if category in by_class:
                y = height_at(by_class[category], (span.left + span.right) / 2)
                share = below / (1.05 * shown.peak_bytes)
                assert y == pytest.approx(BOTTOM - (BOTTOM - TOP) * share, abs=0.051)


def test_a_capacity_near_the_peak_is_a_line_and_one_far_above_is_a_sentence() -> None:
    timeline = ALL["nanochat"]
    peak = timeline.read(BATCH)[0].bytes
    near = draw(timeline, BATCH, title="t", capacity_bytes=int(1.4 * peak))
    assert paths(near)["capacity"].startswith(f"M{PLOT.left} ")
    assert "above the picture" not in words(near)
    assert "snugpt-over" not in near
    far = draw(timeline, BATCH, title="t", capacity_bytes=20 * peak)
    assert "capacity" not in paths(far)
    shown = words(far)
    at = shown.index("capacity")
    assert shown[at : at + 3] == ["capacity", gib(20 * peak), "above the picture"]
    assert paths(far)["weights"] == paths(draw(timeline, BATCH, title="t"))["weights"]


def test_what_does_not_fit_crosses_the_capacity_and_is_hatched_there() -> None:
    timeline = ALL["nanochat"]
    peak = timeline.read(BATCH)[0].bytes
    capacity = int(0.9 * peak)
    drawn = paths(draw(timeline, BATCH, title="t", capacity_bytes=capacity))
    line = float(drawn["capacity"].split("L")[1].split()[1])
    tops = levels(drawn["url(#snugpt-over)"])
    assert min(y for _, _, y in tops) < line - 10
    assert all(y <= line for _, _, y in tops)


def test_a_process_that_is_too_large_is_in_sight_with_its_capacity() -> None:
    timeline = ALL["nanochat"]
    peak = timeline.read(BATCH)[0].bytes
    process = BytesBand(low=2 * peak, expected=3 * peak, high=4 * peak)
    fits = draw(timeline, BATCH, title="t", capacity_bytes=5 * peak, process_bytes=process)
    assert words(fits).count("above the picture") == 2
    broken = draw(timeline, BATCH, title="t", capacity_bytes=3 * peak, process_bytes=process)
    assert "above the picture" not in words(broken)
    assert "capacity" in paths(broken)


def peak_after(quiet_before: int, quiet_after: int) -> Timeline:
    """A peak with so many small allocations before and after it."""
    small, large = (Buffer("t", "activations", size, 0, "") for size in (1, 2**30))
    quiet = [Event(1, small), Event(-1, small)]
    events = [*quiet * quiet_before, Event(1, large), Event(-1, large), *quiet * quiet_after]
    return Timeline((), (Placed("forward", 0, Segment(events, 1)),), 1)


EARLY, LATE = peak_after(0, 500), peak_after(500, 0)
HOSTILE = '</title><script>alert("x")</script> & ]]> \x00\x1b[31m\ud800 \u202e' + "w" * 500


def test_a_hostile_title_stays_text() -> None:
    picture = draw(ALL["nanochat"], BATCH, title=HOSTILE, measured=ALL["nanochat"],
                   measured_label=HOSTILE)  # fmt: skip
    picture.encode("utf-8")
    root = ElementTree.fromstring(picture)
    assert not list(root.iter(f"{SVG}script"))
    title = root.findtext(f"{SVG}title") or ""
    assert title.startswith('</title><script>alert("x")</script> & ]]> ')
    assert len(title) <= 104
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "", 1)


def test_two_timelines_share_the_place_of_each_phase_whatever_their_number_of_events() -> None:
    few, many = step(depth=2), step(depth=9)
    first, second = series(few, BATCH), series(many, BATCH)
    places = spans(first, second, PLOT, label_width)
    assert list(places) == [s.key for s in first.stretches]
    for shown in (first, second):
        for key, start, stop in shown.stretches:
            inside = [c for c in columns(shown, places) if start <= c.instant < stop]
            assert (inside[0].span.left, inside[-1].span.right) == places[key]
    picture = draw(few, BATCH, title="t", measured=many, measured_batch=BATCH)
    line = levels(paths(picture)["measured"])
    assert (line[0][0], line[-1][1]) == (PLOT.left, PLOT.right)
    # All of both is in sight, and the line's highest point is the higher peak.
    top = min(y for _, _, y in line)
    assert top == pytest.approx(BOTTOM - (BOTTOM - TOP) / 1.05, abs=0.051)
    said = f"traced: peak {gib(second.peak_bytes)} in {second.peak_phase}, predicted ÷ traced"
    assert f"{said} {first.peak_bytes / second.peak_bytes:.4f}" in words(picture)


def test_a_phase_that_only_one_timeline_has_leaves_a_gap_in_the_other() -> None:
    whole = step()
    part = replace(whole, placed=tuple(p for p in whole.placed if p.phase != "clip"))
    first, second = series(part, BATCH), series(whole, BATCH)
    wanted = [s.key for s in second.stretches]
    places = spans(first, second, PLOT, label_width)
    assert list(places) == wanted == list(spans(second, first, PLOT, label_width))
    gap = places[("clip", 1)]
    drawn = paths(draw(part, BATCH, title="t", measured=whole, measured_batch=BATCH))
    middle = (gap.left + gap.right) / 2
    assert not [1 for left, right, _ in levels(drawn["weights"]) if left <= middle < right]
    assert height_at(drawn["measured"], middle) < BOTTOM


def test_of_more_passes_the_highest_is_shown_and_their_number_said() -> None:
    predicted = step(accumulation=2)
    early = predicted.placed[: next(i for i, p in enumerate(predicted.placed) if p.phase == "clip")]
    late = predicted.placed[len(early) :]
    half = len(early) // 2
    spike = Placed("backward", 0, peak_after(0, 0).placed[0].segment)
    passes = (*early, *early[half:], spike, *early[half:], *late)
    measured = replace(predicted, placed=passes)
    first, whole = series(predicted, BATCH), series(measured, BATCH)
    shown = folded(whole, first)
    assert [s.key for s in shown.stretches] == [s.key for s in first.stretches]
    assert (shown.peak_bytes, shown.peak_phase) == (whole.peak_bytes, "backward")
    second = next(s for s in shown.stretches if s.key == ("backward", 2))
    assert max(shown.totals[second.start : second.stop]) == whole.peak_bytes
    said = words(draw(predicted, BATCH, title="t", measured=measured, measured_batch=BATCH))
    assert any(text.endswith(f"; 2 of {whole.num_repeats} passes shown") for text in said)
    assert folded(first, whole) == first


def test_text_keeps_off_other_text() -> None:
    """By a generous width of letters, in every picture of this file and on a card that is small."""
    tight = BytesBand(low=GIB, expected=GIB, high=GIB)
    for timeline in (*ALL.values(), EARLY, LATE):
        picture = draw(timeline, BATCH, title="t", capacity_bytes=GIB, process_bytes=tight,
                       measured=timeline, measured_batch=BATCH)  # fmt: skip
        boxes = []
        for element in ElementTree.fromstring(picture).iter(f"{SVG}text"):
            x, y = float(element.get("x", "0")), float(element.get("y", "0"))
            width = 6.6 * len(element.text or "")
            x -= {"end": width, "middle": width / 2}.get(element.get("text-anchor", ""), 0)
            above_plot = (element.text or "").startswith("peak ")
            assert x >= (PLOT.left if above_plot else 0)
            assert x + width <= (PLOT.right if above_plot else WIDTH)
            boxes.append((x, y - 10, x + width, y + 2))
        for i, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[:i]:
                apart = left >= other[2] or right <= other[0] or top >= other[3]
                assert apart or bottom <= other[1]


@pytest.mark.parametrize(
    ("top", "unit", "last"),
    [(24 * GIB, "GiB", 20), (0.3 * GIB, "GiB", 0.3), (1.2 * GIB, "GiB", 1.2), (5, "B", 5),
     (90 * 2**20, "MiB", 80)],
)  # fmt: skip
def test_ticks_are_few_and_round(top: float, unit: str, last: float) -> None:
    ticks, _, name = axis(top)
    assert (name, ticks[0], ticks[-1]) == (unit, 0, pytest.approx(last))
    assert 3 <= len(ticks) <= 7


def test_paths_merge_equal_steps_and_close_each_piece() -> None:
    steps = [(0, 1, 5), (1, 2, 5), (2, 3, 4), (7, 8, 4)]
    assert stepped(steps) == "M0 5H2V4H3M7 4H8"
    assert area(steps, 9) == "M0 5H2V4H3V9H0ZM7 4H8V9H7Z"


def test_both_papers_have_a_rule_for_every_category_that_is_drawn() -> None:
    picture = draw(ALL["nanochat"], BATCH, title="t")
    light, dark = picture.split("@media (prefers-color-scheme:dark)")
    for category in set(STACKED) & set(paths(picture)):
        (one,) = re.findall(rf"\.{category}{{fill:(#\w+)}}", light)
        (other,) = re.findall(rf"\.{category}{{fill:(#\w+)}}", dark)
        assert one != other


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb by the sRGB formula of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


NEIGHBOURS = [
    ("weights", "optimizer"), ("optimizer", "gradients"), ("gradients", "activations"),
    ("optimizer", "activations"), ("weights", "kv_cache"), ("kv_cache", "activations"),
    ("activations", "logits"), ("activations", "workspace"),
]  # fmt: skip


@pytest.mark.parametrize(("below", "above"), NEIGHBOURS)
def test_neighbours_of_the_stack_differ_in_lightness_on_both_papers(below: str, above: str) -> None:
    from snugpt.estimate.picture_svg import FILLS

    for one, other in zip(FILLS[below], FILLS[above], strict=True):
        assert contrast(one, other) >= 1.45
