"""`moedge.export`: checkpoint folder in, bundle out."""

from __future__ import annotations

import datetime
import math
import os
import shutil
from pathlib import Path
from typing import Any

from ..bundle import (
    FORMAT,
    MANIFEST,
    MODEL,
    WEIGHTS,
    Bundle,
    Progress,
    file_entry,
    staged_directory,
    write_json,
)
from ..errors import BundleError, CheckpointError
from .checkpoint import Checkpoint
from .config import MoEConfig
from .families import find_family
from .functions import DOMAIN
from .graph import build_canonical_graph, save_graph
from .layout import Layout, plan_layout
from .options import GROUP_SIZES, WEIGHTS_CHOICES
from .parity import check_parity
from .quantization import find_algorithm
from .weights import check_sources, check_unused
from .writer import ClassError, write_weights

COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def export_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: str = "int4",
    group_size: int = 128,
    algorithm: str = "rtn",
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a Hugging Face checkpoint folder to a bundle.

    Args:
        source: folder with config.json and safetensors.
        output: the bundle's folder; it appears when everything is written and checked, or not at all.
        weights: fp32, fp16, int8 or int4.
        group_size: input channels that share a scale; the largest that divides a tensor's width is used, up to this.
        algorithm: how weights are quantized.
        verify: run the parity check.
        force: replace a folder that holds files.
        progress: called with (what, done, total).

    Raises:
        CheckpointError: the checkpoint cannot be read, or is not what its config says.
        ParityError: the export differs from the checkpoint.
        BundleError: the output cannot be written.
    """
    _check_options(weights, group_size)
    quantizer = find_algorithm(algorithm)
    checkpoint = Checkpoint.open(source)
    _refuse_quantized(checkpoint)
    family = find_family(checkpoint)
    config = family.read_config(checkpoint)
    plan = family.plan_weights(config)
    check_sources(checkpoint, plan)
    notes = check_unused(checkpoint, plan, family.ignored_tensors(config))
    layout = plan_layout(plan, weights, group_size, zero_points=False)
    target = Path(output)
    _check_target(checkpoint.path, target, layout.nbytes)
    with staged_directory(target, force=force) as staged:
        errors = write_weights(checkpoint, layout, staged / WEIGHTS, quantizer, progress)
        model = build_canonical_graph(config, layout, staged)
        save_graph(model, staged / MODEL)
        if verify:
            check_parity(checkpoint, config, layout, model, staged / WEIGHTS, progress)
        _copy_files(checkpoint.path, staged)
        manifest = _describe(checkpoint, config, layout, errors, notes)
        manifest["quantization"].update(weights=weights, group_size=group_size, algorithm=algorithm)
        manifest["provenance"]["verified"] = verify
        manifest["files"] = {path.name: file_entry(path) for path in sorted(staged.iterdir())}
        write_json(staged / MANIFEST, manifest)
    return Bundle.open(target)


def _check_options(weights: str, group_size: int) -> None:
    if weights not in WEIGHTS_CHOICES:
        raise CheckpointError(f"weights {weights!r} is not known; known: {', '.join(WEIGHTS_CHOICES)}")
    if group_size not in GROUP_SIZES:
        known = ", ".join(str(size) for size in sorted(GROUP_SIZES))
        raise CheckpointError(f"group size {group_size} is not supported; supported: {known}")


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    quantization = checkpoint.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{checkpoint.path}: quantization_config {method!r} is not supported; export a float checkpoint "
            "(fp32, fp16 or bf16)"
        )


def _check_target(source: Path, target: Path, wanted: int) -> None:
    if target.exists() and source.resolve() == target.resolve():
        raise BundleError(f"{target} is the checkpoint itself; name another output folder")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise BundleError(
            f"{target}: the bundle needs {wanted / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
            "free some space or name an output folder on another disk"
        )


def _copy_files(source: Path, staged: Path) -> None:
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, staged / name)


def _describe(
    checkpoint: Checkpoint, config: MoEConfig, layout: Layout, errors: dict[str, ClassError], notes: list[str]
) -> dict[str, Any]:
    from .. import __version__

    parameters = sum(math.prod(stored.weight.shape) for stored in layout.stored.values())
    experts = sum(math.prod(s.weight.shape) for s in layout.stored.values() if s.weight.role == "experts")
    idle = experts * (config.moe.num_experts - config.moe.num_experts_per_tok) // config.moe.num_experts
    gate = config.moe.gate
    classes: dict[str, Any] = {}
    for stored in layout.stored.values():
        entry: dict[str, Any] = {"dtype": stored.data.dtype}
        if stored.quantized:
            role = stored.weight.role
            entry |= {"group_size": stored.group_size, "relative_error": errors[role].relative}
        if stored.quantized or stored.weight.role not in classes:
            classes[stored.weight.role] = entry
    return {
        "format": FORMAT,
        "model": {
            "name": checkpoint.path.resolve().name,
            "family": config.family,
            "parameters": parameters,
            "active_parameters": parameters - idle,
        },
        "config": config.to_json(),
        "gating": [{"op": f"{DOMAIN}.{gate.op}", "layers": list(config.moe.layers), "attributes": gate.attributes}],
        "quantization": {"classes": classes},
        "sizes": _sizes(config, layout),
        "cache": [{"name": name, "width": width} for name, width in config.cache_entries()],
        "provenance": {
            "source": checkpoint.path.resolve().name,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "moedge": __version__,
            "tensors": len(checkpoint.entries),
            "checkpoint_sha256": checkpoint.fingerprint(),
            "notes": [*config.notes, *notes],
        },
    }


def _sizes(config: MoEConfig, layout: Layout) -> dict[str, int]:
    """Bytes by role; a tied table counts as the head, which is what reads all of it."""
    sizes = layout.sizes_by_role()
    if config.tie_word_embeddings:
        sizes["head"] = sizes.pop("embedding")
    roles = ("embedding", "norm", "attention", "dense_mlp", "router", "shared_experts", "experts", "head")
    return {role: sizes.get(role, 0) for role in roles}
