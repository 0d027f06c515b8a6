"""Engines that do not fit the bundle or the machine are refused before they load, with the command that mends it."""

from __future__ import annotations

import json
import shutil

import fake_engine
import numpy as np
import pytest
from click.testing import CliRunner

from moedge.bundle import Bundle
from moedge.errors import BundleError, EngineError, MoedgeError
from moedge.profiles.verify_commands import verify_command
from moedge.runtime import machine, preflight
from moedge.runtime.commands import inspect_command
from moedge.runtime.engine import load
from moedge.runtime.initializers import read_placed
from moedge.runtime.sessions import _plans
from moedge.runtime.verify import verify


@pytest.fixture(scope="session")
def whole_bundle(tmp_path_factory):
    return fake_engine.write_bundle(tmp_path_factory.mktemp("preflight") / "bundle")


@pytest.fixture
def bundle(whole_bundle, tmp_path):
    return shutil.copytree(whole_bundle, tmp_path / "bundle")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)


def engine_json(bundle, **changes):
    fake_engine.edit_json(bundle / "engines/cpu/engine.json", **changes)


def add_plan(bundle, content=b"plan", profile="rtx4090", **changes):
    """An engine for a GPU beside the CPU's."""
    folder = bundle / "engines" / profile
    folder.mkdir()
    (folder / "engine.plan").write_bytes(content)
    document = json.loads((bundle / "engines/cpu/engine.json").read_text())
    document |= {"profile": profile, "backend": "tensorrt_rtx", "backend_version": "1.7.1.116"}
    document |= {"compute_capability": [8, 9], "files": {"engine.plan": fake_engine.file_entry(folder / "engine.plan")}}
    (folder / "engine.json").write_text(json.dumps(document | changes))


def refusal(bundle, profile=None):
    with pytest.raises(MoedgeError) as caught:
        load(bundle, profile)
    assert isinstance(caught.value, EngineError), "one class for engines"
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(bundle), "BUNDLE")


AGAIN = "build it again: moedge build BUNDLE --profile cpu"


def test_no_engine(bundle):
    assert refusal(bundle, "rtx4090") == (
        "BUNDLE has no engine 'rtx4090', it has cpu; build it: moedge build BUNDLE --profile rtx4090"
    )
    shutil.rmtree(bundle / "engines")
    assert refusal(bundle) == "BUNDLE has no engines; build one: moedge build BUNDLE --profile cpu"
    assert refusal(bundle, "cpu") == "BUNDLE has no engines; build one: moedge build BUNDLE --profile cpu"


def test_a_profile_that_nobody_knows_is_not_to_be_built(bundle):
    assert refusal(bundle, "rtx490") == (
        "BUNDLE has no engine 'rtx490' (did you mean rtx4090?), it has cpu, and no device profile has that name: "
        "moedge profiles lists them"
    )
    load(bundle, "CPU").close()  # any spelling of one that is there


def test_engine_json_of_another_kind(bundle):
    engine_json(bundle, format=2)
    assert refusal(bundle, "cpu") == (
        f"BUNDLE/engines/cpu/engine.json: engine format 2, this version reads 1; {AGAIN}"
    )
    engine_json(bundle, format=1, profile="other")
    assert "engine.json is of profile 'other', not 'cpu'; build it" in refusal(bundle, "cpu")
    engine_json(bundle, profile="cpu", max_seq_len="many")
    assert "not a valid engine.json (max_seq_len is many)" in refusal(bundle, "cpu")
    engine_json(bundle, max_seq_len=64, files=None)
    assert "not a valid engine.json" in refusal(bundle, "cpu")
    (bundle / "engines/cpu/engine.json").write_text('{"format": 1}')
    assert "not a valid engine.json (missing 'compute_capability'); build it again" in refusal(bundle, "cpu")
    (bundle / "engines/cpu/engine.json").write_text("{")
    assert "engine.json: not readable as JSON" in refusal(bundle, "cpu")


