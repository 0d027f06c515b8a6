"""Bad input to export: one clear line, exit 1, no half bundle, an older one untouched."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import edit_config, edit_tensors, make_model, save_model

import moedge
from moedge.export.checkpoint import read_header

Edit = Callable[[Path], None]


def run_export(source: Path, output: Path, *options: str, **process: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moedge", "export", str(source), "-o", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, **process)


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1000)


def cut_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)


def lose_expert(folder: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".layers.2.mlp.experts.5." in name]:
            del tensors[name]

    edit_tensors(folder, edit)


def reshape(folder: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])

    edit_tensors(folder, edit)


def plant_nan(folder: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.gate.weight"][3, 5] = np.nan

    edit_tensors(folder, edit)


def add_tensor(folder: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = np.zeros((32, 64), np.float32)

    edit_tensors(folder, edit)


def lose_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def config(**changes: Any) -> Edit:
    return lambda folder: edit_config(folder, **changes)


def make_bundle(folder: Path) -> None:
    (folder / "moedge.json").write_text("{}")


CASES: dict[str, tuple[Edit, str]] = {
    "a bundle": (make_bundle, "{folder} is a bundle already: make an engine of it with moedge build {folder} --"),
    "no config": (drop_config, "{folder} has no config.json (it holds: "),
    "unknown model_type": (
        config(model_type="gpt2"),
        "{folder}/config.json: model_type 'gpt2' is not known; known: ",
    ),
    "truncated": (truncate, "{folder}/model.safetensors: truncated: tensor "),
    "header cut": (cut_header, "{folder}/model.safetensors: truncated or not safetensors (a header of "),
    "missing expert": (
        lose_expert,
        "{folder}: 3 of 91 tensors are missing, 3 of them of experts, first "
        "'model.layers.2.mlp.experts.5.gate_proj.weight'; download the checkpoint again, or correct config.json",
    ),
    "shape contradicts config": (
        reshape,
        "{folder}: tensor 'model.layers.1.mlp.experts.3.down_proj.weight' has shape [64, 31], config.json implies "
        "[64, 32]; correct config.json or download the checkpoint again",
    ),
    "NaN in a router": (
        plant_nan,
        "{folder}: tensor 'model.layers.1.mlp.gate.weight' holds NaN or infinity in row 3; download it again",
    ),
    "tensor nobody uses": (
        add_tensor,
        "{folder}: 1 tensors of the checkpoint are not used by the graph, first "
        "'model.layers.1.mlp.experts.8.up_proj.weight'; ",
    ),
    "missing shard": (
        lose_shard,
        "{folder}: 1 of 2 shards named by model.safetensors.index.json are missing, first "
        "model-00002-of-00002.safetensors; download the checkpoint again",
    ),
    "only pickles": (
        only_pickles,
        "{folder} has neither model.safetensors nor model.safetensors.index.json (found pytorch_model.bin: convert to "
        "safetensors first)",
    ),
    "size of the wrong type": (
        config(hidden_size="64"),
        "{folder}/config.json: hidden_size is '64', an integer was expected",
    ),
    "size missing": (
        config(num_hidden_layers=None),
        "{folder}/config.json: num_hidden_layers is missing; it is needed for this model family",
    ),
    "top-k beyond the experts": (
        config(num_experts_per_tok=9),
        "{folder}/config.json: num_experts_per_tok 9 exceeds the 8 experts; correct config.json",
    ),
    "unknown rope": (
        config(rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        "{folder}/config.json: rope type 'spiral' is not known; known: ",
    ),
    "unknown activation": (
        config(hidden_act="gelu"),
        "{folder}/config.json: hidden_act is 'gelu'; supported here: 'silu'",
    ),
    "no sparse layer": (
        config(first_k_dense_replace=3),
        "{folder}/config.json: first_k_dense_replace 3 leaves no mixture-of-experts layer of 3; ",
    ),
    "config is no object": (
        lambda folder: (folder / "config.json").write_text("[1]") and None,
        "{folder}/config.json: holds a JSON list, not an object",
    ),
}


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(case: str, checkpoint: Path, tmp_path: Path) -> None:
    edit, expected = CASES[case]
    edit(checkpoint)
    with pytest.raises(moedge.MoedgeError) as caught:
        moedge.export(checkpoint, tmp_path / "bundle")
    assert str(caught.value).startswith(expected.format(folder=checkpoint))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_the_command_prints_the_line_and_exits_1(checkpoint: Path, tmp_path: Path) -> None:
    lose_expert(checkpoint)
    result = run_export(checkpoint, tmp_path / "bundle")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {checkpoint}: 3 of 91 tensors are missing")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("module", "extra"), [("onnx", "export"), ("onnxruntime", "cpu")])
def test_a_package_that_is_not_installed_is_named_before_anything_is_written(
    module: str, extra: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; import moedge\n"
        f"try: moedge.export({str(tiny_checkpoint)!r}, {str(tmp_path / 'bundle')!r})\n"
        "except moedge.DependencyError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.startswith(f"{module} is not installed"), result.stderr
    assert f"pip install 'moedge[{extra}]'" in result.stdout
    assert os.listdir(tmp_path) == []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failing_export_leaves_the_older_bundle_as_it_was(
    checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = snapshot(bundle)
    with pytest.raises(moedge.BundleError) as caught:
        moedge.export(checkpoint, bundle)
    expected = f"{bundle} is not empty; name another output folder, or replace it with --force (force=True)"
    assert str(caught.value) == expected
    plant_nan(checkpoint)
    with pytest.raises(moedge.CheckpointError):
        moedge.export(checkpoint, bundle, force=True)
    assert snapshot(bundle) == before
    assert sorted(os.listdir(tmp_path)) == ["bundle", "checkpoint"]


def test_force_replaces_the_older_bundle(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    moedge.export(tiny_checkpoint, bundle, weights="int8", force=True)
    manifest = json.loads((bundle / "moedge.json").read_text())
    assert manifest["quantization"]["weights"] == "int8"
    assert not (bundle / "engines").exists()  # they were made from the other weights
    assert os.listdir(tmp_path) == ["bundle"]


def test_force_replaces_bundles_only(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    with pytest.raises(moedge.BundleError) as caught:
        moedge.export(tiny_checkpoint, mine, force=True)
    assert str(caught.value) == (
        f"{mine} holds files and no moedge.json: --force replaces bundles only; name another output folder"
    )
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    inside = Path(shutil.copytree(tiny_checkpoint, bundle / "checkpoint"))
    with pytest.raises(moedge.BundleError) as caught:
        moedge.export(inside, bundle, force=True)
    assert str(caught.value) == (
        f"{bundle} holds the checkpoint {inside}, which would go with it; name another output folder"
    )
    assert (mine / "precious.txt").read_text() == "mine" and (inside / "config.json").is_file()


def test_the_folder_one_stands_in_is_replaced_like_any_other(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    monkeypatch.chdir(bundle)
    moedge.export(tiny_checkpoint, ".", weights="int8", force=True)
    assert json.loads((bundle / "moedge.json").read_text())["quantization"]["weights"] == "int8"
    assert os.listdir(tmp_path) == ["bundle"]


def test_the_checkpoint_is_never_its_own_output(checkpoint: Path) -> None:
    before = snapshot(checkpoint)
    with pytest.raises(moedge.BundleError, match="is the checkpoint itself; name another output folder"):
        moedge.export(checkpoint, checkpoint, force=True)
    assert snapshot(checkpoint) == before


def test_a_file_in_the_outputs_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("mine")
    with pytest.raises(moedge.BundleError) as caught:
        moedge.export(tiny_checkpoint, tmp_path / "bundle", force=True)
    assert str(caught.value) == f"{tmp_path / 'bundle'} is a file, not a folder; name another output folder"
    with pytest.raises(moedge.BundleError) as caught:
        moedge.export(tiny_checkpoint, tmp_path / "bundle" / "below" / "it")
    assert str(caught.value) == (
        f"{tmp_path / 'bundle/below/it'}: {tmp_path / 'bundle'} is a file, not a folder; name another output folder"
    )


def test_a_file_in_the_inputs_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = tiny_checkpoint / "config.json"
    with pytest.raises(moedge.CheckpointError) as caught:
        moedge.export(config, tmp_path / "bundle")
    assert str(caught.value) == f"{config} is a file, not a folder; name the folder that it lies in"
    with pytest.raises(moedge.BundleError) as refused:
        moedge.load(config)
    assert str(refused.value) == f"{config} is a file, not a folder; name the folder that `moedge export` made"


def test_a_disk_that_fills_up_in_the_middle(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The operating system refuses to let any file grow beyond 64 KiB, weights.bin needs more."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = snapshot(bundle)
    limit = 64 * 1024
    result = run_export(
        tiny_checkpoint,
        bundle,
        "--force",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {bundle}: the disk is full (File too large, ")
    assert line.endswith("nothing was kept: free some space or name an output folder on another disk")
    assert snapshot(bundle) == before
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100 * 1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(moedge.BundleError, match="the bundle needs 0 MiB, 0 MiB are free; free some space or name an"):
        moedge.export(tiny_checkpoint, tmp_path / "new" / "bundle")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_in_the_middle(tmp_path: Path) -> None:
    """A real SIGINT while the weights are being written."""
    model = make_model(9, hidden_size=512, moe_intermediate_size=1024, n_routed_experts=16)
    source = save_model(model, tmp_path / "checkpoint")
    command = [sys.executable, "-m", "moedge", "export", str(source), "-o", str(tmp_path / "bundle")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".bundle.partial-*/weights.bin")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin"])
def test_a_bundle_with_a_byte_flipped_is_not_built_from(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with (bundle / name).open("r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)
        stream.seek(1000)
        stream.write(bytes([byte[0] ^ 1]))
    before = snapshot(bundle)
    with pytest.raises(moedge.BuildError) as caught:
        moedge.build(bundle, "cpu")
    assert str(caught.value) == (
        f"{bundle / name} does not have the checksum in the manifest: the bundle is damaged; "
        "export it again: moedge export ... --force"
    )
    assert snapshot(bundle) == before


LIES: dict[str, tuple[Any, str]] = {
    "past the end": ({"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16000]}}, "truncated: tensor 't'"),
    "absurd shape": (
        {"t": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}},
        "tensor 't' has 16 bytes, its shape",
    ),
    "negative": ({"t": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "malformed header entry"),
    "backwards": ({"t": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, "truncated: tensor 't' ends at"),
    "fractions": ({"t": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, "malformed header entry"),
    "booleans": ({"t": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "malformed header entry"),
    "unknown dtype": ({"t": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}}, "has dtype 'F33'; known: "),
    "dtype is a list": ({"t": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, "tensor 't' has dtype"),
    "no object": ({"t": 5}, "malformed header entry"),
    "overlap": (
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        },
        "tensors 'a' and 'b' overlap",
    ),
    "a list": ([1, 2], "the safetensors header is not an object"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, tmp_path: Path) -> None:
    header, expected = LIES[lie]
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(moedge.CheckpointError, match="^" + str(path)) as caught:
        read_header(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "truncated or not safetensors"),
        (b"\xff" * 8 + b"{}", "truncated or not safetensors (a header of 18446744073709551615 bytes announced"),
        ((2).to_bytes(8, "little") + b"{]", "the safetensors header is not JSON"),
        ((2000).to_bytes(8, "little") + b"[" * 2000, "the safetensors header is not JSON"),
    ],
)
def test_files_that_are_not_safetensors(raw: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(moedge.CheckpointError) as caught:
        read_header(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_options_list_the_known(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(moedge.CheckpointError, match="weights 'int3' is not known; known: fp32, fp16, int8, int4"):
        moedge.export(tiny_checkpoint, tmp_path / "b", weights="int3")
    with pytest.raises(moedge.CheckpointError, match="group size 48 is not supported; supported: 16, 32, 64, 128"):
        moedge.export(tiny_checkpoint, tmp_path / "b", group_size=48)
    with pytest.raises(moedge.CheckpointError, match="algorithm 'magic' is not known; known: rtn"):
        moedge.export(tiny_checkpoint, tmp_path / "b", algorithm="magic")
