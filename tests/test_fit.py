"""The fit check against arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from family_cases import FAMILIES, make_model, save_model
from model_manifests import deepseek_v2_lite

import moedge
from moedge.bundle import Bundle
from moedge.errors import BundleError
from moedge.profiles.advice import _largest, narrower_weight_bytes, narrower_weights
from moedge.profiles.device import load_profile
from moedge.profiles.fit import check_fit, estimate_workspace, size
from moedge.profiles.shape import ModelShape, default_kv_cache

GIB = 1 << 30


def test_parts_by_hand() -> None:
    manifest = deepseek_v2_lite()
    fit = check_fit(manifest, load_profile("rtx4090"), max_batch=2, max_seq_len=4096, workspace_bytes=123_456_789)
    assert fit.weight_bytes == sum(manifest["sizes"].values())
    assert fit.cache_bytes == 2 * 4096 * 27 * (512 + 64) * 2  # fp16 on TensorRT
    assert fit.workspace_bytes == 123_456_789
    assert fit.runtime_bytes == 600 * 2**20
    assert fit.available_bytes == 23 * GIB
    assert fit.total_bytes == fit.weight_bytes + fit.cache_bytes + 123_456_789 + 600 * 2**20
    assert fit.fits and not fit.suggestions and not fit.devices_that_fit
    assert fit.explain().startswith("DeepSeek-V2-Lite fits rtx4090: it needs 8.6 GiB")
    element = {"int8": 1 + 4 / 64, "fp16": 2, "fp32": 4}[default_kv_cache(manifest)]
    assert check_fit(manifest, load_profile("cpu"), 2, 4096).cache_bytes == 2 * 4096 * 27 * (512 + 64) * element
    narrow = check_fit(manifest, load_profile("cpu"), 2, 4096, cache_bytes_per_element=1)
    assert 2 * narrow.cache_bytes == fit.cache_bytes


def test_rows_and_json_add_up() -> None:
    fit = check_fit(deepseek_v2_lite(), load_profile("jetson-agx-orin-64gb"))
    rows = {what: count for what, count, _ in fit.rows()}
    assert rows["needed"] == rows["weights"] + rows["KV cache"] + rows["workspace"] + rows["runtime"]
    document = json.loads(json.dumps(fit.to_json()))
    assert document["total_bytes"] == rows["needed"] and document["available_bytes"] == 58 * GIB
    assert document["fits"] is True and document["max_seq_len"] == 2048


def test_fewer_bits_is_the_first_remedy() -> None:
    """fp16: 31.4 GB on a 24 GiB card; int8 is enough, so int4 is not asked for, and no context or batch helps."""
    fit = check_fit(deepseek_v2_lite("fp16"), load_profile("rtx4090"), 1, 4096)
    assert not fit.fits
    assert [(each.change, each.option) for each in fit.suggestions] == [("fewer bits", "moedge export --weights int8")]
    by_hand = sum(deepseek_v2_lite("int8")["sizes"].values()) - fit.weight_bytes + fit.total_bytes
    assert fit.suggestions[0].total_bytes == pytest.approx(by_hand, rel=1e-4)
    assert fit.explain() == (
        "DeepSeek-V2-Lite does not fit rtx4090: it needs 30.2 GiB (weights 29.3 GiB, KV cache 122 MiB at 1 x 4096 "
        "tokens, workspace 214 MiB, runtime 600 MiB), rtx4090 has 23.0 GiB; it fits with moedge export --weights int8 "
        f"(fewer bits, {size(by_hand)})"
    )


def test_context_and_batch_are_the_largest_that_fit() -> None:
    manifest, device = deepseek_v2_lite(), load_profile("rtx4090")
    fit = check_fit(manifest, device, max_batch=8, max_seq_len=65536)
    found = {each.change: each for each in fit.suggestions}
    assert list(found) == ["shorter context", "smaller batch"]  # int4 already: no fewer bits
    context = int(found["shorter context"].option.removeprefix("--max-seq-len "))
    assert context % 256 == 0 and check_fit(manifest, device, 8, context).fits
    assert not check_fit(manifest, device, 8, context + 256).fits
    batch = int(found["smaller batch"].option.removeprefix("--max-batch "))
    assert check_fit(manifest, device, batch, 65536).fits and not check_fit(manifest, device, batch + 1, 65536).fits
    assert found["smaller batch"].total_bytes == check_fit(manifest, device, batch, 65536).total_bytes


def test_devices_that_fit_when_nothing_else_helps() -> None:
    fit = check_fit(deepseek_v2_lite(), load_profile("jetson-orin-nano-8gb"))
    assert not fit.fits and not fit.suggestions
    assert fit.devices_that_fit[:2] == ("jetson-orin-nx-16gb", "jetson-agx-orin-64gb")
    assert "no change of weights, context or batch helps; it fits: jetson-orin-nx-16gb, " in fit.explain()


def test_no_device_is_large_enough() -> None:
    manifest = deepseek_v2_lite()
    manifest["sizes"]["experts"] = 10**12
    told = check_fit(manifest, load_profile("cpu")).explain()
    assert told.endswith("nor a larger known device: take a smaller model")


def test_narrower_weights_are_what_an_export_would_write() -> None:
    for wide in ("fp32", "fp16", "int8"):
        for narrow in ("int8", "int4"):
            if (wide, narrow) != ("int8", "int8"):
                by_hand = sum(deepseek_v2_lite(narrow, "int6")["sizes"].values())
                assert narrower_weight_bytes(deepseek_v2_lite(wide), narrow) == pytest.approx(by_hand, rel=1e-6)
    manifest = deepseek_v2_lite()
    assert narrower_weight_bytes(manifest, "int8") == sum(manifest["sizes"].values()), "never wider"


@pytest.mark.parametrize(
    ("experts", "width", "shared", "chunk_256_to_1024"),
    [(128, 768, 0, (163e6, 317e6, 623e6)), (64, 1408, 2816, (151e6, 291e6))],
)
def test_workspace_against_tensorrt_build_logs(
    experts: int, width: int, shared: int, chunk_256_to_1024: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch of one MoE layer, read from TensorRT-RTX 1.7 build logs: never estimated below, at most 6% above."""
    manifest = deepseek_v2_lite()
    manifest["config"]["moe"] |= {
        "num_experts": experts,
        "intermediate_size": width,
        "shared_intermediate_size": shared,
        "layers": list(range(27)),
    }
    manifest["config"] |= {"vocab_size": 1, "num_attention_heads": 0}  # the layer alone: no logits, no scores
    for doubling, logged in enumerate(chunk_256_to_1024):
        monkeypatch.setattr("moedge.profiles.fit.PREFILL_CHUNK", 256 << doubling)
        estimated = estimate_workspace(ModelShape.from_manifest(manifest), "tensorrt_rtx", 1, 4096)
        assert logged <= estimated <= 1.06 * logged