def test_damaged_engine_files(bundle):
    model = bundle / "engines/cpu/model.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    where = "engine 'cpu': BUNDLE/engines/cpu/model.onnx"
    assert refusal(bundle) == f"{where} is damaged (its checksum is not the one it was made with); {AGAIN}"
    model.write_bytes(content[:100])
    assert refusal(bundle) == f"{where} has 100 bytes instead of {len(content)}; {AGAIN}"
    model.unlink()
    assert refusal(bundle) == f"{where} is missing; {AGAIN}"


def test_another_bundles_engine(bundle):
    made_from = json.loads((bundle / "engines/cpu/engine.json").read_text())["made_from"]
    engine_json(bundle, made_from={**made_from, "weights.bin": "0" * 64})
    assert refusal(bundle) == f"engine 'cpu' was made from another weights.bin than this bundle's; {AGAIN}"
    (engine,) = json.loads(CliRunner().invoke(inspect_command, [str(bundle), "--json"]).stdout)["engines"]
    assert not engine["runs_here"] and engine["reason"].startswith("engine 'cpu' was made from another weights.bin")


def test_weights_of_another_size(bundle):
    size = (bundle / "weights.bin").stat().st_size
    with (bundle / "weights.bin").open("ab") as stream:
        stream.write(b"x")
    again = "export the bundle again: moedge export ... --force"
    assert refusal(bundle) == f"BUNDLE/weights.bin has {size + 1} bytes instead of {size}; {again}"
    (bundle / "weights.bin").unlink()
    assert refusal(bundle) == f"BUNDLE/weights.bin is missing; {again}"


def test_another_backend_version(bundle):
    engine_json(bundle, backend_version="1.2.3")
    here = preflight.backend_module("onnxruntime").version()
    assert refusal(bundle) == f"engine 'cpu' was built with onnxruntime 1.2.3, and {here} is installed; {AGAIN}"


def test_unknown_backend(bundle):
    engine_json(bundle, backend="abacus")
    assert refusal(bundle, "cpu") == (
        "unknown backend 'abacus'; this version of moedge knows onnxruntime, onnxruntime_cuda, onnxruntime_prefix, "
        "tensorrt, tensorrt_rtx: upgrade moedge, or build the engine again"
    )


def test_several_faults_are_counted(bundle):
    engine_json(bundle, backend_version="1.2.3", made_from={"model.onnx": "0", "weights.bin": "0"})
    assert refusal(bundle).endswith("(2 more: moedge verify BUNDLE)")


def test_a_graph_that_is_not_what_engine_json_says(bundle):
    engine_json(bundle, vocab_size=301)
    assert "engine 'cpu' is not what its engine.json says (logits is missing or of another width)" in refusal(bundle)
    engine_json(bundle, vocab_size=300, moe_layers=[0])
    assert "(experts.0 is missing" in refusal(bundle)


def test_a_graph_that_onnxruntime_refuses(bundle):
    model = bundle / "engines/cpu/model.onnx"
    model.write_bytes(b"no protobuf")
    engine_json(bundle, files={"model.onnx": fake_engine.file_entry(model)})
    assert "cannot load BUNDLE/engines/cpu/model.onnx (" in refusal(bundle)


def test_a_gpu_engine_without_a_gpu(bundle, no_gpu):
    add_plan(bundle)
    assert refusal(bundle, "rtx4090") == (
        "engine 'rtx4090' needs a GPU of compute capability 8.9, and this machine has no GPU with a driver; "
        "what runs here: cpu (--profile cpu)"
    )
    with load(bundle) as engine:
        assert engine.profile == "cpu", "the best that runs here"
    shutil.rmtree(bundle / "engines/cpu")
    assert refusal(bundle) == (
        "no engine in BUNDLE runs on this machine (engine 'rtx4090' needs a GPU of compute capability 8.9, and this "
        "machine has no GPU with a driver); build one that does: moedge build BUNDLE --profile cpu"
    )
    assert refusal(bundle, "rtx4090").endswith("build one that runs here: moedge build BUNDLE --profile cpu")


