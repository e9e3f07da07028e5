"""Measure what training and generation really take on a GPU, beside what was predicted.

    PYTHONPATH=src python bench/gpu_memory.py --set eager --out records/gpu/eager.jsonl

The command for a bare machine with a card and no network. It needs Python >= 3.11, PyTorch >= 2.10
and one wheel that can be carried as a file, msgspec (`pip download msgspec` elsewhere, for the
Python of that machine; then `pip install --no-index msgspec-*.whl`). With the wheel of nvidia-ml-py
the driver is asked to the byte, without it through nvidia-smi or not at all; the record says which.

Sets: `eager` (30 configurations, the most informative first, meant for nine minutes), `compiled`
(the same, compiled, where the trainer can), `levers` (each lever the trainer has, by itself and in
sets: bytes and milliseconds beside those of the plain step) and `nanochat` (its own code from
`--checkout PATH`; `--stack nanochat@2026-03` says which version that is). Each configuration runs
in a fresh process, and its record is one line, on disk before the next begins. Called again, it
does what is missing and tries once more what failed; `--minutes` ends it in time. `--snapshots
FOLDER` keeps the allocator's history of a few. `--only NAME,NAME` picks, `--list` names them,
`--dry-run` prints what is predicted and runs nothing, `--device cpu` rehearses all of it at toy
size on the processor.

A record: set, name, kind, held_out, asked, predicted (and by phase), outcome (fit, oom, failed with
its reason), measured, environment, and `measurement` as in the ledger. Every third configuration is
held out of any fit by its position. This process never touches CUDA.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from campaign import configurations as known
from campaign import dry_run
from campaign.boundary import bisect
from campaign.children import Command, Ended, be_child, run_child, this_script
from campaign.configurations import Configuration
from campaign.jobs import Environment, Generation, Job, Peer, Scratch, Training
from campaign.lever_set import lever_set
from campaign.measurements import measurement_of
from campaign.predictions import as_json, gpu_of, phases_of, predict, predicted_boundary
from campaign.records import Record, append, newest, read, table
from snugpt.planner.machine import default_num_threads
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.gpu import Gpu
from snugpt.spec.measurement import utc_now
from snugpt.spec.memory import MemoryEstimate
from snugpt.spec.recipe import Recipe
from snugpt.spec.runtime import runtime_for
from snugpt.spec.shape import ModelShape

CHILD_LIMIT_S = 200.0  # a hung child costs no more than this
FIRST_GUESS_S = 20.0  # how long a child is thought to take before one has


class TimeIsUpError(Exception):
    """The minutes are over; what was running is left for the next call."""


class Campaign:
    """One call: a device, a file, a deadline."""

    def __init__(self, asked: argparse.Namespace, command: Command = this_script) -> None:
        self.asked, self.command = asked, command
        self.toy = asked.device == "cpu"
        self.deadline = time.monotonic() + 60 * asked.minutes
        self.walls_s: list[float] = []
        self.gpu: Gpu | None = None
        self.num_threads = default_num_threads()
        self.environment: Record = {}

    def run(self, configurations: tuple[Configuration, ...]) -> int:
        """Measure what is missing in the file; return how many are left."""
        done = newest(read(self.asked.out))
        left = [c for c in configurations if c.name not in done]
        left += [c for c in configurations if done.get(c.name, {}).get("outcome") == "failed"]
        try:
            if left:
                self.look_around()
            while left:
                self.keep(self.record(left[0]))
                left.pop(0)
        except TimeIsUpError:
            print(f"time is up, {len(left)} left: call again to go on", file=sys.stderr)
        except KeyboardInterrupt:
            print(f"interrupted, {len(left)} left: call again to go on", file=sys.stderr)
        return len(left)

    def look_around(self) -> None:
        """Learn what the machine is from a child; predictions need the card."""
        ended = self.child(Environment(device=self.asked.device))
        found, self.environment = ended.result, ended.result.get("environment") or {}
        self.keep({"name": "environment", "kind": "environment", **found})
        if found["outcome"] != "fit":
            raise SystemExit(f"error: the device can't be used: {found['reason']}")
        self.gpu = gpu_of(self.asked.device, found["measured"])
        self.num_threads = found["measured"].get("num_threads", self.num_threads)

    def child(self, job: Job) -> Ended:
        """Run a job if there is time for it.

        Raises:
            TimeIsUpError: there is not, or it was stopped by the deadline and not by its own limit.
        """
        left_s = self.deadline - time.monotonic()
        needed_s = statistics.median(self.walls_s) if self.walls_s else FIRST_GUESS_S
        if left_s < needed_s:
            raise TimeIsUpError
        limit_s = min(CHILD_LIMIT_S, left_s)
        ended = run_child(job, limit_s, self.command)
        if ended.timed_out and limit_s < CHILD_LIMIT_S:
            raise TimeIsUpError
        self.walls_s.append(ended.wall_s)
        return ended

    def keep(self, record: Record) -> None:
        """Write one record down and say so."""
        record = {"schema": 1, "time": utc_now(), "set": self.asked.set, **record}
        append(self.asked.out, record)
        reason = f": {record['reason']}" if record.get("reason") else ""
        print(f"{record['name']}: {record['outcome']}{reason}", file=sys.stderr)

    def record(self, configuration: Configuration) -> Record:
        """Everything about one configuration, measured now."""
        asked, named = configuration.asked, {
            "name": configuration.name, "kind": configuration.kind, "asked": configuration.asked,
            "held_out": configuration.held_out, "toy": self.toy,
        }  # fmt: skip
        if configuration.kind == "boundary":
            return named | self.boundary(asked)
        if configuration.kind == "scratch":
            job: Job = Scratch(device=self.asked.device, group=asked["group"], toy=self.toy)
            return named | {"predicted": None} | flat(self.child(job))
        if configuration.kind == "peer":
            return named | self.peer_record(asked)
        shape, recipe = self.question(configuration)
        estimate = self.predicted(shape, recipe)
        ended = self.child(self.job(configuration, shape, recipe))
        found = named | {"predicted": as_json(estimate), "phases": self.phases(shape, recipe)}
        found |= flat(ended)
        measurement = measurement_of(found, shape, recipe, estimate, self.environment)
        return found | {"measurement": measurement}

    def question(
        self, configuration: Configuration, batch: int | None = None
    ) -> tuple[ModelShape, Recipe]:
        """Shape and recipe of a configuration, at its own batch or another."""
        asked, toy = configuration.asked, self.toy
        shape = known.shape_of(asked, toy=toy)
        if configuration.kind == "generation":
            return shape, known.generation_recipe(asked, toy=toy)
        own = min(2, asked["batch"]) if toy else asked["batch"]
        return shape, known.training_recipe(asked, batch=batch or own, toy=toy)

    def predicted(self, shape: ModelShape, recipe: Recipe) -> MemoryEstimate:
        """The estimate for the card that is here."""
        assert self.gpu is not None
        return predict(shape, recipe, self.gpu, self.num_threads)

    def phases(self, shape: ModelShape, recipe: Recipe) -> dict[str, int]:
        """Predicted allocated bytes by phase."""
        assert self.gpu is not None
        return phases_of(shape, recipe, self.gpu, self.num_threads)

    def job(self, configuration: Configuration, shape: ModelShape, recipe: Recipe) -> Job:
        """What the child is told."""
        assert self.gpu is not None
        device = self.asked.device
        if configuration.kind == "generation":
            runtime = runtime_for(self.gpu, recipe.weight_dtype, 0.0, self.num_threads)
            return Generation(device=device, shape=shape, recipe=recipe, runtime=runtime)
        runtime = runtime_for(self.gpu, recipe.compute_dtype, shape.dropout, self.num_threads)
        folder = self.asked.snapshots if configuration.snapshot else None
        snapshot = str(Path(folder) / f"{configuration.name}.pickle.gz") if folder else None
        cap_bytes = configuration.asked.get("cap_bytes")
        return Training(device=device, shape=shape, recipe=recipe, runtime=runtime,
                        cap_bytes=cap_bytes, snapshot=snapshot)  # fmt: skip

    def peer(self, asked: dict[str, Any]) -> Peer:
        """What the child is told about a checkout; a toy keeps the levers."""
        small = {"depth": 2, "device_batch_size": 2, "seq_len": 64, "vocab_size": 512}
        return Peer(device=self.asked.device, **(asked | (small if self.toy else {})))

    def peer_record(self, asked: dict[str, Any]) -> Record:
        """nanochat's own code; compiled on a card it is what the stack of its version predicts."""
        ended = flat(self.child(self.peer(asked)))
        if self.toy or not asked["compiled"]:
            return {"predicted": None, **ended}
        shape, recipe = known.peer_question(asked)
        estimate = self.predicted(shape, recipe)
        found = {"predicted": as_json(estimate), **ended}
        measurement = measurement_of(found, shape, recipe, estimate, self.environment)
        return found | {"measurement": measurement}

    def boundary(self, asked: dict[str, Any]) -> Record:
        """The largest batch within the cap, by trials around the one that is predicted."""
        cap = self.asked.toy_cap if self.toy else asked["cap_bytes"]
        plain = Configuration(name="trial", kind="training", asked=asked | {"cap_bytes": cap})

        def estimate(batch: int) -> MemoryEstimate:
            return self.predicted(*self.question(plain, batch))

        said = predicted_boundary(cap, estimate)
        trials: list[Record] = []

        def attempt(batch: int) -> str | None:
            ended = self.child(self.job(plain, *self.question(plain, batch)))
            outcome = ended.result["outcome"]
            trials.append({"batch": batch, "outcome": outcome, "reason": ended.result["reason"],
                           "measured": ended.result["measured"]})  # fmt: skip
            return outcome if outcome in ("fit", "oom") else None

        found = bisect(attempt, said["batch"]["expected"])
        capped_by = (
            "counting afterwards" if self.toy else "torch.cuda.set_per_process_memory_fraction"
        )
        reason = None if found.complete else trials[-1]["reason"] or "too many trials"
        shape, recipe = self.question(plain, 1)
        boundary = {
            "cap_bytes": cap, "shape": to_builtins(shape), "recipe": to_builtins(recipe),
            "gpu_id": self.environment.get("gpu_id"), "gpu_name": self.environment.get("device"),
            "trials": [{"batch": t["batch"], "outcome": t["outcome"]} for t in trials],
        }  # fmt: skip
        return {
            "boundary": boundary, "predicted": said,
            "outcome": "fit" if found.complete else "failed", "reason": reason,
            "measured": {**found._asdict(), "capped_by": capped_by, "trials": trials},
            "environment": self.environment,
        }  # fmt: skip

    def dry_run(self, configurations: tuple[Configuration, ...]) -> None:
        """Print what is predicted for the card that is named, or for this processor."""
        self.gpu = gpu_of("cpu", {}) if self.toy else find_gpu(self.asked.gpu)

        def predicted(c: Configuration) -> MemoryEstimate | None:
            if c.kind in ("training", "generation"):
                return self.predicted(*self.question(c))
            if c.kind == "peer" and c.asked["compiled"] and not self.toy:
                return self.predicted(*known.peer_question(c.asked))
            return None

        device = "this processor" if self.toy else self.gpu.name
        for line in dry_run.table(configurations, predicted, device=device, toy=self.toy):
            print(line)


