"""The machine around the GPU: how much memory a process can have, and where results are kept.

Nothing here imports torch, so that `snugpt plan` can ask too. All sizes in bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from snugpt.errors import FailedError

ROOT = Path("/")
_RESET_PEAK_RESIDENT = "5"  # Documentation/filesystems/proc.rst, clear_refs


def cpu_capacity_bytes(root: Path = ROOT) -> int:
    """Return how many bytes this process can hold: available RAM or the cgroup's rest, the smaller.

    What the process holds already counts as available to it. `root` is where /proc and /sys lie.
    Where there is no /proc (macOS) it is the installed RAM.

    Raises:
        FailedError: the system does not say how much memory it has.
    """
    available = _fields(root / "proc/meminfo").get("MemAvailable")
    if available is None:
        return _installed_bytes()
    held = _fields(root / "proc/self/status").get("RssAnon", 0)
    return min([available, *_cgroup_rests(root)]) + held


def resident_bytes() -> int | None:
    """Return the resident size of this process, None where there is no /proc."""
    return _fields(ROOT / "proc/self/status").get("VmRSS")


def peak_resident_bytes() -> int | None:
    """Return the largest resident size since the start or since `reset_peak_resident`.

    None on a system that counts neither VmHWM nor ru_maxrss (Windows).
    """
    peak = _fields(ROOT / "proc/self/status").get("VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # KiB but for macOS


def reset_peak_resident() -> bool:
    """Start the peak resident size anew from here; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK_RESIDENT, encoding="ascii")
    except OSError:
        return False
    return True


def default_ledger_folder() -> Path:
    """Return where measurements go unless told: $XDG_DATA_HOME/snugpt or ~/.local/share/snugpt."""
    data_home = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():  # the XDG rules: a relative path is to be ignored
        data_home = Path.home() / ".local" / "share"
    return data_home / "snugpt"


def default_cache_folder() -> Path:
    """Return where what can be made again goes: $XDG_CACHE_HOME/snugpt or ~/.cache/snugpt."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache_home.is_absolute():
        cache_home = Path.home() / ".cache"
    return cache_home / "snugpt"


def _fields(path: Path) -> dict[str, int]:
    """Read `Name:  123 kB` lines as bytes; nothing where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    fields = [(line.partition(":")[0], line.split()) for line in lines]
    return {
        name: int(words[1]) * 1024
        for name, words in fields
        if len(words) == 3 and words[2] == "kB" and words[1].isdigit()
    }


def _installed_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:
        raise FailedError(
            "this system does not say how much memory it has", hint="snugpt plan --gpu rtx-4090"
        ) from error


def _cgroup_rests(root: Path) -> Iterator[int]:
    """Yield limit minus use of every cgroup this process is in; a parent's limit holds too."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # Version 2 has one tree and an empty controller list, version 1 a tree per controller.
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        path = PurePosixPath(inside)
        for part in (path, *path.parents):
            rest = _cgroup_rest(mount / str(part).lstrip("/"), version=1 if controllers else 2)
            if rest is not None:
                yield rest


def _cgroup_rest(folder: Path, version: int) -> int | None:
    limit_file, use_file, cache_field = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    try:
        limit = int((folder / limit_file).read_text(encoding="ascii"))
        use = int((folder / use_file).read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    # Files read once are in the count, but the kernel drops them when memory is asked for.
    values = dict(zip(statistics[::2], statistics[1::2], strict=False))
    return max(0, limit - use + int(values.get(cache_field, "0")))