def test_a_gpu_engine_on_gpus(bundle, monkeypatch):
    add_plan(bundle)
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("NVIDIA A100", (8, 0), 80 << 30)])
    assert refusal(bundle, "rtx4090") == (
        "engine 'rtx4090' needs a GPU of compute capability 8.9, and this machine has NVIDIA A100 (8.0); "
        "what runs here: cpu (--profile cpu)"
    )
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 << 30)])
    monkeypatch.setattr(_plans.importlib.util, "find_spec", lambda name: None)
    assert refusal(bundle, "rtx4090") == (
        "engine 'rtx4090' cannot run: tensorrt_rtx is not installed: pip install 'moedge[rtx]'; "
        "what runs here: cpu (--profile cpu)"
    )


def test_a_prepared_folder(bundle):
    add_plan(bundle, profile="jetson", backend="tensorrt", status="prepared", compute_capability=[8, 7])
    assert refusal(bundle, "jetson") == (
        "engine 'jetson' is prepared, not built: finish it on the device it is for: "
        "moedge build BUNDLE/engines/jetson; what runs here: cpu (--profile cpu)"
    )
    assert verify(Bundle.open(bundle)).faults == []


def test_large_files_are_hashed_by_verify_only(bundle, monkeypatch):
    monkeypatch.setattr(preflight, "HASHED_AT_LOAD", 10)
    (bundle / "engines/cpu/extra.bin").write_bytes(b"x" * 20)
    files = {"extra.bin": fake_engine.file_entry(bundle / "engines/cpu/extra.bin")}
    model = bundle / "engines/cpu/model.onnx"
    engine_json(bundle, files={**files, "model.onnx": fake_engine.file_entry(model)})
    (bundle / "engines/cpu/extra.bin").write_bytes(b"y" * 20)
    load(bundle).close()
    assert ["extra.bin is damaged" in fault for fault in verify(Bundle.open(bundle)).faults] == [True]


PART = {"engine": "engine.plan"}


def on_its_gpu(monkeypatch):
    """A machine where nothing but the engine's own state keeps it from loading."""
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("RTX 4090", (8, 9), 24 << 30)])
    monkeypatch.setattr(machine, "cuda_driver_version", lambda: (13, 0))
    monkeypatch.setattr(_plans, "find_missing", lambda *names: None)
    for backend in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setattr(f"moedge.runtime.sessions.{backend}.find_missing", lambda *names: None)
        monkeypatch.setattr(f"moedge.runtime.sessions.{backend}.version", lambda: "1.7.1.116")


def test_large_plans_are_hashed_at_every_load(bundle, monkeypatch):
    on_its_gpu(monkeypatch)
    monkeypatch.setattr(preflight, "HASHED_AT_LOAD", 2)
    add_plan(bundle, b"plan" * 10, session={"parts": [PART]})
    (bundle / "engines/rtx4090/engine.plan").write_bytes(b"pLan" * 10)
    assert refusal(bundle, "rtx4090") == (
        "engine 'rtx4090': BUNDLE/engines/rtx4090/engine.plan is damaged (its checksum is not the one it was made "
        "with); build it again: moedge build BUNDLE --profile rtx4090"
    )


