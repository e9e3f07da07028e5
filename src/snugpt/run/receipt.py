"""The receipt of a run: what memory it took, beside what was predicted.

On the CPU torch's allocator is recorded while the model is built and takes its first two steps (a
resumed one its first) and one evaluation batch; from then on every step is alike. On CUDA the
counters run throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import torch

from snugpt.data.durable_file import write_durably
from snugpt.errors import FailedError
from snugpt.ledger import store
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.run.measuring import measurement_of
from snugpt.run.memory_watch import (
    CudaCounters,
    Peaks,
    peak_resident_bytes,
    reset_peak_resident,
)
from snugpt.spec.measurement import Measurement, Outcome
from snugpt.spec.memory import Phase
from snugpt.spec.plan import Plan


class MemoryMeter:
    """Counts one run: `start` before the model is built, `mark` the phases, `stop`, read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.complete = False
        self._cuda = CudaCounters(device) if device.type == "cuda" else None
        self._cpu: CpuAllocations | None = None
        self._recording = ExitStack()

    def start(self) -> None:
        """Begin to count. Nothing of the run may be on the device yet."""
        if self._cuda is not None:
            self._cuda.reset()
            return
        reset_peak_resident()
        self._cpu = CpuAllocations(keep_events=False)
        self._recording.enter_context(self._cpu)

    def mark(self, phase: Phase) -> None:
        """Say that a phase begins."""
        if self._cpu is not None:
            self._cpu.mark(phase)

    def stop(self, *, complete: bool = False) -> None:
        """End the recording; `complete` if a whole step and an evaluation are in it."""
        self._recording.close()
        self.complete = self.complete or complete

    def again(self) -> None:
        """Count anew: what was counted so far is of a recipe that is no longer in effect."""
        self.stop()
        self.complete = False
        if self._cuda is not None:
            self._cuda.reset()
            return
        assert self._cpu is not None
        reset_peak_resident()
        self._cpu = CpuAllocations(self._cpu.live_bytes, keep_events=False)
        self._recording.enter_context(self._cpu)

    def now(self) -> tuple[int | None, int | None]:
        """Peak allocated and reserved bytes so far, None while the CPU's are being recorded."""
        if self._cuda is not None:
            return (
                torch.cuda.max_memory_allocated(self.device),
                torch.cuda.max_memory_reserved(self.device),
            )
        allocated = self._cpu.peak_bytes if self._cpu is not None and self.complete else None
        return allocated, allocated

    def measurement(
        self,
        plan: Plan,
        argv: Sequence[str],
        outcome: Outcome = "fit",
        *,
        retries: int = 0,
        steps: int,
        loss: float | None,
        bits_per_byte: float | None,
        tokens_per_s: float | None,
    ) -> Measurement:
        """What was counted, with the prediction it was made against."""
        peaks = self._cuda.read() if self._cuda is not None else self._cpu_peaks()
        return measurement_of(
            self.device,
            peaks,
            self._cpu.phases if self._cpu is not None else None,
            program="snugpt train",
            outcome=outcome,
            argv=argv,
            shape=plan.shape,
            recipe=plan.recipe,
            predicted=plan.memory,
            tokens_per_s=tokens_per_s,
            steps=steps,
            retries=retries,
            final_loss=loss,
            bits_per_byte=bits_per_byte,
        )

    def keep(self, measurement: Measurement, ledger_folder: Path, file: Path) -> list[str]:
        """Write a measurement into the run's folder and the ledger; return what failed.

        The run is done by now: a ledger that can't be written must not make it a failure.
        """
        failures = []
        text = msgspec.json.format(msgspec.json.encode(measurement)) + b"\n"
        for write in (
            lambda: write_durably(file, text),
            lambda: store.append(ledger_folder, measurement),
        ):
            try:
                write()
            except FailedError as error:
                failures.append(error.message)
        return failures

    def _cpu_peaks(self) -> Peaks:
        assert self._cpu is not None
        events = "torch CPU allocator events"
        return Peaks(
            allocated_bytes=self._cpu.peak_bytes,
            reserved_bytes=self._cpu.peak_bytes,
            process_bytes=peak_resident_bytes(),
            counters={"allocated": events, "reserved": events, "process": "peak resident size"},
        )
