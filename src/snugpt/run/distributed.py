"""Several processes as one run: what torchrun's environment says, and how they begin and end.

    torchrun --nproc-per-node 2 -m snugpt.cli train plan.json

Each process is one rank with one device. The first rank prints and writes; what it alone knows it
tells the others. The first process that fails speaks for all, and all end with its exit code.

gloo carries what lies in host memory, NCCL what lies on CUDA devices (not tried on several yet).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from snugpt.errors import BadQuestionError, FailedError, SnugError
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import TrainingRecipe

Result = TypeVar("Result")
# The last resort: a process that ends breaks its connections, which the others see at once.
TIMEOUT = timedelta(minutes=30)
INTERRUPTED = 128 + signal.SIGINT


class Alone:
    """A run of one process."""

    rank, size, is_first = 0, 1, True

    def first(self, work: Callable[[], Result]) -> Result:
        """Let the first rank work and tell all the result, which must be fit to be pickled."""
        return work()

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        """Let the first rank work, then the others, who find what it has written."""
        return work()

    def highest(self, number: int) -> int:
        """The highest of the numbers that the ranks say, once all have said one."""
        return number

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """The numbers, each summed over the ranks."""
        return numbers

    def speaks(self, exit_code: int) -> bool:
        """Whether this rank is the first to fail."""
        return True


class World(Alone):
    """A run of several processes: this one's rank, and how it talks to the others."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.is_first = self.rank == 0
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
            if local_rank >= torch.cuda.device_count():
                raise BadQuestionError(
                    f"nproc-per-node = {self.size} is not allowed: there are"
                    f" {torch.cuda.device_count()} CUDA devices here",
                    hint="nvidia-smi -L",
                )
            torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        self._store = dist.distributed_c10d._get_default_store()
        self._failed_first: bool | None = None

    def first(self, work: Callable[[], Result]) -> Result:
        import torch.distributed as dist

        found = [work() if self.is_first else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[return-value]

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        if self.is_first:
            found = work()
            self.highest(0)
        else:
            self.highest(0)
            found = work()
        return found

    def highest(self, number: int) -> int:
        import torch
        import torch.distributed as dist

        said = torch.tensor(number)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return int(said)

    def sums(self, *numbers: float) -> tuple[float, ...]:
        import torch
        import torch.distributed as dist

        said = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(said)
        return tuple(said.tolist())

    def speaks(self, exit_code: int) -> bool:
        if self._failed_first is None:
            self._failed_first = self._store.add("failed", 1) == 1
            if self._failed_first:
                self._store.set("exit code", str(exit_code))
        return self._failed_first

    def exit_code(self) -> int:
        """The exit code of the rank that failed first."""
        return int(self._store.get("exit code"))


ALONE = Alone()
_entered: list[Alone] = []


@contextmanager
def joined() -> Iterator[Alone]:
    """Join the processes that torchrun started with this one; alone where it started none.

    Inside another such block it is the same run. An error leaves the block of the rank that failed
    first; all others leave with SystemExit and say nothing.
    """
    if _entered or int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield _entered[-1] if _entered else ALONE
        return
    world = _world()
    _entered.append(world)
    try:
        yield world
        world.highest(0)  # nobody leaves before the last has saved
    except BaseException as error:
        raise _spoken_once(world, error) from error
    finally:
        _entered.pop()
    import torch.distributed as dist

    dist.destroy_process_group()


def _world() -> World:
    import torch.distributed as dist

    try:
        return World()
    except (ValueError, dist.DistError) as error:
        raise FailedError(
            f"the processes did not find each other: {str(error).splitlines()[0][:200]}",
            hint="torchrun --nproc-per-node 2 -m snugpt.cli train plan.json",
        ) from error


def _spoken_once(world: World, error: BaseException) -> BaseException:
    """The error where this rank failed first, else a silent end with the first one's exit code."""
    code = error.exit_code if isinstance(error, SnugError) else 1
    code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else code
    try:
        if not world.speaks(code):
            return SystemExit(world.exit_code())
    except RuntimeError:  # the process that keeps the store is gone, and said why
        return SystemExit(1)
    if _is_broken_connection(error):
        return FailedError(
            f"another of the {world.size} processes ended without a word"
            f" ({str(error).splitlines()[0][:160]}); earlier checkpoints are kept",
            hint="free -h",
        )
    return error


def _is_broken_connection(error: BaseException) -> bool:
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def refuse_other_number(plan: Plan, recipe: TrainingRecipe) -> None:
    """Refuse to train on another number of processes than the plan is for.

    Raises:
        BadQuestionError: torchrun started another number, or none.
    """
    world = _entered[-1] if _entered else ALONE
    if recipe.world_size == world.size:
        return
    planned = plan.command if plan.command.startswith("torchrun ") else ""
    line = f"torchrun --nproc-per-node {recipe.world_size} -m snugpt.cli train plan.json"
    if recipe.world_size == 1:
        line = "snugpt train plan.json"
    raise BadQuestionError(
        f"world_size = {recipe.world_size} is not allowed: {world.size}"
        f" {'process was' if world.size == 1 else 'processes were'} started",
        hint=planned or line,
    )
