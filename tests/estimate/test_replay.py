"""Snapshots replayed: the simulation against a recorded history, segment by segment."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from naive_allocator import MIB
from snapshot_writer import SnapshotWriter, random_run
from snugpt.estimate.history import beginning
from snugpt.estimate.recorded import timeline_of_snapshot
from snugpt.estimate.replay import replay
from snugpt.estimate.snapshot import read_snapshot


@pytest.mark.parametrize("capacity_bytes", [None, 200 * MIB])
@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 14, 33, 43, 44])
def test_a_whole_history_is_replayed_to_the_byte_and_address(
    seed: int, expandable: bool, capacity_bytes: int | None, tmp_path: Path
) -> None:
    run = random_run(seed, expandable=expandable, capacity_bytes=capacity_bytes)
    found = replay(read_snapshot(run.write(tmp_path / "s.pickle")))
    assert found.parting is None
    assert found.notes == ()
    assert found.expandable is expandable
    assert found.recorded_reserved_peak == found.replayed_reserved_peak == run.reserved_peak
    assert found.recorded_reserved_end == found.replayed_reserved_end == run.naive.reserved
    assert found.replayed_allocated_peak == run.allocated_peak
    assert found.recorded_allocated_end == found.replayed_allocated_end == run.naive.allocated
    assert len(found.ooms) == run.naive.ooms


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 14, 20])
def test_a_history_that_lost_its_beginning_is_replayed_from_what_was_there(
    seed: int, expandable: bool, tmp_path: Path
) -> None:
    run = random_run(seed, expandable=expandable, capacity_bytes=None)
    found = replay(read_snapshot(run.write(tmp_path / "s.pickle", last_events=150)))
    if found.parting is not None:  # a block's size before the recording is not always known
        assert not expandable
        assert "unsplit rest" in found.notes[0]
    assert (found.parting is None) is (expandable or seed < 14)
    assert found.num_events == 151
    assert found.recorded_reserved_end == run.naive.reserved
    assert found.recorded_allocated_end == run.naive.allocated
    if found.parting is None:
        assert found.replayed_reserved_end == run.naive.reserved
        assert found.replayed_allocated_end == run.naive.allocated


def test_what_was_there_first_is_found_by_undoing(tmp_path: Path) -> None:
    """By hand: 3 MiB stay, 7 MiB go, 12 MiB come, and the history holds the last two only."""
    run = SnapshotWriter()
    stays, goes = run.allocate(3 * MIB), run.allocate(7 * MIB)
    kept = len(run.events)
    run.free(goes)
    run.allocate(12 * MIB)
    last = len(run.events) - kept
    found = beginning(read_snapshot(run.write(tmp_path / "s.pickle", last_events=last)))
    assert found.reserved_bytes == 20 * MIB
    assert [(b.address, b.size) for blocks in found.blocks.values() for b in blocks] == [
        (stays, 3 * MIB),
        (goes, 7 * MIB),
    ]
    assert (found.contradictions, found.inferred) == (0, 1)


def test_the_event_where_run_and_replay_part_is_named(tmp_path: Path) -> None:
    run = SnapshotWriter()
    run.allocate(5 * MIB)
    run.allocate(30 * MIB)
    plain = run.plain()
    taken = next(e for e in plain["device_traces"][0] if e["size"] == 30 * MIB)
    assert taken["action"] == "segment_alloc"
    taken["size"] += 2 * MIB  # as an allocator with other rules would have done
    segment = plain["segments"][1]
    segment["total_size"] += 2 * MIB
    segment["blocks"][0]["size"] += 2 * MIB
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(plain))
    found = replay(read_snapshot(path))
    assert (found.parting.index, found.parting.action) == (3, "alloc")
    assert found.parting.size == 30 * MIB
    assert found.parting.recorded_reserved_bytes - found.parting.replayed_reserved_bytes == 2 * MIB
    assert found.recorded_reserved_peak - found.replayed_reserved_peak == 2 * MIB


def test_what_the_simulation_leaves_out_is_noted(tmp_path: Path) -> None:
    run = SnapshotWriter()
    run.free(run.allocate(5 * MIB))
    plain = run.plain()
    plain["allocator_settings"] |= {
        "garbage_collection_threshold": 0.8, "roundup_power2_divisions": {"1": 4},
    }  # fmt: skip
    plain["device_traces"][0].pop(1)  # the allocation itself was not recorded
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(plain))
    notes = "\n".join(replay(read_snapshot(path)).notes)
    for part in ("garbage_collection", "roundup_power2", "do not agree"):
        assert part in notes
    path.write_bytes(pickle.dumps(plain | {"device_traces": [[]]}))
    assert "no history" in replay(read_snapshot(path)).notes[0]


def test_a_snapshot_is_a_timeline_with_names_and_phases(tmp_path: Path) -> None:
    """By hand: 3 MiB lie there; 5 come in forward, 7 in backward, 5 go, 1 comes with no phase."""
    run = SnapshotWriter()
    run.allocate(3 * MIB, line=11)
    kept = len(run.events)
    run.annotate("snugpt.forward", "START")
    first = run.allocate(5 * MIB, line=12)
    run.annotate("some other range", "START")
    run.annotate("snugpt.loss", "START")
    run.free(run.allocate(2 * MIB, line=15))
    run.annotate("snugpt.loss", "END")
    run.annotate("snugpt.forward", "END")
    run.annotate("backward", "START")
    run.allocate(7 * MIB, line=13)
    run.free(first)
    run.annotate("backward", "END")
    run.allocate(MIB, line=14)
    snapshot = read_snapshot(run.write(tmp_path / "s.pickle", last_events=len(run.events) - kept))
    timeline = timeline_of_snapshot(snapshot)
    assert [buffer.name for buffer in timeline.resident] == ["model.py:11 forward"]
    alive, phases = timeline.read(1)
    assert (alive.bytes, alive.phase) == (15 * MIB, "backward")
    assert phases == {
        "forward": 8 * MIB,
        "loss": 10 * MIB,
        "backward": 15 * MIB,
        "recorded": 11 * MIB,
    }
    assert {b.name: b.fixed_bytes for b in alive.buffers} == {
        "model.py:11 forward": 3 * MIB, "model.py:12 forward": 5 * MIB,
        "model.py:13 forward": 7 * MIB,
    }  # fmt: skip
    assert timeline.peak_bytes(1) == alive.bytes


def test_a_tensor_that_was_freed_and_only_waits_is_not_alive(tmp_path: Path) -> None:
    run = SnapshotWriter()
    run.free(run.allocate(3 * MIB), other_stream=9)
    kept = len(run.events)
    run.allocate(5 * MIB)
    run.caught_up(9)
    last = len(run.events) - kept
    snapshot = read_snapshot(run.write(tmp_path / "s.pickle", last_events=last))
    assert timeline_of_snapshot(snapshot).resident == ()
    found = replay(snapshot)
    assert found.parting is None
    assert found.replayed_allocated_peak == 5 * MIB


@pytest.mark.parametrize("seed", range(4))
def test_the_timeline_peaks_where_the_run_did_but_for_the_unsplit_rest(seed, tmp_path) -> None:
    run = random_run(seed, expandable=True, capacity_bytes=None)
    alive, _ = timeline_of_snapshot(read_snapshot(run.write(tmp_path / "s.pickle"))).read(1)
    assert alive.bytes == run.allocated_peak  # expandable segments split everything off
    assert sum(n * -(-b.fixed_bytes // 512) * 512 for b, n in alive.buffers.items()) == alive.bytes
