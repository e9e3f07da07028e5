"""The lever `offload = optimizer` in the walk: moments on the host, two buffers on the device.

The torch-free twin of `model/state_on_host.py`.
"""

from __future__ import annotations

from snugpt.estimate.host import ALIGNMENT_BYTES
from snugpt.estimate.operations import Buffer, Net, Weight
from snugpt.estimate.parameters import all_weights
from snugpt.estimate.updating import Updating, moment_bytes, optimizer_state, stretches
from snugpt.spec.shape import ModelShape
from snugpt.units import round_up

# Below, a copy takes longer to start than to carry: 16 KiB of fp32, norms and gates.
SMALLEST_MOVED_ELEMENTS = 4096
NUM_STAGES = 2  # one is updated while the other is fetched


def moves_state(elements: int) -> bool:
    """Whether the moments of a parameter of this size go to the host."""
    return elements >= SMALLEST_MOVED_ELEMENTS


def stays(weight: Weight, state: list[Buffer], updating: Updating) -> list[Buffer]:
    """What of a parameter's state lies on the device: counters, and all of small parameters."""
    moves = updating.on_host and moves_state(weight.elements)
    return [buffer for buffer in state if not moves or _is_counter(buffer)]


def on_host(net: Net, updating: Updating) -> tuple[Buffer, ...]:
    """What of all state lies on the host, the largest first, as it is laid there."""
    if not updating.on_host:
        return ()
    found = [
        buffer
        for weight in all_weights(net.shape)
        if moves_state(weight.elements)
        for buffer in optimizer_state(net, weight, updating)
        if not _is_counter(buffer)
    ]
    return tuple(sorted(found, key=lambda buffer: -buffer.fixed_bytes))


def stages(net: Net, updating: Updating) -> list[Buffer]:
    """The buffers on the device that stretches of state are fetched into."""
    size = stage_bytes(net.shape, updating) if updating.on_host else 0
    name, text = "optimizer stages", "moments of a stretch"
    return [net.fixed(name, "optimizer", size, text) for _ in range(NUM_STAGES if size else 0)]


def stage_bytes(shape: ModelShape, updating: Updating) -> int:
    """Bytes of one stage: the moments of the longest stretch of any parameter that moves."""
    longest = (
        moment_bytes(weight, updating, next(stretches(weight.elements)).stop)
        for weight in all_weights(shape)
        if moves_state(weight.elements)
    )
    return max((sum(round_up(n, ALIGNMENT_BYTES) for n in sizes) for sizes in longest), default=0)


def _is_counter(buffer: Buffer) -> bool:
    return buffer.name == "AdamW counters"
