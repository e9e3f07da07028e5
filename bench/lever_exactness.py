"""What each lever does to the loss: curves beside the plain fp32 run, on the built-in corpus.

    python bench/lever_exactness.py --output bench/results/lever_exactness.txt    about 15 minutes
    python bench/lever_exactness.py --styles nanochat --steps 60

Every lever is trained with three seeds from the weights and over the rows of the plain run with the
same seed. The first line is the measure for exact levers: half the batch twice, which is the same
mathematics summed in another order. An exact lever is the plain run to the bit, or differs by no
more than MARGIN times what that line does. A lever that is not exact does no harm that can be seen
here if its final validation loss is nearer to the plain run's than the seeds are to each other.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import lever_ranks
from lever_cases import BYTES_OF_TEXT, Case, Training, cases, corpus, divided, plain_recipe
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import STYLES, ModelShape, Style, shape_for

SEEDS = (0, 1, 2)
LAYERS, WIDTH, HEADS, SEQ_LEN, BATCH, STEPS = 2, 64, 2, 64, 8, 200
MARGIN = 10.0  # chaos: after many steps the same rounding grows by a factor that varies
SAME = 1e-5  # of a nat: what a sum in another order may always differ by, in fp32


@dataclass(frozen=True)
class Curve:
    """One run: the loss of each step, and the validation loss at the end."""

    losses: tuple[float, ...]
    final: float


@dataclass(frozen=True)
class Result:
    """A lever over all seeds: how far it was from its plain run, in nats."""

    case: Case
    largest: float
    final: float
    identical: bool

    def verdict(self, reordered: float, spread: float) -> str:
        """What the figures say of the lever's promise."""
        if self.case.recipe.grad_accum_steps > 1:
            return "the measure"
        if self.case.exact:
            if self.identical:
                return "identical to the bit"
            within = self.largest <= max(SAME, MARGIN * reordered)
            return "within the order of sums" if within else "NOT EXACT"
        return "below the seeds' spread" if self.final < spread else "ABOVE the seeds' spread"


@dataclass(frozen=True)
class Comparison:
    """All levers of one style beside the plain run, and how far its seeds are apart."""

    style: Style
    spread: float
    reordered: float
    results: tuple[Result, ...]
    refused: tuple[Case, ...]

    @property
    def broken(self) -> list[str]:
        """Levers that do not keep what they promise."""
        return [
            r.case.name for r in self.results
            if r.verdict(self.reordered, self.spread) == "NOT EXACT"
        ]  # fmt: skip


def compare(
    style: Style, steps: int = STEPS, tokens: np.ndarray | None = None,
    layers: int = LAYERS, width: int = WIDTH, seq_len: int = SEQ_LEN, batch: int = BATCH,
    processes: bool = True,
) -> Comparison:  # fmt: skip
    """Train every lever of a small model of a style beside its plain run.

    Without `processes` those of several processes are left out: each starts Python twice.
    """
    shape = shape_for(
        style, layers, width=width, heads=HEADS, context_len=seq_len, vocab_size=BYTES_OF_TEXT
    )
    text = corpus() if tokens is None else tokens
    plain = plain_recipe(seq_len, batch, steps)
    runs: dict[TrainingRecipe, list[Curve]] = {}

    def run(recipe: TrainingRecipe) -> list[Curve]:
        if recipe not in runs:
            runs[recipe] = curves_of(shape, recipe, text)
        return runs[recipe]

    every = [*cases(shape, plain), *(divided(plain) if processes else ())]
    results = [beside(c, run(c.recipe), run(c.beside)) for c in every if c.refused is None]
    finals = [each.final for each in run(plain)]
    return Comparison(
        style=style, spread=max(finals) - min(finals), reordered=results[0].largest,
        results=tuple(results), refused=tuple(c for c in every if c.refused is not None),
    )  # fmt: skip


def curves_of(shape: ModelShape, recipe: TrainingRecipe, tokens: np.ndarray) -> list[Curve]:
    """Train a recipe from every seed."""
    if recipe.world_size > 1:
        found = lever_ranks.curves(shape, recipe, tokens, SEEDS)
        return [Curve(each.losses, each.final) for each in found]
    return [curve(shape, recipe, tokens, seed) for seed in SEEDS]


def curve(shape: ModelShape, recipe: TrainingRecipe, tokens: np.ndarray, seed: int) -> Curve:
    """Train from a seed to the end of a recipe."""
    training = Training(shape, recipe, tokens, seed)
    losses = [training.take() for _ in range(recipe.num_steps)]
    return Curve(tuple(float(loss) for loss in losses), training.validated())


def beside(case: Case, found: list[Curve], plain: list[Curve]) -> Result:
    """The furthest that a lever was from its plain run, over steps and seeds."""
    pairs = list(zip(found, plain, strict=True))
    steps = [abs(a - b) for f, p in pairs for a, b in zip(f.losses, p.losses, strict=True)]
    finals = [abs(f.final - p.final) for f, p in pairs]
    worst = max(steps) if all(map(math.isfinite, steps)) else math.inf
    return Result(case, worst, statistics.mean(finals), all(f == p for f, p in pairs))


def lines(found: Comparison) -> Iterator[str]:
    """The table of one style."""
    yield (
        f"{found.style}: the seeds end {found.spread:.1e} nats apart; a sum in another order:"
        f" {found.reordered:.1e}"
    )
    yield f"  {'lever':<38}{'largest':>10}{'at the end':>12}   verdict"
    for result in found.results:
        verdict = result.verdict(found.reordered, found.spread)
        yield f"  {result.case.name:<38}{result.largest:>10.1e}{result.final:>12.1e}   {verdict}"
    for case in found.refused:
        yield f"  {case.name:<38}{'-':>10}{'-':>12}   not here: {case.refused}"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    began_s = time.monotonic()
    said = [
        f"python bench/lever_exactness.py --styles {' '.join(asked.styles)}, on the CPU in fp32"
        " where nothing else is said",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {LAYERS} layers x {WIDTH},"
        f" {BATCH} x {SEQ_LEN} bytes of the built-in corpus a step, {asked.steps} steps,"
        f" seeds {SEEDS[0]} to {SEEDS[-1]}",
        "nats: the furthest apart of any step and seed, and the mean over seeds at the end on"
        " validation text",
        "",
    ]
    broken = []
    print("\n".join(said))
    for style in asked.styles:
        found = compare(style, asked.steps)
        said += lines(found)
        print("\n".join(lines(found)), flush=True)
        broken += found.broken
    print(f"{time.monotonic() - began_s:.0f} s", file=sys.stderr)
    if asked.output:
        asked.output.write_text("\n".join(said).rstrip() + "\n", encoding="utf-8")
    if broken:
        sys.exit(f"not exact: {', '.join(broken)}")


if __name__ == "__main__":
    main()
