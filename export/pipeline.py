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
    sealed,
    staged_directory,
    write_json,
)
from ..errors import BundleError, CheckpointError
from .adapter import bind_adapter
from .checkpoint import Checkpoint
from .config import GateConfig, MoEConfig
from .digests import Digest, Key
from .families import Family, find_family
from .functions import DOMAIN
from .graph import build_canonical_graph, check_graph, save_graph
from .heads import choose_head, copies_embedding, settle_head, untie_head
from .layout import Layout, plan_layout
from .load_balance import make_load_aware
from .memory import calibration_bytes, plan_memory
from .options import BY_CHANNEL, GROUP_SIZES, WEIGHTS_CHOICES, LoadAware
from .ordering import order_columns
from .parity import MAX_ROUNDING, check_parity, find_needs
from .quantization import Algorithm, Calibrated, find_algorithm
from .quantization.sources import bind_sources, describe_sources
from .weights import Weight, check_sources, check_unused, keep_routers
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
    head: str | None = None,
    group_size: int = 128,
    algorithm: str = "rtn",
    zero_points: bool | None = None,
    verify: bool = True,
    force: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    max_memory: int | str | None = None,
    load_aware: LoadAware | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a Hugging Face checkpoint folder to a bundle.

    Args:
        source: folder with config.json and safetensors.
        output: the bundle's folder; it appears when everything is written and checked, or not at all.
        weights: fp32, fp16, int8 or int4.
        head: int8, int6 or int4, where weights are int4; None: the default. A tied head becomes a copy when it is int6
            or int4, and is int8 by default, as is one of a hidden size that 64 does not divide: int6 takes no other.
        group_size: input channels that share a scale; the largest that divides a tensor's width is used, up to this;
            0 is one scale for each output channel.
        algorithm: how weights are quantized.
        zero_points: whether each group of a layer's matrices gets a zero point of its own, or all are symmetric;
            None is the algorithm's own way. Embeddings and an int8 head are symmetric.
        verify: run the parity check.
        force: replace a folder that holds files.
        adapter: a PEFT folder of a LoRA adapter that is merged on the way.
        calibration: a file of text, for algorithms that calibrate.
        max_memory: bytes, or "2GiB", "500MB": bound on the process's peak resident memory; a quarter of what is free
            (or the least that works, where that is more).
        load_aware: choose experts under a penalty for busy ones and within a capacity of each; None: as trained.
        progress: called with (what, done, total).

    Raises:
        CheckpointError: the checkpoint cannot be read, is not what its config says, or needs more than `max_memory`.
        ParityError: the export differs from the checkpoint.
        BundleError: the output cannot be written.
    """
    check_options(weights, group_size)
    asked, head = head is not None, choose_head(weights, head)
    quantizer = find_algorithm(algorithm)
    checkpoint = Checkpoint.open(source)
    family = find_family(checkpoint)
    config = family.read_config(checkpoint)
    plan, notes = _make_plan(checkpoint, family, config, adapter)
    head = settle_head(head, config.hidden_size, tied=config.tie_word_embeddings, asked=asked)
    config, plan = untie_head(config, plan, head)
    if copies_embedding(plan):
        notes.append(f"the head is tied to the embedding; in {head} it is stored beside it")
    quantizer, extra = _calibrate(quantizer, checkpoint, config, plan, calibration)
    if load_aware is not None:
        config = make_load_aware(config, load_aware)
    own = quantizer.ZERO_POINTS if zero_points is None else zero_points
    layout = plan_layout(plan, weights, group_size, zero_points=own, head=head)
    target = Path(output)
    if not target.name:
        target = target.resolve()  # "." is another folder once it has been replaced
    _check_target(checkpoint.path, target, layout.nbytes)
    model = build_canonical_graph(config, layout, target)
    memory = plan_memory(plan, find_needs(config, layout, model, target) if verify else None, max_memory, extra)
    with staged_directory(target, force=force, replaces=MANIFEST) as staged:
        digests: dict[Key, Digest] | None = {} if verify else None
        path, planned = staged / WEIGHTS, layout
        layout, errors = write_weights(checkpoint, layout, path, quantizer, progress, memory.chunk, digests)
        if layout is not planned:
            model = build_canonical_graph(config, layout, target)
        save_graph(model, staged / MODEL)
        check_graph(staged / MODEL)
        if verify:
            rounding = getattr(quantizer, "MAX_ROUNDING", MAX_ROUNDING)
            check_parity(checkpoint, config, layout, model, path, memory, progress, rounding, digests)
        _copy_files(checkpoint.path, staged)
        said = quantizer.notes() if isinstance(quantizer, Calibrated) else []
        manifest = _describe(checkpoint, config, layout, errors, [*notes, *describe_sources(plan, errors), *said])
        manifest["quantization"].update(weights=weights, head=head, group_size=group_size, algorithm=algorithm)
        manifest["provenance"]["verified"] = verify
        manifest["files"] = {path.name: file_entry(path) for path in sorted(staged.iterdir())}
        write_json(staged / MANIFEST, sealed(manifest))
    return Bundle.open(target)


def check_options(weights: str, group_size: int) -> None:
    """Raises CheckpointError for precisions and group sizes that are not known."""
    if weights not in WEIGHTS_CHOICES:
        raise CheckpointError(f"weights {weights!r} is not known; known: {', '.join(WEIGHTS_CHOICES)}")
    if group_size not in (*GROUP_SIZES, BY_CHANNEL):
        known = ", ".join(str(size) for size in sorted(GROUP_SIZES))
        raise CheckpointError(
            f"group size {group_size} is not supported; supported: {known}, and {BY_CHANNEL} for one scale a channel"
        )


def _make_plan(
    checkpoint: Checkpoint, family: Family, config: MoEConfig, adapter: str | os.PathLike[str] | None
) -> tuple[list[Weight], list[str]]:
    """Every canonical tensor, bound to how the checkpoint holds it, and notes; every tensor has its use or a reason."""
    _check_extent(checkpoint, config)
    plan = bind_sources(checkpoint, family.plan_weights(config))
    merged: list[str] = []
    if adapter is not None:
        plan, merged = bind_adapter(checkpoint, plan, adapter)
    check_sources(checkpoint, plan)
    plan = order_columns(keep_routers(checkpoint, plan))
    return plan, merged + check_unused(checkpoint, plan, family.ignored_tensors(config))


def _calibrate(
    algorithm: Algorithm,
    checkpoint: Checkpoint,
    config: MoEConfig,
    plan: list[Weight],
    calibration: str | os.PathLike[str] | None,
) -> tuple[Algorithm, int]:
    """The algorithm, ready, and the bytes that it will hold beside the usual."""
    calibrate = getattr(algorithm, "calibrate", None)
    if calibrate is None:
        if calibration is not None:
            raise CheckpointError("this algorithm does not calibrate; leave --calibration out, or use --algorithm gptq")
        return algorithm, 0
    sequences = algorithm.read_sequences(checkpoint, calibration, config)  # type: ignore[attr-defined]
    tokens = sum(len(sequence) for sequence in sequences)
    return calibrate(checkpoint, config, plan, sequences), calibration_bytes(plan, config, tokens)


def _check_extent(checkpoint: Checkpoint, config: MoEConfig) -> None:
    """Refuse a config.json that claims absurdly much, before a plan of each of its tensors is made."""
    held = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    moe, layers = config.moe, config.num_hidden_layers
    # A norm of each layer and, quantized or not, at least as much of each expert.
    if config.hidden_size * (layers + len(moe.layers) * moe.num_experts) > held:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: {layers} layers with {moe.num_experts} experts are more than the "
            f"checkpoint's {held} values; correct config.json or download the checkpoint again"
        )


def _check_target(source: Path, target: Path, wanted: int) -> None:
    if target.exists() and source.resolve() == target.resolve():
        raise BundleError(f"{target} is the checkpoint itself; name another output folder")
    if target.resolve() in source.resolve().parents and (target / MANIFEST).is_file():
        raise BundleError(f"{target} holds the checkpoint {source}, which would go with it; name another output folder")
    check_room(target, wanted)


def check_room(target: Path, wanted: int) -> None:
    """Raises BundleError where the disk has not `wanted` bytes."""
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

    plan = [stored.weight for stored in layout.stored.values()]
    twice = layout["head.weight"].weight.size if copies_embedding(plan) else 0
    parameters = sum(weight.size for weight in plan) - twice
    experts = sum(math.prod(s.weight.shape) for s in layout.stored.values() if s.weight.role == "experts")
    idle = experts * (config.moe.num_experts - config.moe.num_experts_per_tok) // config.moe.num_experts
    gate = config.moe.gate
    return {
        "format": FORMAT,
        "model": {
            "name": checkpoint.path.resolve().name,
            "family": config.family,
            "parameters": parameters,
            "active_parameters": parameters - idle,
        },
        "config": config.to_json(),
        "gating": [_describe_gate(gate) | {"layers": list(config.moe.layers)}],
        "quantization": {"classes": describe_classes(layout, errors)},
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


def describe_classes(layout: Layout, errors: dict[str, ClassError]) -> dict[str, Any]:
    """How the tensors of each role are stored: the quantized form that most values have, the others under `also`.

    `float8_scales`, `float16_scales`, `bfloat16_values`: bytes of scales and of routers' matrices in those types, which
    not every kernel reads.
    """
    forms: dict[str, dict[tuple[bool, str, int, bool], int]] = {}
    for stored in layout.stored.values():
        own = stored.quantized and not stored.shared_zero_points
        form = stored.quantized, stored.data.dtype, stored.group_size, own
        held = forms.setdefault(stored.weight.role, {})
        held[form] = held.get(form, 0) + math.prod(stored.data.shape)
    classes = {role: _describe_class(held, errors.get(role)) for role, held in forms.items()}
    for stored in layout.stored.values():
        narrow = ("scales", stored.scales, ("float8", "float16")), ("values", stored.data, ("bfloat16",))
        for what, slot, dtypes in narrow:
            if slot is not None and slot.dtype in dtypes:
                name = f"{slot.dtype}_{what}"
                entry = classes[stored.weight.role]
                entry[name] = entry.get(name, 0) + slot.nbytes
    return classes


def _describe_class(held: dict[tuple[bool, str, int, bool], int], error: ClassError | None) -> dict[str, Any]:
    """`held`: values by (quantized, dtype, group size, zero points)."""
    first, *others = sorted(held, key=lambda form: (form[0], held[form]), reverse=True)
    quantized, dtype, group, zero_points = first
    entry: dict[str, Any] = {"dtype": dtype}
    if quantized and error is not None:
        entry |= {"group_size": group, "zero_points": zero_points, "relative_error": error.relative}
    if others:
        entry["also"] = [
            f"{dtype}{f', group {group}' if group else ''}{', zero points' if own else ''}"
            for _, dtype, group, own in others
        ]
    return entry


def _describe_gate(gate: GateConfig) -> dict[str, Any]:
    over = {} if gate.base is None else {"over": _describe_gate(gate.base)}
    return {"op": f"{DOMAIN}.{gate.op}", "attributes": gate.attributes, **over}


def _sizes(config: MoEConfig, layout: Layout) -> dict[str, int]:
    """Bytes by role; a tied table counts as the head, which is what reads all of it."""
    sizes = layout.sizes_by_role()
    if config.tie_word_embeddings:
        sizes["head"] = sizes.get("head", 0) + sizes.pop("embedding")
    roles = ("embedding", "norm", "attention", "dense_mlp", "router", "shared_experts", "experts", "head")
    return {role: sizes.get(role, 0) for role in roles}
