"""The snapshot reader: what PyTorch writes is read, whatever else is an error and does nothing."""

from __future__ import annotations

import copyreg
import os
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from naive_allocator import MIB
from snapshot_writer import MODEL, SnapshotWriter, random_run
from snugpt.errors import BadQuestionError, FailedError, SnugError
from snugpt.estimate import snapshot as snapshot_module
from snugpt.estimate.plain_pickle import DamagedError, load_plain
from snugpt.estimate.recorded import frame_name, timeline_of_snapshot
from snugpt.estimate.replay import replay
from snugpt.estimate.snapshot import Frame, read_snapshot

plain_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8")),
        st.integers(-(2**100), 2**100),
    ),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(st.text("ab"), inner)
    ),
    max_leaves=30,
)  # fmt: skip


@settings(deadline=None, derandomize=True)
@given(plain_values, st.integers(2, 5))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol: int) -> None:
    assert load_plain(pickle.dumps(value, protocol)) == value


def test_long_texts_many_entries_and_shared_values_are_read(tmp_path: Path) -> None:
    shared = ["x" * 70_000, "é" * 300]
    value = {"list": list(range(5000)), "again": [shared, shared], "wide": [2**40, -(2**40), -1]}
    for protocol in (2, 3, 4, 5):
        found = load_plain(pickle.dumps(value, protocol))
        assert found == value
        assert found["again"][0] is found["again"][1]
    for make in (pickle._dumps, pickle.dumps):  # Python's and C's picklers frame differently
        assert load_plain(make(value)) == value


def test_a_snapshot_is_read_whole(tmp_path: Path) -> None:
    run = SnapshotWriter()
    kept, freed = run.allocate(3 * MIB, line=4), run.allocate(5 * MIB, stream=9, line=5)
    run.free(freed)
    found = read_snapshot(run.write(tmp_path / "s.pickle"))
    assert (found.device, found.expandable) == (0, False)
    assert [s.total_size for s in found.segments] == [20 * MIB, 20 * MIB]
    block = found.segments[0].blocks[0]
    assert (block.address, block.size, block.state) == (kept, 3 * MIB, "active_allocated")
    assert block.frames[0] == Frame(filename=MODEL, line=4, name="forward")
    assert [e.action for e in found.events] == [
        "segment_alloc", "alloc", "segment_alloc", "alloc", "free_requested", "free_completed",
        "snapshot",
    ]  # fmt: skip
    assert found.events[3].stream == 9
    assert found.events[3].frames[0].line == 5


