"""nanochat without its compiler against its own code, traced on the meta device.

The figures are what `bench/nanochat_checkouts.py` observed of commits 1b1cc3c and 92d63d4: bytes
above what lay there before the phase. Both have the same model.
"""

from __future__ import annotations

import msgspec
import pytest
from nanochat_recipes import FEBRUARY, HOPPER, JULY, MARCH, recipe_for, shape_at

from snugpt.errors import BadQuestionError
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.estimate.stacks.nanochat.eager import EagerStep
from snugpt.spec.recipe import TrainingRecipe

# layers, batch, context, vocabulary: forward with loss, backward, optimizer in March, in July
TRACED = {
    (2, 4, 512, 32768): (838_030_336, 1_106_466_304, 33_554_432, 102_236_672),
    (4, 8, 256, 32768): (915_045_888, 1_183_481_856, 67_108_864, 213_910_016),
    (6, 2, 1024, 512): (226_846_720, 234_703_360, 95_700_480, 155_901_440),
    (12, 2, 2048, 32768): (3_339_257_344, 3_876_128_768, 765_003_264, 1_246_452_224),
}


def eager(name: str, batch: int, seq_len: int, accumulation: int = 1) -> TrainingRecipe:
    recipe = recipe_for(name, batch=batch, seq_len=seq_len, accumulation=accumulation)
    return msgspec.structs.replace(recipe, compile="off")


def peaks(name: str, layers: int, batch: int, seq_len: int, vocab: int) -> tuple[int, int, int]:
    shape = shape_at(name, layers, seq_len=seq_len, vocab_size=vocab)
    version = find_stack(name).version
    assert version is not None
    step = EagerStep(version, shape, eager(name, batch, seq_len), HOPPER)
    timeline = step.timeline()
    _, phases = timeline.read(batch)
    resident = sum(timeline.bytes_of(b, batch) for b in timeline.resident)
    gradients = sum(timeline.bytes_of(b, batch) for b in step.optimizer.all_gradients())
    forward = max(phases["forward"], phases["loss"]) - resident
    return forward, phases["backward"] - resident, phases["optimizer"] - resident - gradients


@pytest.mark.parametrize("sizes", TRACED)
def test_eager_peaks_are_those_of_its_own_code(sizes: tuple[int, int, int, int]) -> None:
    forward, backward, march, july = TRACED[sizes]
    for name, optimizer in ((MARCH, march), (JULY, july)):
        found = peaks(name, *sizes)
        assert found == pytest.approx((forward, backward, optimizer), rel=5e-5)
        assert found[0] == forward


def test_eager_gradients_are_added_as_they_come() -> None:
    """A compiled backward hands out all gradients together, an eager one each at once."""
    shape = shape_at(JULY, 6, seq_len=256)
    once, twice = (
        find_stack(JULY).timeline(shape, eager(JULY, 8, 256, n), HOPPER).read(8)[0].bytes
        for n in (1, 2)
    )
    gradients = sum(
        n * (2 if "embedding" in group else 4)
        for group, n in find_stack(JULY).parameter_groups(shape).items()
    )
    assert twice - once == pytest.approx(gradients, rel=1e-4)


def test_an_eager_step_ends_with_what_it_began_with() -> None:
    for layers in (1, 2, 3, 8):
        timeline = find_stack(JULY).timeline(
            shape_at(JULY, layers, seq_len=256), eager(JULY, 2, 256, 2), HOPPER
        )
        balance: dict[object, int] = {}
        for _, _, (sign, buffer) in timeline.events():
            balance[buffer] = balance.get(buffer, 0) + sign
        assert set(balance.values()) == {0}


def test_what_is_not_derived_without_the_compiler_is_refused() -> None:
    assert find_stack(FEBRUARY).levers["compile"] == ("on",)  # its autocast keeps copies of its own
    recipe = msgspec.structs.replace(eager(MARCH, 2, 256), fp8="on")
    with pytest.raises(BadQuestionError, match="without its compiler"):
        find_stack(MARCH).timeline(shape_at(MARCH, 4, seq_len=256), recipe, HOPPER)
