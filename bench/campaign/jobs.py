"""What the parent hands to a child process, and where the two agree on its spelling."""

from __future__ import annotations

import msgspec

from snugpt.spec.recipe import GenerationRecipe, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape


class Environment(msgspec.Struct, frozen=True, kw_only=True, tag="environment"):
    """Describe the machine: card, versions, context, library workspaces."""

    device: str


class Training(msgspec.Struct, frozen=True, kw_only=True, tag="training"):
    """Take `steps` training steps and an evaluation batch; count from the second step on.

    `cap_bytes` bounds what PyTorch may hold. `snapshot` is where the allocator's history goes.
    """

    device: str
    shape: ModelShape
    recipe: TrainingRecipe
    runtime: Runtime
    steps: int = 3
    timed_steps: int = 3
    cap_bytes: int | None = None
    snapshot: str | None = None


class Generation(msgspec.Struct, frozen=True, kw_only=True, tag="generation"):
    """Fill a cache with a prompt, then decode token by token to its end."""

    device: str
    shape: ModelShape
    recipe: GenerationRecipe
    runtime: Runtime


class Scratch(msgspec.Struct, frozen=True, kw_only=True, tag="scratch"):
    """Run a group of operations alone and count what they take beside their results."""

    device: str
    group: str
    toy: bool = False


class Peer(msgspec.Struct, frozen=True, kw_only=True, tag="peer"):
    """Take micro-steps of nanochat's own model and optimizer, imported from a checkout."""

    device: str
    checkout: str
    depth: int
    device_batch_size: int
    seq_len: int
    vocab_size: int
    accumulation: int
    compiled: bool
    stack: str = ""  # which of our stacks models the checkout; the child does not look at it
    window_pattern: str = "SSSL"
    steps: int = 3


Job = Environment | Training | Generation | Scratch | Peer


def encode(job: Job) -> str:
    """One line of JSON for the command line of a child."""
    return msgspec.json.encode(job).decode()


def decode(text: str) -> Job:
    """Read what `encode` wrote."""
    return msgspec.json.decode(text, type=Job)
