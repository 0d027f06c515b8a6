"""A moedge.json that was damaged or made by hand, with or without a seal: one line, whichever command reads it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import moedge
from moedge.bundle import Bundle, sealed
from moedge.cli import main
from moedge.manifest import check_manifest
from moedge.profiles.device import load_profile
from moedge.profiles.estimate import estimate

GONE = object()
HOSTILE = [GONE, None, "x", "../..", -1, 0, 1.5, 2**31 - 1, 10**30, float("nan"), True, [], [1], [[[]]], {}, {"a": 1}]
COUNT = "a whole number from 1 to 2147483647 was expected"
WORST = [
    ("format", [], "bundle format [], this version reads 1; export the checkpoint again with this version"),
    ("model", GONE, "model is missing"),
    ("model.name", 3, "model.name is 3, a text was expected"),
    ("config", [], "config is a list, an object was expected"),
    ("config.vocab_size", "x", f"config.vocab_size is 'x', {COUNT}"),
    ("config.num_hidden_layers", 2**31, "config.num_hidden_layers is 2147483648, a whole number from 1 to 4095 was"),
    ("config.max_position_embeddings", None, f"config.max_position_embeddings is null, {COUNT}"),
    ("config.attention.kind", "x", "config.attention.kind is 'x', one of mla, gqa, torch was expected"),
    ("config.attention.kv_lora_rank", GONE, "config.attention.kv_lora_rank is missing"),
    ("config.rope", "x", "config.rope is 'x', an object was expected"),
    ("config.moe.layers", 3, "config.moe.layers is 3, a list was expected"),
    ("config.moe.layers", [2, 1], "config.moe.layers are not layers of 3 in their order"),
    ("config.moe.layers", [1, [2]], "config.moe.layers.1 is a list, a whole number from 0 to 1125899906842624 was"),
    ("config.moe.num_experts", 1, "2 experts for each token, of 1"),
    ("gating", [{"op": "x"}], "gating.0.attributes is missing"),
    ("gating.0.attributes.top_k", "x", "gating.0.attributes.top_k is 'x', a number was expected"),
    ("quantization.classes.experts", None, "quantization.classes.experts is null, an object was expected"),
    ("quantization.classes.head.relative_error", 10**400, "is a number of more than 20 digits, a number was expected"),
    ("sizes.norm", -1, "sizes.norm is -1, a whole number from 0 to 1125899906842624 was expected"),
    ("cache", [{"name": "latent.0"}], "cache.0.width is missing"),
    ("files", None, "files is null, an object was expected"),
    ("files", {"a": 5}, "files.a is 5, an object was expected"),
]
COMMANDS = [
    ("inspect",),
    ("verify",),
    ("generate", "-p", "a"),
    ("build", "--profile", "cpu"),
    ("estimate", "--profile", "cpu"),
    ("report", "--matrix", "--profile", "cpu", "-o", "no.html"),
    ("serve", "--port", "0"),
]


def edited(document: dict[str, Any], place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    found = document = copy.deepcopy({key: part for key, part in document.items() if key != "seal"})
    for key in place[:-1]:
        found = found[key]  # type: ignore[index]
    if value is GONE:
        del found[place[-1]]  # type: ignore[arg-type]
    else:
        found[place[-1]] = value  # type: ignore[index]
    return document


@pytest.mark.parametrize(("place", "value", "told"), WORST)
def test_every_command_says_what_is_wrong(
    place: str, value: Any, told: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "moedge.json"
    whole = json.loads((tiny_bundle / "moedge.json").read_text())
    document = edited(whole, tuple(int(key) if key.isdigit() else key for key in place.split(".")), value)
    for written in (document, sealed(document)):
        path.write_text(json.dumps(written))
        with pytest.raises(moedge.BundleError) as caught:
            Bundle.open(tmp_path)
        text = str(caught.value)
        assert text.startswith(f"{path}: ") and told in text and "; export the checkpoint again" in text
        assert len(text.splitlines()) == 1
    for name, *options in COMMANDS:
        result = CliRunner().invoke(main, [name, str(tmp_path), *options], standalone_mode=False)
        assert isinstance(result.exception, moedge.BundleError) and str(result.exception) == text, name


def test_a_size_that_the_graph_has_not_is_told_at_build(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    whole = json.loads((bundle / "moedge.json").read_text())
    (bundle / "moedge.json").write_text(json.dumps(edited(whole, ("config", "vocab_size"), 2**31 - 1)))
    with pytest.raises(moedge.BundleError) as caught:
        moedge.build(bundle, "jetson-thor", max_seq_len=64)
    told = "cannot be loaded (it has 320 tokens, moedge.json says 2147483647); export the bundle again"
    assert str(caught.value) == f"{bundle / 'model.onnx'}: {told}"


def places(part: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    keys = part if isinstance(part, dict) else {0, len(part) - 1} if isinstance(part, list) and part else ()
    for key in keys:
        yield (*above, key)
        yield from places(part[key], (*above, key))


def test_what_is_let_pass_can_be_estimated(tiny_bundle: Path) -> None:
    """Each key in turn deleted, and replaced by each hostile value: refused in a line, or a manifest like any other."""
    whole = json.loads((tiny_bundle / "moedge.json").read_text())
    device, taken, refused = load_profile("rtx4090"), 0, 0
    for place in places(whole):
        for value in HOSTILE if place != ("seal",) else ():
            document = edited(whole, place, value)
            try:
                check_manifest(document)
            except moedge.BundleError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1 and str(error).startswith("moedge.json: "), place
                continue
            taken += 1
            found = estimate(document, device, prompt_tokens=8, new_tokens=2)
            assert found["fits"] in (True, False), place
    assert refused > 1000 and taken > 100
