"""This machine as the doctor sees it: cards and who holds them, spills, builds, disk and RAM."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from snugpt.planner.doctor import cards, machine_checks, torch_build
from snugpt.planner.doctor.cards import Card, CardProcess, Driver, driver_at_hand
from snugpt.planner.doctor.machine_checks import Check, check_machine, is_wsl
from snugpt.planner.doctor.torch_build import TorchBuild, torch_at_hand
from snugpt.units import GIB, MIB


class _Nvml:
    """Stands for NVML with one card; a call in `lacks` is not known to the driver."""

    NVMLError = RuntimeError
    nvmlMemory_v2 = 2  # noqa: N815

    def __init__(self, *lacks: str, **answers: Any) -> None:
        self.lacks = lacks
        self.answers = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetCount": 1,
            "nvmlSystemGetCudaDriverVersion_v2": 12080,
            "nvmlSystemGetDriverVersion": b"570.86.15",
            "nvmlDeviceGetHandleByIndex": 0,
            "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(
                total=24 * GIB, free=18 * GIB, reserved=400 * MIB
            ),
            "nvmlDeviceGetCudaComputeCapability": (8, 9),
            "nvmlDeviceGetDisplayActive": 1,
            "nvmlDeviceGetComputeRunningProcesses": [
                SimpleNamespace(pid=41, usedGpuMemory=5 * GIB)
            ],
            "nvmlDeviceGetGraphicsRunningProcesses": [
                SimpleNamespace(pid=7, usedGpuMemory=300 * MIB),
                SimpleNamespace(pid=41, usedGpuMemory=None),
            ],
            "nvmlSystemGetProcessName": b"/usr/bin/python3 \x1b[31mtrain.py",
            **answers,
        }

    def __getattr__(self, name: str) -> Any:
        if name not in self.answers:
            raise AttributeError(name)

        def call(*_: Any) -> Any:
            if name in self.lacks:
                raise RuntimeError("Not Supported")
            return self.answers[name]

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cards, "DRIVER_FILES", (tmp_path,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(*lacks: str, **answers: Any) -> Driver | None:
        monkeypatch.setitem(sys.modules, "pynvml", _Nvml(*lacks, **answers))
        return driver_at_hand()

    return install


def test_the_driver_s_library_says_who_holds_the_card(driver) -> None:
    found = driver()
    assert (found.version, found.cuda) == ("570.86.15", (12, 8))
    (card,) = found.cards
    assert (card.free_bytes, card.kept_bytes, card.display) == (18 * GIB, 400 * MIB, True)
    first, second = card.processes
    assert (first.pid, first.bytes, first.draws, first.name) == (41, 5 * GIB, False, "python3")
    assert (second.pid, second.draws) == (7, True)


def test_what_a_driver_does_not_know_is_left_out(driver) -> None:
    found = driver(
        "nvmlDeviceGetDisplayActive", "nvmlDeviceGetGraphicsRunningProcesses",
        "nvmlSystemGetProcessName", "nvmlSystemGetCudaDriverVersion_v2",
        "nvmlDeviceGetCudaComputeCapability",
    )  # fmt: skip
    (card,) = found.cards
    assert (found.cuda, card.display, card.capability) == (None, None, None)
    assert len(card.processes) == 1


def test_a_driver_that_does_not_answer_is_none(driver) -> None:
    assert driver("nvmlInit") is None
    assert driver("nvmlDeviceGetMemoryInfo") is None


def test_without_its_library_nvidia_smi_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cards, "DRIVER_FILES", (tmp_path,))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in *query-gpu*)"
        " echo '0, NVIDIA GeForce RTX 3060, 12288, 11000, 1288, 8.6, Enabled, 551.23';;"
        " *) echo '77, /usr/bin/python, 900'; echo '78, C:\\\\x\\\\chrome.exe, [N/A]';; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = driver_at_hand()
    assert found is not None
    (card,) = found.cards
    assert (card.total_bytes, card.capability, card.display) == (12288 * MIB, (8, 6), True)
    assert [(each.pid, each.name, each.bytes) for each in card.processes] == [
        (77, "python", 900 * MIB),
        (78, "chrome.exe", None),
    ]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert driver_at_hand() is None


def checks(
    monkeypatch: pytest.MonkeyPatch,
    driver: Driver | None = None,
    torch: TorchBuild | None = None,
    runs: Path = Path("runs"),
) -> dict[str, Check]:
    monkeypatch.setattr(machine_checks, "driver_at_hand", lambda: driver)
    monkeypatch.setattr(machine_checks, "torch_at_hand", lambda: torch)
    return {check.name: check for check in check_machine(runs).checks}


def card(name: str = "NVIDIA GeForce RTX 4090", free: int = 23 * GIB, **fields: Any) -> Card:
    return Card(index=0, name=name, total_bytes=24 * GIB, free_bytes=free, **fields)


def with_card(version: str = "570.86", cuda: tuple[int, int] = (12, 8), **fields: Any) -> Driver:
    fields = {"kept_bytes": GIB // 2, **fields}
    return Driver(version=version, cuda=cuda, cards=(card(**fields),), told_by="NVML")


CUDA = TorchBuild(version="2.13.0+cu128", cuda=(12, 8), triton=True)


def test_a_machine_without_a_card_still_has_disk_ram_and_torch_checked(monkeypatch) -> None:
    found = checks(monkeypatch)
    assert found["gpu"].status == "missing"
    assert found["torch"].status == "missing"
    assert found["torch"].hint == "pip install 'snugpt[train]'"
    assert "free" in found["disk"].text
    assert "GiB" in found["RAM"].text


def test_a_card_that_others_hold_gets_a_reserve(monkeypatch) -> None:
    assert checks(monkeypatch, with_card())["gpu 0"].status == "ok"
    held = checks(monkeypatch, with_card(free=20 * GIB, display=True))
    assert held["gpu 0"].status == "warning"
    assert held["gpu 0"].hint == "snugpt plan --reserve 3.5"
    assert "not visible from here" in held["held by"].text
    process = CardProcess(pid=9, name="python", bytes=3 * GIB)
    named = checks(monkeypatch, with_card(free=20 * GIB, processes=(process,)))
    assert "3.00 GiB, process 9 (python), computes" in named["held by"].text


@pytest.mark.parametrize(
    ("version", "on_windows", "spills", "setting"),
    [
        ("535.98", True, False, ""),
        ("536.40", True, True, "from driver 546.01 on"),
        ("551.23", True, True, "Prefer No Sysmem Fallback"),
        ("570.86.15", False, False, ""),
    ],
)
def test_windows_silent_spill_is_told(
    monkeypatch, version: str, on_windows: bool, spills: bool, setting: str
) -> None:
    monkeypatch.setattr(machine_checks, "is_wsl", lambda: on_windows)
    found = checks(monkeypatch, with_card(version))
    assert ("spill" in found) == spills
    if spills:
        assert setting in (found["spill"].hint or "")


def test_windows_under_linux_is_known_by_its_kernel() -> None:
    assert is_wsl("5.15.153.1-microsoft-standard-WSL2")
    assert not is_wsl("6.8.0-45-generic")


@pytest.mark.parametrize(
    ("build", "driver", "status", "words"),
    [
        (CUDA, with_card(), "ok", "for CUDA 12.8"),
        (TorchBuild(version="2.13.0+cpu"), with_card(), "missing", "can't use the card"),
        (TorchBuild(version="2.13.0+cpu"), None, "ok", "for CPU"),
        (
            TorchBuild(version="2.13.0+cu130", cuda=(13, 0)),
            with_card(),
            "missing",
            "the driver runs CUDA up to 12.8",
        ),
        (TorchBuild(version="2.13.0+rocm6.4", rocm="6.4.0"), None, "ok", "for ROCm 6.4.0"),
    ],
)
def test_a_build_that_can_t_use_the_card_is_told(
    monkeypatch, build: TorchBuild, driver: Driver | None, status: str, words: str
) -> None:
    check = checks(monkeypatch, driver, build)["torch"]
    assert check.status == status
    assert words in check.text


def test_a_card_that_left_the_default_wheels_gets_the_line_that_installs_its_own(
    monkeypatch,
) -> None:
    pascal = with_card(name="NVIDIA GeForce GTX 1070")
    check = checks(monkeypatch, pascal, CUDA)["kernels"]
    assert check.status == "missing"
    assert check.hint == "uv pip install 'torch<2.15' --torch-backend=cu126"
    own = TorchBuild(version="2.14.0+cu126", cuda=(12, 6))
    assert "kernels" not in checks(monkeypatch, pascal, own)
    assert "kernels" not in checks(monkeypatch, with_card(), CUDA)
    assert checks(monkeypatch, with_card(name="NVIDIA Future"), CUDA)["kernels"].status == "ok"


def test_every_card_hidden_is_told(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert checks(monkeypatch, with_card(), CUDA)["hidden"].status == "missing"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "hidden" not in checks(monkeypatch, with_card(), CUDA)


def test_little_disk_and_little_ram_are_warnings(monkeypatch, tmp_path: Path) -> None:
    sizes = SimpleNamespace(total=64 * MIB, free=2 * GIB)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: sizes)
    monkeypatch.setattr(machine_checks, "cpu_capacity_bytes", lambda: GIB)
    found = checks(monkeypatch, runs=tmp_path)
    assert found["disk"].status == found["RAM"].status == "warning"
    assert found["disk"].hint
    if "/dev/shm" in found:  # Linux
        assert found["/dev/shm"].status == "warning"


def test_the_installed_torch_is_read_from_its_files_without_importing_it(
    monkeypatch, tmp_path: Path
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "version.py").write_text(
        "__version__ = '2.13.0+cu128'\ndebug = False\ncuda: Optional[str] = '12.8'\n"
        "git_version = 'x'\nhip: Optional[str] = None\n"
    )
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(torch_build, "find_spec", lambda name: spec if name == "torch" else None)
    monkeypatch.setattr(torch_build, "version", lambda name: "2.13.0+cu128")
    assert torch_at_hand() == TorchBuild(version="2.13.0+cu128", cuda=(12, 8))
    (package / "version.py").unlink()
    assert torch_at_hand() == TorchBuild(version="2.13.0+cu128")


def test_this_machine_s_torch_is_what_its_own_version_file_says() -> None:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        pytest.skip("torch is not installed")
    says = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    found = torch_at_hand()
    assert found is not None
    assert found.version == says["__version__"]
    cuda = says["cuda"]
    assert found.cuda == (None if cuda is None else tuple(int(n) for n in cuda.split(".")[:2]))
