"""bench/peers.py without any peer: our own rows, what is missing, and what a peer said."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib import import_module
from pathlib import Path

import pytest

from snugpt.estimate.parameters import num_parameters
from snugpt.spec.shape import shape_for

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))
peers, programs, own = (import_module(name) for name in ("peers", "peer_programs", "own_rows"))

NANOGPT = """
from torch import nn
from torch.nn import functional as F

def GPTConfig(vocab_size, **rest):
    return vocab_size

class GPT(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, 16)
        self.head = nn.Linear(16, vocab_size)
    def forward(self, tokens, targets):
        logits = self.head(self.tokens(tokens))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the bench prints where nothing is installed."""
    root = tmp_path_factory.mktemp("peers")
    done = subprocess.run(
        [sys.executable, BENCH / "peers.py", "--venv-root", root],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert not list(root.iterdir())
    return done.stdout


def test_peers_that_are_not_installed_are_skipped_by_name(shown: str) -> None:
    skipped = [line for line in shown.splitlines() if line.startswith("skipped: ")]
    assert [line.split(":")[1].strip() for line in skipped] == list(programs.PEERS)


def test_our_trainer_is_predicted_as_it_is_traced_in_every_case(shown: str) -> None:
    def figures(who: str, loss: str) -> list[int]:
        (line,) = (each for each in shown.splitlines() if each.startswith(f"{who:<14} {loss}"))
        return [int(figure.replace(",", "")) for figure in line[32:62].split()]

    plain, chunked = (figures("snugpt plan", loss) for loss in own.LOSSES.values())
    assert [figures("snugpt trace", loss) for loss in own.LOSSES.values()] == [plain, chunked]
    assert len(plain) == len(peers.CASES)
    assert all(less < more for less, more in zip(chunked, plain, strict=True))


@pytest.mark.parametrize("letter", peers.CASES)
def test_our_plan_of_a_case_is_of_its_shape_and_recipe(letter: str) -> None:
    case, plan = peers.CASES[letter], own.own_plan(peers.CASES[letter], "plain")
    shape, recipe = plan.shape, plan.recipe
    assert (shape.num_layers, shape.model_dim, shape.num_heads, shape.num_kv_heads) == (
        case.layers, case.width, case.heads, case.heads,
    )  # fmt: skip
    assert (shape.mlp_dim, shape.vocab_size, shape.tied_embeddings) == (
        case.mlp, case.vocab, case.tied,
    )  # fmt: skip
    assert (recipe.device_batch_size, recipe.grad_accum_steps) == (case.batch, 1)
    assert (recipe.seq_len, recipe.compute_dtype, recipe.loss) == (case.seq_len, "bf16", "plain")
    assert (recipe.optimizer, recipe.checkpoint, recipe.compile) == ("adamw", "none", "off")


def test_a_checkout_of_nanogpt_is_traced_and_given_to_mem_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "model", None)
    del sys.modules["model"]
    monkeypatch.setattr(own, "find_spec", lambda name: None if name == "transformers" else name)
    (tmp_path / "model.py").write_text(NANOGPT, encoding="utf-8")

    lines, said = own.program_lines(tmp_path)

    figures = {line[:32].strip(): line[32:62].split() for line in lines}
    requested, tracked, _, kept = (
        [int(figure.replace(",", "")) for figure in by_case[:2]] for by_case in figures.values()
    )
    assert list(figures)[1] == "MemTracker     the same"
    assert tracked == requested
    logits = [rows * 1024 * 50257 * 2 / 2**20 for rows in (8, 32)]
    assert [k - r for k, r in zip(kept, requested, strict=True)] == pytest.approx(logits, abs=1)
    assert all(by_case[2] == "-" for by_case in figures.values())
    assert said[-1] == "not traced: Hugging Face's Llama: transformers is not installed"
    assert max(len(line) for line in (*lines, *said[0].splitlines())) <= 100


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
