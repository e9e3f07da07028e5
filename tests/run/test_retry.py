"""Smaller micro-batches: the same rows in other groups, and when a step can't be taken again."""

from __future__ import annotations

import msgspec
import pytest
import torch
from tiny_plan import tiny_plan, write_text

from snugpt.data.loader import TrainingLoader
from snugpt.run.retry import MOST_RETRIES, Retries, smaller, with_batch
from snugpt.spec.recipe import TrainingRecipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> TrainingRecipe:
    found = tiny_plan(write_text(tmp_path_factory.mktemp("text") / "text.txt")).recipe
    assert isinstance(found, TrainingRecipe)
    return found


def of(recipe: TrainingRecipe, batch: int, steps: int) -> TrainingRecipe:
    tokens = batch * steps * recipe.seq_len
    return msgspec.structs.replace(
        recipe, device_batch_size=batch, grad_accum_steps=steps, total_batch_tokens=tokens
    )


@pytest.mark.parametrize(
    ("batch", "steps", "next_batch", "next_steps"),
    [(8, 1, 4, 2), (2, 3, 1, 6), (3, 1, 1, 3), (5, 2, 2, 5), (6, 1, 3, 2), (9, 2, 3, 6)],
)
def test_the_micro_batch_is_halved_or_the_next_that_divides_the_rows(
    recipe, batch, steps, next_batch, next_steps
) -> None:
    found = smaller(of(recipe, batch, steps))
    assert (found.device_batch_size, found.grad_accum_steps) == (next_batch, next_steps)
    assert found.total_batch_tokens == batch * steps * recipe.seq_len


def test_the_rows_of_a_step_are_the_same_in_any_micro_batch(recipe) -> None:
    whole = of(recipe, 6, 2)
    for batch in (6, 4, 3, 2, 1):
        assert rows_of(with_batch(whole, batch), step=3) == rows_of(whole, step=3)


def rows_of(recipe: TrainingRecipe, step: int) -> list[int]:
    """The first token of every row, which names the row."""
    loader = TrainingLoader(
        tokens=torch.arange(40 * recipe.seq_len + 1).numpy(), seq_len=recipe.seq_len, seed=3,
        device_batch_size=recipe.device_batch_size, grad_accum_steps=recipe.grad_accum_steps,
    )  # fmt: skip
    batches = [loader.batch(step, i).inputs[:, 0] for i in range(recipe.grad_accum_steps)]
    return torch.cat(batches).tolist()


def test_a_step_can_be_taken_again_until_an_optimizer_has_begun(recipe) -> None:
    retries = Retries(recipe)
    retries.begin(CPU)
    for phase in ("forward", "loss", "backward", "clip"):
        retries.mark(phase)
        assert retries.possible, phase
    retries.mark("optimizer")
    assert not retries.possible
    retries.mark("forward")  # not even if a part of it is called forward
    assert not retries.possible
    retries.end()
    assert retries.whole


def test_gradients_that_go_to_the_optimizer_in_backward_can_not_be_taken_back(recipe) -> None:
    at_once = msgspec.structs.replace(
        of(recipe, 4, 1), schedule=msgspec.structs.replace(recipe.schedule, clip_norm=0.0)
    )
    assert at_once.steps_in_backward
    retries = Retries(at_once)
    retries.begin(CPU)
    retries.mark("loss")
    assert retries.possible
    retries.mark("backward")
    assert not retries.possible
    assert not retries.whole


def test_it_is_done_twice_at_most_and_never_below_one_sequence(recipe) -> None:
    retries = Retries(of(recipe, 16, 1))
    for batch in (8, 4):
        retries.begin(CPU)
        assert retries.possible
        assert retries.make_smaller(CPU).device_batch_size == batch
    retries.begin(CPU)
    assert not retries.possible
    single = Retries(of(recipe, 1, 16))
    single.begin(CPU)
    assert not single.possible


def test_the_random_state_is_that_of_the_step_s_start(recipe) -> None:
    retries = Retries(recipe)
    torch.manual_seed(7)
    retries.begin(CPU)
    drawn = torch.rand(3)
    retries.make_smaller(CPU)
    assert torch.equal(torch.rand(3), drawn)


def test_a_checkpoint_carries_the_recipe_in_effect_to_the_same_plan_only(recipe) -> None:
    first = Retries(of(recipe, 8, 1))
    assert first.state == {}
    first.begin(CPU)
    first.make_smaller(CPU)
    state = msgspec.json.decode(msgspec.json.encode(first.state))
    resumed = Retries(of(recipe, 8, 1))
    assert resumed.go_on_from(state)
    assert (resumed.recipe, resumed.count) == (first.recipe, 1)
    other = Retries(msgspec.structs.replace(of(recipe, 8, 1), checkpoint="blocks"))
    assert not other.go_on_from(state)
    assert (other.recipe.device_batch_size, other.count) == (8, 0)
    assert not Retries(recipe).go_on_from({})
    assert MOST_RETRIES == 2