def test_a_plan_needs_no_weights_beside_it(bundle, monkeypatch):
    on_its_gpu(monkeypatch)
    add_plan(bundle, session={"parts": [PART]})
    (bundle / "weights.bin").unlink()
    opened = Bundle.open(bundle)
    preflight.check_engine(opened, preflight.read_engine(opened, "rtx4090"))
    assert "weights.bin is missing" in refusal(bundle, "cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": {}}, "engine.json has no checksum of engine.plan"),
        ({"session": {"parts": [PART, {"engine": "more.plan"}]}}, "engine.json has no checksum of more.plan"),
        ({"session": {"parts": [{"engine": "../x.plan"}]}}, "engine.json has no checksum of ../x.plan"),
        ({"made_from": {}}, "engine.json does not say which model.onnx it was made from"),
        ({"files": {"../cpu/x": {"bytes": 1, "sha256": "0"}}}, "names '../cpu/x', which is no file of its folder"),
        ({"compute_capability": [9, 0]}, "needs a GPU of compute capability 9.0, and this machine has RTX 4090 (8.9)"),
        ({"backend_version": "1.6.0"}, "was built with tensorrt_rtx 1.6.0, and 1.7.1.116 is installed"),
        ({"backend": "tensorrt", "backend_version": "10.15"}, "built with tensorrt 10.15, and 1.7.1.116 is installed"),
        ({"cuda_minimum": 14}, "needs a driver for CUDA 14, and this machine's is for CUDA 13.0: update the NVIDIA dr"),
    ],
)
def test_what_engine_json_leaves_out_or_says_of_another_machine(bundle, monkeypatch, changes, said):
    on_its_gpu(monkeypatch)
    add_plan(bundle, **{"session": {"parts": [PART]}, **changes})
    assert said in refusal(bundle, "rtx4090")
    (bundle / "engines/rtx4090").rename(bundle / "engines/l4")  # of the same compute capability
    assert "engine.json is of profile 'rtx4090', not 'l4'; build it: moedge build" in refusal(bundle, "l4")


def test_an_edited_engine_json_is_told_by_its_seal(bundle):
    path = bundle / "engines/cpu/engine.json"
    document = json.loads(path.read_text())
    engine_json(bundle, seal=preflight.seal_of(document))
    load(bundle, "cpu").close()
    engine_json(bundle, max_seq_len=document["max_seq_len"] * 2)
    assert refusal(bundle, "cpu") == (
        f"BUNDLE/engines/cpu/engine.json was changed since the engine was built; {AGAIN}"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_seq_len": -1}, "not a valid engine.json (max_seq_len is -1)"),
        ({"max_seq_len": 10**18}, "not a valid engine.json (max_seq_len is 1000000000000000000)"),
        ({"max_seq_len": 2**31 - 1}, " MiB does not fit the memory; load with a smaller max_seq_len"),
        ({"vocab_size": True}, "not a valid engine.json (vocab_size is True)"),
        ({"layers": float("nan")}, "not a valid engine.json (layers is nan)"),
        ({"session": {"lanes": "many"}}, "not a valid engine.json (lanes is many)"),
        ({"cache": []}, "is not what its engine.json says"),
    ],
)
def test_absurd_numbers_are_refused(bundle, monkeypatch, changes, said):
    real = np.empty

    def sparing(shape, *options):
        if isinstance(shape, int) and shape > 1 << 30:  # what a small machine would say
            raise MemoryError
        return real(shape, *options)

    monkeypatch.setattr(np, "empty", sparing)
    engine_json(bundle, **changes)
    assert said in refusal(bundle, "cpu")


def test_weights_that_are_a_link(bundle, tmp_path):
    """Several bundles' folders may share a file; a link to one of another name cannot be followed, and is named."""
    weights, store = bundle / "weights.bin", tmp_path / "store"
    store.mkdir()
    weights.rename(store / "weights.bin")
    weights.symlink_to(store / "weights.bin")
    with load(bundle) as engine:
        assert engine.logits([1, 2]).shape == (2, fake_engine.VOCAB)
    weights.unlink()
    weights.symlink_to((store / "weights.bin").rename(store / "blob"))
    assert f"BUNDLE/weights.bin is a link to {store / 'blob'}, which onnxruntime does not follow: " in refusal(bundle)


