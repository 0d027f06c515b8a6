"""What `moedge report` reads: JSON files, and whether a document in them is a result that it can tell.

Results travel: through other machines, other versions, editors and scripts. So every value is looked at before anything
is drawn, also those that the report only shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ReportError, shorten

SCHEMA = 1
PERCENTILES = ("p50", "p90", "p99")
BAND = ("low", "high")
TIMES = ("ttft_ms", "itl_ms")

# The contract's keys in its order: what each must be. A figure may be null where it is not known.
_TEXTS = ("model", "profile", "backend", "device")
_COUNTS = ("batch", "prompt_tokens", "new_tokens")
_FIGURES = (
    "threads repeat load_s prefill_tokens_per_s decode_tokens_per_s peak_memory_bytes bundle_bytes bytes_per_token "
    "bandwidth_bytes_per_s bandwidth_limit_bytes_per_s fraction_of_limit energy_j_per_token group_size"
).split()
# What may be there besides.
_OPTIONAL_FIGURES = ("usd_per_million_tokens", "context_tokens", "device_memory_bytes")
_OPTIONAL_TEXTS = ("weights", "created", "scenario", "limit_note", "energy_reason", "assumptions")
_OPTIONAL_OBJECTS = ("versions", "machine", "model_info", "spread")

_LARGEST_FILE = 256 << 20  # bytes: a sweep with all its samples is a few
_MADE_BY = "make results with `moedge bench --json` or `moedge estimate --json`"
_LONGEST_NAME = 500
# Beyond these no time, rate, size or price of a computer lies, and arithmetic with them leaves the numbers.
_SMALLEST, _LARGEST = 1e-12, 1e18


def read_documents(paths: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[Any, str]]:
    """(document, where it is from) for each document in JSON files, each one document or a list of them.

    Raises:
        ReportError: not readable, not JSON, or too large; names the file.
    """
    for path in map(Path, paths):
        found = _read(path)
        for index, document in enumerate(found):
            yield document, str(path) if len(found) == 1 else f"{path}[{index}]"


def _read(path: Path) -> list[Any]:
    try:
        with path.open("rb") as stream:
            raw = stream.read(_LARGEST_FILE + 1)
        if len(raw) > _LARGEST_FILE:
            raise ReportError(f"{path}: larger than {_LARGEST_FILE >> 20} MiB: no result of `moedge bench --json`")
        document = json.loads(raw)  # UTF-8, -16 or -32: some shells write `>` in UTF-16
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file; make results with `moedge bench --json {path}`") from None
    except OSError as cause:
        raise ReportError(f"{path}: not readable ({cause.strerror}); {_MADE_BY}") from None
    except UnicodeDecodeError as cause:
        reason = f"not text: {cause.reason} at byte {cause.start}"
    except json.JSONDecodeError as cause:
        reason = str(cause)
    except RecursionError:
        reason = "objects or lists too deep in one another"
    except ValueError:  # int() refuses thousands of digits
        reason = "a number of thousands of digits"
    else:
        return document if isinstance(document, list) else [document]
    raise ReportError(f"{path}: not readable as JSON ({reason}); {_MADE_BY}")


def check_result(document: Any, origin: str) -> None:
    """Raises ReportError where `document`, from `origin`, is no result of this schema."""
    if not isinstance(document, Mapping) or "schema" not in document:
        raise ReportError(f"{origin}: no bench result (it has no schema); {_MADE_BY}")
    if type(document["schema"]) is not int or document["schema"] != SCHEMA:
        raise ReportError(
            f"{origin}: result of schema {shorten(document['schema'])}, this version reads schema {SCHEMA}; measure "
            "again with this version's `moedge bench --json`"
        )
    required = [*_TEXTS, "weights", *_COUNTS, *_FIGURES, *TIMES, "measured"]
    missing = [key for key in required if key not in document]
    if missing:
        raise ReportError(f"{origin}: {', '.join(missing)} missing; {_MADE_BY}")
    for key in _TEXTS:
        check_text(document[key], f"{origin}: {key}")
    if not isinstance(document["measured"], bool):
        raise ReportError(f"{origin}: measured is {shorten(document['measured'])}; true or false was expected")
    for key in _COUNTS:
        check_figure(document[key], f"{origin}: {key}")
    for key in (*_FIGURES, *_OPTIONAL_FIGURES):
        check_figure(document.get(key), f"{origin}: {key}", may_be_null=True)
    for key in TIMES:
        _check_times(document[key], f"{origin}: {key}")
    for key in _OPTIONAL_TEXTS:
        check_text(document.get(key), f"{origin}: {key}", may_be_null=True)
    for key in _OPTIONAL_OBJECTS:
        if not isinstance(document.get(key, {}), Mapping):
            raise ReportError(f"{origin}: {key} is {shorten(document[key])}; an object was expected")
    check_values(document, origin)


def check_figure(value: Any, where: str, *, may_be_null: bool = False) -> None:
    """Raises ReportError where a figure is none of a computer: negative, NaN, or beyond any size."""
    if value is None and may_be_null:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not value >= 0:
        null = " or null" if may_be_null else ""
        raise ReportError(f"{where} is {shorten(value)}; a number of 0 or more{null} was expected")
    if value and not _SMALLEST <= value <= _LARGEST:
        raise ReportError(f"{where} is {shorten(value)}, which no such figure can be; measure again")


def check_text(value: Any, where: str, *, may_be_null: bool = False) -> None:
    """Raises ReportError where a value is no text, or one that no name or remark is as long as."""
    if value is None and may_be_null:
        return
    if not isinstance(value, str):
        null = " or null" if may_be_null else ""
        raise ReportError(f"{where} is {shorten(value)}; a text{null} was expected")
    if len(value) > _LONGEST_NAME:
        raise ReportError(f"{where} has {len(value):,} characters; at most {_LONGEST_NAME} were expected")


def check_values(document: Any, origin: str) -> None:
    """Raises ReportError where a value anywhere in a document is a number that is none (NaN, 1e400) or a text that is
    not Unicode (half of a surrogate pair): what neither a chart nor a file can hold."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, str):
            if any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ReportError(f"{origin}: {shorten(value)} is not Unicode text; write the file again")
        elif isinstance(value, (int, float)) and not -_LARGEST <= value <= _LARGEST:
            raise ReportError(f"{origin}: {shorten(value)} stands in it, which no figure can be; measure again")


def _check_times(times: Any, where: str) -> None:
    if not isinstance(times, Mapping):
        raise ReportError(f"{where} is {shorten(times)}; percentiles p50, p90, p99 were expected")
    for key in PERCENTILES:
        if key not in times:
            raise ReportError(f"{where}.{key} missing; measure again with this version's `moedge bench --json`")
        check_figure(times[key], f"{where}.{key}", may_be_null=key != "p50")
    for key in BAND:
        check_figure(times.get(key), f"{where}.{key}", may_be_null=True)
    for keys in (PERCENTILES, ("low", "p50", "high")):
        known = [times[key] for key in keys if times.get(key) is not None]
        if known != sorted(known):
            raise ReportError(f"{where}: {', '.join(keys)} do not grow ({', '.join(map(str, known))}); measure again")
