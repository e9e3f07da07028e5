"""Writes snapshots in the format of `torch.cuda.memory._dump_snapshot`, without a GPU.

The requests are random or given; where each lies, and which segments come and go, is said by
`naive_allocator`, which shares nothing with the allocator that replays them. Keys and values are
those of THCPModule_memorySnapshot in torch/csrc/cuda/Module.cpp (PyTorch 2.13).
"""

from __future__ import annotations

import pickle
import random
from pathlib import Path

from naive_allocator import MIB, NaiveAllocator

MODEL = "/home/someone/project/model.py"


def frames(line: int) -> list[dict]:
    """A call stack as PyTorch records it: innermost first, with frames of libraries."""
    return [
        {"filename": "/usr/lib/python3/site-packages/torch/nn/functional.py", "line": 7,
         "name": "linear"},
        {"filename": MODEL, "line": line, "name": "forward"},
        {"filename": "/home/someone/project/train.py", "line": 3, "name": "<module>"},
    ]  # fmt: skip


class SnapshotWriter:
    """Allocates, frees and keeps the history that PyTorch would have kept."""

    def __init__(self, *, expandable: bool = False, capacity_bytes: int | None = None) -> None:
        self.naive = NaiveAllocator(expandable=expandable, capacity_bytes=capacity_bytes)
        self.events: list[dict] = []
        self.asked: dict[int, tuple[int, int, int]] = {}  # address: bytes, stream, line
        self.annotations: list[dict] = []
        self.allocated_peak = self.reserved_peak = self.time_us = 0

    def allocate(self, num_bytes: int, stream: int = 0, line: int = 1) -> int | None:
        address = self.naive.allocate(num_bytes, stream)
        self._keep_log(line)
        if address is None:
            self._event("oom", num_bytes, stream, line, device_free=512)
            return None
        self._event("alloc", num_bytes, stream, line, addr=address)
        self.asked[address] = num_bytes, stream, line
        return address

    def free(self, address: int, other_stream: int | None = None) -> None:
        size, stream, line = self.asked[address]
        self._event("free_requested", size, stream, line, addr=address)
        if other_stream is not None:
            self.naive.record_stream(address, other_stream)
        self.naive.release(address)
        self._keep_log(line)

    def caught_up(self, stream: int) -> None:
        self.naive.caught_up(stream)
        self._keep_log(0)

    def empty_cache(self) -> None:
        self.naive.give_back_cached()
        self._keep_log(0)

    def annotate(self, name: str, stage: str) -> None:
        self.time_us += 1
        self.annotations.append(
            {"name": name, "stage": stage, "device": 0, "time_us": self.time_us}
        )

    def plain(self, last_events: int | None = None) -> dict:
        """The dict that PyTorch pickles; of the history only the last events."""
        events = self.events if last_events is None else self.events[-last_events:]
        return {
            "segments": self._segments(),
            "device_traces": [[*events, self._entry("snapshot", 0, 0, 0, addr=0)]],
            "allocator_settings": {
                "PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1,
                "garbage_collection_threshold": 0.0,
                "expandable_segments": self.naive.expandable, "pinned_num_register_threads": 1,
                "roundup_power2_divisions": {"1": 0, "2": 0},
            },
            "external_annotations": self.annotations,
        }  # fmt: skip

    def write(self, path: Path, last_events: int | None = None) -> Path:
        path.write_bytes(pickle.dumps(self.plain(last_events)))
        return path

    def _segments(self) -> list[dict]:
        found = []
        for segment in self.naive.segments:
            small, stream = segment["pool"]
            fresh = True
            for kind, start, end in self.naive.stretches(segment):
                if kind == "unmapped":
                    fresh = True
                    continue
                if fresh:
                    found.append({
                        "device": 0, "address": start, "total_size": 0, "allocated_size": 0,
                        "active_size": 0, "requested_size": 0, "stream": stream,
                        "segment_type": "small" if small else "large", "segment_pool_id": (0, 0),
                        "is_expandable": self.naive.expandable, "frames": [], "blocks": [],
                    })  # fmt: skip
                    fresh = False
                found[-1]["total_size"] += end - start
                state = "inactive"
                if kind == "used":
                    waits = self.naive.used[start][3] == "waiting"
                    state = "active_pending_free" if waits else "active_allocated"
                size, _, line = self.asked.get(start, (0, 0, 0)) if kind == "used" else (0, 0, 0)
                found[-1]["blocks"].append({
                    "address": start, "size": end - start, "requested_size": size, "state": state,
                    "frames": frames(line) if kind == "used" else [],
                })  # fmt: skip
        return found

    def _keep_log(self, line: int) -> None:
        for action, address, size, stream in self.naive.log:
            if action == "free_completed":
                size, stream, line = self.asked.pop(address)
            self._event(action, size, stream, line, addr=address)
        self.naive.log.clear()

    def _event(self, action: str, size: int, stream: int, line: int, **more: int) -> None:
        self.events.append(self._entry(action, size, stream, line, **more))
        self.allocated_peak = max(self.allocated_peak, self.naive.allocated)
        self.reserved_peak = max(self.reserved_peak, self.naive.reserved)

    def _entry(self, action: str, size: int, stream: int, line: int, **more: int) -> dict:
        self.time_us += 1
        return {
            "action": action, "size": size, "stream": stream, "time_us": self.time_us,
            "compile_context": "N/A", "user_metadata": "", "pool_id": (0, 0),
            "frames": frames(line), **more,
        }  # fmt: skip


def random_run(seed: int, *, expandable: bool, capacity_bytes: int | None) -> SnapshotWriter:
    """A few hundred requests on three streams, with an emptied cache now and then."""
    chance = random.Random(seed)
    writer = SnapshotWriter(expandable=expandable, capacity_bytes=capacity_bytes)
    live: list[int] = []
    for _ in range(300):
        draw = chance.random()
        if draw < 0.5:
            size = chance.randrange(1, chance.choice((4096, 2 * MIB, 12 * MIB, 60 * MIB)))
            address = writer.allocate(size, chance.choice((0, 0, 0, 9)), chance.randrange(1, 40))
            live += [] if address is None else [address]
        elif draw < 0.9 and live:
            other = chance.choice((None, None, None, 0, 9))
            writer.free(live.pop(chance.randrange(len(live))), other)
        elif draw < 0.98:
            writer.caught_up(chance.choice((0, 9)))
        elif chance.random() < 0.3:
            writer.empty_cache()
    return writer
