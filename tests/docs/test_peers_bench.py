"""bench/peers.py without any peer: it names what is missing, and says what a peer said."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib import import_module
from pathlib import Path

from snugpt.estimate.parameters import num_parameters
from snugpt.spec.shape import shape_for

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))
peers, programs = import_module("peers"), import_module("peer_programs")


def test_peers_that_are_not_installed_are_skipped_by_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCH / "peers.py", "--venv-root", tmp_path],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skipped: ")]
    assert [line.split(":")[1].strip() for line in skipped] == list(programs.PEERS)
    assert not list(tmp_path.iterdir())


def test_a_peer_s_figures_versions_and_refusals_are_shown(tmp_path: Path) -> None:
    venv.create(tmp_path / "made-up", with_pip=False)
    program = """
if case["batch"] == 32:
    sys.exit("32 is too many")
print("noise")
say([], a_row=case["parameters"] / MIB)
"""
    lines, versions = peers.table_of(
        tmp_path, "made-up", programs.Peer(("made-up==1",), program, "all")
    )
    assert versions == {}
    assert lines == [
        f"{'made-up':<14} {'a row':<17}{119:>10,}{'-':>10}{128:>10,}   all",
        "  B refused: 32 is too many",
    ]


def test_the_llama_like_case_has_as_many_parameters_as_ours() -> None:
    case = peers.CASES["C"]
    shape = shape_for("llama", case.layers, width=case.width, vocab_size=case.vocab, kv_heads=12,
                      mlp=case.mlp, context_len=case.seq_len)  # fmt: skip
    assert num_parameters(shape) == case.parameters


def test_every_program_is_python_and_every_peer_has_a_version() -> None:
    for name, peer in programs.PEERS.items():
        compile(programs.START + peer.program, name, "exec")
        assert "==" in peer.requires[0]
