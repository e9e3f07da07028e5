"""The same model trained by snugpt, for a program whose memory is not planned: nanoGPT's.

Its levers (chunked loss, checkpointing) often hold what the other program could not.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from snugpt.errors import SnugError
from snugpt.planner.answer import answer
from snugpt.planner.command import command_line
from snugpt.planner.doctor.mends import Mend
from snugpt.planner.doctor.patient import card_of
from snugpt.planner.doctor.program import ProgramRun
from snugpt.planner.doctor.report import OutOfMemory
from snugpt.planner.levers import in_words
from snugpt.planner.machine import Machine
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe


def in_snugpt(run: ProgramRun, event: OutOfMemory, gpu: str | None) -> Iterator[Mend]:
    """Yield the plan of the same model here, if the card is known and it fits.

    Raises:
        BadQuestionError: there is no card of that name.
    """
    card = find_gpu(gpu) if gpu is not None else card_of(run, event)
    if run.name != "nanogpt" or card is None:
        return
    fields = run.fields
    try:
        question = msgspec.convert(
            {
                "gpu": card.id,
                "style": "gpt2",
                **{name: fields[name] for name in ("layers", "heads", "width", "seq_len")},
                "batch_size": int(fields["device_batch_size"]) * int(fields["grad_accum_steps"]),
                "optimizer": "adamw",
            },
            Question,
        )
        machine = Machine(gpu=card, capacity_bytes=card.usable_bytes)
        made = answer(question, machine=machine, num_alternatives=0)
    except (SnugError, msgspec.ValidationError):
        return
    if not made.fits or not isinstance(made.recipe, TrainingRecipe):
        return
    levers = ", ".join(
        [f"device_batch_size {made.recipe.device_batch_size}", *in_words(made.recipe)]
    )
    yield Mend(
        change=f"the same model in snugpt, {levers}",
        kind="program",
        command=command_line(question),
        process_bytes=made.memory.process_bytes.high,
        fits=True,
    )
