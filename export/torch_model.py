"""`moedge export my_package:build_model`: a user's own PyTorch model to a bundle.

The model takes input_ids int64 [batch, sequence] and gives logits [batch, sequence, vocab]; its mixtures are
`torch_ops.Experts`. torch.onnx.export writes its graph, `torch_graph` makes that canonical, and the weights go the way
of any checkpoint's. B = batch, S = sequence, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import importlib
import inspect
import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
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
from ..errors import BundleError, UsageError, require
from .digests import Digest, Key
from .functions import DOMAIN
from .graph import save_graph
from .heads import choose_head, settle_head
from .layout import Layout, plan_layout
from .options import names_builder
from .pipeline import check_options, check_room, describe_classes
from .quantization import Calibrated, find_algorithm
from .torch_graph import TorchGraph, canonicalize
from .torch_parity import LONGEST, check_torch_parity
from .writer import CHUNK_BYTES, ClassError, write_weights

FAMILY = "torch"
OPSET = 23  # that of the canonical graph
MOST_POSITIONS = 2048  # what is tried first of a model that does not say how long a text it takes
_PROBE = (2, 5)  # batch and sequence of the first call
# What of a tokenizer's folder goes into the bundle; its config.json is another model's.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def export_torch_model(
    source: Any,
    output: str | os.PathLike[str],
    *,
    weights: str = "int4",
    head: str | None = None,
    group_size: int = 128,
    algorithm: str = "rtn",
    zero_points: bool | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_positions: int | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a PyTorch model to a bundle.

    Args:
        source: an nn.Module, a function without arguments that returns one, or the name of either,
            "my_package:build_model", which is imported with the current folder on the path: this runs its code.
        output: the bundle's folder; it appears when everything is written and checked, or not at all.
        weights: fp32, fp16, int8 or int4: of the experts, the linear layers and the embeddings.
        head: as of `export_checkpoint`; a tied one stays int8.
        group_size: as of `export_checkpoint`.
        algorithm: rtn or hqq.
        zero_points: as of `export_checkpoint`.
        tokenizer: a folder with tokenizer.json (and tokenizer_config.json, generation_config.json ...), or that file.
        max_positions: tokens that the model takes at most. Default: its `config.max_position_embeddings`, else the
            largest of 2048, 1024, 512 ... that it runs on.
        verify: compare the graph's logits with the model's own, and every expert.
        force: replace a bundle that is there.
        progress: called with (what, done, total).

    Raises:
        UsageError: there is no such function, it gives no such model, or torch cannot export it.
        CheckpointError: an option is not known, or a weight is NaN or infinite.
        ParityError: the graph differs from the model.
        BundleError: the output cannot be written.
    """
    require("torch", purpose="export a torch model")
    require("onnxscript", "torch", "export a torch model")
    check_options(weights, group_size)
    asked, head = head is not None, choose_head(weights, head)
    quantizer = find_algorithm(algorithm)
    if isinstance(quantizer, Calibrated) or hasattr(quantizer, "calibrate"):
        raise UsageError(f"algorithm {algorithm} calibrates on a checkpoint; for a torch model use rtn or hqq")
    files = _find_tokenizer(tokenizer)
    target = Path(output) if Path(output).name else Path(output).resolve()
    with _users_code():
        name, model = load_model(source)
        model = _prepare(name, model)
        vocab = _probe(name, model)
        positions = _find_positions(name, model, max_positions)
        graph = canonicalize(trace(name, model), model, name)
        head = _settle_head(graph, head, asked)
        own = quantizer.ZERO_POINTS if zero_points is None else zero_points
        layout = plan_layout(graph.plan, weights, group_size, zero_points=own, head=head)
        check_room(target, layout.nbytes)
        with staged_directory(target, force=force, replaces=MANIFEST) as staged:
            digests: dict[Key, Digest] | None = {} if verify else None
            layout, errors = write_weights(
                graph.source, layout, staged / WEIGHTS, quantizer, progress, CHUNK_BYTES, digests
            )
            canonical = graph.build(layout, target)
            save_graph(canonical, staged / MODEL)
            if verify:
                check_torch_parity(model, graph, layout, canonical, staged, positions, digests, progress)
            for path in files:
                shutil.copyfile(path, staged / path.name)
            manifest = _describe(name, graph, layout, errors, vocab, positions)
            manifest["quantization"].update(weights=weights, head=head, group_size=group_size, algorithm=algorithm)
            manifest["provenance"]["verified"] = verify
            manifest["files"] = {path.name: file_entry(path) for path in sorted(staged.iterdir())}
            write_json(staged / MANIFEST, sealed(manifest))
    return Bundle.open(target)


