"""What we, MemTracker and other estimators say of three common cases of training.

    python bench/peers.py --venv-root FOLDER              those that are installed under FOLDER
    python bench/peers.py --venv-root FOLDER --install    install the missing ones first, with pip
    python bench/peers.py --venv-root FOLDER --nanogpt CHECKOUT     trace nanoGPT for A and B, too

Cases A and B are GPT-2 124M with 8 and 32 sequences of 1024 tokens, C a llama-like 134M with 8, all
with AdamW. Figures are MiB as each program gives them; nothing is converted. C is traced where
transformers is installed. Each peer runs in an environment of its own; one that is missing or
refuses a case is named with its reason. Environments that need torch share this one's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
import venv
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from common_cases import CASES, WIDTH, Case, head, row
from own_rows import PROGRAM_HEAD, TRAINER_HEAD, program_lines, trainer_lines
from peer_programs import NOT_ON_PYPI, PEERS, START, Peer

INSTALL_S, ASK_S = 900, 300


def python_of(root: Path, name: str) -> Path:
    """The interpreter of a peer's environment."""
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    return root / name / scripts / "python"


def install(root: Path, name: str, peer: Peer) -> str | None:
    """Make a peer's environment; return why not, if not."""
    venv.create(root / name, with_pip=True)
    python = python_of(root, name)
    torch = find_spec("torch")
    if peer.needs_torch and torch is not None:
        found = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        shared = Path(found.strip()) / "zz_shared.pth"  # behind its own packages
        shared.write_text(f"{Path(torch.origin).parents[1]}\n", encoding="utf-8")
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
        for way, mib in figures.items():
            rows.setdefault(way, {})[letter] = mib
    lines = [row(name, way, by_case, peer.leaves_out) for way, by_case in rows.items()]
    return [*lines, *refusals], versions


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1][:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv-root", type=Path, required=True, help="folder of environments")
    parser.add_argument("--install", action="store_true", help="install what is missing")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    asked = parser.parse_args()
    if asked.nanogpt is not None and not (asked.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt: no model.py in {asked.nanogpt}")
    print(head())
    said = own_part(asked.nanogpt)
    said += peers_part(asked.venv_root, asked.install)
    print("\n" + "\n".join(said))


def own_part(nanogpt: Path | None) -> list[str]:
    """Print our rows and MemTracker's; return what is to be said below the table."""
    lines, said = program_lines(nanogpt)
    programs = [PROGRAM_HEAD, *lines] if lines else []
    print("\n".join([*programs, TRAINER_HEAD, *trainer_lines()]))
    return said


def peers_part(root: Path, with_install: bool) -> list[str]:
    """Print the peers' rows; return what is to be said below the table."""
    print("other estimators, asked about the case")
    used: dict[str, str] = {}
    absent: list[str] = []
    for name, peer in PEERS.items():
        there = python_of(root, name).exists()
        if not there and with_install:
            why = install(root, name, peer)
            there = why is None
            absent += [f"{name}: pip could not install it: {why}"] if why else []
        elif not there:
            absent.append(f"{name}: not under {root}; --install fetches it")
        if there:
            lines, versions = table_of(root, name, peer)
            print("\n".join(lines))
            used |= versions
    numbers = ", ".join(f"{name}=={number}" for name, number in sorted(used.items()))
    return [
        *(textwrap.wrap(f"versions: {numbers}", WIDTH, break_on_hyphens=False) if used else ()),
        *(f"skipped: {line}" for line in absent),
        *(f"not run: {name}: {reason}" for name, reason in NOT_ON_PYPI.items()),
    ]


if __name__ == "__main__":
    main()
