"""`snugpt trace`: the real code beside the prediction, its picture, and recorded snapshots."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from door import Door, names_under, refusal

from snapshot_writer import random_run
from snugpt.cli.screen import COLUMNS
from snugpt.planner.machine import machine_for

D2 = "snugpt trace --gpu rtx-4090 --depth 2"


def test_predicted_and_traced_agree_phase_by_phase_and_name_by_name(door: Door) -> None:
    done = door(f"{D2} --json")
    found = json.loads(done.out)
    assert (done.code, found["agrees"], found["parting"]) == (0, True, None)
    assert found["phases"].keys() == {
        "forward", "loss", "backward", "clip", "optimizer", "evaluate"
    }  # fmt: skip
    named = {term["name"]: term for term in found["terms"]}
    assert named["mlp activations"]["made_in"].startswith("ReluSquared.forward functions.py:")
    large = [term for term in found["terms"] if term["predicted_bytes"] > 2**20]
    assert len(large) > 8
    assert all(term["predicted_bytes"] == term["traced_bytes"] for term in large)


@pytest.mark.parametrize(
    "command",
    [D2, "snugpt trace --gpu gtx-1070 --task generate --preset tiny",
     "snugpt trace --gpu cpu --depth 1 --style gpt2 --dropout 0.1 --seq-len 64",
     "snugpt trace --gpu rtx-4090 --depth 3 --dropout 0.1"],
)  # fmt: skip
def test_the_screen_says_agree_within_80_columns(door: Door, command: str) -> None:
    done = door(command)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].endswith("AGREE")
    assert max(len(line) for line in lines) <= COLUMNS
    assert "nowhere" in done.out


def test_a_plan_is_traced_as_it_was_written(door: Door, elsewhere: Path) -> None:
    assert door("snugpt plan --gpu t4 --depth 2 --seq-len 128 -o plan.json").code == 0
    done = door("snugpt trace plan.json --plot step.svg")
    assert done.code == 0
    texts = [e.text or "" for e in ElementTree.parse(elsewhere / "step.svg").getroot().iter()]
    assert any("traced" in text for text in texts)


def test_a_difference_is_an_error_that_names_both_figures(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snugpt.estimate import kinds
    from snugpt.estimate.memory import _timelines

    plain = kinds.relu_squared

    def keeps_its_input_too(net, x):
        operation = plain(net, x)
        return type(operation)(**{
            **{name: getattr(operation, name) for name in operation.__slots__},
            "keeps": (x, *operation.keeps),
        })  # fmt: skip

    _timelines.clear()
    monkeypatch.setattr(kinds, "relu_squared", keeps_its_input_too)
    done = door(f"{D2} --checkpoint none")
    _timelines.clear()
    assert done.code == 1
    assert "DIFFER" in done.out
    assert "first in forward" in done.out
    assert "a bug in snugpt" in done.err
    assert "mlp activations" not in done.out  # behind the parting no tensor has a sure name
    assert "activations" in done.out


def test_compiled_layers_are_not_traced_and_the_way_out_is_named(door: Door) -> None:
    done = door("trace --gpu rtx-4090 --depth 2 --compile on")
    assert done.code == 2
    assert "compile = 'on' is not traced" in done.err
    assert "hint: snugpt trace --gpu rtx-4090 --depth 2 --compile off" in done.err


@pytest.mark.parametrize(
    ("lever", "back"),
    [
        ("--num-gpus 2 --sharding full", "--num-gpus 2 --seq-len 64 --sharding none"),
        ("--compile on", "--seq-len 64 --compile off"),
    ],
)
def test_a_plan_that_is_not_traced_hints_its_own_question(
    door: Door, lever: str, back: str
) -> None:
    assert door(f"plan --gpu rtx-4090 --depth 2 --seq-len 64 {lever} -o plan.json").code == 0
    for line in ("trace plan.json", f"trace --gpu rtx-4090 --depth 2 --seq-len 64 {lever}"):
        error, hint = refusal(door(line), 2)
        assert "is not traced" in error
        assert sorted(hint.split()) == sorted(
            f"snugpt trace --gpu rtx-4090 --depth 2 {back}".split()
        )
        assert door(hint).code == 0


def test_a_trace_that_takes_long_says_so_before(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snugpt.cli.trace.MANY_CHUNKS", 3)
    command = "snugpt trace --gpu cpu --depth 1 --seq-len 64 --device-batch-size 1"
    assert "4 chunks of 16 tokens" in door(f"{command} --loss-chunk-tokens 16").err
    assert door(f"{command} --loss-chunk-tokens 32").err == ""


def test_a_snapshot_is_replayed_and_drawn(door: Door, elsewhere: Path) -> None:
    made = random_run(1, expandable=False, capacity_bytes=None)
    made.write(elsewhere / "snapshot.pickle")
    done = door("snugpt trace --snapshot snapshot.pickle --plot recorded.svg")
    assert done.code == 0
    assert "replayed" in done.out
    assert (elsewhere / "recorded.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("snugpt trace --stack nanochat --gpu h100", 2, "stack"),
        ("snugpt trace --snapshot s.pickle --depth 2", 2, "depth"),
        ("snugpt trace plan.json --depth 2", 2, "depth"),
        ("snugpt trace --depth 2 --plot step.png", 2, "plot"),
        ("snugpt trace --snapshot text.txt", 1, "no CUDA memory snapshot"),
        ("snugpt trace missing.json", 1, "missing.json"),
    ],
)
def test_bad_input_is_one_line_and_a_hint_and_leaves_nothing(
    door: Door, elsewhere: Path, command: str, code: int, said: str
) -> None:
    before = names_under(elsewhere)
    error, _ = refusal(door(command), code)
    assert said in error
    assert names_under(elsewhere) == before


MODEL = """
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(512, 64), nn.Linear(64, 512)
    def forward(self, x, targets):
        logits = self.head(self.embedding(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

class Waits(Net):
    def forward(self, x, targets):
        loss = super().forward(x, targets)
        return loss if loss.item() > 1 else 2 * loss
"""


@pytest.fixture
def own_model(elsewhere: Path, request: pytest.FixtureRequest) -> str:
    """A module of the user's in the current folder, by a name no other test has imported."""
    name = f"own_{abs(hash(request.node.name)) % 10**9}"
    (elsewhere / f"{name}.py").write_text(MODEL)
    return name


def test_a_model_of_ones_own_is_traced_for_a_card(
    door: Door, elsewhere: Path, own_model: str
) -> None:
    command = f"snugpt trace {own_model}:Net --gpu rtx-3060 --batch-size 4 --seq-len 128"
    done = door(f"{command} --json --plot own.svg")
    found = json.loads(done.out)
    assert (done.code, found["fits"], found["batch_size"]) == (0, True, 4)
    assert found["parameters"] == 512 * 64 * 2 + 512
    assert found["largest_batch"] > 1000
    assert (elsewhere / "own.svg").exists()
    shown = door(command)
    assert shown.out.splitlines()[0].endswith("FITS")
    assert max(len(line) for line in shown.out.splitlines()) <= COLUMNS


def test_a_model_that_does_not_fit_exits_3_with_the_batch_that_does(
    door: Door, own_model: str
) -> None:
    command = f"snugpt trace {own_model}:Net --gpu rtx-3060 --seq-len 128"
    error, hint = refusal(door(f"{command} --batch-size 200000"), 3)
    assert "does not fit" in error
    assert hint.startswith(f"{command} --batch-size ")
    assert door(hint).code == 0


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (":Waits", 1, "waits for data"),
        (":Nett", 2, "did you mean 'Net'"),
        (":Net --depth 2", 2, "depth is not a flag"),
        (".more:Net", 2, "unknown module"),
    ],
)
def test_a_model_that_cannot_be_traced_is_one_line(
    door: Door, own_model: str, end: str, code: int, said: str
) -> None:
    error, _ = refusal(door(f"snugpt trace {own_model}{end}"), code)
    assert said in error


