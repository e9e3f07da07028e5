"""What levers cost in time beside what is counted: factors fitted to records, by kind of device.

The counted cost of a lever is its arithmetic and its kernels (`estimate/speed.py`). A factor says
what a step with the lever took in `bench/lever_costs.py`, over what was counted for it. There is
none until three records of that kind of device have the lever: then the counted cost stands.
Levers that are pulled together multiply; that is assumed.
"""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path

import msgspec

from snugpt.estimate.stacks.catalogue import stack_of
from snugpt.spec import calibration
from snugpt.spec.calibration import Calibration, Factor
from snugpt.spec.recipe import TrainingRecipe

FILE = Path(calibration.__file__).with_name("lever_times.json")
TIMED = ("loss", "checkpoint", "compile", "offload", "state_dtype", "weight_dtype", "fp8")


def names_of(recipe: TrainingRecipe) -> list[str]:
    """The levers of a recipe that are not as they are by default, as the records name them."""
    defaults = {lever: stack_of(recipe).levers[lever][0] for lever in TIMED}
    found = [
        f"{lever} {getattr(recipe, lever)}"
        for lever, default in defaults.items()
        if getattr(recipe, lever) != default
    ]
    steps = "+".join(recipe.selective_steps)
    return [f"{name} {steps}" if name == "checkpoint selective" else name for name in found]


def time_factor(recipe: TrainingRecipe, backend: str) -> float:
    """What the counted time of a step is multiplied by; 1.0 without records of our own program."""
    known = fitted().get(backend)
    if known is None or stack_of(recipe).version is not None:
        return 1.0
    factors = known.factors
    return prod(factors[name].value for name in names_of(recipe) if name in factors)


@cache
def fitted() -> dict[str, Calibration]:
    """The factors by backend, as `bench/lever_costs.py --write` left them."""
    text = FILE.read_bytes()
    factors = msgspec.json.decode(text, type=dict[str, dict[str, Factor]])
    return {backend: Calibration(factors=found) for backend, found in factors.items()}
