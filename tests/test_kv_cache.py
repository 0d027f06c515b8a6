"""The KV cache in fp32, fp16 and int8 on the CPU engine: what is in it, what it costs, and that all else holds."""

from __future__ import annotations

import errno
import json
import mmap
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from attention_cases import mix
from click.testing import CliRunner
from family_cases import VOCAB, make_model, save_model

import moedge
from moedge import cli
from moedge.bundle import Bundle, read_json
from moedge.errors import BuildError, EngineError, UsageError
from moedge.export.memory import resident_bytes
from moedge.profiles.device import load_profile
from moedge.profiles.estimate import estimate
from moedge.profiles.fit import check_fit
from moedge.profiles.shape import KV_CACHE_DEFAULT, bytes_per_token, default_kv_cache, kv_element_bytes
from moedge.runtime import kernels
from moedge.runtime.preflight import CacheEntry, EngineInfo, read_engine
from moedge.runtime.sessions import Session, SessionOptions, backend_module
from moedge.runtime.sessions._ort_cache import SequenceCache

TOKENS = np.random.default_rng(21).integers(0, VOCAB, 60)
PROMPT = 40
# Mean error of logits over their spread, on random weights, which are harsher than trained ones.
MOST_ERROR = {"fp16": 6e-3, "int8": 0.15}
CASES = {"latent": ("deepseek_v3", "many_groups"), "grouped": ("gpt_oss", "alternate_windows")}


