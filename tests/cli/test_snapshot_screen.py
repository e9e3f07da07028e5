"""What the screen of a snapshot says."""

from __future__ import annotations

import gzip
import pickle
import subprocess
from pathlib import Path

import pytest

from naive_allocator import MIB
from snapshot_writer import SnapshotWriter, random_run
from snugpt.cli.snapshot_screen import screen
from snugpt.errors import FailedError
from snugpt.estimate.replay import replay
from snugpt.estimate.snapshot import read_snapshot


def shown(run: SnapshotWriter, folder: Path, **changes: object) -> str:
    path = folder / "s.pickle"
    path.write_bytes(pickle.dumps(run.plain() | changes))
    snapshot = read_snapshot(path)
    return screen(replay(snapshot), snapshot)


def test_it_says_what_was_held_what_filled_it_and_where_memory_ran_out(tmp_path: Path) -> None:
    run = SnapshotWriter(capacity_bytes=100 * MIB)
    run.annotate("forward", "START")
    for _ in range(3):
        run.allocate(20 * MIB, line=12)
    run.free(run.allocate(30 * MIB, line=13))
    run.allocate(90 * MIB, line=14)
    run.annotate("forward", "END")
    text = shown(run, tmp_path)
    lines = [" ".join(line.split()) for line in text.split("\n")]
    assert lines[0] == "memory snapshot of CUDA device 0, native segments"
    assert lines[1] == "history 13 events, 3 segments at the end"
    assert "reserved, peak 90.0 MiB 90.0 MiB" in lines
    assert "reserved, at the end 60.0 MiB 60.0 MiB" in lines
    assert "allocated, peak - 90.0 MiB" in lines
    assert "allocated, at the end 60.0 MiB 60.0 MiB" in lines
    assert "OOM 90.0 MiB were asked for, the driver had 512 B left" in lines
    assert "60.0 MiB 3 x model.py:12 forward < train.py:3 <module>" in lines
    assert "30.0 MiB 1 x model.py:13 forward < train.py:3 <module>" in lines
    assert "phases forward 90.0 MiB" in lines
    assert "did what the real one did" in text


@pytest.mark.parametrize("expandable", [False, True])
def test_it_is_one_screen_of_79_columns(expandable: bool, tmp_path: Path) -> None:
    run = random_run(3, expandable=expandable, capacity_bytes=200 * MIB)
    for line in range(100, 140):
        run.allocate(512, line=line)
    plain = run.plain()
    for event in plain["device_traces"][0]:
        for frame in event["frames"]:
            frame["name"] += "x" * 200
    lines = shown(run, tmp_path, **plain).split("\n")
    assert all(len(line) <= 79 for line in lines)
    assert len(lines) <= 30
    assert any("other places" in line for line in lines)
    assert any("times more" in line for line in lines)


def test_where_the_replay_parts_is_said(tmp_path: Path) -> None:
    run = SnapshotWriter()
    run.allocate(5 * MIB)
    run.allocate(6 * MIB)
    plain = run.plain()
    history = plain["device_traces"][0]
    history[2]["addr"] += MIB
    blocks = plain["segments"][0]["blocks"]
    assert [block["state"] for block in blocks] == ["active_allocated"] * 2 + ["inactive"]
    blocks[1]["address"] += MIB
    blocks[2] |= {"address": blocks[2]["address"] + MIB, "size": blocks[2]["size"] - MIB}
    gap = {"address": 5 * MIB + blocks[0]["address"], "size": MIB, "state": "inactive"}
    blocks.insert(1, gap)
    text = " ".join(shown(run, tmp_path, **plain).split())
    assert "the ways part at event 3 of 4, alloc of 6.00 MiB: as much is held, but another" in text


def test_without_a_history_nothing_is_said_to_agree(tmp_path: Path) -> None:
    run = SnapshotWriter()
    run.allocate(5 * MIB)
    text = " ".join(shown(run, tmp_path, device_traces=[[]]).split())
    assert "note no history" in text
    assert "history 0 events, 1 segment at the end" in text
    assert "peak" not in text
    assert "held 5.00 MiB of tensors" in text
    assert "did what the real one did" not in text
    assert "replay nothing to replay, so nothing is compared" in text


@pytest.mark.parametrize("name", ["my s.pickle.gz", "s.pickle"])
def test_a_packed_snapshot_is_named_as_such_and_its_hint_unpacks_it(
    name: str, tmp_path: Path
) -> None:
    run = SnapshotWriter()
    run.allocate(5 * MIB)
    path = tmp_path / name
    path.write_bytes(gzip.compress(pickle.dumps(run.plain())))
    with pytest.raises(FailedError, match="is packed with gzip") as caught:
        read_snapshot(path)
    assert caught.value.hint is not None
    subprocess.run(caught.value.hint, shell=True, check=True)
    (unpacked,) = set(tmp_path.iterdir()) - {path}
    assert path.exists()
    assert len(read_snapshot(unpacked).segments) == 1
