"""The lever `checkpoint = selective`: what a sublayer keeps for its backward pass, and what not.

Every tensor that a function saves goes through `Keeping.pack`, which puts it into a `Place` of the
graph. A call's results are kept unless one of its steps is to be made again: then their places
stay empty, and the call runs once more, without gradients, when backward reads the first of them.

    with keeping(steps) as keep:
        h = keep.unless({"pointwise"}, norm, x)     # h is kept, unless `pointwise` is a step
        q, k, v = keep.unless({"qkv"}, heads, h)    # these too; h is made again first, if it must

The graph and all gradients stay as they are. A place goes with the function that reads it, so what
was made again is freed where it would have been freed if it had been kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from snugpt.spec.recipe import SelectiveStep


class Place:
    """Where a function finds a tensor it saved: the tensor, or the call that makes it again.

    Or what the hooks around the sublayer made of it, which know how to bring it back (`offload`).
    """

    __slots__ = ("__weakref__", "call", "elsewhere", "tensor")

    def __init__(self, tensor: Tensor | None, call: Call | None = None) -> None:
        self.tensor, self.call = tensor, call
        self.elsewhere: tuple[Callable[[Any], Tensor], Any] | None = None

    def read(self) -> Tensor:
        """The tensor, made again or brought back if it is not there."""
        if self.elsewhere is not None:
            bring, packed = self.elsewhere
            return bring(packed)
        if self.tensor is None:
            self.call.run()
        return self.tensor

    def hand_over(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        """Leave a kept tensor to other hooks."""
        packed, self.tensor = pack(self.tensor), None
        self.elsewhere = unpack, packed


class Call:
    """A call that will run again, and the empty places that wait for each of its results.

    It holds the places of its inputs, and the places hold it; it knows them only weakly, so a graph
    that is dropped leaves no circle behind.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Any]) -> None:
        self.function, self.inputs = function, inputs
        self.waiting: list[list[weakref.ref[Place]]] = []

    def run(self) -> None:
        """Make the results again, and hand each to the places that still wait for it.

        Backward runs without gradients, and so does this: nothing is kept of it.
        """
        inputs = [each.read() if isinstance(each, Place) else each for each in self.inputs]
        results = as_tuple(self.function(*inputs))
        for result, places in zip(results, self.waiting, strict=True):
            for place in (reference() for reference in places):
                if place is not None:
                    place.tensor, place.call = result, None
        self.inputs = ()


class KeepingAll:
    """Nothing is made again: every call is simply called."""

    def __enter__(self) -> KeepingAll:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def unless(self, steps: set[SelectiveStep], function: Callable[..., Any], *inputs: Any) -> Any:
        """What the function returns."""
        return function(*inputs)


class Keeping(KeepingAll):
    """Around the calls of one sublayer: sees each tensor that is saved inside."""

    def __init__(self, made_again: Sequence[SelectiveStep]) -> None:
        self.made_again = frozenset(made_again)
        self.places: dict[StorageWeakRef, list[Place]] = {}  # of what is kept
        self.waiting: dict[StorageWeakRef, tuple[Call, list[weakref.ref[Place]]]] = {}

    def __enter__(self) -> Keeping:
        self.around = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self.hooks = saved_tensors_hooks(self.pack, Place.read)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
        if self.around is not None and error[0] is None:
            for place in (place for places in self.places.values() for place in places):
                place.hand_over(*self.around)
        del (
            self.hooks,
            self.around,
            self.places,
            self.waiting,
        )  # the hooks hold this object: no circle is left

    def pack(self, tensor: Tensor) -> Place:
        """Give a saved tensor its place. The reference is weak: only the place keeps a tensor."""
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage in self.waiting:
            call, places = self.waiting[storage]
            place = Place(None, call)
            places.append(weakref.ref(place))
        else:
            place = Place(tensor.detach())  # the line where a tensor is kept
            self.places.setdefault(storage, []).append(place)
        return place

    def unless(self, steps: set[SelectiveStep], function: Callable[..., Any], *inputs: Any) -> Any:
        """Call the function; keep what it returns, unless one of `steps` is to be made again.

        Its tensors are found by their storage, so it has to return them as they will be saved: of
        the same shape. Inputs that are not kept either are made again when they are needed.
        """
        results = function(*inputs)
        if self.made_again & steps:
            places = [self.pack(each) if isinstance(each, Tensor) else each for each in inputs]
            call = Call(function, places)
            for result in as_tuple(results):
                self.forget(result, call)
        return results

    def forget(self, result: Tensor, call: Call) -> None:
        """Empty the places of a tensor; `call` will fill them."""
        storage = StorageWeakRef(result.untyped_storage())
        places = self.places.pop(storage, [])
        for place in places:
            place.tensor, place.call = None, call
        call.waiting.append([weakref.ref(place) for place in places])
        self.waiting[storage] = call, call.waiting[-1]


def keeping(made_again: Sequence[SelectiveStep]) -> KeepingAll:
    """Around one sublayer: its calls' results are kept, but for those that are made again."""
    return Keeping(made_again) if made_again and torch.is_grad_enabled() else KeepingAll()


def as_tuple(results: Any) -> tuple[Any, ...]:
    """A lone result as a tuple of one."""
    return results if isinstance(results, tuple) else (results,)
