"""Measurement, calibration factor and host, against JSON and made-up systems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from snugpt.errors import BadQuestionError, FailedError
from snugpt.spec.calibration import Factor
from snugpt.spec.host import cpu_capacity_bytes, default_ledger_folder
from snugpt.spec.measurement import Environment, Measurement, measurement_from_json, new_id, utc_now
from snugpt.spec.recipe import GenerationRecipe, Schedule, TrainingRecipe
from snugpt.spec.shape import shape_for

KIB = 1024
TRAINING = TrainingRecipe(
    seq_len=8,
    device_batch_size=2,
    grad_accum_steps=1,
    total_batch_tokens=16,
    total_tokens=160,
    compute_dtype="fp32",
    loss="plain",
    loss_chunk_tokens=16,
    checkpoint="none",
    optimizer="adamw",
    schedule=Schedule(
        learning_rate=0.001,
        matrix_learning_rate=0.02,
        weight_decay=0.0,
        warmup_fraction=0.0,
        cooldown_fraction=0.0,
        final_fraction=1.0,
        clip_norm=1.0,
        seed=0,
        eval_every_steps=1,
        eval_tokens=16,
        save_every_steps=1,
    ),
)
GENERATION = GenerationRecipe(
    batch=1, prompt_tokens=4, max_new_tokens=4, kv_dtype="bf16", weight_dtype="bf16"
)


def _measurement(**fields: Any) -> Measurement:
    known: dict[str, Any] = {
        "id": "a",
        "time": "2026-11-20T11:08:27Z",
        "program": "snugpt train",
        "outcome": "fit",
        "gpu_id": None,
        "gpu_name": "a processor",
        "environment": Environment(python="3", platform="Linux", device="cpu", snugpt="0"),
    }
    return Measurement(**(known | fields))


@pytest.mark.parametrize("recipe", [TRAINING, GENERATION, None])
def test_json_round_trip(recipe: TrainingRecipe | GenerationRecipe | None) -> None:
    measurement = _measurement(
        shape=shape_for("nanochat", 4),
        recipe=recipe,
        allocated_bytes=2**40,
        phases={"forward": 5},
        tokens_per_s=1.5,
        argv=("snugpt", "train"),
    )
    text = msgspec.json.encode(measurement)
    assert json.loads(text)["allocated_bytes"] == 2**40
    assert measurement_from_json(text) == measurement


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("field", ["tokens_per_s", "final_loss", "bits_per_byte"])
def test_figures_that_are_no_numbers_are_refused(field: str, value: float) -> None:
    with pytest.raises(BadQuestionError, match=field):
        _measurement(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("allocated_bytes", -1),
        ("num_ooms", -1),
        ("id", ""),
        ("time", "today"),
        ("time", "2026-11-20T11:08:27"),
        ("time", "2026-11-20T11:08:27+01:00"),
    ],
)
def test_impossible_fields_are_refused(field: str, value: object) -> None:
    with pytest.raises(BadQuestionError, match=field):
        _measurement(**{field: value})


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"recipe": {"task": "dance"}}', b"NaN"]
)
def test_other_texts_are_not_measurements(text: bytes) -> None:
    with pytest.raises(FailedError, match="not a measurement"):
        measurement_from_json(text)


def test_an_impossible_value_in_a_file_is_a_damaged_file() -> None:
    text = msgspec.json.encode(_measurement(steps=7)).replace(b'"steps":7', b'"steps":-7')
    with pytest.raises(FailedError, match="steps"):
        measurement_from_json(text)


def test_a_measurement_without_prediction_has_no_ratio() -> None:
    assert _measurement(allocated_bytes=5).ratios == {}


def test_ids_differ_and_the_time_of_now_is_allowed() -> None:
    now = utc_now()
    assert new_id(now) != new_id(now)
    _measurement(time=now, id=new_id(now))


@pytest.mark.parametrize(
    "fields",
    [
        {"sources": ("a", "b")},
        {"sources": ("a", "a", "b")},
        {"value": 5.0},
        {"value": float("nan")},
        {"low": 0.0},
        {"high": float("inf")},
    ],
)
def test_a_factor_needs_three_measurements_and_lies_between_them(fields: dict[str, Any]) -> None:
    known: dict[str, Any] = {"value": 1.0, "low": 0.5, "high": 2.0, "sources": ("a", "b", "c")}
    assert Factor(**known).n == 3
    with pytest.raises(BadQuestionError):
        Factor(**(known | fields))


def _system(root: Path, files: dict[str, str]) -> Path:
    known = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:     600 kB\nHugePages_Total: 0\n"}
    for name, text in (known | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_capacity_is_the_available_ram_and_what_is_held_already(tmp_path: Path) -> None:
    assert cpu_capacity_bytes(_system(tmp_path, {})) == 600 * KIB
    status = "Name:\tpython\nVmRSS:\t 70 kB\nRssAnon:\t   50 kB\n"
    assert cpu_capacity_bytes(_system(tmp_path, {"proc/self/status": status})) == 650 * KIB


def test_a_parent_cgroup_limits_too_and_cache_counts_as_free(tmp_path: Path) -> None:
    root = _system(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": "5000\n",
            "sys/fs/cgroup/pod/memory.current": "3000\n",
            "sys/fs/cgroup/pod/memory.stat": "anon 1\ninactive_file 400\n",
        },
    )
    assert cpu_capacity_bytes(root) == 5000 - 3000 + 400


def test_version_1_cgroups_are_read_under_their_own_names(tmp_path: Path) -> None:
    root = _system(
        tmp_path,
        {
            "proc/self/cgroup": "3:cpuset:/other\n2:cpu,memory:/box\n0::/\n",
            "sys/fs/cgroup/memory/other/memory.limit_in_bytes": "1\n",
            "sys/fs/cgroup/memory/other/memory.usage_in_bytes": "0\n",
            "sys/fs/cgroup/memory/other/memory.stat": "",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9000\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 30\n",
        },
    )
    assert cpu_capacity_bytes(root) == 7030


def test_no_proc_means_the_installed_ram(tmp_path: Path) -> None:
    total = next(
        int(line.split()[1]) * KIB
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert cpu_capacity_bytes(tmp_path) == total


def test_the_ledger_lies_in_the_data_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_ledger_folder() == tmp_path / "data" / "snugpt"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", ignored)
        assert default_ledger_folder() == tmp_path / ".local" / "share" / "snugpt"