def test_an_edited_moedge_json_is_told_by_its_seal(tiny_bundle, tmp_path):
    """Any byte of it: what an export wrote is loaded as it is, or not at all."""
    path = shutil.copytree(tiny_bundle, tmp_path / "bundle") / "moedge.json"
    document = json.loads(path.read_text())
    document["config"]["max_position_embeddings"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError) as caught:
        load(path.parent)
    assert str(caught.value) == f"{path} was changed since the export; export the bundle again"


def test_an_old_driver(bundle, monkeypatch):
    on_its_gpu(monkeypatch)
    monkeypatch.setattr(machine, "cuda_driver_version", lambda: (12, 4))
    add_plan(bundle, session={"parts": [PART]}, cuda_minimum=13)
    assert refusal(bundle, "rtx4090").startswith(
        "engine 'rtx4090' needs a driver for CUDA 13 (580 or later), and this machine's is for CUDA 12.4: update the "
        "NVIDIA driver; what runs here: cpu"
    )
    monkeypatch.setattr(machine, "cuda_driver_version", lambda: None)
    unchecked = verify(Bundle.open(bundle)).unchecked
    assert "engine 'rtx4090': the driver (a driver for CUDA 13 (580 or later) is needed; none is here)" in unchecked


def run_verify(bundle, *options):
    return CliRunner().invoke(verify_command, [str(bundle), *options])


def test_verify_of_a_whole_bundle(bundle, no_gpu):
    add_plan(bundle)
    result = run_verify(bundle, "--json")
    document = json.loads(result.stdout)
    # The plan here is four bytes of text: sound only where nobody can tell.
    others = [fault for fault in document["faults"] if "rtx4090" not in fault]
    assert others == []
    assert document["files"] == 5 and document["experts"] == fake_engine.EXPERTS
    assert document["engines"]["cpu"] == {"ok": True, "status": "ready", "runs_here": True, "reason": None}
    assert document["engines"]["rtx4090"]["runs_here"] is False
    shutil.rmtree(bundle / "engines/rtx4090")
    result = run_verify(bundle)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].endswith("4 experts, 1 engine")
    assert "engine cpu: ok; runs here" in result.stdout
    assert "checking bundle/model.onnx\n" in result.stderr and "checking cpu/model.onnx\n" in result.stderr


def test_verify_of_a_malformed_plan(bundle):
    trt = pytest.importorskip("tensorrt_rtx")
    add_plan(bundle, b"no plan at all" * 10, backend_version=trt.__version__)
    faults = verify(Bundle.open(bundle)).faults
    assert len(faults) == 1 and f"engine.plan is no plan that tensorrt_rtx {trt.__version__} would read" in faults[0]
    assert faults[0].endswith(f"build it again: moedge build {bundle} --profile rtx4090")


def test_verify_of_a_real_plan_without_a_gpu(bundle, no_gpu, capfd):
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network, config = builder.create_network(0), builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    network.mark_output(network.add_identity(network.add_input("x", trt.float32, (4,))).get_output(0))
    add_plan(bundle, bytes(builder.build_serialized_network(network, config)), backend_version=trt.__version__)
    capfd.readouterr()
    verdict = verify(Bundle.open(bundle))
    assert verdict.faults == []
    assert verdict.unchecked == ["engine 'rtx4090': that it runs (it needs a GPU of its kind)"]
    assert capfd.readouterr() == ("", "")
    assert "engine rtx4090: files ok; engine 'rtx4090' needs " in run_verify(bundle).stdout


def test_verify_says_what_it_could_not_check(bundle, monkeypatch):
    from moedge.runtime.sessions import tensorrt_rtx as backend

    monkeypatch.setattr(backend, "version", lambda: None)
    add_plan(bundle)
    result = run_verify(bundle)
    assert result.exit_code == 0
    assert "not checked: engine 'rtx4090': its version (tensorrt_rtx 1.7.1.116; none is installed)" in result.stdout
    assert "the plan's format (tensorrt_rtx is not installed: pip install 'moedge[rtx]')" in result.stdout


