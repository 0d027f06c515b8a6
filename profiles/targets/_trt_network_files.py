"""The lowered network in files, part by part, and what engine.json says of it: shared by both TensorRT targets."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...bundle import Progress
from ...errors import BuildError
from ...export import memory
from ...export.config import MoEConfig, moe_config_from_json
from . import BuildRequest
from ._canonical import describe_load, load_canonical
from ._trt_check import check_numerics, measure_half
from ._trt_form import NetworkForm, cache_widths, choose_form
from ._trt_log import read_build_log
from ._trt_parts import NetworkSizes, Part, caller_bytes, estimate_build_bytes, measure_sizes, plan_parts
from .tensorrt_network import LoweredNetwork, lower_network

# TF32 would round the router's float32 products, and with them the choice of experts.
SETTINGS: dict[str, Any] = {"tf32": False}


@dataclass(frozen=True)
class Prepared:
    """A network that was checked and cut, and the fields of engine.json that follow from it.

    `smallest_matrix`, elements of an expert's: a kernel that writes as much out writes experts out. `check_bytes`: what
    checking it may take; None for no bound.
    """

    parts: list[Part]
    total: int
    form: NetworkForm
    smallest_matrix: int
    check_bytes: int | None
    numerics: dict[str, Any]
    fields: dict[str, Any]

    def measure_half(self, request: BuildRequest, paths: list[Path], progress: Progress | None) -> None:
        """What half precision costs, with the parts as they were written."""
        self.numerics["half_precision"] = measure_half(request.bundle, paths, self.form, progress)


def prepare_network(request: BuildRequest, bound: int | None, progress: Progress | None) -> Prepared:
    """Plan the parts so that building each takes at most `bound` bytes, and check the lowering; nothing is written yet.

    Raises:
        BuildError: sizes beyond these targets, or a bound below what one layer needs.
        ParityError: the lowered network is not the canonical graph.
    """
    network, _, parts = _plan_network(request, bound)
    form, config = network.form, moe_config_from_json(request.bundle.config)
    # Checked here, whatever machine the engines are then built on.
    check_bytes = None if request.max_memory is None else request.max_memory - memory.resident_bytes()
    numerics = check_numerics(request.bundle, progress, parts=parts, memory=check_bytes, form=form)
    smallest = config.moe.intermediate_size * config.hidden_size
    total = config.num_hidden_layers
    fields = _describe_network(request, config, network, numerics)
    return Prepared(parts, total, form, smallest, check_bytes, numerics, fields)


def plan_build(request: BuildRequest, bound: int | None) -> list[dict[str, Any]]:
    """What `build` would make, part by part, and in what memory; nothing is written, checked or built.

    Raises:
        BuildError: sizes beyond these targets, or a bound below what one layer needs.
    """
    beside = caller_bytes()
    network, sizes, parts = _plan_network(request, bound)
    per_layer = 2 * sum(cache_widths(moe_config_from_json(request.bundle.config), network.form))
    return [
        {
            "layers": [part.start, part.stop],
            "cache_bytes_per_token": per_layer * (part.stop - part.start),
            "weights_bytes": sizes.of(part),
            "build_memory_bytes": estimate_build_bytes(sizes.of(part)) + beside,
        }
        for part in parts
    ]


def _plan_network(request: BuildRequest, bound: int | None) -> tuple[LoweredNetwork, NetworkSizes, list[Part]]:
    if request.max_seq_len < 2:
        raise BuildError(f"max_seq_len {request.max_seq_len}: a TensorRT engine needs room for 2 tokens or more")
    beside = caller_bytes()  # now: the whole network's graph is gone when the builders run
    model, config = load_canonical(request.bundle)
    form = choose_form(request, config)
    network = lower_network(model, config, request.max_seq_len, real=ir.DataType.FLOAT16, form=form)
    sizes = measure_sizes(network.weights, config.num_hidden_layers)
    return network, sizes, plan_parts(sizes, bound, beside)


def write_part(
    request: BuildRequest, part: Part, form: NetworkForm, folder: Path, progress: Progress | None
) -> LoweredNetwork:
    """Lower a part in half precision and write its graph and weights."""
    model, config = load_canonical(request.bundle)
    network = lower_network(model, config, request.max_seq_len, real=ir.DataType.FLOAT16, part=part, form=form)
    network.weights.write(folder / part.weights, progress)
    network.save(folder, part.model)
    return network


def read_cuda_major(package: str) -> int | None:
    """The CUDA that an installed package is for, by what it requires (tensorrt_rtx_cu13); None where that says none."""
    try:
        wanted = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [int(match[1]) for match in (re.search(r"[-_]cu(\d+)\b", each) for each in wanted) if match]
    return max(found, default=None)


def shape_profiles(network: LoweredNetwork, max_seq_len: int) -> list[dict[str, list[list[int]]]]:
    """P0: exactly one token. P1: a chunk. Each asks for the logits of one row. Of several lanes P2: a token of each."""
    chunk, lanes = network.chunk, network.form.lanes
    runs = [((1, 1), 1), ((2, chunk), 1)] + ([((lanes, lanes), lanes)] if lanes > 1 else [])
    profiles: list[dict[str, list[list[int]]]] = []
    for (least, most), sequences in runs:
        sizes = {"T": (least, most), "S": (sequences, sequences), "R": (sequences, sequences)}
        shapes = {}
        for value in network.model.graph.inputs:
            assert value.shape is not None and value.name is not None
            dims = [size if isinstance(size, int) else str(size.value) for size in value.shape]
            low, high = ([sizes[size][end] if isinstance(size, str) else size for size in dims] for end in (0, 1))
            if any(isinstance(size, str) for size in dims):
                shapes[value.name] = [low, high, high]
        profiles.append(shapes)
    return profiles


def _describe_network(
    request: BuildRequest, config: MoEConfig, network: LoweredNetwork, numerics: dict[str, Any]
) -> dict[str, Any]:
    """engine.json's fields that follow from the whole network."""
    stored = request.bundle.manifest["quantization"]["weights"]
    weights = f"fp8 (from {stored})" if network.form.fp8 else stored
    return {
        "precision": f"{weights} weights, fp16 products, fp32 router, norms and residual",
        "max_batch": network.form.lanes,
        "max_seq_len": request.max_seq_len,
        "cache": [tensor.to_json() for tensor in network.cache],
        "session": {
            "chunk": network.chunk,
            "expert_buckets": network.form.buckets,
            "cache": {
                "shape": [network.form.lanes, "heads", network.slots, "width / heads"],
                "aliased": {f"past.{tensor.name}": f"present.{tensor.name}" for tensor in network.cache},
                "initial": "zeros",  # slots behind the length are masked, and 0 times NaN is NaN
            },
            "latent_attention": _name_latent_form(network),
            "numerics": numerics,
            "network_weights_bytes": network.weights.nbytes,
            **describe_load(config),
        },
    }


