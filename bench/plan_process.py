"""CPU time of `snugpt plan` as a whole process, beside one that only imports its libraries.

    python bench/plan_process.py [ROUNDS]

The commands take turns, so that a machine that speeds up or slows down does so for all. Held to:
150 ms of CPU time, and 3 x the empty import.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

SNUGPT = str(Path(sys.executable).with_name("snugpt"))
COMMANDS = {
    "import click, msgspec": [sys.executable, "-c", "import click, msgspec"],
    "snugpt --help": [SNUGPT, "--help"],
    "snugpt plan d12, rtx-4090": [SNUGPT, "plan", "--gpu", "rtx-4090", "--depth", "12"],
    "snugpt plan d24, rtx-4090": [SNUGPT, "plan", "--gpu", "rtx-4090", "--depth", "24"],
    "snugpt plan d4, this machine": [SNUGPT, "plan", "--depth", "4"],
    "snugpt gpus": [SNUGPT, "gpus"],
}


def cpu_ms(command: list[str]) -> float:
    """User and system time of one run in milliseconds, its output thrown away."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    actions = [(os.POSIX_SPAWN_DUP2, nothing, 1), (os.POSIX_SPAWN_DUP2, nothing, 2)]
    child = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    os.close(nothing)
    if os.waitstatus_to_exitcode(status) not in (0, 3):
        raise SystemExit(f"failed: {' '.join(command)}")
    return (usage.ru_utime + usage.ru_stime) * 1e3


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):  # the first round warms the disk cache
        for name, command in COMMANDS.items():
            times[name].append(cpu_ms(command))
    base = statistics.median(times["import click, msgspec"][1:])
    print(f"{'CPU time of the whole process':32}  min ms  median  max ms  x import")
    for name, found in times.items():
        counted = sorted(found[1:])
        middle = statistics.median(counted)
        print(
            f"{name:32}  {counted[0]:6.0f}  {middle:6.0f}  {counted[-1]:6.0f}  {middle / base:8.2f}"
        )


if __name__ == "__main__":
    main()