def test_onnxruntime_workspace_is_of_the_chosen_experts() -> None:
    shape = ModelShape.from_manifest(deepseek_v2_lite())
    layer = 256 * max(3 * (6 * 1408 + 2816), 3 * 10944) * 4 * 1.04
    scores = 2 * 16 * 256 * 2048 * 4
    assert estimate_workspace(shape, "onnxruntime", 1, 2048) == round(layer) + scores + 102400 * 4 + (8 << 20)


def test_largest_is_the_largest() -> None:
    for limit in range(12):
        for below in range(1, 12):
            assert _largest(lambda n, limit=limit: n <= limit, below) == max(n for n in range(below) if n <= limit)


def test_sizes_for_a_reader() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 << 20, 640 << 20, 24 * GIB, 128 * GIB)] == [
        "0 B", "1023 B", "1.0 KiB", "5.0 MiB", "640 MiB", "24.0 GiB", "128 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("model",), True, "model is True, an object was expected; export the checkpoint again"),
        (("model", "family"), float("nan"), "model.family is nan, a text was expected; export"),
        (("config",), [], "config is a list, an object was expected"),
        (("sizes", "experts"), 10**400, "sizes.experts is a number of more than 20 digits, a whole number from 0 to"),
        (("config", "vocab_size"), 0, "config.vocab_size is 0, a whole number from 1 to 2147483647 was expected"),
        (("config", "moe", "intermediate_size"), float("nan"), "config.moe.intermediate_size is nan, a whole number"),
        (("config", "moe", "num_experts_per_tok"), 65, "65 experts for each token, of 64; export the checkpoint again"),
        (("config", "attention"), "gqa", "config.attention is 'gqa', an object was expected"),
    ],
)
def test_a_manifest_that_is_damaged(place: tuple[str, ...], value: object, told: str) -> None:
    manifest = deepseek_v2_lite()
    part = manifest
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(BundleError) as raised:
        check_fit(manifest, load_profile("cpu"))
    assert told in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_manifest_that_lacks_a_key() -> None:
    manifest = deepseek_v2_lite()
    del manifest["config"]["hidden_size"]
    with pytest.raises(BundleError) as raised:
        check_fit(manifest, load_profile("cpu"))
    assert str(raised.value) == "moedge.json: config.hidden_size is missing; export the checkpoint again"


CHANGES = {"fewer bits": "b", "shorter context": "c", "smaller batch": "n"}


