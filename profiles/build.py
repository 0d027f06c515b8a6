"""`moedge.build`: bundle and device profile in, engine out, under BUNDLE/engines/PROFILE/."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from ..bundle import (
    ENGINE_MANIFEST,
    FORMAT,
    MODEL,
    WEIGHTS,
    Bundle,
    Progress,
    file_entry,
    find_faults,
    read_json,
    staged_directory,
    write_json,
)
from ..errors import BuildError
from .device import DeviceProfile, load_profile
from .fit import Fit, check_fit
from .targets import BuildRequest, find_target

BUILD_FOLDER_MANIFEST = "build.json"
DEFAULT_MAX_SEQ_LEN = 4096


def build(
    bundle: str | os.PathLike[str],
    profile: str | os.PathLike[str] | DeviceProfile,
    *,
    backend: str | None = None,
    max_batch: int = 1,
    max_seq_len: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build an engine for a device; returns its folder. An engine that was there is replaced when the new one is whole.

    Args:
        bundle: what `moedge.export` wrote.
        profile: a profile's name, a TOML file, or a loaded profile.
        backend: a target other than the profile's own (`moedge.profiles.targets.list_targets()`).
        max_batch: sequences that run at once.
        max_seq_len: tokens of prompt and answer together; the model's own limit up to 4096 unless given.
        progress: called with (what, done, total).

    Raises:
        BundleError: the bundle is missing or damaged.
        ProfileError: the profile is unknown or wrong.
        BuildError: it does not fit the device, or the target's builder refused or failed.
    """
    opened = Bundle.open(bundle)
    device = profile if isinstance(profile, DeviceProfile) else load_profile(profile)
    target = find_target(backend or device.target)
    request = BuildRequest(opened, device, max_batch, pick_max_seq_len(opened, max_seq_len))
    fit = check_build_fit(opened, device, max_batch, request.max_seq_len)
    if not fit.fits:
        raise BuildError(fit.explain())
    check_sources(opened)
    folder = opened.engine_dir(device.name)
    started = time.monotonic()
    with staged_directory(folder, force=True, error=BuildError) as staged:
        fields = target.build(request, staged, progress)
        document = {
            "format": FORMAT,
            "profile": device.name,
            "target": backend or device.target,
            **fields,
            **_describe_model(opened),
            "fit": fit.to_json(),
            "build_seconds": round(time.monotonic() - started, 3),
            "peak_build_memory_bytes": fields.get("peak_build_memory_bytes") or peak_memory_bytes(),
        }
        write_engine_manifest(staged, document)
    return folder


def pick_max_seq_len(bundle: Bundle, asked: int | None) -> int:
    """Tokens of room; raises BuildError beyond what the model was made for."""
    limit = int(bundle.config["max_position_embeddings"])
    if asked is None:
        return min(limit, DEFAULT_MAX_SEQ_LEN)
    if not 1 <= asked <= limit:
        raise BuildError(f"max_seq_len {asked}: this model takes 1 to {limit} tokens; use --max-seq-len {limit}")
    return asked


def check_build_fit(bundle: Bundle, device: DeviceProfile, max_batch: int, max_seq_len: int) -> Fit:
    """The fit check that `build` makes first and `--dry-run` prints."""
    if max_batch < 1:
        raise BuildError(f"max_batch {max_batch}: at least 1 was expected; use --max-batch 1")
    return check_fit(bundle.manifest, device, max_batch, max_seq_len)


def check_sources(bundle: Bundle) -> None:
    """The graph and the weights are what the manifest says, so that no engine is made from damaged ones.

    Raises:
        BuildError: names the first damaged file.
    """
    files = {name: entry for name, entry in bundle.manifest["files"].items() if name in (MODEL, WEIGHTS)}
    faults = find_faults(bundle.path, files)
    if faults:
        raise BuildError(f"{faults[0]}: the bundle is damaged; export it again: moedge export ... --force")


def finish_build(folder: Path, progress: Progress | None = None) -> Path:
    """Finish, on the device, a folder that `build` prepared elsewhere; returns the folder.

    Raises:
        BuildError: not such a folder, damaged, or the device's TensorRT is missing.
    """
    settings = read_json(folder / BUILD_FOLDER_MANIFEST, BuildError)
    target: Any = find_target(str(settings.get("target")))
    document = read_json(folder / ENGINE_MANIFEST, BuildError)
    started = time.monotonic()
    document.update(target.finish(folder, progress))
    document["build_seconds"] = round(time.monotonic() - started, 3)
    write_engine_manifest(folder, document)
    return folder


def write_engine_manifest(folder: Path, document: dict[str, Any]) -> None:
    """Write engine.json with the bytes and checksum of every other file of the folder."""
    files = {
        path.relative_to(folder).as_posix(): file_entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ENGINE_MANIFEST
    }
    document["files"] = files
    document["bytes"] = sum(entry["bytes"] for entry in files.values())
    write_json(folder / ENGINE_MANIFEST, document)


def _describe_model(bundle: Bundle) -> dict[str, Any]:
    """What a session and a report need of the model, so that an engine folder speaks for itself."""
    config, files = bundle.config, bundle.manifest["files"]
    moe = config["moe"]
    return {
        "model": bundle.manifest["model"]["name"],
        "made_from": {name: files[name]["sha256"] for name in (MODEL, WEIGHTS)},
        "vocab_size": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "moe_layers": moe["layers"],
        "num_experts": moe["num_experts"],
        "num_experts_per_tok": moe["num_experts_per_tok"],
    }


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, and of its largest child."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
