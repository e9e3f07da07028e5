"""The walk: a list of operations becomes the events of its forward and backward passes.

It follows PyTorch's rules, which are simple when every operation is one autograd function:

- a tensor is freed after its last reader, unless an operation keeps it;
- backward runs the list in reverse; an operation's incoming gradient is freed when its call
  returns, then what it alone still kept;
- what is made again instead of being kept is made where backward first reads it, and is then freed
  as if it had been kept;
- a second gradient for the same tensor is added in place if nobody else holds the first one and it
  is no view, else into a new tensor (input_buffer.cpp, `can_accumulate_inplace`);
- a parameter's first gradient is taken over as it is; later ones are added and freed
  (accumulate_grad.h); where a parameter is used twice, the first waits for the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from snugpt.estimate.operations import Buffer, Call, Operation, Weight
from snugpt.estimate.timeline import Event


@dataclass(slots=True, eq=False)
class Held:
    """A gradient, how many places hold it, and whether it is a view of another tensor."""

    buffer: Buffer
    holders: int = 1
    view: bool = False


@dataclass(slots=True)
class Walk:
    """The walk of one micro-step. `first` is the one that finds no gradients yet.

    `uses` counts how often a weight occurs, by name, where that is more than once. With `update` a
    complete gradient goes to the optimizer, which takes what that says, and then away.
    """

    first: bool = True
    uses: dict[str, int] = field(default_factory=dict)
    update: Callable[[Weight], list[Event]] | None = None
    _waiting: dict[str, tuple[Buffer, int]] = field(default_factory=dict)

    def backward(
        self,
        operations: Sequence[Operation],
        entry: Buffer | None,
        incoming: Buffer,
        *,
        made_again: Sequence[Call] = (),
        beside: Sequence[Buffer] = (),
        hold_entry: bool = False,
        entry_stays: bool = False,
        incoming_stays: bool = False,
    ) -> tuple[list[Event], Buffer | None]:
        """Events of the reversed list; returns also the gradient of `entry` that is left alive.

        `incoming` is the gradient of the last result. What lies `beside` goes with what the first
        operation kept, and so does the entry with `hold_entry`; with `entry_stays` somebody else
        keeps the entry, as with `incoming_stays` the incoming gradient.
        """
        events: list[Event] = []
        keepers = _count_keepers(operations)
        missing = {buffer: call for call in made_again for buffer in call.results}
        slots = {operations[-1].result: Held(incoming, holders=1 + incoming_stays)}
        if entry is not None:
            keepers[entry] = keepers.get(entry, 0) + hold_entry + entry_stays
        for operation in reversed(operations):
            events += _made_again(operation.keeps, missing, keepers)
            arrived = slots.pop(operation.result, None)
            own = {b for b in operation.keeps if keepers[b] == 1 and b in operation.backward}
            shared = set(operation.keeps) - own
            events += sequence([b for b in operation.backward if b not in shared], own)
            handed_on = [
                (target, arrived if grad is None else Held(grad, view=operation.gives_views))
                for target, grad in operation.gradients
            ]
            if arrived is not None:
                arrived.holders += sum(grad is None for _, grad in operation.gradients)
                _let_go(arrived, events)
            for buffer in operation.keeps:
                keepers[buffer] -= 1
                gone = buffer in own or keepers[buffer] or _is_gradient(operation, buffer)
                if not gone:
                    events.append(Event(-1, buffer))
            if operation is operations[0]:
                going = (*beside, entry) if hold_entry and entry is not None else beside
                events += [Event(-1, buffer) for buffer in going]
            for target, held in handed_on:
                assert held is not None
                _add(slots, target, held, events)
            for weight, buffer in operation.weight_gradients:
                self._give(weight, buffer, events)
        left = None if entry is None else slots.pop(entry, None)
        return events, None if left is None else left.buffer

    def _give(self, weight: Weight, buffer: Buffer, events: list[Event]) -> None:
        """Hand a gradient to its parameter, once all its uses have contributed."""
        first, given = self._waiting.pop(weight.name, (buffer, 0))
        if given:
            events.append(Event(-1, buffer))  # added into the one that waited
        if given + 1 < self.uses.get(weight.name, 1):
            self._waiting[weight.name] = first, given + 1
        elif self.update is not None:
            events += [*self.update(weight), Event(-1, first)]
        elif not self.first:
            events.append(Event(-1, first))  # added into the gradient that is there


def forward(
    operations: Sequence[Operation],
    entry: Buffer | None,
    *,
    keep: bool,
    made_again: Sequence[Call] = (),
    hold_entry: bool = False,
    stop: int | None = None,
) -> list[Event]:
    """Events of the list run forward; with `keep` what backward needs and can't have made again
    stays alive.

    With `stop` it ends before that operation; what the rest would read is still alive then.
    """
    kept: set[Buffer] = {b for op in operations for b in op.keeps} if keep else set()
    kept -= {buffer for call in made_again for buffer in call.results}
    if hold_entry and entry is not None:
        kept.add(entry)
    return _run(operations, kept, stop)


def _run(
    operations: Sequence[Operation], kept: set[Buffer], stop: int | None = None
) -> list[Event]:
    """Events of a list of which only what is `kept` and the last result are left."""
    events: list[Event] = []
    last_reader = {buffer: i for i, op in enumerate(operations) for buffer in op.reads}
    for i, operation in enumerate(operations[:stop]):
        events += sequence(operation.forward)
        for buffer in _left_over(operation.forward):
            if buffer is not operation.result and buffer not in kept:
                events.append(Event(-1, buffer))
        for buffer in dict.fromkeys(operation.reads):
            if last_reader[buffer] == i and buffer not in kept:
                events.append(Event(-1, buffer))
    return events


def recompute(operations: Sequence[Operation], entry: Buffer) -> list[Event]:
    """Events of running a checkpointed list again, up to the last operation that keeps something.

    PyTorch stops there (`early_stop` of torch.utils.checkpoint); what was made and is not kept
    goes.
    """
    last = max(i for i, op in enumerate(operations) if op.keeps)
    events = forward(operations, entry, keep=True, hold_entry=True, stop=last + 1)
    kept = {b for op in operations for b in op.keeps} | {entry}
    alive: dict[Buffer, int] = {}
    for sign, buffer in events:
        alive[buffer] = alive.get(buffer, 0) + sign
    events += [Event(-1, b) for b, n in alive.items() if n and b not in kept]
    return events


def _made_again(
    read: Sequence[Buffer], missing: dict[Buffer, Call], keepers: dict[Buffer, int]
) -> list[Event]:
    """Events of the calls that make what is about to be read and is `missing`; they leave that.

    A call that needs another's results comes after it. What only a later call reads goes with it.
    """
    if missing.keys().isdisjoint(read):
        return []
    calls: list[Call] = []

    def need(buffer: Buffer) -> None:
        call = missing.get(buffer)
        if call is None:
            return
        for result in call.results:
            missing.pop(result)
        for operation in call.operations:
            for each in operation.reads:
                need(each)
        calls.append(call)

    for buffer in read:
        need(buffer)
    operations = [operation for call in calls for operation in call.operations]
    made = {operation.result for operation in operations}
    there = {b for operation in operations for b in operation.reads if b not in made}
    awaited = {b for call in calls for b in call.results if keepers.get(b)}
    return _run(operations, there | awaited)


def sequence(buffers: Sequence[Buffer], given: Iterable[Buffer] = ()) -> list[Event]:
    """A buffer is allocated where it is first named and freed where it is named again.

    One that is `given` is alive already, and freed where it is first named.
    """
    events: list[Event] = []
    alive = set(given)
    for buffer in buffers:
        if buffer in alive:
            alive.remove(buffer)
            events.append(Event(-1, buffer))
        else:
            alive.add(buffer)
            events.append(Event(1, buffer))
    return events


def _left_over(buffers: Sequence[Buffer]) -> list[Buffer]:
    """What a sequence leaves alive: the buffers named once."""
    return [b for b in buffers if buffers.count(b) == 1]


def _count_keepers(operations: Sequence[Operation]) -> dict[Buffer, int]:
    keepers: dict[Buffer, int] = {}
    for operation in operations:
        for buffer in operation.keeps:
            keepers[buffer] = keepers.get(buffer, 0) + 1
    return keepers


def _is_gradient(operation: Operation, buffer: Buffer) -> bool:
    """Whether a kept buffer is handed out as a gradient instead of being freed."""
    return any(buffer is grad for _, grad in operation.gradients) or any(
        buffer is grad for _, grad in operation.weight_gradients
    )


def _let_go(held: Held, events: list[Event]) -> None:
    held.holders -= 1
    if not held.holders:
        events.append(Event(-1, held.buffer))


def _add(slots: dict[Buffer, Held], target: Buffer, held: Held, events: list[Event]) -> None:
    """Bring a gradient to a tensor that may have one already."""
    present = slots.get(target)
    if present is None:
        slots[target] = held
    elif present.holders == 1 and not present.view:
        _let_go(held, events)
    else:
        total = Held(Buffer("activation gradients", "activations", target.fixed_bytes,
                            target.sequence_bytes, target.formula))  # fmt: skip
        events.append(Event(1, total.buffer))
        _let_go(present, events)
        _let_go(held, events)
        slots[target] = total