def test_advice_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """900 random shapes and devices (seed 21): what is advised fits, the next larger does not, and where nothing is
    advised nothing at all fits, whatever weights, context and batch one tries."""
    monkeypatch.setattr("moedge.profiles.fit._devices_that_fit", lambda *asked: ())
    draw = random.Random(21)
    seen: Counter[str] = Counter()
    for turn in range(900):
        have = draw.choice(("fp32", "fp16", "int8", "int4"))
        manifest = deepseek_v2_lite(have, ("int8", "int6")[turn % 2])
        scale = draw.choice((0.01, 0.1, 1, 3))
        manifest["sizes"] = {name: round(count * scale) for name, count in manifest["sizes"].items()}
        manifest["config"]["vocab_size"] = draw.choice((102_400, 10_000_000))  # whose logits tell batches apart
        device = load_profile(draw.choice(("rtx4090", "jetson-orin-nano-8gb", "raspberry-pi-5")))
        batch, length = draw.choice((1, 2, 7, 32)), draw.choice((100, 700, 4096, 50_000))
        memory = round(check_fit(manifest, device, batch, length).total_bytes * draw.uniform(0.05, 1.2))
        device = dataclasses.replace(device, memory_bytes=memory, memory_reserved_bytes=memory // 10)
        fit = check_fit(manifest, device, batch, length)
        options = ("fp16", "int8", "int4", "int4 --head int4")[-1 if have == "int4" else 0 :]
        narrower = {name: narrower_weight_bytes(manifest, name, device.target) for name in options}
        weights = {None: fit.weight_bytes} | {k: n for k, n in narrower.items() if n < fit.weight_bytes}

        def total(name: str | None, count: int, tokens: int) -> int:
            other = check_fit(manifest, device, count, tokens, weight_bytes=weights[name])  # noqa: B023
            return other.total_bytes

        if fit.fits:
            assert not fit.suggestions
            continue
        room = fit.available_bytes
        for advice in fit.suggestions:
            name, count, tokens = read_advice(advice.option, batch, length)
            assert total(name, count, tokens) == advice.total_bytes <= room
            seen["".join(CHANGES[part] for part in advice.change.split(" and "))] += 1
            if "shorter context" in advice.change:
                assert total(name, count, tokens + 256 if tokens >= 256 else 2 * tokens) > room
            if advice.change == "smaller batch":
                assert total(name, count + 1, tokens) > room
            if "fewer bits" in advice.change:
                wider = list(weights)[list(weights).index(name) - 1]
                assert total(wider, count, tokens) > room
        alone = {
            "fewer bits": any(total(name, batch, length) <= room for name in weights),
            "shorter context": total(None, batch, 16) <= room and length > 16,
            "smaller batch": total(None, 1, length) <= room and batch > 1,
        }
        if any(alone.values()):
            assert [advice.change for advice in fit.suggestions] == [name for name, works in alone.items() if works]
        else:
            assert len(fit.suggestions) == any(total(name, 1, 16) <= room for name in weights)
            seen["nothing"] += not fit.suggestions
    assert all(seen[kind] >= 1 for kind in ("b", "c", "n", "bc", "cn", "bcn", "nothing")), seen


def read_advice(option: str, batch: int, length: int) -> tuple[str | None, int, int]:
    """(weights, batch, context) that the options ask for."""
    words = option.replace(" and ", " ").split()
    asked = dict(zip(words, words[1:]))  # noqa: B905
    weights = f"{asked['--weights']} --head int4" if "--head" in asked else asked.get("--weights")
    return weights, int(asked.get("--max-batch", batch)), int(asked.get("--max-seq-len", length))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe"])
def test_fewer_bits_are_what_an_export_then_takes(family: str, tmp_path: Path) -> None:
    """To the byte, also where groups are smaller than 128, matrices stay float32, and the head is tied."""
    name = list(FAMILIES[family].configurations)[-1]
    save_model(make_model(family, name), family, tmp_path / "checkpoint")
    moedge.export(tmp_path / "checkpoint", tmp_path / "fp16", weights="fp16", verify=False)
    manifest = Bundle.open(tmp_path / "fp16").manifest
    options = ["int8", "int4"] + ["int4 --head int4"] * (not manifest["config"]["tie_word_embeddings"])
    assert list(narrower_weights(manifest)) == options
    for place, option in enumerate(options):
        weights, _, head = option.partition(" --head ")
        bundle = moedge.export(
            tmp_path / "checkpoint", tmp_path / str(place), weights=weights, head=head or None, verify=False
        )
        assert narrower_weight_bytes(manifest, option) == sum(bundle.sizes.values())
        assert option not in narrower_weights(bundle.manifest)
