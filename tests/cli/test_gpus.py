"""`snugpt gpus`: the catalogue as a table, filtered, and one card whole with its sources."""

from __future__ import annotations

import json

import pytest

from snugpt.cli.main import run
from snugpt.spec.catalogue import catalogue

HEAD, FOOT = 1, 1


def _lines(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    assert run(["gpus", *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_card_has_a_row_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _lines(capsys)
    assert [line.split()[0] for line in lines[HEAD:-FOOT]] == list(catalogue())
    assert max(map(len, lines)) <= 80


def test_a_recalled_figure_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {line.split()[0]: line.split() for line in _lines(capsys)[HEAD:-FOOT]}
    for gpu in catalogue().values():
        row = rows[gpu.id]
        assert row[1].startswith("~") == ("usable_bytes" in gpu.recalled)
        assert row[2].startswith("~") == ("bandwidth_bytes_per_s" in gpu.recalled)
        assert row[4].startswith("~") == ("flops" in gpu.recalled)


def test_filters_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--min-memory", "24", "--capability", "8.9", "--backend", "cuda", "--json"]
    assert run(["gpus", *flags]) == 0
    found = {gpu["id"] for gpu in json.loads(capsys.readouterr().out)["gpus"]}
    assert found >= {"rtx-4090", "rtx-5090", "l4", "l40s", "h100-80gb"}
    assert found.isdisjoint({"rtx-3090", "rtx-4080", "a100-40gb", "m2-max-96gb"})


def test_a_search_finds_words_in_names(capsys: pytest.CaptureFixture[str]) -> None:
    found = [line.split()[0] for line in _lines(capsys, "--search", "RTX 30")[HEAD:-FOOT]]
    assert found == [name for name in catalogue() if name.startswith("rtx-30")]


def test_one_card_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(_lines(capsys, "4090"))
    card = catalogue()["rtx-4090"]
    assert all(source in text for source in card.sources)
    assert card.date in text
    assert run(["gpus", "rtx 4090", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"] == list(card.sources)


def test_links_and_power_are_shown_with_what_was_recalled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = " ".join(" ".join(_lines(capsys, "a40")).split())
    assert "PCIe 4.0 x16, 31.51 GB/s to the CPU; NVLink ~56.25 GB/s to other cards" in text
    assert "300 W" in text
    superchip = " ".join(_lines(capsys, "gh200"))
    assert "450 GB/s to the CPU" in superchip
    assert "PCIe" not in superchip
    assert "NVLink" not in "".join(_lines(capsys, "4090"))
    apple = " ".join(_lines(capsys, "m1"))
    assert "memory shared with the CPU" in apple
    assert "not known" in apple


def test_nothing_found_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gpus", "--min-memory", "9999"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no card matches" in printed.err


@pytest.mark.parametrize(
    "flags", [["rtx-4091"], ["--capability", "eight"], ["--min-memory", "nan"], ["--backend", "x"]]
)
def test_bad_filters_exit_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gpus", *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_columns_of_the_table_do_not_run_into_each_other(capsys) -> None:
    assert run(["gpus"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.split()) == len(lines[0].split()) for line in lines[:-1])
    assert not any("e+" in line for line in lines)
