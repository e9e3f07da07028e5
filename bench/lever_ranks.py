"""Loss curves of two processes over gloo, for `lever_exactness.py`.

    torchrun --nproc-per-node 2 bench/lever_ranks.py JOB.json OUT.json

The job names shape, recipe, seeds and the file of tokens; the first rank writes what it found.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape

LIMIT_S = 1800.0


class Job(msgspec.Struct, frozen=True):
    """What every rank trains, seed by seed."""

    shape: ModelShape
    recipe: TrainingRecipe
    seeds: tuple[int, ...]
    tokens: str


class Found(msgspec.Struct, frozen=True):
    """The losses of each step, and the validation loss at the end."""

    losses: tuple[float, ...]
    final: float


def curves(
    shape: ModelShape, recipe: TrainingRecipe, tokens: np.ndarray, seeds: tuple[int, ...]
) -> list[Found]:
    """Train a recipe of several processes on this machine, each seed in turn."""
    with tempfile.TemporaryDirectory() as folder:
        job, out, text = (Path(folder) / name for name in ("job.json", "out.json", "tokens.npy"))
        np.save(text, tokens)
        job.write_bytes(msgspec.json.encode(Job(shape, recipe, seeds, str(text))))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        count = ["--nproc-per-node", str(recipe.world_size)]
        alone = {"OMP_NUM_THREADS": "1"} | os.environ
        script = [__file__, str(job), str(out)]
        subprocess.run([*launch, *count, *script], check=True, timeout=LIMIT_S, env=alone)
        return msgspec.json.decode(out.read_bytes(), type=list[Found])


def be_a_rank(job_file: str, out: str) -> None:
    """Train the job as the rank that torchrun's environment names."""
    import torch.distributed as dist

    from lever_cases import Training

    job = msgspec.json.decode(Path(job_file).read_bytes(), type=Job)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    for seed in job.seeds:
        training = Training(job.shape, job.recipe, np.load(job.tokens), seed, rank=rank)
        losses = [float(training.take()) for _ in range(job.recipe.num_steps)]
        found.append(Found(tuple(losses), training.validated()))
    if rank == 0:
        Path(out).write_bytes(msgspec.json.encode(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    be_a_rank(*sys.argv[1:])
