"""Config files: two languages, two vocabularies, flags over file over preset over dial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snugpt.cli.main import run
from snugpt.spec.config_file import read_config

GUIDE = {
    "name": "150M", "description": "a guide's file", "device": "cuda", "batch_size": 32,
    "block_size": 256, "vocab_size": 50304, "n_embd": 768, "n_head": 12, "n_layer": 16,
    "dropout": 0.2, "bias": False, "max_iters": 5000, "learning_rate": 0.0003,
    "eval_interval": 500,
}  # fmt: skip


def _plan(
    capsys: pytest.CaptureFixture[str], file: Path, *flags: str, code: int = 0
) -> dict[str, Any]:
    assert run(["plan", "--gpu", "rtx-4090", "--config", str(file), "--json", *flags]) == code
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    return made


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    file = tmp_path / "150M.json"
    file.write_text(json.dumps(GUIDE))
    return file


def test_a_guides_file_is_the_preset_of_its_name(
    guide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _plan(capsys, guide)
    assert run(["plan", "--gpu", "rtx-4090", "--preset", "150M", "--json"]) == 0
    preset = json.loads(capsys.readouterr().out)
    assert made["shape"] == preset["shape"]
    recipe = made["recipe"]
    assert recipe["total_batch_tokens"] == 32 * 256
    assert recipe["total_tokens"] == 5000 * 32 * 256
    assert recipe["optimizer"] == "adamw"
    assert recipe["schedule"]["learning_rate"] == 0.0003
    assert recipe["schedule"]["eval_every_steps"] == 500


def test_flags_go_over_the_file(guide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seq-len", "128", "--heads", "6", "--max-iters", "7", "--optimizer", "muon"]
    made = _plan(capsys, guide, *flags)
    assert made["shape"]["context_len"] == 128
    assert made["shape"]["num_heads"] == 6
    assert made["recipe"]["total_batch_tokens"] == 32 * 128
    assert made["recipe"]["total_tokens"] == 7 * 32 * 128
    assert made["recipe"]["optimizer"] == "muon"


def test_a_flag_replaces_its_rivals_in_the_file(
    guide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _plan(capsys, guide, "--total-batch-tokens", "65536", "--total-tokens", "6553600")
    assert made["recipe"]["total_batch_tokens"] == 65536
    assert made["recipe"]["total_tokens"] == 6553600
    shallow = _plan(capsys, guide, "--depth", "4")["shape"]
    assert (shallow["num_layers"], shallow["model_dim"], shallow["style"]) == (4, 256, "gpt2")


def test_the_file_goes_over_the_preset_and_that_over_the_dial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "small"\nlayers = 3\ntotal-batch-tokens = 8192\n')
    made = _plan(capsys, file)
    assert made["shape"]["num_layers"] == 3  # the file's
    assert made["shape"]["model_dim"] == 384  # the preset's
    assert made["shape"]["mlp_dim"] == 4 * 384  # the dial's rule
    assert made["recipe"]["total_batch_tokens"] == 8192
    assert _plan(capsys, file, "--preset", "tiny")["shape"]["model_dim"] == 192


def test_a_character_file_reads_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny_char.json"
    file.write_text(json.dumps(GUIDE | {"vocab_size": 256}))
    made = _plan(capsys, file)
    assert made["shape"]["vocab_size"] == 256
    assert made["question"]["byte_tokens"] is True


def test_a_guides_file_serves_for_generation_too(
    guide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _plan(capsys, guide, "--task", "generate")
    assert made["recipe"]["task"] == "generate"
    assert made["shape"]["num_layers"] == 16


def test_toml_has_our_names_and_sizes_in_gib(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('depth = 4\ngpu = "t4"\nreserve = 1.5\nhours = 2.0\ntie = true\n')
    expected = {"depth": 4, "gpu": "t4", "reserve": 3 * 2**29, "hours": 2.0, "tie": True}
    assert read_config(file) == expected


BAD = {
    "misspelt.json": ('{"n_layer": 4, "n_embed": 64}', "did you mean 'n_embd'"),
    "misspelt.toml": ("depht = 4", "did you mean 'depth'"),
    "doubled.json": ('{"depth": 4, "depth": 5}', "twice"),
    "doubled.toml": ("depth = 4\ndepth = 5", "TOML"),
    "same.json": ('{"block_size": 64, "seq_len": 64}', "same field"),
    "hyphens.json": ('{"seq-len": 64, "seq_len": 64}', "hyphen"),
    "cut.json": ('{"depth": 4', "JSON"),
    "list.json": ("[1]", "table"),
    "nan.json": ('{"dropout": NaN}', "NaN"),
    "nan.toml": ("dropout = nan", "dropout"),
    "text.toml": ('depth = "four"', "depth = 'four'"),
    "yes.toml": ("layers = true", "layers = True"),
    "range.toml": ("depth = 0", "1 to 1024"),
    "bias.json": ('{"bias": true}', "bias"),
    "device.json": ('{"device": "tpu"}', "cuda, cpu or auto"),
    "nested.toml": ("[depth]\nx = 1", "depth"),
    "deep.json": ("[" * 100_000, "JSON"),
    "heads.json": ('{"n_layer": 4, "n_embd": 100, "n_head": 3}', "heads"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_exit_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = BAD[name]
    file, output = tmp_path / name, tmp_path / "plan.json"
    file.write_text(text)
    code = run(["plan", "--gpu", "t4", "--config_file", str(file), "--json", "-o", str(output)])
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    error, hint = printed.err.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert len(error) < 300
    assert hint.startswith("hint: ")
    assert not output.exists()


@pytest.mark.parametrize("make", ["missing", "folder", "binary", "huge"])
def test_a_file_that_cannot_be_read_is_one_line(
    make: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config"
    if make == "folder":
        file.mkdir()
    elif make == "binary":
        file.write_bytes(b"\xff\xfe\x00")
    elif make == "huge":
        file.write_bytes(b"#" * (2 << 20))
    assert run(["plan", "--gpu", "t4", "--config", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
