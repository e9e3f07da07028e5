"""Reads a pickle of plain values, and can do nothing else.

Unpickling runs a small program, and the full language can call anything. This is a machine for the
few instructions that dicts, lists, tuples, strings, numbers, booleans and None are written with
(protocols 2 to 5; meanings from the table in Python's pickletools). It has no instruction that
looks up a name, makes an object or calls: such a file is refused where the instruction stands.

It works in a loop, not by recursion, so nesting costs nothing. Every value takes at least one byte
of the file and the number of values is limited, so that memory is bounded by the file's size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

MAX_VALUES = 50_000_000
MAX_INT_BYTES = 16

_FLOAT, _INT32 = struct.Struct(">d"), struct.Struct("<i")


class DamagedError(ValueError):
    """The bytes are no pickle of plain values; the message says where and why."""


def load_plain(data: bytes, max_values: int = MAX_VALUES) -> object:
    """Return the value that `data` holds; raises `DamagedError`."""
    machine = _Machine(data)
    handlers, size = _HANDLERS, len(data)
    budget = max_values
    while True:
        at = machine.at
        if at >= size:
            raise DamagedError(f"it ends after {size:,} bytes, in the middle")
        code = data[at]
        machine.at = at + 1
        if code == _STOP:
            return machine.finish()
        handler = handlers.get(code)
        if handler is None:
            raise DamagedError(f"instruction 0x{code:02x} at byte {at:,} has no place in one")
        budget -= 1
        if budget < 0:
            raise DamagedError(f"it holds more than {max_values:,} values")
        try:
            handler(machine)
        except (IndexError, KeyError, struct.error):
            raise DamagedError(f"the instruction at byte {at:,} has nothing to work on") from None
        except UnicodeDecodeError:
            raise DamagedError(f"the text at byte {at:,} is not UTF-8") from None


class _Machine:
    """Values in the making, marks between them, and the values that may be named again."""

    __slots__ = ("at", "data", "marks", "memo", "stack")

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def finish(self) -> object:
        if len(self.stack) != 1 or self.marks:
            raise DamagedError(f"it stops at byte {self.at:,} with {len(self.stack)} values open")
        if self.at != len(self.data):
            raise DamagedError(f"{len(self.data) - self.at:,} bytes follow its end")
        return self.stack[0]

    def take(self, num_bytes: int) -> bytes:
        start = self.at
        self.at = end = start + num_bytes
        if end > len(self.data):
            raise DamagedError(f"it ends after {len(self.data):,} bytes, in the middle")
        return self.data[start:end]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def since_mark(self) -> list[object]:
        start = self.marks.pop()
        found = self.stack[start:]
        if len(self.stack) < start:
            raise IndexError
        del self.stack[start:]
        return found

    def last_dict(self) -> dict[str, object]:
        found = self.stack[-1]
        if type(found) is not dict:
            raise DamagedError(f"an entry at byte {self.at:,} goes into no dict")
        return found

    def last_list(self) -> list[object]:
        found = self.stack[-1]
        if type(found) is not list:
            raise DamagedError(f"an entry at byte {self.at:,} goes into no list")
        return found


def _set(machine: _Machine, target: dict[str, object], entries: list[object]) -> None:
    if len(entries) % 2:
        raise IndexError
    for key, value in zip(entries[::2], entries[1::2], strict=True):
        if type(key) is not str:
            raise DamagedError(f"a key at byte {machine.at:,} is no text")
        target[key] = value


def _protocol(machine: _Machine) -> None:
    version = machine.number(1)
    if not 2 <= version <= 5 or machine.at != 2:
        raise DamagedError(f"protocol {version} is none of 2 to 5")


def _frame(machine: _Machine) -> None:
    if machine.number(8) > len(machine.data) - machine.at:
        raise DamagedError("a frame is longer than the file")


def _mark(machine: _Machine) -> None:
    machine.marks.append(len(machine.stack))


def _setitem(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine, machine.last_dict(), [key, value])


def _setitems(machine: _Machine) -> None:
    entries = machine.since_mark()
    _set(machine, machine.last_dict(), entries)


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    machine.last_list().append(value)


def _appends(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.last_list().extend(values)


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def build(machine: _Machine) -> None:
        values = [machine.stack.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return build


def _tuple(machine: _Machine) -> None:
    machine.stack.append(tuple(machine.since_mark()))


def _value(make: Callable[[], object]) -> Callable[[_Machine], None]:
    def build(machine: _Machine) -> None:
        machine.stack.append(make())

    return build


def _unsigned(width: int) -> Callable[[_Machine], None]:
    def build(machine: _Machine) -> None:
        machine.stack.append(machine.number(width))

    return build


def _signed(machine: _Machine) -> None:
    machine.stack.append(_INT32.unpack(machine.take(4))[0])


def _long(machine: _Machine) -> None:
    width = machine.number(1)
    if width > MAX_INT_BYTES:
        raise DamagedError(f"a number at byte {machine.at:,} has {8 * width} bits")
    machine.stack.append(int.from_bytes(machine.take(width), "little", signed=True))


def _float(machine: _Machine) -> None:
    machine.stack.append(_FLOAT.unpack(machine.take(8))[0])


def _text(width: int) -> Callable[[_Machine], None]:
    def build(machine: _Machine) -> None:
        length = machine.number(width)
        machine.stack.append(machine.take(length).decode("utf-8"))

    return build


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _put(width: int) -> Callable[[_Machine], None]:
    def build(machine: _Machine) -> None:
        machine.memo[machine.number(width)] = machine.stack[-1]

    return build


def _get(width: int) -> Callable[[_Machine], None]:
    def build(machine: _Machine) -> None:
        machine.stack.append(machine.memo[machine.number(width)])

    return build


_STOP = ord(".")
_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    0x80: _protocol,
    0x95: _frame,
    ord("("): _mark,
    ord("}"): _value(dict),
    ord("]"): _value(list),
    ord(")"): _value(tuple),
    ord("N"): _value(lambda: None),
    0x88: _value(lambda: True),
    0x89: _value(lambda: False),
    ord("s"): _setitem,
    ord("u"): _setitems,
    ord("a"): _append,
    ord("e"): _appends,
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("t"): _tuple,
    ord("K"): _unsigned(1),
    ord("M"): _unsigned(2),
    ord("J"): _signed,
    0x8A: _long,
    ord("G"): _float,
    0x8C: _text(1),
    ord("X"): _text(4),
    0x8D: _text(8),
    0x94: _memoize,
    ord("q"): _put(1),
    ord("r"): _put(4),
    ord("h"): _get(1),
    ord("j"): _get(4),
}
