"""What other estimators say of three common cases, each run in an environment of its own.

    python bench/peers.py --venv-root FOLDER              those that are installed under FOLDER
    python bench/peers.py --venv-root FOLDER --install    install the missing ones first, with pip

Cases A and B are GPT-2 124M with 8 and 32 sequences of 1024 tokens, C a llama-like 134M with 8, all
with AdamW. Figures are MiB as each program gives them; nothing is converted. A peer that is missing
or refuses a case is named with its reason. Environments that need torch share this one's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

from peer_programs import NOT_ON_PYPI, PEERS, START, Peer

INSTALL_S, ASK_S = 900, 300


@dataclass(frozen=True)
class Case:
    """One training step: AdamW, bf16 over fp32 weights, flash attention, one device."""

    style: str
    layers: int
    width: int
    heads: int
    mlp: int
    vocab: int
    seq_len: int
    batch: int
    tied: bool
    parameters: int


GPT2 = Case("gpt2", 12, 768, 12, 3072, 50257, 1024, 8, True, 124_439_808)
CASES = {
    "A": GPT2,
    "B": Case(**{**asdict(GPT2), "batch": 32}),
    "C": Case("llama", 12, 768, 12, 2048, 32000, 1024, 8, False, 134_105_856),
}


def python_of(root: Path, name: str) -> Path:
    """The interpreter of a peer's environment."""
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    return root / name / scripts / "python"


def install(root: Path, name: str, peer: Peer) -> str | None:
    """Make a peer's environment; return why not, if not."""
    venv.create(root / name, with_pip=True)
    python = python_of(root, name)
    if peer.needs_torch:
        found = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        shared = Path(found.strip()) / "zz_shared.pth"  # behind its own packages
        shared.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    command = [python, "-m", "pip", "install", "--quiet", *peer.requires]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    return None if done.returncode == 0 else _last_line(done.stderr)


def ask(root: Path, name: str, peer: Peer, case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """A peer's figures of one case in MiB, and the versions that gave them.

    Raises:
        RuntimeError: it refuses, or fails.
    """
    done = subprocess.run(
        [python_of(root, name), "-c", START + peer.program],
        input=json.dumps(asdict(case)), capture_output=True, text=True, timeout=ASK_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(_last_line(done.stderr))
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["mib"], answer["versions"]


def table_of(root: Path, name: str, peer: Peer) -> tuple[list[str], dict[str, str]]:
    """The lines of one peer, a row for each way it was asked, and its versions."""
    rows: dict[str, dict[str, float]] = {}
    refusals: list[str] = []
    versions: dict[str, str] = {}
    for letter, case in CASES.items():
        try:
            figures, versions = ask(root, name, peer, case)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            refusals.append(f"  {letter} refused: {error}")
            continue
        for row, mib in figures.items():
            rows.setdefault(row, {})[letter] = mib
    lines = []
    for row, by_case in rows.items():
        cells = (f"{by_case[c]:>10,.0f}" if c in by_case else f"{'-':>10}" for c in CASES)
        lines.append(f"{name:<14} {row:<17}{''.join(cells)}   {peer.leaves_out}")
    return [*lines, *refusals], versions


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1][:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv-root", type=Path, required=True, help="folder of environments")
    parser.add_argument("--install", action="store_true", help="install what is missing")
    asked = parser.parse_args()
    print(f"{'peer':<14} {'asked for':<17}{''.join(f'{c:>10}' for c in CASES)}   leaves out")
    used: dict[str, str] = {}
    absent: list[str] = []
    for name, peer in PEERS.items():
        there = python_of(asked.venv_root, name).exists()
        if not there and asked.install:
            why = install(asked.venv_root, name, peer)
            there = why is None
            absent += [f"{name}: pip could not install it: {why}"] if why else []
        elif not there:
            absent.append(f"{name}: not under {asked.venv_root}; --install fetches it")
        if there:
            lines, versions = table_of(asked.venv_root, name, peer)
            print("\n".join(lines))
            used |= versions
    print("\nversions: " + ", ".join(f"{name} {number}" for name, number in sorted(used.items())))
    for line in absent:
        print(f"skipped: {line}")
    for name, reason in NOT_ON_PYPI.items():
        print(f"not run: {name}: {reason}")


if __name__ == "__main__":
    main()
