"""What each lever costs in time: step over plain step, pair by pair in one process.

    python bench/lever_costs.py --out records/lever-costs.jsonl --write     30 to 60 minutes
    python bench/lever_costs.py --widths 128 --pairs 2 --only blocks        a look

Run it on a machine that does nothing else. Plain steps and steps with the lever take turns, so that
a machine that changes speed does so for both: a pair is one step over the mean of the plain steps
before and after it. `noise` is the same for a second plain model: a lever within it costs nothing
that can be seen here.

nanochat style, fp32 on the CPU and bf16 on a card. The model is wide enough that matrix products
take most of the step, as they do in a real one: the counted share is printed. Below that, kernels
that are started and small sums decide, and a ratio says nothing about a larger model.

A record (`ledger/lever_costs.py`) is one lever at one width; three widths make a factor. `--write`
puts the factors of all records into src/snugpt/spec/lever_times.json, where the estimate of speed
reads them. Records of the CPU say nothing about a GPU: there what is counted stands until a card
was measured (`--device cuda`).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from lever_cases import BYTES_OF_TEXT, EMULATED, Case, Training, cases, plain_recipe, replaced
from snugpt.estimate import lever_times
from snugpt.estimate.flops import executed_flops_per_token
from snugpt.estimate.speed import step_time_s, training_rate
from snugpt.ledger.lever_costs import LeverCost, factors, read
from snugpt.planner.machine import machine_for
from snugpt.run.environment import gpu_id_of, this_environment
from snugpt.spec.gpu import Gpu
from snugpt.spec.measurement import new_id, utc_now
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape, shape_for

LAYERS, SEQ_LEN, BATCH = 4, 256, 8
WIDTHS, HEAD = (256, 384, 512), 64
PAIRS, WARM_UP = 9, 2
Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """Quartiles of paired ratios."""

    low: float
    middle: float
    high: float


def paired(plain: Callable[[], object], other: Callable[[], object], pairs: int,
           clock: Clock = time.perf_counter) -> Ratio:  # fmt: skip
    """Take turns: plain, other, plain ... plain; each other one over the plain ones beside it."""
    for _ in range(WARM_UP):
        plain()
        other()
    gc.collect()
    times = [_seconds(plain, clock)]
    for _ in range(pairs):
        times += [_seconds(other, clock), _seconds(plain, clock)]
    ratios = [2 * times[i] / (times[i - 1] + times[i + 1]) for i in range(1, len(times), 2)]
    low, middle, high = (float(np.quantile(ratios, share)) for share in (0.25, 0.5, 0.75))
    return Ratio(low, middle, high)


def _seconds(work: Callable[[], object], clock: Clock) -> float:
    began_s = clock()
    work()
    return clock() - began_s


class Bench:
    """One width on one device."""

    def __init__(self, width: int, device: str, pairs: int) -> None:
        self.device, self.pairs = torch.device(device), pairs
        self.shape: ModelShape = shape_for(
            "nanochat", LAYERS, width=width, heads=width // HEAD, context_len=SEQ_LEN,
            vocab_size=8 * BYTES_OF_TEXT,
        )  # fmt: skip
        dtype = "fp32" if device == "cpu" else "bf16"
        recipe = plain_recipe(SEQ_LEN, BATCH, 10_000, chunk=SEQ_LEN)
        # What the estimate calls plain has its loss in chunks.
        self.plain = replaced(recipe, compute_dtype=dtype, loss="chunked")
        self.gpu: Gpu = machine_for("cpu" if device == "cpu" else gpu_id_of(self.device)).gpu
        draw = np.random.default_rng(0)
        self.tokens = draw.integers(self.shape.vocab_size, size=SEQ_LEN * 4000, dtype=np.uint16)
        self.sizes = {
            "style": "nanochat", "layers": LAYERS, "width": width, "seq_len": SEQ_LEN,
            "batch": BATCH, "vocab_size": self.shape.vocab_size, "dtype": dtype,
        }  # fmt: skip

    def step(self, recipe: TrainingRecipe) -> Callable[[], object]:
        """A training of its own whose steps can be taken one by one."""
        training = Training(self.shape, recipe, self.tokens, device=self.device, gpu=self.gpu)
        if self.device.type == "cpu":
            return training.take

        def take() -> None:
            training.take()
            torch.cuda.synchronize()

        return take

    def against_plain(self, recipe: TrainingRecipe, beside: TrainingRecipe) -> Ratio:
        return paired(self.step(beside), self.step(recipe), self.pairs)

    def counted(self, recipe: TrainingRecipe, beside: TrainingRecipe) -> float:
        """The ratio that the estimate counts, without what was fitted before."""
        rate = training_rate(self.gpu, beside).flops_per_s.expected
        times = [
            step_time_s(self.shape, each, self.gpu, rate)
            / lever_times.time_factor(each, self.gpu.backend)
            for each in (recipe, beside)
        ]
        return times[0] / times[1]

    @property
    def matrix_share(self) -> float:
        """The counted share of matrix products in a plain step."""
        rate = training_rate(self.gpu, self.plain).flops_per_s.expected
        tokens = self.plain.total_batch_tokens
        products_s = executed_flops_per_token(self.shape, self.plain) * tokens / rate
        return products_s / step_time_s(self.shape, self.plain, self.gpu, rate)

    def cases(self) -> list[Case]:
        """Every lever that can be pulled on this device, but those the CPU only emulates."""
        every = cases(self.shape, self.plain, self.gpu)
        slow = EMULATED if self.device.type == "cpu" else set()
        return [c for c in every if c.refused is None and not slow & c.changes.keys()]

    def record(self, case: Case, found: Ratio, noise: Ratio) -> LeverCost:
        now = utc_now()
        return LeverCost(
            id=new_id(now), time=now, backend=self.gpu.backend, lever=name_of(case),
            sizes=self.sizes, pairs=self.pairs, low=found.low, ratio=found.middle, high=found.high,
            noise_low=noise.low, noise_high=noise.high,
            counted=self.counted(case.recipe, case.beside),
            environment=this_environment(self.device),
        )  # fmt: skip


def name_of(case: Case) -> str:
    """The lever as the estimate names it; what it has no name for keeps the case's."""
    names = lever_times.names_of(case.recipe)
    return names[0] if len(names) == 1 else case.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="a part of the levers' names")
    parser.add_argument("--out", type=Path, help="file of records, added to")
    parser.add_argument("--write", action="store_true", help="make the factors of all records")
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.pairs} pairs;"
          " ratios of step times, quartiles")  # fmt: skip
    for width in asked.widths:
        one_width(Bench(width, asked.device, asked.pairs), asked.only or "", asked.out)
    if asked.write:
        made = factors(read(asked.out))
        lever_times.FILE.write_text(json.dumps(msgspec.to_builtins(made), indent=1) + "\n")
        print(f"{sum(map(len, made.values()))} factors in {lever_times.FILE.name}")


def one_width(bench: Bench, only: str, out: Path | None) -> None:
    """Measure every lever at one width; print it, and keep it if there is a file."""
    noise = bench.against_plain(bench.plain, bench.plain)
    print(f"\nwidth {bench.sizes['width']}: matrix products {bench.matrix_share:.0%} of a counted"
          f" step; two plain steps {shown(noise)}")  # fmt: skip
    print(f"{'lever':<38}{'measured':>24}{'counted':>9}")
    for case in bench.cases():
        if only not in case.name:
            continue
        record = bench.record(case, bench.against_plain(case.recipe, case.beside), noise)
        ratio = Ratio(record.low, record.ratio, record.high)
        print(f"{record.lever:<38}{shown(ratio):>24}{record.counted:>9.2f}", flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("ab") as file:
                file.write(msgspec.json.encode(record) + b"\n")


def shown(ratio: Ratio) -> str:
    return f"{ratio.middle:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


if __name__ == "__main__":
    main()