def flat(ended: Ended) -> Record:
    """A child's result and how long it took, as fields of a record."""
    return {**ended.result, "wall_s": round(ended.wall_s, 2)}


def chosen(asked: argparse.Namespace) -> tuple[Configuration, ...]:
    """The configurations of the set, held-out ones marked, then only those that were named."""
    if asked.set == "nanochat":
        found = known.peer_set(asked.checkout or "CHECKOUT", asked.stack)
    elif asked.set == "levers":
        found = lever_set()
    else:
        found = known.EAGER if asked.set == "eager" else known.compiled_set()
    found = known.with_held_out(found)
    if not asked.only:
        return found
    names = asked.only.split(",")
    unknown = set(names) - {c.name for c in found}
    if unknown:
        raise SystemExit(f"error: no configuration {', '.join(sorted(unknown))}; try --list")
    return tuple(c for c in found if c.name in names)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--set", choices=("eager", "compiled", "levers", "nanochat"), default="eager",
        help="which configurations: as they are, compiled, lever by lever, or nanochat's own code",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="file of records, read first and added to")
    parser.add_argument(
        "--minutes", type=float, default=9.0,
        help="how long this call may take; the next one goes on (default 9)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cuda measures; cpu rehearses it all at toy size on this processor",
    )  # fmt: skip
    parser.add_argument("--snapshots", help="folder for the allocator's history of a few")
    parser.add_argument("--checkout", help="path of a checkout of nanochat")
    parser.add_argument("--stack", default="nanochat", help="version of the checkout")
    parser.add_argument("--only", help="names, with commas between")
    parser.add_argument("--list", action="store_true", help="names of the set")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what is predicted, run nothing"
    )
    parser.add_argument("--gpu", default="h200", help="card of a dry run on cuda (default h200)")
    parser.add_argument("--toy-cap", type=int, default=8 * 2**20, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, command: Command = this_script) -> int:
    """Run the campaign, or one child of it."""
    asked = arguments(argv)
    if asked.child:
        return be_child(asked.child, asked.result)
    configurations = chosen(asked)
    if not configurations:
        print("nothing to do: recipes can't be compiled in this version", file=sys.stderr)
        return 0
    if asked.list:
        print("\n".join(f"{c.name}{'  held out' * c.held_out}" for c in configurations))
        return 0
    campaign = Campaign(asked, command)
    if asked.dry_run:
        campaign.dry_run(configurations)
        return 0
    if asked.out is None or (asked.set == "nanochat" and not asked.checkout):
        raise SystemExit("error: --out FILE is needed, and --checkout PATH for nanochat")
    left = campaign.run(configurations)
    records = newest(read(asked.out))
    print("\n".join(table(records[c.name] for c in configurations if c.name in records)))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
