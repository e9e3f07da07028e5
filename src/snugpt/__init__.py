"""snugpt plans, trains and runs the GPT that fits your GPU.

    import snugpt

    plan = snugpt.plan(gpu="rtx-4090", depth=12)      # no torch needed
    snugpt.trace(model, batch, gpu="rtx-4090")        # anyone's model, no GPU
    print(snugpt.memory_report())                     # one line in anyone's loop
    with snugpt.Watch() as watch:                     # around anyone's training loop
        ...
    watch.measurement                                 # kept in the ledger for `snugpt records`

The verbs are imported when they are first asked for, so that `import snugpt` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from snugpt.errors import BadQuestionError, DoesNotFitError, FailedError, SnugError

if TYPE_CHECKING:
    from snugpt.planner.answer import plan
    from snugpt.run.memory_watch import memory_report
    from snugpt.run.watch import Watch
    from snugpt.tracing.any_model import trace

__all__ = [
    "BadQuestionError",
    "DoesNotFitError",
    "FailedError",
    "SnugError",
    "Watch",
    "memory_report",
    "plan",
    "trace",
]

_VERBS = {
    "plan": "snugpt.planner.answer",
    "memory_report": "snugpt.run.memory_watch",
    "Watch": "snugpt.run.watch",
    "trace": "snugpt.tracing.any_model",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'snugpt' has no attribute {name!r}")
    try:
        return getattr(import_module(_VERBS[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "numpy", "tokenizers", "safetensors"):
            raise
        raise FailedError(
            f"snugpt.{name} needs {error.name}", hint="pip install 'snugpt[train]'"
        ) from None