def test_of_several_devices_the_busiest_is_read_unless_one_is_named(tmp_path: Path) -> None:
    one, two = SnapshotWriter(), SnapshotWriter()
    one.allocate(3 * MIB)
    for _ in range(3):
        two.allocate(30 * MIB)
    plain, other = one.plain(), two.plain()
    for segment in other["segments"]:
        segment["device"] = 1
    plain["segments"] += other["segments"]
    plain["device_traces"] += other["device_traces"]
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(plain))
    assert (read_snapshot(path).device, len(read_snapshot(path).segments)) == (1, 3)
    assert [s.total_size for s in read_snapshot(path, device=0).segments] == [20 * MIB]
    with pytest.raises(BadQuestionError, match="device = 2 is not in the snapshot: 0, 1"):
        read_snapshot(path, device=2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(2**200), "a number at byte 13 has 208 bits"),
        (b"\x80\x04}(\x8c\x01aNNu.", "the instruction at byte 9 has nothing to work on"),
        (b"\x80\x04]](aNt.", "it stops at byte 9 with 3 values open"),
        (b"\x80\x06N.", "protocol 6 is none of 2 to 5"),
        (b"N\x80\x04.", "protocol 4 is none"),
        (b"\x80\x04cos\nsystem\n.", "instruction 0x63 at byte 2 has no place in one"),
        (b"\x80\x04(N.", "stops at byte 5 with 1 values open"),
    ],
)
def test_each_thing_wrong_is_named(data: bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        load_plain(data)


class Call:
    """Unpickled by `pickle`, it would call."""

    def __init__(self, function, *arguments) -> None:
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def hostile(marker: Path) -> dict[str, bytes]:
    """Files made to harm, and files that are none."""
    touch = f"touch {marker}".encode()
    good = pickle.dumps(SnapshotWriter().plain())
    deep = b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."
    laughs = b"\x80\x04]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(40)) + b"e."
    return {
        "os.system by reduce": pickle.dumps({"segments": [Call(os.system, touch.decode())]}),
        "os.system, protocol 2": pickle.dumps(Call(os.system, touch.decode()), 2),
        "os.system, protocol 0": pickle.dumps(Call(os.system, touch.decode()), 0),
        "eval": pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')")),
        "INST": b"(X%s" % len(touch).to_bytes(4, "little") + touch + b"ios\nsystem\n.",
        "OBJ": b"\x80\x02(cos\nsystem\nX" + len(touch).to_bytes(4, "little") + touch + b"o.",
        "NEWOBJ": b"\x80\x02cbuiltins\nlist\n)\x81.",
        "BUILD": b"\x80\x02}}b.",
        "EXT1": b"\x80\x02\x82\x01)R.",
        "persistent id": b"\x80\x02Pwhatever\n.",
        "binary persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "global": b"\x80\x02cos\nsystem\n.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "bytearray": pickle.dumps(bytearray(9), 5),
        "set": pickle.dumps({"segments": {1, 2}}),
        "deep": deep,
        "billion laughs": laughs,
        "memo far out": b"\x80\x02]r\xff\xff\xff\xffh\xfe.",
        "memo as text": b"\x80\x02]p99999999999\n.",
        "huge integer": b"\x80\x02\x8b" + (2**24).to_bytes(4, "little") + b"\xff" * 2**24 + b".",
        "integer of 200 bytes": pickle.dumps({"segments": 2**1600}),
        "decimal integer": b"I" + b"9" * 100_000 + b"\n.",
        "text longer than the file": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x.",
        "frame longer than the file": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"].",
        "not UTF-8": b"\x80\x04\x8c\x02\xff\xfe.",
        "pops nothing": b"\x80\x04a.",
        "pops across a mark": b"\x80\x04](]a.",
        "odd entries": b"\x80\x04}(NNNu.",
        "key is a list": b"\x80\x04}]Ns.",
        "key is a number": pickle.dumps({1: 2}),
        "stops with two values": b"\x80\x04NN.",
        "stops within a mark": b"\x80\x04N(.",
        "entry into a tuple": b"\x80\x04)Na.",
        "itself in itself": b"\x80\x04]\x94h\x00a.",
        "empty": b"",
        "text": b"torch.cuda.memory._dump_snapshot\n",
        "json": b'{"segments": [], "device_traces": []}',
        "zip": b"PK\x03\x04" + bytes(30),
        "zeros": bytes(1000),
        "cut short": good[:-7],
        "goes on behind its end": good + b"\x80\x04N.",
        "a list": pickle.dumps([]),
        "without traces": pickle.dumps({"segments": []}),
        "protocol 0": pickle.dumps(SnapshotWriter().plain(), 0),
    }


@pytest.mark.parametrize("name", hostile(Path("x")))
def test_a_hostile_file_is_one_line_and_nothing_happens(name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "bad.pickle"
    path.write_bytes(hostile(marker)[name])
    copyreg.add_extension("os", "system", 1)
    try:
        with pytest.raises(FailedError) as caught:
            read_snapshot(path)
    finally:
        copyreg.remove_extension("os", "system", 1)
    assert caught.value.exit_code == 1
    assert "bad.pickle is no CUDA memory snapshot" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300 + len(str(path))
    assert "_dump_snapshot" in caught.value.hint
    assert [each.name for each in tmp_path.iterdir()] == ["bad.pickle"]


def test_pickle_itself_would_have_run_it(tmp_path: Path) -> None:
    """So that the test above proves something."""
    marker = tmp_path / "marker"
    pickle.loads(hostile(marker)["os.system by reduce"])
    assert marker.exists()


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("event", {"action": "explode"}), ("event", {"size": -1}), ("event", {"size": "5"}),
        ("event", {"size": 2**50}), ("event", {"addr": 2**70}), ("event", {"frames": 3}),
        ("event", {"frames": [{"name": 3}]}), ("event", {"time_us": 1.5}),
        ("event", {"size": True}), ("event", dict.fromkeys(map(str, range(100)))),
        ("block", {"size": 512}), ("block", {"size": 0}), ("block", {"state": "lost"}),
        ("block", {"address": 4096}), ("segment", {"total_size": 5}),
        ("segment", {"segment_type": "medium"}), ("segment", {"segment_pool_id": (0,)}),
        ("segment", {"blocks": {}}), ("segment", {"address": -5}),
        ("whole", {"segments": {}}), ("whole", {"segments": [5]}),
        ("whole", {"device_traces": [5]}), ("whole", {"device_traces": None}),
        ("whole", {"allocator_settings": {"max_split_size": "x"}}),
        ("whole", {"external_annotations": 7}),
        ("whole", {"external_annotations": [{"name": "x", "stage": "MIDDLE"}]}),
    ],
)  # fmt: skip
def test_a_value_that_pytorch_would_not_write_is_refused(place, change, tmp_path: Path) -> None:
    run = SnapshotWriter()
    run.allocate(5 * MIB)
    plain = run.plain()
    segment = plain["segments"][0]
    target = {
        "event": plain["device_traces"][0][1], "block": segment["blocks"][0], "segment": segment,
        "whole": plain,
    }[place]  # fmt: skip
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(plain))
    read_snapshot(path)
    target |= change
    path.write_bytes(pickle.dumps(plain))
    with pytest.raises(FailedError):
        read_snapshot(path)


