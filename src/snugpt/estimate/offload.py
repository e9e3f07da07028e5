"""The lever `offload` in the walk: what leaves the device, when, and when it is back.

The torch-free twin of `model/offload.py`, which says the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from snugpt.estimate.operations import Buffer
from snugpt.estimate.parameters import all_weights
from snugpt.estimate.stacks.snugpt import Part
from snugpt.estimate.state_on_host import moves_state
from snugpt.estimate.timeline import Event
from snugpt.spec.memory import Phase
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

SMALLEST_PART = 16  # what is smaller than this part of the layer's input stays on the device


@dataclass(frozen=True, slots=True)
class MovedLayers:
    """What moves of each layer but the last, whose backward follows at once; () for one that stays.

    A tensor's bytes are compared with the input's per sequence, so that the batch decides nothing.
    """

    layers: tuple[tuple[Buffer, ...], ...] = ()

    def before(self, phase: Phase, layer: int) -> tuple[Event, ...]:
        """A layer's backward begins with the tensors of the layer before it coming back."""
        if phase != "backward":
            return ()
        return tuple(Event(1, buffer) for buffer in self._of(layer - 1))

    def after(self, phase: Phase, layer: int) -> tuple[Event, ...]:
        """At the end of a layer's forward those of the layer before it have been copied and go."""
        if phase != "forward":
            return ()
        return tuple(Event(-1, buffer) for buffer in self._of(layer - 1))

    @property
    def on_host(self) -> tuple[Buffer, ...]:
        """All that lies in host memory at the end of a forward pass, in the order it came."""
        return tuple(buffer for layer in self.layers for buffer in layer)

    def _of(self, layer: int) -> tuple[Buffer, ...]:
        return self.layers[layer] if 0 <= layer < len(self.layers) else ()


def why_not_offload(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime) -> str | None:
    """What stands against moving anything to the host, or None."""
    if runtime.device == "cpu":
        return "on a CPU the host's memory is the device's own"
    if recipe.sharding != "none":
        return f"with sharding = {recipe.sharding!r} it was not derived"
    if recipe.offload == "optimizer":
        moves = any(moves_state(weight.elements) for weight in all_weights(shape))
        return None if moves else "the model is so small that no state is worth a copy"
    if recipe.compile == "on":
        return "what a compiled layer keeps is out of its reach"
    if shape.num_layers == 1:
        return "what the last layer keeps stays on the device, and there is no other"
    return None


def moved_of(part: Part, *, recomputes: bool, entry_stays: bool) -> tuple[Buffer, ...]:
    """What moves of one layer: its kept tensors but the small ones; where it runs again, its input.

    With `entry_stays` something outside the layer keeps the input anyway.
    """
    entry = part.entry
    assert entry is not None
    again = {buffer for call in part.made_again for buffer in call.results}
    kept = [b for op in part.operations for b in op.keeps if b not in again]
    return tuple(
        buffer
        for buffer in dict.fromkeys([entry] if recomputes else kept)
        if buffer.sequence_bytes * SMALLEST_PART >= entry.sequence_bytes
        and not (entry_stays and buffer is entry)
    )
