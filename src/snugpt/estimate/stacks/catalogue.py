"""Stacks: the programs that can run a recipe, each at a dated version.

A stack is what a plan has to know about such a program: which levers and options it has, what its
step keeps in memory, and how its number of parameters and its arithmetic are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from snugpt.errors import BadQuestionError, unknown_name
from snugpt.estimate.flops import executed_flops_per_token
from snugpt.estimate.fully_sharded import FullyShardedStep
from snugpt.estimate.parameters import parameter_groups
from snugpt.estimate.stacks.nanochat import parameters as nanochat
from snugpt.estimate.stacks.nanochat.eager import EagerStep
from snugpt.estimate.stacks.nanochat.step import NanochatStep
from snugpt.estimate.stacks.nanochat.versions import VERSIONS, Version
from snugpt.estimate.timeline import Timeline
from snugpt.estimate.training import TrainingStep
from snugpt.spec.recipe import Recipe, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape, ParameterGroup

Levers = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Stack:
    """One program at one version.

    Attributes:
        name: as a plan has it: `snugpt`, or `nanochat@` and a month.
        levers: the values each lever of a recipe can have, the default first.
        options: its own names for fields of a Question that go on its command line; a field of
            training that is neither here, nor a lever, nor the planner's own, it lacks.
        most_gpus: how many cards it runs on at once.
        expandable_segments: whether it has PyTorch grow segments in place.
        version: nanochat's version; None for snugpt.
    """

    name: str
    levers: Levers
    options: Mapping[str, str]
    most_gpus: int
    expandable_segments: bool
    timeline: Callable[[ModelShape, TrainingRecipe, Runtime], Timeline]
    parameter_groups: Callable[[ModelShape], dict[ParameterGroup, int]]
    step_flops_per_token: Callable[[ModelShape, TrainingRecipe], int]
    version: Version | None = None


def _snugpt_timeline(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime) -> Timeline:
    step = FullyShardedStep if recipe.sharding == "full" else TrainingStep
    return step(shape, recipe, runtime).timeline()


def _nanochat_timeline(
    version: Version, shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime
) -> Timeline:
    if recipe.fp8 == "on" and recipe.compile == "off":
        raise BadQuestionError(
            f"--fp8 is not an option of {version.name}: without its compiler it is not derived",
            hint=f"snugpt plan --stack {version.name} --gpu h100 --depth 12 --fp8",
        )
    step = NanochatStep if recipe.compile == "on" else EagerStep
    return step(version, shape, recipe, runtime).timeline()


def _nanochat_flops(version: Version, shape: ModelShape, recipe: TrainingRecipe) -> int:
    return nanochat.flops_per_token(version, shape)


SNUGPT = Stack(
    name="snugpt",
    levers=MappingProxyType(
        {
            "loss": ("chunked", "plain"),
            "checkpoint": ("none", "selective", "blocks"),
            "optimizer": ("muon", "adamw"),
            "state_dtype": ("fp32", "bf16", "int8"),
            "weight_dtype": ("master", "bf16"),
            "fp8": ("off", "on"),
            "compile": ("off", "on"),
            "sharding": ("none", "optimizer", "full"),
            "offload": ("none", "optimizer", "activations"),
            "compute_dtype": ("bf16", "fp16", "fp32"),
            "launcher": ("python", "torchrun"),
        }
    ),
    options=MappingProxyType({}),
    most_gpus=8,
    expandable_segments=False,
    timeline=_snugpt_timeline,
    parameter_groups=parameter_groups,
    step_flops_per_token=executed_flops_per_token,
)


def _nanochat(version: Version) -> Stack:
    return Stack(
        name=version.name,
        levers=MappingProxyType(
            {
                "loss": ("plain",),
                "checkpoint": ("none",),
                "optimizer": ("muon",),
                "state_dtype": ("fp32",),
                "weight_dtype": ("master",),
                "offload": ("none",),
                "fp8": ("off", "on") if version.fp8 else ("off",),
                "compile": ("on", "off") if version.smear_channels else ("on",),
                "sharding": ("none", "optimizer"),
                "compute_dtype": ("bf16",),
                "launcher": ("python", "torchrun"),
            }
        ),
        options=version.options,
        most_gpus=8,
        expandable_segments=True,
        timeline=partial(_nanochat_timeline, version),
        parameter_groups=partial(nanochat.parameter_groups, version),
        step_flops_per_token=partial(_nanochat_flops, version),
        version=version,
    )


STACKS: Mapping[str, Stack] = MappingProxyType(
    {"snugpt": SNUGPT, **{version.name: _nanochat(version) for version in VERSIONS}}
)
NEWEST = {"nanochat": VERSIONS[-1].name}


def find_stack(name: str) -> Stack:
    """Return the stack of that name; `nanochat` is its newest version.

    Raises:
        BadQuestionError: there is none; the nearest name is in the message.
    """
    asked = name.strip().lower()
    found = STACKS.get(NEWEST.get(asked, asked))
    if found is None:
        known = (*NEWEST, *STACKS)
        raise unknown_name(
            "stack", name[:40], known, hint="snugpt plan --stack nanochat --gpu h100 --depth 20"
        )
    return found


def stack_of(recipe: Recipe) -> Stack:
    """Return the stack that runs a recipe; generation is snugpt's."""
    return find_stack(recipe.stack) if isinstance(recipe, TrainingRecipe) else SNUGPT