def test_keys_that_are_not_known_and_an_oom_of_any_size_are_read(tmp_path: Path) -> None:
    run = SnapshotWriter(capacity_bytes=30 * MIB)
    run.allocate(5 * MIB)
    run.allocate(2**50)
    plain = run.plain()
    plain["of a later version"] = {"x": [1]}
    plain["device_traces"][0][0]["of a later version"] = None
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(plain))
    (oom,) = (event for event in read_snapshot(path).events if event.action == "oom")
    assert (oom.size, oom.device_free) == (2**50, 512)


def test_segments_that_overlap_are_refused(tmp_path: Path) -> None:
    run = SnapshotWriter()
    run.allocate(30 * MIB)
    plain = run.plain()
    plain["segments"] *= 2
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(plain))
    with pytest.raises(FailedError, match="overlap"):
        read_snapshot(path)


def test_one_entry_named_a_thousand_times_is_counted_each_time(tmp_path, monkeypatch) -> None:
    run = SnapshotWriter()
    run.allocate(5 * MIB)
    plain = run.plain()
    plain["segments"][0]["blocks"] *= 1000
    plain["segments"] *= 1000
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(plain))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(snapshot_module, "MAX_ENTRIES", 1500)
    with pytest.raises(FailedError, match="more than 1,500 entries"):
        read_snapshot(path)


def test_too_many_values_and_too_large_a_file_are_refused(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(DamagedError, match="more than 10 values"):
        load_plain(pickle.dumps([None] * 20), max_values=10)
    path = SnapshotWriter().write(tmp_path / "s.pickle")
    monkeypatch.setattr(snapshot_module, "MAX_FILE_BYTES", 100)
    with pytest.raises(FailedError, match="snapshots up to 100 B are read"):
        read_snapshot(path)


def test_a_path_that_is_no_file_is_a_bad_question(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, Path(os.devnull)):
        with pytest.raises(BadQuestionError, match="is no file"):
            read_snapshot(path)


@settings(
    deadline=None, derandomize=True, max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_flipped_and_missing_bytes_are_an_error_or_still_a_snapshot(tmp_path: Path, data) -> None:
    """A flip within a name can't be noticed; none may end in another error, nor a replay of it."""
    run = random_run(1, expandable=data.draw(st.booleans()), capacity_bytes=None)
    damaged = bytearray(pickle.dumps(run.plain(last_events=data.draw(st.integers(0, 40)))))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "s.pickle"
    path.write_bytes(damaged[: data.draw(st.sampled_from([None, None, len(damaged) // 2]))])
    message = ""
    try:
        replay(read_snapshot(path))
    except SnugError as error:
        message = error.message
    assert "\n" not in message


def test_random_bytes_behind_a_proper_head_are_an_error(tmp_path: Path) -> None:
    chance, path = random.Random(5), tmp_path / "s.pickle"
    for _ in range(300):
        path.write_bytes(b"\x80\x04" + chance.randbytes(60) + b".")
        with pytest.raises(FailedError):
            read_snapshot(path)


def test_a_frame_is_named_without_folders_and_can_not_steer_a_terminal() -> None:
    assert frame_name(Frame("C:\\x\\model.py", 3, "forward")) == "model.py:3 forward"
    assert "\x1b" not in frame_name(Frame("a\x1b[2J.py", 1, "f\x07\n"))


@pytest.mark.parametrize("seed", range(60, 100))
def test_a_history_that_contradicts_itself_is_refused_or_replayed(seed: int, tmp_path) -> None:
    chance = random.Random(seed)
    run = random_run(seed % 5, expandable=seed % 2 == 0, capacity_bytes=200 * MIB)
    plain = run.plain(last_events=chance.choice([None, 100]))
    history = plain["device_traces"][0]
    for _ in range(chance.randrange(1, 6)):
        entry = chance.choice([*history, *plain["segments"]])
        key = chance.choice(sorted(entry.keys() & {"size", "addr", "stream", "address"}))
        entry[key] = chance.choice([0, 512, entry[key] + 2 * MIB, 2**43, 2**62])
        history.insert(chance.randrange(len(history)), dict(chance.choice(history)))
        history.pop(chance.randrange(len(history)))
        chance.choice(history)["action"] = chance.choice(["alloc", "segment_map", "segment_free"])
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(plain))
    try:
        snapshot = read_snapshot(path)
    except FailedError:
        return
    found = replay(snapshot)
    assert found.num_events == len(snapshot.events)
    assert timeline_of_snapshot(snapshot).read(1)[0].bytes >= 0
