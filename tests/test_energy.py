"""Energy counters: RAPL's files, NVML's counter and tegrastats' lines, each by a stand-in that counts what we say."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moedge.runtime import energy
from moedge.runtime.energy import EnergyMeter, Nvml, Rapl, Tegrastats, read_watts


def test_rapl_counts_packages_once_and_through_a_wrap(tmp_path: Path) -> None:
    meter = EnergyMeter(Rapl(tmp_path))
    meter.start()
    assert meter.joules() is None and meter.reason == "this machine shows no RAPL energy counters (/sys/class/powercap)"
    assert meter.source is None
    for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text("900\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("1000\n")
    meter = EnergyMeter(Rapl(tmp_path))
    meter.start()
    (tmp_path / "intel-rapl:0/energy_uj").write_text("100\n")  # wrapped
    (tmp_path / "intel-rapl:1/energy_uj").write_text("950\n")
    assert meter.reason is None and meter.source == "RAPL, CPU packages"
    assert meter.joules() == pytest.approx((200 + 50) / 1e6)
    (tmp_path / "intel-rapl:0/energy_uj").write_text("150\n")
    assert meter.joules() == pytest.approx((200 + 50 + 50) / 1e6)
    (tmp_path / "intel-rapl:0/energy_uj").unlink()
    assert "is not readable by this user" in str(EnergyMeter(Rapl(tmp_path)).reason)
    assert meter.joules() is None and "could no longer be read" in str(meter.reason)


class FakeNvml:
    """The functions of pynvml that are used, with a counter of ours in millijoules."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self) -> None:
        self.millijoules = 5000
        self.refuses = False
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:
        if self.refuses:
            raise self.NVMLError("Not Supported")
        return self.millijoules

    def nvmlDeviceGetClockInfo(self, device: int, kind: int) -> int:
        return 1000 * kind

    def nvmlDeviceGetMaxClockInfo(self, device: int, kind: int) -> int:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetEnforcedPowerLimit(self, device: int) -> int:
        return 450_000

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[SimpleNamespace]:
        own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=123)
        return [SimpleNamespace(pid=1, usedGpuMemory=7), own]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"


def test_nvml_counts_joules_and_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    meter = EnergyMeter(Nvml())
    meter.start()
    fake.millijoules += 1500
    assert meter.joules() == pytest.approx(1.5) and meter.source == "NVML, GPU 0"
    meter.close()
    assert fake.open == 0
    assert energy.describe_gpu_state() == {
        "sm_clock_mhz": 1000,
        "max_sm_clock_mhz": None,
        "memory_clock_mhz": 2000,
        "power_limit_w": 450.0,
        "driver": "580.1",
    }
    assert energy.process_gpu_memory() == 123
    fake.refuses = True
    assert Nvml().reason == "NVML shows no energy counter of GPU 0 (Not Supported)"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Nvml().reason == (
        "pynvml is not installed (needed to read a GPU's energy); install it: pip install 'moedge[rtx]'"
    )
    assert energy.describe_gpu_state() is None and energy.process_gpu_memory() is None


@pytest.mark.parametrize(
    "line,watts",
    [
        ("RAM 2448/7620MB (lfb 4x4MB) CPU [0%@729] VDD_IN 4567mW/4500mW VDD_CPU_GPU_CV 600mW/600mW", 4.567),
        ("RAM 1/3964MB POM_5V_IN 1922/1922 POM_5V_GPU 40/40 POM_5V_CPU 322/322", 1.922),
        ("VDD_GPU_SOC 3200mW/3200mW VDD_CPU_CV 800mW/800mW VIN_SYS_5V0 4000mW/4000mW NC 0mW/0mW", 8.0),
        ("RAM 2448/7620MB (lfb 4x4MB) CPU [0%@729]", None),
    ],
)
def test_power_in_a_line_of_tegrastats(line: str, watts: float | None) -> None:
    assert read_watts(line) == (None if watts is None else pytest.approx(watts))


def test_tegrastats_sums_power_over_time() -> None:
    lines = "import time\nwhile True: print('VDD_IN 5000mW/5000mW', flush=True); time.sleep(0.01)"
    source = Tegrastats((sys.executable, "-c", lines), patience=30)
    meter = EnergyMeter(source)
    began = time.monotonic()
    meter.start()
    time.sleep(0.1)
    joules = meter.joules()
    took = time.monotonic() - began
    meter.close()
    assert meter.source == "tegrastats, board"
    assert joules is not None and 5 * 0.1 * 0.99 <= joules <= 5 * took * 1.01


def test_tegrastats_that_tells_nothing() -> None:
    silent = Tegrastats((sys.executable, "-c", "print('RAM 1/2MB')"), patience=30)
    said = "tegrastats tells no power of this board (VDD_IN and the like); try it as root"
    assert silent.reason == said and silent.read() is None
    assert "tegrastats does not run" in str(Tegrastats(("/nowhere/tegrastats",)).reason)


def test_which_counter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(energy.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert energy.open_meter(on_gpu=True).source == "NVML, GPU 0"
    assert str(energy.open_meter(on_gpu=False).source or energy.open_meter(on_gpu=False).reason).count("RAPL") == 1
    monkeypatch.setattr(energy.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(energy, "Tegrastats", lambda: SimpleNamespace(name="tegrastats, board", reason=None))
    assert energy.open_meter(on_gpu=False).source == "tegrastats, board"
    said = SimpleNamespace(stdout="NV Power Mode: MAXN\n0\n")
    monkeypatch.setattr(energy.subprocess, "run", lambda *args, **kwargs: said)
    assert energy.power_mode() == "MAXN"
