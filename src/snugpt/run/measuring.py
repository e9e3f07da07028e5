"""One way from counted peaks to a Measurement, for our trainer and for anyone's loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from snugpt.run.environment import gpu_id_of, this_environment
from snugpt.run.memory_watch import Peaks
from snugpt.spec.measurement import Measurement, Outcome, new_id, utc_now
from snugpt.spec.memory import Phase


def measurement_of(
    device: torch.device,
    peaks: Peaks,
    phases: Mapping[Phase, int] | None,
    *,
    program: str,
    outcome: Outcome,
    argv: Sequence[str],
    **run: Any,
) -> Measurement:
    """Return what was counted on `device`, named and dated now, with the machine it ran on.

    `run` are the fields of a Measurement that only the run knows: shape, recipe, predicted,
    tokens_per_s, steps, final_loss, bits_per_byte.
    """
    time, environment = utc_now(), this_environment(device)
    return Measurement(
        id=new_id(time),
        time=time,
        program=program,
        outcome=outcome,
        gpu_id=gpu_id_of(device),
        gpu_name=environment.device,
        allocated_bytes=peaks.allocated_bytes,
        reserved_bytes=peaks.reserved_bytes,
        process_bytes=peaks.process_bytes,
        counters=peaks.counters,
        phases=None if phases is None else dict(phases),
        alloc_retries=peaks.alloc_retries,
        num_ooms=peaks.num_ooms,
        environment=environment,
        argv=tuple(argv),
        **run,
    )
