"""This machine: what it is, how fast it reads memory, how much memory the process took.

Figures come from the operating system; what cannot be read is None, never a guess.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CPUS = Path("/sys/devices/system/cpu")
_MIB = 1 << 20

# A buffer this many times the last-level cache is read from memory, not from the cache.
_BEYOND_CACHE = 4
_BANDWIDTH_BYTES = 256 * _MIB


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as its driver describes it."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int


def describe() -> dict[str, Any]:
    """The hardware and the software that a measurement ran on, as JSON."""
    import numpy

    from .energy import describe_gpu_state, power_mode

    return {
        "cpu": cpu_name(),
        "cpu_model": cpu_model(),
        "cores": default_threads(),
        "logical_cpus": len(_affinity()),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": memory_bytes(),
        "frequency_governor": _read(_CPUS / "cpu0/cpufreq/scaling_governor"),
        "frequency_hz": _frequency(),
        "max_frequency_hz": _kilohertz(_CPUS / "cpu0/cpufreq/cpuinfo_max_freq"),
        "gpus": [
            {"name": gpu.name, "compute_capability": list(gpu.compute_capability), "memory_bytes": gpu.memory_bytes}
            for gpu in gpus()
        ],
        "gpu_driver": gpu_driver(),
        "gpu_state": describe_gpu_state() if gpus() else None,
        "power_mode": power_mode(),
        "board": _board(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": numpy.__version__,
    }


def cpu_name() -> str:
    """What the CPU calls itself."""
    text = _read(Path("/proc/cpuinfo")) or ""
    for key in ("model name", "Model", "Hardware"):
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def cpu_model() -> str | None:
    """Family and model number of an x86 processor (Linux): its generation, where its name says nothing of it."""
    text = _read(Path("/proc/cpuinfo")) or ""
    found = [re.search(rf"^{key}\s*:\s*(\d+)$", text, re.MULTILINE) for key in ("cpu family", "model")]
    return f"family {found[0].group(1)} model {found[1].group(1)}" if found[0] and found[1] else None


def name_of(compute_capability: tuple[int, int] | None) -> str:
    """What the hardware calls itself that runs an engine for this capability; None: the CPU."""
    fitting = [gpu.name for gpu in gpus() if gpu.compute_capability == compute_capability]
    return fitting[0] if fitting else cpu_name()


def default_threads() -> int:
    """Physical cores that this process may use: within its affinity and its cgroup's quota, siblings counted once."""
    siblings = {_read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in _affinity()}
    quota = _cgroup_cpus()
    return max(1, min(len(siblings), quota) if quota else len(siblings))


def last_level_cache_bytes() -> int | None:
    """Bytes of CPU 0's largest cache."""
    sizes = [_cache_bytes(_read(entry / "size")) for entry in (_CPUS / "cpu0/cache").glob("index*")]
    return max((size for size in sizes if size), default=None)


def memory_bytes() -> int | None:
    """Bytes of memory in the machine, or of the cgroup's limit where that is less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _read(Path("/sys/fs/cgroup/memory.max"))
    return min(total, int(limit)) if limit and limit.isdigit() else total


def available_memory_bytes() -> int | None:
    """Bytes that can be had without swapping."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def measure_bandwidth(threads: int, repeats: int = 5) -> float:
    """Bytes per second that `threads` threads read from memory: the best of `repeats` sweeps over a large buffer.

    A maximum over int32 costs one instruction per cache line or two, so the memory is what it waits for; reading alone
    is also what decoding does with the weights.
    """
    import numpy as np

    size = max(_BANDWIDTH_BYTES, _BEYOND_CACHE * (last_level_cache_bytes() or 0))
    available = available_memory_bytes()
    if available:
        size = min(size, available // 2)
    buffer = np.ones(size // 4, dtype=np.int32)
    parts = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            best = min(best, time.perf_counter() - began)
    return buffer.nbytes / best


def reset_peak_memory() -> bool:
    """Forget the peak resident memory so far; False where the system cannot, and the peak is the whole process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int | None:
    """The most resident memory of this process since it began or since `reset_peak_memory`."""
    peak = _kibibytes(Path("/proc/self/status"), "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if platform.system() == "Darwin" else used * 1024


def release_memory() -> None:
    """Give memory that nobody holds any more back to the system."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc): it keeps some of it otherwise."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


_gpus: list[Gpu] | None = None
_gpus_lock = threading.Lock()


def gpus() -> list[Gpu]:
    """The CUDA devices of this machine, asked of the driver once; empty without a driver."""
    global _gpus
    with _gpus_lock:
        if _gpus is None:
            _gpus = _query_gpus()
        return _gpus


def _open_cuda() -> Any:
    """The driver's library; None where there is none."""
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _query_gpus() -> list[Gpu]:
    cuda = _open_cuda()
    if cuda is None:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        device, text, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        failed = (
            cuda.cuDeviceGet(ctypes.byref(device), index)
            or cuda.cuDeviceGetName(text, len(text), device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
            or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
            or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        )
        if not failed:
            capability = (major.value, minor.value)
            found.append(Gpu(text.value.decode(errors="replace"), capability, memory.value))
    return found


def cuda_driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports, (major, minor); None without a driver."""
    cuda = _open_cuda()
    number = ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def gpu_driver() -> str | None:
    """Version of the NVIDIA kernel driver."""
    text = _read(Path("/proc/driver/nvidia/version"))
    found = re.search(r"Module\D*?(\d+\.\d+(\.\d+)?)", text) if text else None
    return found.group(1) if found else None


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _cgroup_cpus() -> int | None:
    """Whole CPUs that the cgroup's quota allows, at least one: a thread more would spin while it is throttled."""
    words = (_read(Path("/sys/fs/cgroup/cpu.max")) or "").split()
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
        return max(1, int(words[0]) // int(words[1]))
    return None


def _board() -> str | None:
    """What a single-board computer calls itself ("NVIDIA Jetson AGX Orin ...")."""
    return (_read(Path("/proc/device-tree/model")) or "").strip("\0") or None


def _cache_bytes(text: str | None) -> int | None:
    found = re.fullmatch(r"(\d+)([KM]?)", text or "")
    return int(found.group(1)) * {"": 1, "K": 1 << 10, "M": 1 << 20}[found.group(2)] if found else None


def _frequency() -> int | None:
    """CPU 0's clock as it is now."""
    told = _kilohertz(_CPUS / "cpu0/cpufreq/scaling_cur_freq")
    found = re.search(r"^cpu MHz\s*:\s*([\d.]+)$", _read(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return told or (round(1e6 * float(found.group(1))) if found else None)


def _kilohertz(path: Path) -> int | None:
    text = _read(path)
    return int(text) * 1000 if text and text.isdigit() else None


def _kibibytes(path: Path, key: str) -> int | None:
    found = re.search(rf"^{key}:\s*(\d+) kB$", _read(path) or "", re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
