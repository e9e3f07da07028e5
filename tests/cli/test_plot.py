"""`snugpt plan --plot`: the picture beside the plan, whole or not at all, where a file may be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
from door import Door, names_under, refusal

D2 = "snugpt plan --gpu rtx-4090 --depth 2"
NO_FIT = "snugpt plan --gpu rtx-3060 --depth 40"
SVG = "{http://www.w3.org/2000/svg}"


def shown(path: Path) -> list[str]:
    return [e.text or "" for e in ElementTree.parse(path).getroot().iter(f"{SVG}text")]


def test_the_picture_is_written_and_the_answer_is_as_without_it(
    door: Door, elsewhere: Path
) -> None:
    alone, drawn = door(D2), door(f"{D2} --plot d2.svg")
    assert (drawn.code, drawn.out) == (0, alone.out)
    assert drawn.err == "written to d2.svg\n"
    texts = shown(elsewhere / "d2.svg")
    assert texts[0].startswith("Train nanochat, 2 layers, ")
    assert "NVIDIA GeForce RTX 4090" in texts[0]
    assert "capacity" in texts


def test_the_peak_of_the_picture_is_that_of_the_plan_up_to_the_allocators_slack(
    door: Door, elsewhere: Path
) -> None:
    done = door(f"{D2} --plot d2.svg --json")
    memory = json.loads(done.out)["memory"]
    slack = sum(t["bytes"] for t in memory["terms"] if t["category"] == "slack")
    from snugpt.units import gib

    peak = gib(memory["allocated_bytes"] - slack)
    assert f"peak {peak} in {memory['peak_phase']}" in shown(elsewhere / "d2.svg")


def test_what_does_not_fit_is_drawn_over_its_capacity(door: Door, elsewhere: Path) -> None:
    done = door(f"{NO_FIT} --plot no.svg")
    assert refusal(done, 3)[0].startswith("does not fit")
    root = ElementTree.parse(elsewhere / "no.svg").getroot()
    assert [e for e in root.iter(f"{SVG}path") if e.get("fill") == "url(#snugpt-over)"]


def test_a_generation_shows_prefill_and_decode(door: Door, elsewhere: Path) -> None:
    assert door(f"{D2} --task generate --plot g.svg").code == 0
    texts = shown(elsewhere / "g.svg")
    assert texts.index("prefill") < texts.index("decode")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("missing/out.svg", "there is no folder 'missing'"),
        ("text.txt/out.svg", "'text.txt' is no folder"),
        ("-", "a file's name, it is not written to stdout"),
        ("folder.svg", "it is a folder, a file's name is needed"),
        (".", "it is a folder, a file's name is needed"),
        ("fifo.svg", "it is a device or a pipe and no file"),
        ("/dev/null", "it is a device or a pipe and no file"),
        ("link.svg", "it is a link to nothing, which would be replaced; name the file itself"),
        ("to_text.svg", "it is a link, which would be replaced; name the file itself"),
        ("'a\nb'/out.svg", r"there is no folder 'a\nb'"),
        ("a" * 300 + ".svg", "file name too long"),
        ("a" * 250 + ".svg", "file name too long"),
        (".svg", "a name that ends in .svg and has something before it"),
        ("out.png", "a name that ends in .svg"),
        ("out", "a name that ends in .svg"),
        ("text.txt", "a name that ends in .svg"),
    ],
)
def test_what_can_be_no_picture_is_refused_before_any_work(
    door: Door, elsewhere: Path, path: str, allowed: str
) -> None:
    (elsewhere / "folder.svg").mkdir()
    os.mkfifo(elsewhere / "fifo.svg")
    (elsewhere / "link.svg").symlink_to(elsewhere / "target")
    (elsewhere / "to_text.svg").symlink_to(elsewhere / "text.txt")
    before = names_under(elsewhere)
    done = door(f"{D2} --plot {path}")
    error, hint = refusal(done, 2)
    assert error.startswith("plot = ")
    assert error.endswith(f"is not allowed: {allowed}")
    assert hint == "snugpt plan --depth 12 --plot plan.svg"
    assert done.out == ""
    assert names_under(elsewhere) == before


def test_plan_and_picture_do_not_fall_into_one_file(door: Door, elsewhere: Path) -> None:
    (elsewhere / "folder").mkdir()
    done = door(f"{D2} -o one.svg --plot folder/../one.svg")
    assert refusal(done, 2)[0].startswith("plot = ")
    assert not (elsewhere / "one.svg").exists()


def test_a_picture_that_is_there_is_replaced(door: Door, elsewhere: Path) -> None:
    (elsewhere / "d2.SVG").write_text("old", encoding="utf-8")
    assert door(f"{D2} --plot d2.SVG").code == 0
    assert shown(elsewhere / "d2.SVG")