@pytest.fixture(scope="module", params=CASES)
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, unquantized, with an engine for each type of cache."""
    from fake_engine import write_tokenizer

    family, name = CASES[request.param]
    folder = tmp_path_factory.mktemp(f"kv-{request.param}")
    save_model(make_model(family, name), family, folder / "checkpoint")
    write_tokenizer(folder / "checkpoint")
    found = {}
    for kind in ("fp32", "fp16", "int8"):
        moedge.export(folder / "checkpoint", folder / kind, weights="fp32", verify=False)
        moedge.build(folder / kind, "cpu", kv_cache=kind)
        found[kind] = folder / kind
    return found


def open_session(path: Path, lanes: int = 1) -> Session:
    bundle = Bundle.open(path)
    options = SessionOptions(1, lanes=lanes)
    return backend_module("onnxruntime").open_session(bundle, read_engine(bundle, "cpu"), options)


def run(session: Session) -> np.ndarray:
    """Logits after each token: a prompt at once, the rest a token at a time."""
    session.truncate(0)
    first = session.step(TOKENS[:PROMPT], np.arange(PROMPT)).copy()
    rest = [session.step(TOKENS[place : place + 1], np.array([0])).copy() for place in range(PROMPT, len(TOKENS))]
    return np.concatenate([first, *rest])


def test_narrower_caches_stay_near(bundles: dict[str, Path]) -> None:
    exact = run(open_session(bundles["fp32"]))
    errors = {kind: np.abs(run(open_session(bundles[kind])) - exact).mean() / exact.std() for kind in MOST_ERROR}
    assert 0 < errors["fp16"] < errors["int8"]
    assert all(errors[kind] < most for kind, most in MOST_ERROR.items()), errors


@pytest.mark.parametrize("kind", MOST_ERROR)
def test_what_lies_in_the_cache(kind: str, bundles: dict[str, Path]) -> None:
    """In the first layer, whose inputs are equal, the rows are those of fp32, rounded to the nearest."""
    path = bundles[kind]
    plain, narrow = open_session(bundles["fp32"]), open_session(path)
    for session in (plain, narrow):
        session.step(TOKENS[:PROMPT], np.empty(0, np.int64))
    entries = [entry.name for entry in read_engine(Bundle.open(path), "cpu").cache]
    found = dict(zip(entries, narrow.read_rows(0, PROMPT), strict=True))
    names = [entry.name for entry in read_engine(Bundle.open(bundles["fp32"]), "cpu").cache]
    for name, rows in zip(names, plain.read_rows(0, PROMPT), strict=True):
        if not name.endswith(".0"):
            continue
        if kind == "fp16":
            np.testing.assert_array_equal(found[name], rows.astype(np.float16))
            continue
        assert found[name].dtype == np.int8
        if name.startswith("latent"):
            steps = np.repeat(found["scale.0"], rows.shape[1] // found["scale.0"].shape[1], axis=1)
            blocks = np.abs(rows).reshape(*found["scale.0"].shape, -1).max(axis=2)
            np.testing.assert_allclose(found["scale.0"], blocks / 127, rtol=1e-6)
        elif kernels.library() is not None:
            rows = mix(rows, rows.shape[-1]).astype(np.float32) if name.startswith("key") else rows
            steps = found[f"scale.{name}"]
            np.testing.assert_allclose(steps, np.abs(rows).max(axis=-1, keepdims=True) / 127, rtol=1e-4)
        else:
            graph = onnx.load(path / "engines" / "cpu" / "model.onnx", load_external_data=False).graph
            steps = next(onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == f"scale.{name}")
        values = np.clip(rows, -128 * steps, 127 * steps)
        assert (np.abs(found[name] * steps - values) <= 0.501 * steps).all()


@pytest.mark.parametrize("kind", ["fp32", *MOST_ERROR])
def test_lanes_copies_and_rewinding_change_no_bit(kind: str, bundles: dict[str, Path]) -> None:
    single, lanes = open_session(bundles[kind]), open_session(bundles[kind], 2)
    want = run(single)
    other = lanes.another()
    lanes.step(TOKENS[:7], np.empty(0, np.int64))
    other.step(TOKENS[:PROMPT], np.empty(0, np.int64))
    for place in range(PROMPT, PROMPT + 6):
        together = lanes.step_together([other], np.array([3, TOKENS[place]]))
        np.testing.assert_array_equal(together[1], want[place])
    copy = single.another()
    copy.append_rows(single.read_rows(0, PROMPT))
    single.truncate(PROMPT)
    for session in (single, copy):
        logits = session.step(TOKENS[PROMPT : PROMPT + 1], np.array([0]))
        np.testing.assert_array_equal(logits[0], want[PROMPT])


@pytest.mark.parametrize("kind", MOST_ERROR)
def test_prefixes_and_snapshots(kind: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    """What was computed before gives the same tokens with each type."""
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "logprobs": 2}
    with moedge.load(bundles[kind], threads=1, prefill_chunk=16) as engine:
        first = engine.generate(TOKENS[:PROMPT].tolist(), **options)
        list(first)
        engine.save_snapshot(tmp_path / "context")
        list(engine.generate([1, 2], **options))
        again = engine.generate(TOKENS[:PROMPT].tolist(), **options)
        list(again)
        assert again.reused_tokens == 32 and (again.tokens, again.logprobs) == (first.tokens, first.logprobs)
    with moedge.load(bundles[kind], threads=1, prefill_chunk=16) as engine:
        assert engine.load_snapshot(tmp_path / "context") == PROMPT
        restored = engine.generate(TOKENS[:PROMPT].tolist(), **options)
        list(restored)
        assert (restored.tokens, restored.logprobs) == (first.tokens, first.logprobs)


def test_bytes_are_counted_everywhere(bundles: dict[str, Path]) -> None:
    from moedge.runtime.bench import bench

    device = load_profile("raspberry-pi-5")
    for kind, path in bundles.items():
        bundle = Bundle.open(path)
        document = read_json(path / "engines" / "cpu" / "engine.json", BuildError)
        rows = sum(part.nbytes for part in _one_row(path))
        width = sum(entry["width"] for entry in bundle.manifest["cache"])
        assert document["kv_cache"] == kind and f"{kind} KV cache" in document["precision"]
        runs = document if kernels.library() is not None else document.get("stock", document)
        assert runs["cache_bytes_per_token"] == rows == width * kv_element_bytes(kind, bundle.config)
        found = bench(path, prompt_tokens=8, new_tokens=2, repeat=1, threads=1)
        assert found["bytes_per_token"] == bytes_per_token(bundle.manifest, 9, 1, rows / width)
        predicted = estimate(bundle.manifest, device, prompt_tokens=8, new_tokens=2, kv_cache=kind)
        assert predicted["bytes_per_token"] == found["bytes_per_token"]
        fit = check_fit(bundle.manifest, device, 1, 10, cache_bytes_per_element=rows / width)
        assert predicted["fit"]["cache_bytes"] == fit.cache_bytes == 10 * rows


def of_qwen3() -> EngineInfo:
    """Only what a cache is made by: 48 layers of Qwen3-30B-A3B, int8."""
    entries = [
        entry
        for layer in range(48)
        for name in ("key", "value")
        for entry in (
            CacheEntry(f"{name}.{layer}", 512, "int8", 4),
            CacheEntry(f"scale.{name}.{layer}", 4, "float32", 4),
        )
    ]
    return cast(EngineInfo, SimpleNamespace(cache=tuple(entries), session={}, moe_layers=()))


def write_a_token(cache: SequenceCache) -> None:
    for entry in cache._entries:
        cache._write_cache(entry, 0, np.ones(cache._rows_shape(entry, 1), entry.dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_first_token_takes_small_pages() -> None:
    """One of 4 KiB for each head of each layer, not of 2 MiB: all keys lie in one piece of 96 MiB."""
    before = resident_bytes()
    cache = SequenceCache(of_qwen3(), 4096)
    write_a_token(cache)
    assert sum(buffer.shape[0] for buffer in cache.stacks) == 4 * 48
    assert resident_bytes() - before < 24 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have rules of their own")
def test_layers_that_are_granted_alone_are_granted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    real, most = np.empty, 4 * 4096 * 128 * 2

    def sparing(shape: Any, *options: Any) -> Any:
        if isinstance(shape, int) and shape > most:
            raise MemoryError
        return real(shape, *options)

    monkeypatch.setattr(np, "empty", sparing)
    cache = SequenceCache(of_qwen3(), 4096)
    write_a_token(cache)
    assert len(cache._entries) == 192
    assert all((cache._read_cache(entry)[..., :1, :] == 1).all() for entry in cache._entries)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "refused")

    with monkeypatch.context() as strict:  # where memory is counted when it is asked for
        strict.setattr(mmap, "mmap", refuse)
        with pytest.raises(EngineError, match="a cache of 96 MiB does not fit the memory"):
            SequenceCache(of_qwen3(), 4096)
    most //= 4
    with pytest.raises(EngineError, match=r"a cache of 2 MiB does not fit the memory; load with a smaller max_seq_len"):
        SequenceCache(of_qwen3(), 4096)


def _one_row(path: Path) -> list[np.ndarray]:
    session = open_session(path)
    session.step(TOKENS[:1], np.empty(0, np.int64))
    return session.read_rows(0, 1)


def test_wrong_types_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(BuildError, match="kv_cache 'int4': target onnxruntime has fp32, fp16, int8; leave --kv-cache"):
        moedge.build(tiny_bundle, "cpu", kv_cache="int4")
    with pytest.raises(BuildError, match="kv_cache 'int8': target tensorrt_rtx has no choice of it; leave --kv-cache"):
        moedge.build(tiny_bundle, "rtx4090", kv_cache="int8")
    with pytest.raises(UsageError, match="kv_cache 'int8': target tensorrt has no choice of it"):
        manifest = Bundle.open(tiny_bundle).manifest
        estimate(manifest, load_profile("h100"), prompt_tokens=8, new_tokens=2, kv_cache="int8")
    options = ["build", str(tiny_bundle), "--profile", "rtx4090", "--portable", "--kv-cache", "fp16"]
    result = CliRunner().invoke(cli.main, options)
    assert "--portable engines keep their KV cache in their own type" in str(result.exception)


def test_the_default_is_told_alike_wherever_it_is_told() -> None:
    root = Path(__file__).resolve().parent.parent
    names = ("README.md", "docs/kv-cache.md", "scripts/kv_cache.py")
    pages = [(root / name).read_text(encoding="utf-8") for name in names]
    helps = [CliRunner().invoke(cli.main, [name, "--help"]).stdout for name in ("build", "estimate")]
    for text in (*pages, *helps, str(moedge.build.__doc__)):
        assert KV_CACHE_DEFAULT in " ".join(text.split())


@pytest.mark.usefixtures("compiled")
def test_what_nobody_asks_for(
    tiny_bundle: Path, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 beside integers where our own ops run, fp16 of a latent in small blocks; who counts bytes counts those."""
    exact, device = Bundle.open(bundles["fp32"]).manifest, load_profile("raspberry-pi-5")
    integers = Bundle.open(tiny_bundle).manifest
    for manifest, variable, kind in ((integers, "", "fp16"), (exact, "", "fp32"), (integers, "stock", "fp32")):
        monkeypatch.setenv(kernels.VARIABLE, variable)
        assert default_kv_cache(manifest) == kind
        shape: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 2}
        by_itself, asked = (estimate(manifest, device, **shape, kv_cache=each) for each in (None, kind))
        assert by_itself["bytes_per_token"] == asked["bytes_per_token"]
        assert by_itself["fit"] == asked["fit"] == check_fit(manifest, device, 1, 10).to_json()
    monkeypatch.delenv(kernels.VARIABLE)
    config = integers["config"]
    for attention in ({"kind": "gqa"}, {**config["attention"], "kv_lora_rank": 512, "qk_rope_head_dim": 64}):
        assert default_kv_cache({**integers, "config": {**config, "attention": attention}}) == "int8"
    path = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    result = CliRunner().invoke(cli.main, ["build", str(path), "--profile", "cpu"], catch_exceptions=False)
    assert "int4 weights, fp32 activations, fp16 KV cache" in result.stdout
    assert read_json(path / "engines" / "cpu" / "engine.json", BuildError)["kv_cache"] == "fp16"


