"""One rank of several, traced alone: a process group that sends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from snugpt.errors import BadQuestionError
from snugpt.estimate.sharding import heaviest_rank
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape

NOT_TRACED = "sharding = 'full' is not traced: FSDP2 gathers weights on real devices only"


@contextmanager
def pretended_ranks(shape: ModelShape, recipe: TrainingRecipe, rank: int | None) -> Iterator[None]:
    """While it is entered this process is `rank`, else the one that keeps most, of the recipe's.

    Raises:
        BadQuestionError: weights are sharded as well.

    PyTorch's own process group for tests: every collective returns at once, on any device.
    """
    if recipe.world_size == 1:
        yield
        return
    if recipe.sharding == "full":
        raise BadQuestionError(NOT_TRACED, hint="snugpt trace --depth 12")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend too

    rank = heaviest_rank(shape, recipe) if rank is None else rank
    dist.init_process_group("fake", rank=rank, world_size=recipe.world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