def _name_latent_form(network: LoweredNetwork) -> str | None:
    """Which of the two the caches are of; None where the model has no latent attention."""
    if any(tensor.name.startswith("latent.") for tensor in network.cache):
        return "absorbed"
    return "expanded" if network.form.expanded else None


def describe_plain_part(part: Part, network: LoweredNetwork, max_seq_len: int) -> dict[str, Any]:
    """What is known of a part before it is built."""
    return {
        **part.to_json(),
        "inputs": [str(value.name) for value in network.model.graph.inputs],
        "outputs": [str(value.name) for value in network.model.graph.outputs],
        "profiles": shape_profiles(network, max_seq_len),
        "network_weights_bytes": network.weights.nbytes,
        "fp8_error": network.weights.fp8_error,
    }


def describe_part(
    part: Part,
    network: LoweredNetwork,
    max_seq_len: int,
    result: dict[str, Any],
    folder: Path,
    smallest_matrix: int,
) -> dict[str, Any]:
    """A built part for engine.json: its interface, and what the builder and its log say."""
    plain = describe_plain_part(part, network, max_seq_len)
    return plain | describe_result(result, folder / part.log, smallest_matrix)


def describe_result(result: dict[str, Any], log: Path, smallest_matrix: int) -> dict[str, Any]:
    return {
        "memory": read_build_log(log).to_json(smallest_matrix),
        "validity": result["validity"],
        "builder_seconds": result["seconds"],
        "peak_build_memory_bytes": result["peak_bytes"],
        "caller_memory_bytes": result["caller_bytes"],
    }


def together_bytes(part: dict[str, Any]) -> int:
    """What building a part took: its builder's peak, and what the process that waited for it held."""
    return (part["peak_build_memory_bytes"] or 0) + int(part["caller_memory_bytes"])


def add_memory(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts' memory together: all are loaded at once, each with activations of its own."""
    total: dict[str, Any] = {"weights_bytes": sum(part["memory"]["weights_bytes"] or 0 for part in parts)}
    for key in ("activation_bytes", "kernels", "materialized_matrices"):
        total[key] = [sum(counts) for counts in zip(*(part["memory"][key] for part in parts), strict=True)]
    return {"memory": total, "builder_seconds": round(sum(part["builder_seconds"] for part in parts), 3)}