@pytest.fixture(scope="module")
def by_itself(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    """Grouped attention at int4, built as nobody asks for anything, with our own kernels at hand."""
    from fake_engine import write_tokenizer

    folder = tmp_path_factory.mktemp("kv-by-itself")
    save_model(make_model(*CASES["grouped"]), CASES["grouped"][0], folder / "checkpoint")
    write_tokenizer(folder / "checkpoint")
    moedge.export(folder / "checkpoint", folder / "bundle", weights="int4", group_size=16, verify=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.VARIABLE, raising=False)
        patch.setattr(kernels, "FOLDER", library.parent)
        moedge.build(folder / "bundle", "cpu")
    return folder / "bundle"


def test_each_graph_has_the_cache_that_suits_it(
    by_itself: Path, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 with our own kernels, fp32 without; what is said of bytes is of the graph that runs."""
    from moedge.runtime.bench import bench

    document = read_json(by_itself / "engines" / "cpu" / "engine.json", BuildError)
    assert document["kv_cache"] == "int8" and document["stock"]["kv_cache"] == "fp32"
    assert {entry["dtype"] for entry in document["stock"]["cache"]} == {"float32"}
    bundle, logits, read = Bundle.open(by_itself), [], []
    for variable, part in (("", document), (kernels.STOCK, document["stock"])):
        monkeypatch.setenv(kernels.VARIABLE, variable)
        info = read_engine(bundle, "cpu")
        assert info.precision == part["precision"] == f"int4 weights, fp32 activations, {part['kv_cache']} KV cache"
        rows = _one_row(by_itself)
        assert sum(row.nbytes for row in rows) == info.cache_bytes_per_token == part["cache_bytes_per_token"]
        assert [(each.name, each.width) for each in info.cache] == [(e["name"], e["width"]) for e in part["cache"]]
        shape: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 2}
        read.append(bench(by_itself, **shape, repeat=1, threads=1)["bytes_per_token"])
        predicted = estimate(bundle.manifest, load_profile("raspberry-pi-5"), **shape)
        assert predicted["fit"]["cache_bytes"] == 10 * info.cache_bytes_per_token
        result = CliRunner().invoke(cli.main, ["inspect", str(by_itself), "--json"], catch_exceptions=False)
        assert json.loads(result.stdout)["engines"][0]["cache_bytes_per_token"] == info.cache_bytes_per_token
        for lanes in (1, 2):
            logits.append(run(open_session(by_itself, lanes)))
    assert read[0] < read[1]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).mean() < MOST_ERROR["int8"] * logits[2].std()


def test_an_engine_of_before_has_one_cache_for_both_graphs(
    bundles: dict[str, Path], tmp_path: Path, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """engine.json has no `stock` where somebody asks for fp32 or fp16, and never had one before."""
    document = read_json(bundles["fp16"] / "engines" / "cpu" / "engine.json", BuildError)
    assert "stock" not in document
    for variable in ("", kernels.STOCK):
        monkeypatch.setenv(kernels.VARIABLE, variable)
        assert {entry.dtype for entry in read_engine(Bundle.open(bundles["fp16"]), "cpu").cache} == {"float16"}
        assert np.isfinite(run(open_session(bundles["fp16"]))).all()


def test_a_dry_run_counts_the_type(tiny_bundle: Path) -> None:
    totals = []
    for kind in ("fp32", "fp16"):
        options = ["build", str(tiny_bundle), "--profile", "cpu", "--dry-run", "--json", "--kv-cache", kind]
        result = CliRunner().invoke(cli.main, options, catch_exceptions=False)
        totals.append(json.loads(result.stdout)[0]["cache_bytes"])
    assert totals[0] == 2 * totals[1]