HEAD = "import sys, json, torch\nfrom torch import nn\n"
LINEAR = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(512, 64)
    def forward(self, x, labels=None):
        {body}
        return self.embedding(x).mean()
"""
ODD = "class Odd(BaseException):\n    def __str__(self): raise RuntimeError('no words')\n"
USERS_CODE = {
    "a_triple": ("def build(): return nn.Linear(2, 2), None, 3", 2, "'tuple of Linear, None, int'"),
    "no_model": ("def build(): return 3", 2, "a model or a pair (model, batch)"),
    "odd": (f"{ODD}def build(): raise Odd", 1, "raise Odd` raised Odd: (its __str__ raised Runt"),
    "exit_at_import": ("sys.exit(0)", 1, "{name}.py:3: `sys.exit(0)` raised SystemExit: 0"),
    "exit_in_build": ("def build(): sys.exit()", 1, "raised SystemExit"),
    "exit_in_forward": (LINEAR.format(body="raise SystemExit(0)"), 1, "raised SystemExit: 0"),
    "stops_in_forward": (LINEAR.format(body="raise GeneratorExit"), 1, "raised GeneratorExit"),
    "stop_iteration": ("def build(): next(iter(()))", 1, "next(iter(()))` raised StopIteration"),
    "syntax": ("def build(:\n", 1, "{name}.py:3: `def build(:` raised SyntaxError: invalid syntax"),
    "library": (
        "def build(): return json.loads('[')",
        1,
        "{name}.py:3: `def build(): return json.",
    ),
    "missing": ("import no_such_thing", 1, "{name}.py:3: `import no_such_thing` raised Module"),
    "copies_badly": (
        LINEAR.format(body="") + "    def __deepcopy__(self, memo): raise ValueError('single')\n",
        1,
        "raised ValueError: single",
    ),
    "trains_badly": (
        LINEAR.format(body="") + "    def train(self, mode=True): raise SystemExit\n",
        1,
        "raised SystemExit",
    ),
}


@pytest.mark.parametrize("case", USERS_CODE)
def test_whatever_the_users_code_raises_is_one_line_with_its_place(
    door: Door, elsewhere: Path, case: str
) -> None:
    text, code, said = USERS_CODE[case]
    name = f"raises_{case}"
    (elsewhere / f"{name}.py").write_text(HEAD + text)
    target = "Net" if "class Net" in text else "build"
    done = door(f"snugpt trace {name}:{target} --gpu h100 --batch-size 2 --seq-len 16")
    error, _ = refusal(done, code)
    assert said.format(name=name) in error
    assert len(done.err.splitlines()) == 2


def test_an_error_inside_an_installed_package_names_the_users_line_first(
    door: Door, elsewhere: Path
) -> None:
    package = elsewhere / "site-packages" / "inner_of_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def call():\n    raise ValueError('inside')\n")
    user = f"sys.path.append({str(package.parent)!r})\nimport inner_of_test\n"
    (elsewhere / "calls_inner.py").write_text(HEAD + user + "def build(): inner_of_test.call()\n")
    error, _ = refusal(door("snugpt trace calls_inner:build --gpu h100"), 1)
    assert error.startswith("calls_inner.py:5: `def build(): inner_of_test.call()` (in ")
    assert "__init__.py:2) raised ValueError: inside" in error


def test_a_package_that_misses_something_is_not_called_unknown(door: Door, elsewhere: Path) -> None:
    (elsewhere / "half_there").mkdir()
    (elsewhere / "half_there" / "__init__.py").write_text("import no_such_thing\n")
    (elsewhere / "half_there" / "model.py").write_text("def build(): pass\n")
    error, _ = refusal(door("snugpt trace half_there.model:build --gpu h100"), 1)
    assert "no_such_thing` raised ModuleNotFoundError" in error


PRINTS = """
import warnings
print("at import")

