"""A snapshot's own requests, played on the simulated allocator and compared with what it did.

This separates the two halves of a prediction: the requests here are the real ones, so a difference
is the allocator's. New segments are put where the driver put them, so that best fit by address
chooses among the same blocks. Held against snapshots that a simulation wrote; no snapshot of a real
CUDA run was replayed yet.

Not in a snapshot, and so not replayed: the driver's capacity. Where memory ran out the history says
which segments went back, and so does the replay, at the same event. Pages that were mapped before
the request failed go back at once and are left out. A request that was tried again and then needed
no new page (expandable segments only) can't be told from one after `empty_cache`, and is replayed
as that.
"""

from __future__ import annotations

from dataclasses import dataclass

from snugpt.estimate.allocator import CachingAllocator
from snugpt.estimate.blocks import Block, PoolKey
from snugpt.estimate.expandable import ExpandableAllocator
from snugpt.estimate.history import Beginning, beginning, key_of_memory
from snugpt.estimate.snapshot import Snapshot, SnapshotEvent

GIVEN_BACK = ("segment_free", "segment_unmap")
TAKEN = ("segment_alloc", "segment_map")


@dataclass(frozen=True, slots=True)
class Parting:
    """The first event after which the replay holds other memory than the run did."""

    index: int  # from 0, among the events of the snapshot
    action: str
    size: int
    recorded_reserved_bytes: int
    replayed_reserved_bytes: int
    recorded_address: int
    replayed_address: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Recorded and replayed counters, in bytes.

    A history holds what was asked for and not what a block had, so the recorded peak of allocated
    is not known; at the end both are. `parting` is None where the replay went the run's way.
    """

    expandable: bool
    num_events: int
    recorded_reserved_peak: int
    replayed_reserved_peak: int
    replayed_allocated_peak: int
    recorded_reserved_end: int
    replayed_reserved_end: int
    recorded_allocated_end: int
    replayed_allocated_end: int
    ooms: tuple[SnapshotEvent, ...]
    parting: Parting | None
    notes: tuple[str, ...]


def replay(snapshot: Snapshot) -> Replay:
    """Play the events of a snapshot; see the module."""
    start = beginning(snapshot)
    player = _Player(snapshot, start)
    for index, event in enumerate(snapshot.events):
        player.play(index, event)
    player.compare_reserved(len(snapshot.events), None)
    allocator = player.allocator
    return Replay(
        expandable=snapshot.expandable,
        num_events=len(snapshot.events),
        recorded_reserved_peak=player.recorded_peak,
        replayed_reserved_peak=allocator.peak_reserved,
        replayed_allocated_peak=allocator.peak_allocated,
        recorded_reserved_end=sum(s.total_size for s in snapshot.segments),
        replayed_reserved_end=allocator.reserved,
        recorded_allocated_end=sum(
            block.size
            for segment in snapshot.segments
            for block in segment.blocks
            if block.state == "active_allocated"
        ),
        replayed_allocated_end=allocator.allocated,
        ooms=tuple(event for event in snapshot.events if event.action == "oom"),
        parting=player.parting,
        notes=_notes(snapshot, start, player.strangers),
    )


class _Player:
    """Plays events one by one; `recorded` is what the run held after each."""

    def __init__(self, snapshot: Snapshot, start: Beginning) -> None:
        self.parting: Parting | None = None
        self.strangers = 0  # frees of blocks nobody knows
        self.recorded = self.recorded_peak = start.reserved_bytes
        self._places = _Places(snapshot, start)
        limit = snapshot.settings.max_split_size
        kind = ExpandableAllocator if snapshot.expandable else CachingAllocator
        self.allocator: CachingAllocator = kind(
            max_split_bytes=limit if limit > 0 and not snapshot.expandable else None,
            place=self._places.place,
        )
        actions = {event.action for event in snapshot.events}
        self._two_halves = "free_completed" in actions
        self._one_half = "free_requested" not in actions
        self._blocks: dict[int, Block] = {}
        self._awaiting: dict[int, Block] = {}
        self._giving_back = False  # a run of segments that go back
        self._retries = False  # it was to make room for the memory that is taken next
        for key, stretches in start.memory.items():
            used = start.blocks[key]
            blocks = self.allocator.adopt(key, stretches, [(b.address, b.size) for b in used])
            for known, block in zip(used, blocks, strict=True):
                if known.awaiting:
                    self.allocator.request_free(block)
                    self._awaiting[known.address] = block
                else:
                    self._blocks[known.address] = block

    def play(self, index: int, event: SnapshotEvent) -> None:
        action = event.action
        if action in GIVEN_BACK:
            if not self._giving_back:
                self.allocator.release_cached()
                self._places.forget()
            self._giving_back = True
            self.recorded -= event.size
            return
        if self._giving_back:
            self._giving_back = False
            self.compare_reserved(index - 1, event)
            self._retries = action in TAKEN
        elif action not in (*TAKEN, "alloc"):
            self._retries = False
        if action in TAKEN:
            self.recorded += event.size
            self.recorded_peak = max(self.recorded_peak, self.recorded)
            self._places.expect(event)
        elif action == "alloc":
            self._allocate(index, event)
        elif action == "free_requested" or (action == "free_completed" and self._one_half):
            self._request_free(event.addr)
            if self._one_half or not self._two_halves:
                self._complete_free(event.addr)
        elif action == "free_completed":
            self._complete_free(event.addr)

    def compare_reserved(self, index: int, event: SnapshotEvent | None) -> None:
        """Note where the bytes held differ, the first time they do."""
        if self.recorded != self.allocator.reserved:
            self._part(index, event, event.addr if event else 0, event.addr if event else 0)

    def _allocate(self, index: int, event: SnapshotEvent) -> None:
        if event.addr in self._blocks:  # its free was not recorded
            self._request_free(event.addr)
        self._complete_free(event.addr)
        allocate = self.allocator.allocate_new if self._retries else self.allocator.allocate
        block = allocate(max(event.size, 1), event.stream, event.pool_id)
        self._blocks[event.addr] = block
        self._places.forget()
        if self.recorded != self.allocator.reserved or block.address != event.addr:
            self._part(index, event, event.addr, block.address)
        self._retries = False

    def _request_free(self, address: int) -> None:
        block = self._blocks.pop(address, None)
        if block is None:
            self.strangers += 1
            return
        self.allocator.request_free(block)
        self._awaiting[address] = block

    def _complete_free(self, address: int) -> None:
        block = self._awaiting.pop(address, None)
        if block is not None:
            self.allocator.complete_free(block)

    def _part(self, index: int, event: SnapshotEvent | None, recorded: int, replayed: int) -> None:
        if self.parting is None:
            self.parting = Parting(
                index=index,
                action=event.action if event else "end",
                size=event.size if event else 0,
                recorded_reserved_bytes=self.recorded,
                replayed_reserved_bytes=self.allocator.reserved,
                recorded_address=recorded,
                replayed_address=replayed,
            )


class _Places:
    """Where the driver put new memory; somewhere out of the way where the run took none."""

    def __init__(self, snapshot: Snapshot, start: Beginning) -> None:
        self._expandable = snapshot.expandable
        self._expected: list[SnapshotEvent] = []
        self._num_strange = 0
        self._bases: dict[PoolKey, int] = {}
        if self._expandable:  # a range begins at the lowest page that was ever mapped in it
            for key, stretches in start.memory.items():
                self._bases[key] = stretches[0][0]
            for event in snapshot.events:
                if event.action == "segment_map":
                    key = key_of_memory(event, expandable=True)
                    self._bases[key] = min(self._bases.get(key, event.addr), event.addr)

    def expect(self, event: SnapshotEvent) -> None:
        """The run took this memory for the allocation that follows."""
        self._expected.append(event)

    def forget(self) -> None:
        """The allocation is done, or it was given up."""
        self._expected.clear()

    def place(self, key: PoolKey, num_bytes: int) -> int:
        """Return the address of a new segment or range."""
        if self._expandable:
            base = self._bases.pop(key, None)
            if base is not None:
                return base
        for event in self._expected:
            sizes = self._expandable or event.size == num_bytes
            if sizes and (event.stream, event.pool_id) == (key.stream, key.owner):
                self._expected.remove(event)
                return event.addr
        self._num_strange += 1
        return (self._num_strange << 48) + (1 << 62)


def _notes(snapshot: Snapshot, start: Beginning, strangers: int) -> tuple[str, ...]:
    """What makes the comparison weaker than it looks."""
    settings, notes = snapshot.settings, []
    if not snapshot.events:
        notes.append("no history: _record_memory_history was off")
    if start.contradictions or strangers:
        notes.append(
            f"{start.contradictions + strangers:,} events do not agree with the rest: some actions"
            " were not recorded"
        )
    if start.inferred:
        notes.append(
            f"the unsplit rest of {start.inferred:,} blocks from before the recording is not known"
        )
    if any(divisions > 1 for divisions in settings.roundup_power2_divisions.values()):
        notes.append("roundup_power2_divisions was set, which is not simulated")
    if settings.garbage_collection_threshold > 0:
        notes.append("garbage_collection_threshold was set, which is not simulated")
    kinds = {segment.is_expandable for segment in snapshot.segments}
    if len(kinds) > 1:
        notes.append("expandable segments were turned on or off within the run")
    return tuple(notes)
