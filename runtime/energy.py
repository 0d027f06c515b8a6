"""Energy of a stretch of work, from whatever counters the machine has; where there are none, the reason.

On a Jetson `tegrastats` tells the board's power. An engine on an NVIDIA GPU is measured by NVML's energy counter of the
GPU, one on the CPU by RAPL's counters of the packages. Nothing is estimated.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from ..errors import DependencyError, require

_POWERCAP = Path("/sys/class/powercap")
_TEGRASTATS = ("tegrastats", "--interval", "100")
# The whole board's input where the board names it (Orin Nano, Orin NX, Nano, Xavier NX) ...
_BOARD = re.compile(r"(?:VDD_IN|POM_5V_IN) (\d+)(?:mW)?/")
# ... and the rails that make it up where it does not (AGX Orin, AGX Xavier, Thor).
_RAILS = re.compile(r"(?:VDD_GPU_SOC|VDD_CPU_CV|VIN_SYS_5V0|VDD_GPU|VDD_CPU|VDD_CPU_SOC_MSS) (\d+)(?:mW)?/")


class Source(Protocol):
    """A counter of joules that only grows. `reason`: why it cannot be read."""

    name: str
    reason: str | None

    def read(self) -> float | None:
        """Joules since some moment."""

    def close(self) -> None: ...


class EnergyMeter:
    """Joules between `start` and `joules`; `source` says of what, `reason` why there are none."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._began: float | None = None

    @property
    def source(self) -> str | None:
        return None if self.reason else self._source.name

    @property
    def reason(self) -> str | None:
        return self._source.reason

    def start(self) -> None:
        self._began = self._source.read()

    def joules(self) -> float | None:
        """Since `start`; None where `reason` says why."""
        now = self._source.read()
        return None if self.reason or now is None or self._began is None else now - self._began

    def close(self) -> None:
        """End what reads the counters."""
        self._source.close()


def open_meter(on_gpu: bool) -> EnergyMeter:
    """The meter that fits this machine and where the engine runs."""
    if shutil.which(_TEGRASTATS[0]):
        return EnergyMeter(Tegrastats())
    return EnergyMeter(Nvml() if on_gpu else Rapl())


class Rapl:
    """The CPU packages, by the kernel's powercap files."""

    name = "RAPL, CPU packages"

    def __init__(self, root: Path = _POWERCAP) -> None:
        self.reason: str | None = None
        self._total = 0.0
        self._counters: list[tuple[Path, int]] = []  # (energy_uj, the count at which it wraps)
        for zone in sorted(root.glob("intel-rapl:*")):
            if zone.name.count(":") == 1:  # a package; intel-rapl:0:0 is a part of it
                self._counters.append((zone / "energy_uj", _number(zone / "max_energy_range_uj") or 0))
        self._last = [_number(counter) for counter, _ in self._counters]
        if not self._counters:
            self.reason = "this machine shows no RAPL energy counters (/sys/class/powercap)"
        elif None in self._last:
            self.reason = f"{self._counters[0][0]} is not readable by this user"

    def read(self) -> float | None:
        if self.reason:
            return None
        for place, (counter, wrap) in enumerate(self._counters):
            now, last = _number(counter), self._last[place]
            if now is None or last is None:
                self.reason = f"{counter} could no longer be read"
                return None
            self._total += now - last + (wrap if now < last else 0)
            self._last[place] = now
        return self._total / 1e6

    def close(self) -> None:
        pass


class Nvml:
    """One NVIDIA GPU, by the energy counter that NVML has from Volta on (millijoules since the driver was loaded)."""

    def __init__(self, index: int = 0) -> None:
        self.name = f"NVML, GPU {index}"
        self.reason: str | None = None
        self._nvml: Any = None
        try:
            self._nvml = require("pynvml", "rtx", purpose="read a GPU's energy")
            self._nvml.nvmlInit()
            self._device = self._nvml.nvmlDeviceGetHandleByIndex(index)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
        except DependencyError as error:
            self.reason = str(error)
        except Exception as error:  # NVML's own classes, one for each code
            self.reason = f"NVML shows no energy counter of GPU {index} ({error})"

    def read(self) -> float | None:
        if self.reason:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3
        except Exception as error:
            self.reason = f"{self.name} could no longer be read ({error})"
            return None

    def close(self) -> None:
        if self._nvml is not None and not self.reason:
            self._nvml.nvmlShutdown()


class Tegrastats:
    """A Jetson's board: the power that `tegrastats` prints ten times a second, summed over time."""

    name = "tegrastats, board"

    def __init__(self, command: tuple[str, ...] = _TEGRASTATS, patience: float = 3.0) -> None:
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._joules = self._watts = 0.0
        self._last: float | None = None
        self._first = threading.Event()
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError as error:
            self.reason = f"tegrastats does not run ({error})"
            return
        self._thread = threading.Thread(target=self._follow, name="moedge-tegrastats", daemon=True)
        self._thread.start()
        if not self._first.wait(patience) or self._last is None:
            self.reason = "tegrastats tells no power of this board (VDD_IN and the like); try it as root"
            self.close()

    def read(self) -> float | None:
        with self._lock:
            if self.reason or self._last is None:
                return None
            return self._joules + self._watts * (time.monotonic() - self._last)

    def close(self) -> None:
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()
            self._thread.join()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            watts, now = read_watts(line), time.monotonic()
            if watts is None:
                continue
            with self._lock:
                if self._last is not None:
                    self._joules += self._watts * (now - self._last)
                self._watts, self._last = watts, now
            self._first.set()
        self._first.set()


def read_watts(line: str) -> float | None:
    """The board's power in a line of tegrastats, which tells milliwatts now and on average; None: not told."""
    found = _BOARD.findall(line) or _RAILS.findall(line)
    return sum(map(int, found)) / 1e3 if found else None


def describe_gpu_state(index: int = 0) -> dict[str, Any] | None:
    """A GPU's clocks (MHz, now and at most), power limit (W) and driver as NVML tells them; None without NVML."""
    try:
        nvml = require("pynvml", "rtx")
        nvml.nvmlInit()
    except Exception:
        return None
    device = nvml.nvmlDeviceGetHandleByIndex(index)
    asked = {
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM),
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1e3,
        "driver": nvml.nvmlSystemGetDriverVersion,
    }
    found = {}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except nvml.NVMLError:
            found[name] = None
    nvml.nvmlShutdown()
    return found


def process_gpu_memory(index: int = 0) -> int | None:
    """Bytes of a GPU's memory that this process holds, as NVML tells them; None without NVML."""
    try:
        nvml = require("pynvml", "rtx")
        nvml.nvmlInit()
        running = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index))
    except Exception:
        return None
    held = [process.usedGpuMemory for process in running if process.pid == os.getpid()]
    nvml.nvmlShutdown()
    return held[0] if held else None


def power_mode() -> str | None:
    """A Jetson's power mode as `nvpmodel -q` names it."""
    if not shutil.which("nvpmodel"):
        return None
    try:
        told = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"Power Mode:\s*(\S+)", told)
    return found.group(1) if found else None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
