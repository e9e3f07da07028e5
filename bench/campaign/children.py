"""Both ends of a child process: the parent starts it and reads how it ended, it runs a job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import snugpt
from campaign.jobs import Environment, Generation, Job, Peer, Scratch, Training, decode, encode

SCRIPT = Path(__file__).parents[1] / "gpu_memory.py"
# A child imports the snugpt that the parent did, wherever that came from.
OUR_PATH = os.pathsep.join(
    filter(None, (str(Path(snugpt.__file__).parents[1]), os.environ.get("PYTHONPATH")))
)
LAST_WORDS = 400  # characters of stderr that a failure keeps


class Ended(NamedTuple):
    """How a child ended; `timed_out` says that the parent stopped it."""

    result: dict[str, Any]  # outcome, reason, measured, environment
    wall_s: float
    timed_out: bool


Command = Callable[[Job, Path], Sequence[str]]


def this_script(job: Job, result: Path) -> list[str]:
    """The command line of a child that runs `job` and writes its result to a file."""
    return [sys.executable, str(SCRIPT), "--child", encode(job), "--result", str(result)]


def run_child(job: Job, timeout_s: float, command: Command = this_script) -> Ended:
    """Run a job in a process of its own, with everything it starts; never raises for its faults."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "stderr").open("w+b") as words:
        path = Path(folder) / "result.json"
        child = subprocess.Popen(
            list(command(job, path)), stdout=subprocess.DEVNULL, stderr=words,
            start_new_session=True, env={**os.environ, "PYTHONPATH": OUR_PATH},
        )  # fmt: skip
        timed_out = False
        try:
            child.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            stop(child)
        wall_s = time.monotonic() - began
        if timed_out:
            return Ended(failed(f"stopped after {timeout_s:.0f} s"), wall_s, True)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            words.seek(0)
            said = words.read().decode("utf-8", "replace").strip()[-LAST_WORDS:]
            result = failed(f"{ending(child.returncode)}: {said}".rstrip(": "))
    return Ended(result, wall_s, False)


def stop(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that still runs, and what it started in its session (compiler workers)."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code} without a result"


def failed(reason: str) -> dict[str, Any]:
    """The result of a child that has none."""
    return {"outcome": "failed", "reason": reason, "measured": None, "environment": None}


def be_child(text: str, result: Path) -> int:
    """Run one job and write how it ended; out of memory is a result like another."""
    job = decode(text)
    if isinstance(job, Peer):  # as its base_train asks for, before torch is imported
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from campaign import runs, scratch  # now: a process that is full can import no more

    jobs: dict[type, Callable[[Any], dict[str, Any]]] = {
        Environment: runs.machine,
        Training: runs.training,
        Generation: runs.generation,
        Scratch: scratch.scratch,
        Peer: runs.peer,
    }
    # Asking for the card's name starts CUDA, which the job wants to see happen.
    here = environment(job.device) if job.device == "cpu" else None
    try:
        found: dict[str, Any] = {"outcome": "fit", "reason": None, "measured": jobs[type(job)](job)}
    except Exception as error:
        found = runs.ended_by(error)
    found["environment"] = here or environment(job.device)
    part = result.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(result)
    return 0


def environment(device: str) -> dict[str, Any]:
    """Versions, card, allocator setting: what stands beside every record."""
    import msgspec
    import torch

    from snugpt.run.environment import gpu_id_of, this_environment

    here = torch.device(device)
    found: dict[str, Any] = msgspec.to_builtins(this_environment(here))
    return found | {"gpu_id": gpu_id_of(here)}