class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        print("in build")
        self.embedding, self.head = nn.Embedding(512, width), nn.Linear(width, 512)
    def forward(self, x, targets):
        print("in forward")
        warnings.warn("of the user's own")
        logits = self.head(self.embedding(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

class Other(Net):
    def forward(self, x, tgt=None):
        return self.head(self.embedding(x))

class Long(Net):
    def forward(self, x, targets):
        x = self.embedding(x)
        return (x @ x.mT).mean()

class Huge(Net):
    def __init__(self):
        super().__init__(2**26)

class Waits(Net):
    def forward(self, x, targets):
        torch.cuda.synchronize()

class Recurrent(Net):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(64, 64, batch_first=True)
    def forward(self, x, targets):
        return self.layer(self.embedding(x))[0].mean()

def own():
    return Net(), (torch.zeros(4, 32, dtype=torch.long),) * 2
"""
SMALL_BATCH = "--batch-size 2 --seq-len 16"


@pytest.fixture
def prints(elsewhere: Path, request: pytest.FixtureRequest) -> str:
    """A module whose code prints whenever it runs."""
    name = f"prints_{abs(hash(request.node.name)) % 10**9}"
    (elsewhere / f"{name}.py").write_text(HEAD + PRINTS)
    return name


def test_what_the_users_code_prints_goes_to_stderr(door: Door, prints: str) -> None:
    with pytest.warns(UserWarning, match="of the user's own"):
        done = door(f"snugpt trace {prints}:Net --gpu t4 {SMALL_BATCH} --json")
    assert json.loads(done.out)["batch_size"] == 2
    assert {"at import", "in build", "in forward"} <= set(done.err.splitlines())
    with pytest.warns(UserWarning, match="of the user's own"):
        shown = door(f"snugpt trace {prints}:Net --gpu t4 {SMALL_BATCH}").out
    assert not any(line.startswith(("in ", "at ")) for line in shown.splitlines())


@pytest.mark.filterwarnings("ignore:of the user")
def test_without_a_card_it_is_this_machine_and_assumed_sizes_are_said(
    door: Door, prints: str
) -> None:
    found = json.loads(door(f"snugpt trace {prints}:Net {SMALL_BATCH} --json").out)
    assert (found["gpu"], found["seq_len"], found["notes"]) == (machine_for(None).gpu.id, 16, [])
    lines = door(f"snugpt trace {prints}:Net --gpu h100").out.splitlines()
    assert lines[0].startswith("train 66.0K parameters, batch 8 x 1024 tokens")
    assert "note     batch 8 and 1024 tokens are assumed" in lines
    lines = door(f"snugpt trace {prints}:Net --gpu h100 --batch-size 2").out.splitlines()
    assert "note     1024 tokens are assumed" in lines
    own = door(f"snugpt trace {prints}:own --gpu h100").out
    assert ", batch 4 " in own.splitlines()[0]
    assert "assumed" not in own


@pytest.mark.filterwarnings("ignore:of the user")
@pytest.mark.parametrize(
    ("end", "code", "said", "hint"),
    [
        ("Other --gpu h100", 2, "parameters tgt got nothing (labels are given as labels, targets,"
         " target, y)", "Other --gpu h100 --task generate"),
        ("Net --gpu t4 --compute-dtype bf16", 2, "has no bf16",
         "Net --gpu t4 --compute-dtype fp32"),
        ("Net --gpu cpu --compute-dtype bf16", 2, "None on the",
         "Net --gpu cpu --compute-dtype fp32"),
        ("Recurrent --gpu t4 --seq-len 8", 1, "inside cuDNN",
         "Recurrent --gpu cpu --seq-len 8"),
        ("Nett --gpu t4", 2, "did you mean 'Net'", "Net --gpu t4"),
        ("Net --gpu t4 --batch-size 0", 2, "batch_size = 0", "Net --gpu t4 --batch-size 8"),
        ("Net --gpu t4 --depth 2", 2, "depth is not a flag", "Net --gpu t4"),
        ("own --gpu t4 --seq-len 8", 2, "brings its own batch", "own --gpu t4"),
        ("Long --gpu t4 --batch-size 1 --seq-len 65536", 3, "does not fit",
         "Long --gpu t4 --batch-size 1 --seq-len 16384"),
    ],
)  # fmt: skip
def test_a_hint_for_a_model_of_ones_own_is_a_command_that_works(
    door: Door, prints: str, end: str, code: int, said: str, hint: str
) -> None:
    error, found = refusal(door(f"snugpt trace {prints}:{end}"), code)
    assert said in error
    assert found == f"snugpt trace {prints}:{hint}"
    assert door(found).code == 0


@pytest.mark.filterwarnings("ignore:of the user")
def test_where_nothing_helps_the_hint_is_no_command_that_fails_again(
    door: Door, prints: str
) -> None:
    _, hint = refusal(door(f"snugpt trace {prints}:Huge --gpu t4 {SMALL_BATCH}"), 3)
    assert hint == "snugpt gpus"
    _, hint = refusal(door(f"snugpt trace {prints}:Waits --gpu t4 {SMALL_BATCH}"), 1)
    assert "torch.cuda.is_available()" in hint


@pytest.mark.parametrize(
    "target", ["{name}:", ":build", "{name}:build:", "{name}:Net.forward", "{name}.py", "{name}",
               "/nowhere/{name}.py:Net", "a b:c", "x" * 5000, "-", ""],
)  # fmt: skip
def test_a_target_that_is_neither_is_named(door: Door, prints: str, target: str) -> None:
    (Path.cwd() / f"{prints}.py").rename("other.py")
    done = door(f"snugpt trace '{target.format(name=prints)}' --gpu t4")
    error, hint = refusal(done, 2)
    assert "is neither a plan.json nor package.module:callable" in error
    assert hint == "snugpt trace --help"


@pytest.mark.filterwarnings("ignore:of the user")
def test_a_path_to_a_module_is_answered_with_its_dotted_name(door: Door, prints: str) -> None:
    for path in (f"{prints}.py", f"./{prints}.py", Path.cwd() / f"{prints}.py"):
        _, hint = refusal(door(f"snugpt trace {path}:Net --gpu t4"), 2)
        assert hint == f"snugpt trace {prints}:Net"


@pytest.mark.filterwarnings("ignore:of the user")
def test_the_picture_of_ones_own_model_says_its_batch_and_no_other(
    door: Door, elsewhere: Path, prints: str
) -> None:
    assert door(f"snugpt trace {prints}:own --gpu t4 --plot own.svg").code == 0
    texts = " ".join(ElementTree.parse(elsewhere / "own.svg").getroot().itertext())
    assert set(re.findall(r"batch \d+\b(?!\.)", texts)) == {"batch 4"}


def test_the_help_says_what_the_callable_may_be_within_80_columns(door: Door) -> None:
    text = door("snugpt trace --help").out
    words = " ".join(text.split())
    for said in ("or (model, batch)", "without arguments", "batch_size=",
                 "labels, targets, target or y"):  # fmt: skip
        assert said in words
    assert max(len(line) for line in text.splitlines() if "build" in line) <= COLUMNS


def test_a_loop_unrolled_over_the_batch_is_stopped_before_it_ends_the_process(
    door: Door, own_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snugpt.tracing.model_allocations.MOST_OPERATIONS", 10)
    done = door(f"snugpt trace {own_model}:Net --gpu rtx-3060 --batch-size 2 --seq-len 16")
    error, _ = refusal(done, 1)
    assert "more than 10 operations" in error


def test_the_hint_of_a_refused_question_traces(door: Door) -> None:
    error, hint = refusal(door("snugpt trace --gpu t4 --depth 2 --seq-len 64 --compile on"), 2)
    assert "compile" in error
    assert hint.startswith("snugpt trace --gpu t4 --depth 2 --seq-len 64")
    assert door(hint).code == 0