# The user's code


def load_model(source: Any) -> tuple[str, Any]:
    """(name, nn.Module) of what `export_torch_model` takes; runs the user's code.

    Raises:
        UsageError: no such module or attribute, it is not callable, it fails, or it returns something else.
    """
    from torch import nn

    name = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
    found = _import_builder(source) if isinstance(source, str) else source
    if isinstance(found, nn.Module):
        return name, found
    if not callable(found):
        raise UsageError(f"{name} is a {type(found).__name__}, not callable; name a function that returns an nn.Module")
    _check_arguments(name, found)
    model = _call(f"{name}()", found)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}() returned a {type(model).__name__}; a torch.nn.Module was expected")
    return name, model


def _import_builder(spec: str) -> Any:
    if not names_builder(spec):
        raise UsageError(f"{spec!r} names no function; write it as my_package.my_module:build_model")
    module_name, attributes = spec.split(":")
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(f"{spec}: importing {module_name} failed: {_blame(error)}") from error
        if module_name.endswith(".py"):
            raise UsageError(f"{spec} names a file; write the module: {module_name[:-3]}:{attributes}") from None
        raise UsageError(
            f"{spec}: there is no module {error.name!r}; the current folder ({Path.cwd()}) and the installed packages "
            "were searched: change to the folder that holds it, or install it"
        ) from None
    except (Exception, SystemExit) as error:
        raise UsageError(f"{spec}: importing {module_name} failed: {_blame(error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            held = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            held.sort(key=lambda key: -difflib.SequenceMatcher(None, attribute, key).ratio())
            known = ", ".join(held[:8]) or "nothing that can be called"
            raise UsageError(f"{spec}: {module_name} has no {attribute!r}; it has {known}")
        found = getattr(found, attribute)
    return found


def _check_arguments(name: str, function: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # not every callable says what it takes
        return
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in any_number]
    if needed:
        raise UsageError(
            f"{name} needs arguments ({', '.join(needed)}) and is called without any; name a function that sets them"
        )


def _call(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run the user's code; what it raises becomes one line that says where."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} failed: {_blame(error)}") from error


def _blame(error: BaseException) -> str:
    """An exception in one line: where it was raised, its type and the first line of its text."""
    frames = traceback.extract_tb(error.__traceback__)
    text = (str(error).strip().splitlines() or [""])[0]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return f"{where}{type(error).__name__}: {text}" if text else f"{where}{type(error).__name__}"


@contextlib.contextmanager
def _users_code() -> Iterator[None]:
    """The current folder is importable, and what the model prints does not mix with our output."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


# The model


def _prepare(name: str, model: Any) -> Any:
    """The model as it is exported: on the CPU, in float32, evaluating; its answer is the logits alone."""
    from torch import Tensor, nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> Any:
            answer = self.model(input_ids)
            if isinstance(answer, dict) and "logits" in answer:
                return answer["logits"]
            return getattr(answer, "logits", answer)

    _call(f"{name}: model.to('cpu').float()", lambda: model.to("cpu").float())
    return Logits().eval()


def _run(name: str, model: Any, batch: int, sequence: int) -> Any:
    import torch

    ids = torch.zeros((batch, sequence), dtype=torch.int64)
    with torch.no_grad():
        return _call(f"{name}: the model, given input_ids int64 [{batch}, {sequence}],", model, ids)


def _probe(name: str, model: Any) -> int:
    """The vocabulary; raises UsageError when what the model gives are no logits."""
    import torch

    batch, sequence = _PROBE
    logits = _run(name, model, batch, sequence)
    given = type(logits).__name__
    if isinstance(logits, torch.Tensor):
        given = f"{str(logits.dtype).removeprefix('torch.')} {[*logits.shape]}"
        if logits.is_floating_point() and logits.dim() == 3 and logits.shape[:2] == _PROBE:
            return int(logits.shape[2])
    raise UsageError(
        f"{name}: for input_ids [{batch}, {sequence}] the model gave {given}; logits in floating point "
        f"[{batch}, {sequence}, vocab] were expected"
    )


def _find_positions(name: str, model: Any, asked: int | None) -> int:
    if asked is not None:
        if asked < 1:
            raise UsageError(f"max_positions {asked}: at least 1 was expected")
        _run(name, model, 1, min(asked, MOST_POSITIONS))  # more would say little, and may take any amount of memory
        return asked
    for holder in (getattr(model.model, "config", None), model.model):
        declared = getattr(holder, "max_position_embeddings", None)
        if isinstance(declared, int) and declared > 0:
            _run(name, model, 1, min(declared, LONGEST))
            return declared
    length = MOST_POSITIONS
    while length > _PROBE[1]:
        with contextlib.suppress(UsageError):
            _run(name, model, 1, length)
            return length
        length //= 2
    return _PROBE[1]


def trace(name: str, model: Any) -> Any:
    """The model as an onnx_ir.Model with moedge's functions, by torch.onnx.export.

    Raises:
        UsageError: torch cannot export it.
    """
    import torch

    from . import torch_ops

    table = torch_ops.translation_table()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            program = torch.onnx.export(
                model,
                (torch.zeros(_PROBE, dtype=torch.int64),),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": {0: "batch", 1: "sequence"}},
                custom_translation_table=table,
            )
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # torch wraps what is wrong several times
                cause = cause.__cause__
            raise UsageError(
                f"{name}: torch cannot export this model: {_blame(cause)}; its forward must be traceable with a "
                "dynamic batch and sequence (see torch.export)"
            ) from error
        finally:
            logging.disable(logging.NOTSET)
    assert program is not None
    return program.model


# The bundle


def _find_tokenizer(tokenizer: str | os.PathLike[str] | None) -> list[Path]:
    if tokenizer is None:
        return []
    place = Path(tokenizer)
    file = place if place.is_file() else place / "tokenizer.json"
    if not file.is_file() or file.name != "tokenizer.json":
        raise BundleError(f"{place}: no tokenizer.json there; name that file or a folder that holds it")
    beside = [file.parent / name for name in _TOKENIZER_FILES[1:]]
    return [file, *(path for path in beside if path.is_file())] if place.is_dir() else [file]


def _settle_head(graph: TorchGraph, head: str, asked: bool) -> str:
    """What was asked for; int8 with a note where the embedding's rows are looked up in the same matrix."""
    for weight in graph.plan:
        if weight.role != "head":
            continue
        tied = weight.precision == "table"
        if asked and tied and head in ("int6", "int4"):
            graph.notes.append("the head is the embedding's own table, and stays int8")
        head = settle_head(head, weight.shape[-1], tied=tied, asked=asked and not tied)
    return head


def _describe(
    name: str, graph: TorchGraph, layout: Layout, errors: dict[str, ClassError], vocab: int, positions: int
) -> dict[str, Any]:
    from .. import __version__

    first = graph.layers[0]
    parameters = sum(stored.weight.size for stored in layout.stored.values())
    experts = sum(stored.weight.size for stored in layout.stored.values() if stored.weight.role == "experts")
    idle = experts * (first.num_experts - first.top_k) // first.num_experts
    return {
        "format": FORMAT,
        "model": {
            "name": name.replace(":", "."),
            "family": FAMILY,
            "parameters": parameters,
            "active_parameters": parameters - idle,
        },
        "config": {
            "family": FAMILY,
            "vocab_size": vocab,
            "hidden_size": first.hidden_size,
            "intermediate_size": 0,
            "num_hidden_layers": len(graph.layers),
            "max_position_embeddings": positions,
            "num_attention_heads": 0,
            "attention": {"kind": FAMILY},
            "moe": {
                "layers": [*range(len(graph.layers))],
                "num_experts": first.num_experts,
                "num_experts_per_tok": first.top_k,
                "intermediate_size": first.intermediate_size,
                "shared_intermediate_size": 0,
            },
        },
        "gating": graph.describe_gates(DOMAIN),
        "quantization": {"classes": describe_classes(layout, errors)},
        "sizes": layout.sizes_by_role(),
        "cache": [],
        "provenance": {
            "source": name,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "moedge": __version__,
            "tensors": len(graph.source.entries),
            "checkpoint_sha256": graph.source.fingerprint(),
            "notes": graph.notes,
        },
    }
