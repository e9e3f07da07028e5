"""The house stands: imports point down, there are no circles, no file grows too large."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "snugpt"
FLOORS = {
    "units": 0, "errors": 0,
    "spec": 1,
    "estimate": 2,
    "planner": 3, "ledger": 3,
    "model": 4, "data": 4,
    "run": 5, "tracing": 5,
    "api": 6,
    "cli": 7,
}  # fmt: skip
LONGEST_FILE_LINES = 600
TORCH_FREE = ("spec", "estimate", "planner", "ledger")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(("snugpt", *parts)).removesuffix(".__init__")
        found[name] = path
    return found


def imports(path: Path, name: str, known: set[str]) -> set[str]:
    """The modules of the package that a module imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return {each for each in found if each in known and each != name}


def floor_of(module: str) -> int:
    """The floor a module stands on; the package itself re-exports and stands on top."""
    parts = module.split(".")
    return max(FLOORS.values()) + 1 if len(parts) == 1 else FLOORS[parts[1]]


MODULES = modules()
GRAPH = {name: imports(path, name, set(MODULES)) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """The package or ground-floor module that a module lies in."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_point_down(module: str) -> None:
    upward = {
        other
        for other in GRAPH[module]
        if room_of(other) != room_of(module) and floor_of(other) >= floor_of(module)
    }
    assert not upward


def test_no_module_reaches_itself_by_its_imports() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for other in GRAPH[module]:
                visit(other, (*above, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_no_file_is_longer_than_600_lines() -> None:
    root = SOURCE.parents[1]
    files = [p for folder in ("src", "tests", "bench") for p in (root / folder).rglob("*.py")]
    assert files
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE_LINES} == {}


def test_floors_0_to_3_import_without_torch() -> None:
    names = [n for n in MODULES if floor_of(n) <= 3]
    assert len(names) > 20
    code = f"import sys, {', '.join(names)}; print(*(sys.modules.keys() & {{'torch', 'numpy'}}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "--gpu", "rtx-4090", "--depth", "4"],
        ["plan", "--json"],
        ["gpus"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_the_planning_commands_leave_torch_alone(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from snugpt.cli.main import main\n"
        f"sys.argv = ['snugpt', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "torch was imported" not in done.stderr
    assert done.returncode in (0, 3), done.stderr


def test_import_snugpt_leaves_torch_and_rich_alone() -> None:
    code = "import sys, snugpt; print(*(sys.modules.keys() & {'torch', 'numpy', 'rich'}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []
