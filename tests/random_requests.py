"""Random requests to a server, by hypothesis and by schemathesis over its own OpenAPI, and how they were answered."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BOUNDED: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *("prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "stream", "stop", "seed", "logprobs"),
    *("logit_bias", "echo", "user", "timeout", "min_p", "presence_penalty", "stream_options", "top_logprobs"),
    *("frequency_penalty", "repetition_penalty", "max_completion_tokens", "response_format", "tools", "best_of"),
]


def ask_fields(http: httpx.Client, count: int, seed: int | None = None) -> Counter[int]:
    """Requests of known fields with values of any type, half of them with a good prompt. Statuses that came.

    `seed` None: always the same ones.
    """
    model = http.get("/v1/models").json()["data"][0]["id"]
    asked: Counter[int] = Counter()

    @_settings(count, seed)
    @given(
        fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6),
        chat=st.booleans(),
        valid=st.booleans(),
    )
    def ask(fields: dict[str, Any], chat: bool, valid: bool) -> None:
        if valid:
            good = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
            fields = {**fields, **good}
        content = json.dumps({"model": model, **fields}).encode()
        asked[_post(http, content, "chat/completions" if chat else "completions")] += 1

    ask()
    return asked


def ask_bytes(http: httpx.Client, count: int, seed: int | None = None) -> Counter[int]:
    """Requests of random bytes. Statuses that came."""
    asked: Counter[int] = Counter()

    @_settings(count, seed)
    @given(body=st.binary(max_size=200))
    def ask(body: bytes) -> None:
        asked[_post(http, body, "completions")] += 1

    ask()
    return asked


def ask_by_schema(url: str, count: int, seed: int | None = None, *, seconds: float = float("inf")) -> Counter[int]:
    """`count` requests of each kind (good ones and bad ones) of each operation. Statuses that came.

    seconds: for each kind; a busy machine sends fewer.

    Raises:
        AssertionError: a status that the OpenAPI does not say.
    """
    asked: Counter[int] = Counter()
    modes = schemathesis.GenerationMode
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()
        known = {int(status) for status in operation.definition.raw["responses"]} | {404, 405}
        for mode in [modes.POSITIVE, modes.NEGATIVE] if operation.body else [modes.POSITIVE]:
            cases = operation.as_strategy(generation_mode=mode)
            asked += _ask_cases(cases, known, _settings(count, seed), time.monotonic() + seconds)
    return asked


def _ask_cases(cases: Any, known: set[int], decorate: Any, until: float) -> Counter[int]:
    asked: Counter[int] = Counter()

    @decorate
    @given(case=cases)
    def ask(case: Any) -> None:
        if time.monotonic() < until:
            status = case.call(timeout=60).status_code
            asked[status] += 1
            assert status in known, status

    ask()
    return asked


def _post(http: httpx.Client, content: bytes, path: str) -> int:
    return http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"}).status_code


def _settings(count: int, seed: int | None) -> Any:
    import hypothesis

    def decorate(test: Any) -> Any:
        test = settings(max_examples=count, derandomize=seed is None, **BOUNDED)(test)
        return test if seed is None else hypothesis.seed(seed)(test)

    return decorate
