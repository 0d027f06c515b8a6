"""Target `tensorrt`: engines by the TensorRT of JetPack and data centres, which builds only on the device itself.

Elsewhere `build` writes a folder with all that the device needs; `moedge build FOLDER` finishes it there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from ...bundle import MODEL, Progress, file_entry, find_faults, read_json, write_json
from ...errors import BuildError
from ...runtime import machine
from . import BuildRequest
from ._trt_build import LOG, BuildJob, run_builder
from .tensorrt_rtx import SETTINGS, describe_result, prepare_network, shape_profiles

PACKAGE = "tensorrt"
MINIMUM = (10, 15)  # the in-place cache layer came with it
FOLDER_FORMAT = 1
MANIFEST = "build.json"

_README = """\
This folder holds a model lowered for TensorRT {minimum} or later, to be built on {title}.
On the device, with JetPack's TensorRT and `pip install moedge`: moedge build {folder}
build.json says with which settings; engine.plan and engine.json are what comes out.
"""


def build(request: BuildRequest, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Write the lowered network, its weights and build.json; build at once where this machine is the device.

    Raises:
        BuildError: a size beyond this target, or the builder failed.
        ParityError: the lowered network is not the canonical graph.
        DependencyError: onnxruntime is not installed.
    """
    capability = request.device.compute_capability
    if capability is None:
        raise BuildError(
            f"{request.device.name} has no compute capability, and TensorRT builds for NVIDIA GPUs alone; "
            "use --backend onnxruntime"
        )
    prepared = prepare_network(request, folder, progress)
    fields = prepared.fields | {
        "backend": PACKAGE,
        "backend_version": f">={_dotted(MINIMUM)}",
        "compute_capability": list(capability),
        "status": "prepared",
    }
    weights = prepared.network.weights.location
    manifest = {
        "format": FOLDER_FORMAT,
        "target": PACKAGE,
        "profile": request.device.name,
        "device": request.device.title,
        "package": PACKAGE,
        "package_minimum": _dotted(MINIMUM),
        "compute_capability": list(capability),
        "settings": SETTINGS,
        "profiles": shape_profiles(request.max_seq_len),
        "smallest_matrix": prepared.smallest_matrix,
        "session": fields["session"],
        "files": {name: file_entry(folder / name) for name in (MODEL, weights)},
    }
    write_json(folder / MANIFEST, manifest)
    readme = _README.format(minimum=_dotted(MINIMUM), title=request.device.title, folder=request.device.name)
    (folder / "README.txt").write_text(readme, encoding="utf-8")
    if importlib.util.find_spec(PACKAGE) is not None and _is_here(capability):
        fields |= finish(folder, progress)
    return fields


def finish(folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Build, on the device, what `build` prepared elsewhere; returns the fields of engine.json that change.

    Raises:
        BuildError: the folder is damaged, TensorRT is missing or old, this is not the device, or the builder failed.
    """
    manifest = _read_manifest(folder)
    faults = find_faults(folder, manifest["files"], progress)
    if faults:
        raise BuildError(
            f"{faults[0]}: the folder was damaged on its way; copy it again, or prepare it again: moedge build BUNDLE "
            f"--profile {manifest['profile']}"
        )
    capability = (int(manifest["compute_capability"][0]), int(manifest["compute_capability"][1]))
    _check_package(folder, manifest)
    if not _is_here(capability):
        gpus = [f"{gpu.name} ({_dotted(gpu.compute_capability)})" for gpu in machine.gpus()]
        here = ", ".join(gpus) or "no GPU with a driver"
        raise BuildError(
            f"{folder} is for {manifest['device']} (compute capability {_dotted(capability)}) and this machine has "
            f"{here}: TensorRT builds only for the GPU at hand; copy the folder to the device and run there: "
            f"moedge build {folder}"
        )
    job = BuildJob(
        package=str(manifest["package"]),
        model=folder / MODEL,
        folder=folder,
        compute_capability=None,
        profiles=manifest["profiles"],
        settings=manifest["settings"],
        failed_log=folder / LOG,
    )
    result = run_builder(job, f"building for {manifest['profile']}", progress)
    session = manifest["session"] | describe_result(result, folder, int(manifest["smallest_matrix"]))
    return {
        "backend_version": result["version"],
        "status": "ready",
        "peak_build_memory_bytes": result["peak_bytes"],
        "session": session,
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(path, BuildError)
    again = "prepare the folder again: moedge build BUNDLE --profile NAME"
    wanted = "format profile device package package_minimum compute_capability settings profiles session files".split()
    missing = [key for key in (*wanted, "smallest_matrix") if key not in manifest]
    if missing:
        raise BuildError(f"{path}: missing {', '.join(missing)}; {again}")
    if manifest["format"] != FOLDER_FORMAT:
        raise BuildError(f"{path}: format {manifest['format']}, this version reads {FOLDER_FORMAT}; {again}")
    return manifest


def _check_package(folder: Path, manifest: dict[str, Any]) -> None:
    """The device's TensorRT is installed and new enough."""
    package, minimum = str(manifest["package"]), str(manifest["package_minimum"])
    if importlib.util.find_spec(package) is None:
        raise BuildError(
            f"{folder} cannot be finished here: the Python package '{package}' (TensorRT {minimum} or later) is not "
            "installed; on a Jetson it comes with JetPack (sudo apt install nvidia-jetpack python3-libnvinfer, in a "
            "venv made with --system-site-packages), elsewhere: pip install 'moedge[tensorrt]'; then: "
            f"moedge build {folder}"
        )
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return  # installed by other means than a package; the builder will say what it cannot do
    if _numbers(version) < _numbers(minimum):
        raise BuildError(
            f"TensorRT {version} is installed, and this network needs {minimum} or later (the in-place cache layer "
            f"came with it); update JetPack or install that version, then: moedge build {folder}"
        )


def _is_here(capability: tuple[int, int]) -> bool:
    return any(gpu.compute_capability == capability for gpu in machine.gpus())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _dotted(parts: tuple[int, int]) -> str:
    return f"{parts[0]}.{parts[1]}"
