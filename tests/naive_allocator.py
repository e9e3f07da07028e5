"""The caching allocator once more, written to be checked by eye: lists and sets, nothing clever.

Memory is a set of mapped pages (or whole segments) and a list of stretches in use; what is free is
worked out anew for each request. Slow, and independent of the allocator that is tested.
"""

from __future__ import annotations

from itertools import pairwise

MIB = 2**20


class NaiveAllocator:
    """Says at which address each request lies; None where memory has run out."""

    def __init__(self, *, expandable: bool, capacity_bytes: int | None = None) -> None:
        self.expandable, self.capacity = expandable, capacity_bytes
        self.num_segments = 0
        self.segments: list[dict] = []  # pool, base, pages: {number}, page, length
        self.used: dict[int, list] = {}  # address: [size, pool, other streams, state]
        self.reserved = self.retries = self.ooms = 0
        self.log: list[tuple[str, int, int, int]] = []  # action, address, bytes, stream

    @property
    def allocated(self) -> int:
        return sum(size for size, _, _, state in self.used.values() if state == "used")

    @property
    def waiting(self) -> int:
        return sum(size for size, _, _, state in self.used.values() if state == "waiting")

    def allocate(self, num_bytes: int, stream: int) -> int | None:
        size = max(1, (num_bytes + 511) // 512) * 512
        pool = (size <= MIB, stream)
        found = self._find(size, pool) or self._take(size, pool)
        if found is None:
            self.give_back_cached()
            self.retries += 1
            found = self._take(size, pool)
        if found is None:
            self.ooms += 1
            return None
        address, room = found
        rest = room - size
        whole = rest <= MIB and not pool[0] and not self.expandable
        self.used[address] = [room if whole else size, pool, set(), "used"]
        return address

    def record_stream(self, address: int, stream: int) -> None:
        _, pool, streams, _ = self.used[address]
        if stream != pool[1]:
            streams.add(stream)

    def release(self, address: int) -> None:
        if self.used[address][2]:
            self.used[address][3] = "waiting"
        else:
            self._gone(address)

    def caught_up(self, stream: int) -> None:
        for address, (_, _, streams, state) in list(self.used.items()):
            if state == "waiting":
                streams.discard(stream)
                if not streams:
                    self._gone(address)

    def give_back_cached(self) -> None:
        for address, (_, _, _, state) in list(self.used.items()):
            if state == "waiting":
                self._gone(address)
        for segment in list(self.segments):
            busy = {
                page
                for at, (size, *_) in self.used.items()
                if segment["base"] <= at < segment["base"] + segment["length"]
                for page in range(
                    (at - segment["base"]) // segment["page"],
                    (at + size - 1 - segment["base"]) // segment["page"] + 1,
                )
            }
            given = segment["pages"] - busy
            self.reserved -= len(given) * segment["page"]
            self._log_pages("free", "unmap", segment, sorted(given))
            segment["pages"] &= busy
            if given and not segment["pages"]:  # a range that never had a page stays
                self.segments.remove(segment)

    def stretches(self, segment: dict) -> list[tuple[str, int, int]]:
        """What a segment is made of in order of address: (free | used | unmapped, start, end)."""
        cuts = {segment["base"], segment["base"] + segment["length"]}
        for page in segment["pages"]:
            cuts |= {segment["base"] + (page + i) * segment["page"] for i in (0, 1)}
        inside = {a: u for a, u in self.used.items() if min(cuts) <= a < max(cuts)}
        cuts |= {end for a, u in inside.items() for end in (a, a + u[0])}
        cuts = sorted(cuts)
        found: list[tuple[str, int, int]] = []
        for start, end in pairwise(cuts):
            if any(a <= start < a + u[0] for a, u in inside.items()):
                kind = "used"
            elif (start - segment["base"]) // segment["page"] in segment["pages"]:
                kind = "free"
            else:
                kind = "unmapped"
            if found and found[-1][0] == kind and start not in inside:
                found[-1] = (kind, found[-1][1], end)
            else:
                found.append((kind, start, end))
        return found

    def _find(self, size: int, pool: tuple) -> tuple[int, int] | None:
        free = []  # (size, address, size with the unmapped addresses behind it)
        for segment in self.segments:
            if segment["pool"] == pool:
                row = [*self.stretches(segment), ("end", 0, 0)]
                for (kind, start, end), (next_kind, _, next_end) in pairwise(row):
                    if kind == "free":
                        grown = next_end if next_kind == "unmapped" else end
                        free.append((end - start, start, grown - start))
        free = sorted(each for each in free if each[0] >= size)
        if not free:
            return None
        best = 0
        while self.expandable and best + 1 < len(free) and free[best + 1][2] < free[best][2]:
            best += 1
        return free[best][1], free[best][0]

    def _take(self, size: int, pool: tuple) -> tuple[int, int] | None:
        if self.expandable:
            return self._map(size, pool)
        total = 2 * MIB if pool[0] else 20 * MIB if size < 10 * MIB else -(-size // 2**21) * 2**21
        if self.capacity is not None and self.reserved + total > self.capacity:
            return None
        self.reserved += total
        segment = self._segment(pool, page=total, length=total)
        segment["pages"] = {0}
        self._log_pages("alloc", "map", segment, [0])
        return segment["base"], total

    def _map(self, size: int, pool: tuple) -> tuple[int, int] | None:
        page = (2 if pool[0] else 20) * MIB
        for segment in [s for s in self.segments if s["pool"] == pool] or [None]:
            segment = segment or self._segment(pool, page=page, length=2**44 // page * page)
            row = self.stretches(segment)
            for index, (kind, start, _) in enumerate(row):
                if kind != "unmapped":
                    continue
                first = index
                if index and row[index - 1][0] == "free":
                    first, start = index - 1, row[index - 1][1]
                end = start
                for what, _, stop in row[first:]:
                    if what == "used":
                        break
                    end = stop
                if end - start >= size:
                    return self._map_holes(segment, start, size)
        raise AssertionError("the range is far longer than any request")

    def _map_holes(self, segment: dict, start: int, size: int) -> tuple[int, int] | None:
        page, base = segment["page"], segment["base"]
        pages = range((start - base) // page, (start + size - 1 - base) // page + 1)
        hole: list[int] = []
        for number in [*pages, None]:
            if number is not None and number not in segment["pages"]:
                hole.append(number)
            elif hole:
                num_bytes = len(hole) * page
                if self.capacity is not None and self.reserved + num_bytes > self.capacity:
                    return None
                self.reserved += num_bytes
                segment["pages"] |= set(hole)
                self._log_pages("alloc", "map", segment, hole)
                hole = []
        (end,) = (e for kind, s, e in self.stretches(segment) if kind == "free" and s == start)
        return start, end - start

    def _gone(self, address: int) -> None:
        size, pool, _, _ = self.used.pop(address)
        self.log.append(("free_completed", address, size, pool[1]))

    def _log_pages(self, native: str, expandable: str, segment: dict, pages: list[int]) -> None:
        action = f"segment_{expandable if self.expandable else native}"
        run: list[int] = []
        for page in [*pages, None]:
            if run and page != run[-1] + 1:
                address = segment["base"] + run[0] * segment["page"]
                size = len(run) * segment["page"]
                self.log.append((action, address, size, segment["pool"][1]))
                run = []
            run.append(page)

    def _segment(self, pool: tuple, *, page: int, length: int) -> dict:
        self.num_segments += 1
        segment = {
            "pool": pool, "base": self.num_segments << 48, "pages": set(), "page": page,
            "length": length,
        }  # fmt: skip
        self.segments.append(segment)
        return segment
