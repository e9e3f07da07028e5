"""The few pieces of SVG that the picture is made of, and its colours in light and in dark.

Colours are classes and not variables, which not every reader of SVG knows. Along the stack their
lightness differs from neighbour to neighbour, so a grey print can be read; no two are told apart
by red and green alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from snugpt.spec.memory import Category
from snugpt.units import GIB, KIB, MIB

# Of each category: its fill on light paper, and on dark.
FILLS: dict[Category, tuple[str, str]] = {
    "weights": ("#23395d", "#3f5f9c"),
    "optimizer": ("#41729f", "#5a88bf"),
    "gradients": ("#6aae95", "#78b89d"),
    "kv_cache": ("#9d7fbd", "#b79bd6"),
    "batch": ("#5c6670", "#aeb7c0"),
    "communication": ("#7a5c3e", "#b08d68"),
    "activations": ("#f6cf68", "#f9df95"),
    "logits": ("#b5472a", "#dd6b45"),
    "workspace": ("#8c8c8c", "#8f969e"),
    "slack": ("#d5d9de", "#5b636d"),
    "unknown": ("#7b8ea3", "#9fb2c8"),
}
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
INK = {  # class: its rule on light paper, and what is different on dark
    "ink": ("fill:#1d232a", "fill:#e8ecf0"),
    "soft": ("fill:#57606a", "fill:#a3adb8"),
    "grid": ("stroke:#1d232a;stroke-opacity:.14;fill:none", "stroke:#e8ecf0;stroke-opacity:.18"),
    "edge": ("stroke:#1d232a;stroke-opacity:.45;fill:none", "stroke:#e8ecf0;stroke-opacity:.5"),
    "band": ("fill:#1d232a;fill-opacity:.06", "fill:#e8ecf0;fill-opacity:.09"),
    "doubt": ("fill:#1d232a;fill-opacity:.08", "fill:#e8ecf0;fill-opacity:.13"),
    "capacity": (
        "stroke:#a4133c;stroke-width:1.8;stroke-dasharray:7 4;fill:none", "stroke:#ff8fa3"
    ),
    "over": ("stroke:#a4133c;stroke-width:1.6", ""),
    "warn": ("fill:#a4133c", "fill:#ff8fa3"),
    "halo": ("stroke:#ffffff;stroke-width:3.5;stroke-opacity:.8;fill:none", "stroke:#0d1117"),
    "measured": ("stroke:#101418;stroke-width:1.4;fill:none", "stroke:#ffffff"),
    "peak": ("fill:#ffffff;stroke:#101418;stroke-width:1.6", ""),
}  # fmt: skip
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def stylesheet(categories: Iterable[Category]) -> str:
    """The rules of a picture with these categories, dark ones behind light ones."""
    fills = {name: FILLS[name] for name in categories}
    light = [f".{name}{{fill:{one}}}" for name, (one, _) in fills.items()]
    dark = [f".{name}{{fill:{other}}}" for name, (_, other) in fills.items()]
    light += [f".{name}{{{one}}}" for name, (one, _) in INK.items()]
    dark += [f".{name}{{{other}}}" for name, (_, other) in INK.items() if other]
    scope = ".snugpt-picture "
    rules = [
        f"{scope}text{{font-family:{FONT};font-size:12px;font-variant-numeric:tabular-nums}}",
        *(scope + rule for rule in light),
        "@media (prefers-color-scheme:dark){",
        *(scope + rule for rule in dark),
        "}",
    ]
    return "<style>\n" + "\n".join(rules) + "\n</style>"


def escaped(text: str) -> str:
    """Text that may stand between tags; characters that XML forbids become U+FFFD."""
    text = _NOT_XML.sub("\ufffd", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0").replace("-0", "0" if abs(value) < 0.05 else "-0")


def text(x: float, y: float, words: str, kind: str = "ink", extra: str = "") -> str:
    """Words with their baseline at y; `extra` are further attributes."""
    space = " " if extra else ""
    return (
        f'<text x="{number(x)}" y="{number(y)}" class="{kind}"{space}{extra}>'
        f"{escaped(words)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<path d="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}" class="{kind}"/>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A filled rectangle."""
    return (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        f' class="{kind}"/>'
    )


def stepped(levels: Sequence[tuple[float, float, float]]) -> str:
    """Path of a stepped line over (left, right, y); where one does not touch the next, a gap."""
    parts: list[str] = []
    at_x = at_y = ""
    for left, right, y in levels:
        x, height = number(left), number(y)
        if x != at_x:
            parts.append(f"M{x} {height}")
        elif height != at_y:
            parts.append(f"V{height}")
        elif parts[-1][0] == "H":
            parts.pop()
        at_x, at_y = number(right), height
        parts.append(f"H{at_x}")
    return "".join(parts)


def area(levels: Sequence[tuple[float, float, float]], base: float) -> str:
    """Path of what lies between a stepped line and `base`, one closed piece per gap."""
    pieces: list[list[tuple[float, float, float]]] = []
    for level in levels:
        if not pieces or number(pieces[-1][-1][1]) != number(level[0]):
            pieces.append([])
        pieces[-1].append(level)
    return "".join(stepped(piece) + f"V{number(base)}H{number(piece[0][0])}Z" for piece in pieces)


def axis(top_bytes: float, most_ticks: int = 6) -> tuple[list[float], int, str]:
    """Round figures from 0 up to `top_bytes`, the unit they are in as `units.gib` chooses it, and
    its name."""
    sizes = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
    unit, name = next((each for each in sizes if top_bytes >= each[0] / 10), (1, "B"))
    top = max(top_bytes / unit, 1e-9)
    power = 10.0 ** math.floor(math.log10(top / most_ticks))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * most_ticks >= top)
    return [round(i * step, 6) for i in range(int(top / step + 1e-9) + 1)], unit, name