def test_verify_of_a_flipped_byte(bundle):
    content = bytearray((bundle / "weights.bin").read_bytes())
    content[1000] ^= 1
    (bundle / "weights.bin").write_bytes(content)
    fault = (
        f"{bundle}/weights.bin does not have the checksum in the manifest; "
        "export the bundle again: moedge export ... --force"
    )
    result = run_verify(bundle)
    assert isinstance(result.exception, BundleError)
    assert str(result.exception) == f"{bundle}: 1 fault, listed above with what mends it"
    # Once, and no engine of a damaged bundle is said to run.
    assert result.stdout.splitlines()[1:] == [
        "engine cpu: damaged; it needs the bundle's weights.bin",
        f"fault: {fault}",
    ]
    (bundle / "tokenizer.json").unlink()
    assert str(run_verify(bundle).exception) == f"{bundle}: 2 faults, listed above with what mends it"
    result = run_verify(bundle, "--json")
    document = json.loads(result.stdout)
    assert document["engines"]["cpu"] == {
        "ok": False,
        "status": "ready",
        "runs_here": False,
        "reason": "it needs the bundle's tokenizer.json and weights.bin",
    }
    assert str(result.exception).startswith("2 faults, the first: ") and fault in document["faults"]


def test_verify_of_a_damaged_engine_says_so_once(bundle):
    with (bundle / "engines/cpu/model.onnx").open("ab") as stream:
        stream.write(b"x")
    result = run_verify(bundle)
    assert result.stdout.count("model.onnx") == 1 and "engine cpu: damaged\n" in result.stdout
    assert str(result.exception) == f"{bundle}: 1 fault, listed above with what mends it"


def test_verify_of_a_lost_expert(bundle):
    tensor = next(each for each in read_placed(bundle / "model.onnx") if each.name == "layers.1.experts.down.weight")
    assert tensor.shape[0] == fake_engine.EXPERTS
    share = tensor.length // fake_engine.EXPERTS
    content = bytearray((bundle / "weights.bin").read_bytes())
    content[tensor.offset + 2 * share : tensor.offset + 3 * share] = bytes(share)
    (bundle / "weights.bin").write_bytes(content)
    faults = verify(Bundle.open(bundle)).faults
    assert any("expert 2 of layers.1.experts.down.weight is empty (one value throughout)" in fault for fault in faults)


def test_verify_of_missing_expert_tensors(bundle):
    manifest = json.loads((bundle / "moedge.json").read_text())
    config = manifest["config"]
    config["moe"] |= {"num_experts": 5, "layers": [0, 1]}
    fake_engine.edit_json(bundle / "moedge.json", config=config)
    faults = verify(Bundle.open(bundle)).faults
    assert any("model.onnx has no layers.0.experts.gate_up.weight" in fault for fault in faults)
    assert any("layers.1.experts.down.weight has 4 experts instead of 5" in fault for fault in faults)


def test_places_are_those_that_onnx_reads(bundle):
    import onnx

    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    wanted = [
        (each.name, tuple(each.dims), *(entry.value for entry in each.external_data))
        for each in model.graph.initializer
    ]
    found = [(p.name, p.shape, p.location, str(p.offset), str(p.length)) for p in read_placed(bundle / "model.onnx")]
    assert found == wanted and found
    (bundle / "model.onnx").write_bytes(b"\xff" * 10)
    with pytest.raises(BundleError, match="model.onnx is not a readable ONNX file"):
        read_placed(bundle / "model.onnx")


@pytest.mark.parametrize("name", ["weights.bin", "model.onnx", "tokenizer.json"])
def test_a_flipped_byte_of_the_bundle_is_never_loaded(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    again = "export the bundle again: moedge export ... --force"
    assert refusal(bundle) == f"BUNDLE/{name} is damaged (its checksum is not the one it was made with); {again}"
