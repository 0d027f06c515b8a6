"""Device profiles: the shipped ones are complete and plausible, a user's own are found, and slips are named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from moedge.errors import ProfileError
from moedge.profiles import device as device_module
from moedge.profiles.commands import build_command
from moedge.profiles.device import list_profiles, load_profile, plain_name, read_profile
from moedge.profiles.device_commands import profiles_command
from moedge.runtime import machine

SHIPPED = sorted(path.stem for path in (Path(device_module.__file__).parent / "devices").glob("*.toml"))
GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_profiles_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config/moedge/profiles"


def test_the_promised_devices_are_there() -> None:
    promised = (
        "cpu rtx4090 a100-40gb a100-80gb jetson-agx-orin-64gb jetson-orin-nano-8gb h100 h200 l4 rtx-3090 rtx-5090 "
        "dgx-spark jetson-thor orin-nx raspberry-pi-5 x86-laptop x86-laptop-ddr4 x86-laptop-lpddr5x"
    ).split()
    assert len({load_profile(name).name for name in promised}) == len(promised)
    assert list_profiles() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_is_complete_and_plausible(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert re.fullmatch(r"20\d\d-\d\d", profile.as_of)
    assert set(profile.sources) == set(profile.figures()), "each figure has its source, and nothing else has one"
    for figure, source in profile.sources.items():
        dated = re.search(r"(19|20)\d\d", source)
        assert dated or source.startswith("assumption") or source == "read from this machine", (figure, source)
    assert 2 * GIB < profile.memory_bytes < 256 * GIB
    assert profile.available_bytes > profile.memory_bytes / 2
    rates = [profile.flops[precision] for precision in ("fp32", "fp16", "int8", "fp4") if precision in profile.flops]
    assert rates == sorted(rates)
    assert 10 < rates[-1] / profile.bandwidth_bytes_per_s < 5000  # operations of the narrowest kind for a byte
    assert (profile.compute_capability is None) == (profile.kind == "cpu")
    assert (profile.target == "onnxruntime") == (profile.kind == "cpu")
    if profile.power_w is not None:
        assert 5 < profile.power_w < 1000
    assert profile.launch_overhead_us < 20


@pytest.mark.parametrize(
    ("name", "bus_bits", "transfers_per_s"),
    [
        ("rtx4090", 384, 21e9),
        ("rtx3090", 384, 19.5e9),
        ("rtx5090", 512, 28e9),
        ("jetson-agx-orin-64gb", 256, 6.4e9),
        ("jetson-orin-nano-8gb", 128, 6.4e9),
        ("jetson-orin-nx-16gb", 128, 6.4e9),
        ("raspberry-pi-5", 32, 4.267e9),
        ("x86-laptop", 128, 5.6e9),
        ("x86-laptop-ddr4", 128, 3.2e9),
        ("x86-laptop-lpddr5x", 128, 8.533e9),
        ("a100-40gb", 5120, 2.43e9),
        ("a100-80gb", 5120, 3.186e9),
        ("dgx-spark", 256, 8.533e9),
    ],
)
def test_bandwidth_is_the_bus_times_its_rate(name: str, bus_bits: int, transfers_per_s: float) -> None:
    assert load_profile(name).bandwidth_bytes_per_s == pytest.approx(bus_bits / 8 * transfers_per_s, rel=0.01)


@pytest.mark.parametrize(
    ("name", "cores", "clock"),
    [
        ("rtx4090", 16384, 2.52e9),
        ("rtx3090", 10496, 1.695e9),
        ("rtx5090", 21760, 2.407e9),
        ("a100-80gb", 6912, 1.41e9),
        ("jetson-agx-orin-64gb", 2048, 1.3e9),
        ("jetson-orin-nano-8gb", 1024, 1.02e9),
        ("jetson-thor", 2560, 1.575e9),
    ],
)
def test_fp32_is_two_operations_a_core_and_cycle(name: str, cores: int, clock: float) -> None:
    assert load_profile(name).flops["fp32"] == pytest.approx(2 * cores * clock, rel=0.01)


def test_cpu_is_filled_from_this_machine() -> None:
    profile = load_profile("cpu")
    cores = machine.default_threads()
    assert profile.cores == cores
    assert profile.memory_bytes == machine.memory_bytes()
    assert profile.title == machine.cpu_name()
    assert profile.flops["fp32"] == pytest.approx(64e9 * cores)
    assert profile.sources["cores"] == "read from this machine"
    assert profile.is_assumption("bandwidth_bytes_per_s")
    measured = profile.with_bandwidth(31e9, "measured on this machine")
    assert measured.bandwidth_bytes_per_s == 31e9 and not measured.is_assumption("bandwidth_bytes_per_s")


def test_unknown_name_lists_the_known(no_profiles_of_the_user: Path) -> None:
    with pytest.raises(ProfileError) as raised:
        load_profile("rtx490")
    assert str(raised.value) == (
        f"unknown profile 'rtx490' (did you mean rtx4090?); known: {', '.join(SHIPPED)}; add your own as "
        f"{no_profiles_of_the_user / 'rtx490.toml'} or name a path that ends in .toml"
    )


@pytest.mark.parametrize(
    ("part", "meant"), [("orin-nx", "jetson-orin-nx-16gb"), ("4090", "rtx4090"), ("ORIN_NX16", "jetson-orin-nx-16gb")]
)
def test_whole_words_of_a_name_are_enough(part: str, meant: str) -> None:
    assert load_profile(part).name == meant


@pytest.mark.parametrize("part", ["h20", "rtx409", "cp", "-", "jetson"])
def test_less_than_a_word_or_words_of_several_are_no_name(part: str) -> None:
    with pytest.raises(ProfileError, match="^unknown profile"):
        load_profile(part)


def test_own_profile_by_name_and_by_path(no_profiles_of_the_user: Path) -> None:
    no_profiles_of_the_user.mkdir(parents=True)
    own = no_profiles_of_the_user / "bench-box.toml"
    own.write_text(_toml().replace("rtx4090", "bench-box"))
    assert "bench-box" in list_profiles()
    assert load_profile("bench-box").name == load_profile(own).name == load_profile(str(own)).name == "bench-box"


def test_a_copy_has_the_name_of_its_file(no_profiles_of_the_user: Path) -> None:
    no_profiles_of_the_user.mkdir(parents=True)
    (no_profiles_of_the_user / "mine.toml").write_text(_toml())
    assert load_profile("mine").name == "mine" and load_profile("rtx4090").name == "rtx4090"


def test_own_profile_replaces_the_shipped_one(no_profiles_of_the_user: Path) -> None:
    no_profiles_of_the_user.mkdir(parents=True)
    text = _toml().replace("power_w = 450", "power_w = 320")
    (no_profiles_of_the_user / "rtx4090.toml").write_text(text)
    assert load_profile("rtx4090").power_w == 320


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("power_w = 450", "power = 450", "unknown key 'power'; known: as_of, bandwidth_bytes_per_s"),
        ("launch_overhead_us = 2.5\n", "", "launch_overhead_us missing; "),
        (
            "bandwidth_bytes_per_s = 1.008e+12",
            "bandwidth_bytes_per_s = 1008",
            "bandwidth_bytes_per_s is 1008; a number of bytes/s from 1e+08 to 1e+14 was expected",
        ),
        ("bandwidth_bytes_per_s = 1.008e+12", "bandwidth_bytes_per_s = nan", "bandwidth_bytes_per_s is nan; a number"),
        ("memory_bytes = 25769803776", "memory_bytes = 24.5", "memory_bytes is 24.5; a whole number of bytes from"),
        ("memory_bytes = 25769803776", 'memory_bytes = "24 GB"', "memory_bytes is '24 GB'; a whole number of bytes"),
        ("power_w = 450", "power_w = -1", "power_w is -1; a number of watts from 0.1 to 20000 was expected"),
        ("power_w = 450", "power_w = true", "power_w is True; a number of watts"),
        ("memory_reserved_bytes = 1073741824", "memory_reserved_bytes = 30000000000", "leaves nothing of memory_bytes"),
        ("fp16 = 1.652e+14", "fp16 = 1.652e+12", "flops.fp16 is below flops.fp32"),
        ("fp16 = 1.652e+14", "bf16 = 1.652e+14", "unknown precision flops.bf16; known: fp32, fp16, int8, fp8, fp4"),
        ("fp32 = 8.26e+13\n", "", "flops.fp32 is missing"),
        ("compute_capability = [8, 9]\n", "", "compute_capability is missing; a gpu needs it, for example [8, 9]"),
        ("compute_capability = [8, 9]", "compute_capability = 89", "compute_capability is 89; [major, minor] was"),
        ('kind = "gpu"', 'kind = "npu"', "kind is 'npu'; known: gpu, jetson, cpu"),
        ('target = "tensorrt_rtx"', 'target = "trt"', "target is 'trt'; known: onnxruntime, onnxruntime_cuda, tensor"),
        ('title = "NVIDIA GeForce RTX 4090"', "title = 4090", "title is 4090; a text was expected"),
        ("memory_shared = false", "memory_shared = 0", "memory_shared is 0; true or false was expected"),
        ("[sources]\n", '[sources]\nspeed = "a guess"\n', "sources.speed belongs to no figure of a profile"),
        ("[sources]", "[[sources", "not readable as TOML ("),
        ("power_w = 450", f"power_w = {'9' * 5000}", "not readable as TOML (a number of thousands of digits)"),
        ("power_w = 450", f"power_w = {'[' * 5000}", "not readable as TOML ("),
        ('kind = "gpu"', f'kind = "{"x" * 999}"', "kind is 'xxx"),
        ('name = "rtx4090"', 'name = "../rtx4090"', "name is '../rtx4090'; letters, digits, dots and dashes were"),
        ('as_of = "2026-11"', 'as_of = "lately"', "as_of is 'lately'; a month or day was expected, such as 2026-11"),
        ('vendor = "NVIDIA"', 'vendor = "a\\nb"', "vendor is 'a\\nb'; a text was expected"),
        (
            "bandwidth_bytes_per_s = 1.008e+12",
            "bandwidth_bytes_per_s = 1.008e+8",
            "make 6.55e+06 operations for a byte, no device has fewer than 1 or more than 20,000; one of them is in",
        ),
    ],
)
def test_a_slip_names_file_and_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "slip.toml"
    assert old in _toml()
    path.write_text(_toml().replace(old, new, 1))
    with pytest.raises(ProfileError) as raised:
        read_profile(path)
    assert str(raised.value).startswith(f"{path}: ") and told in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_files_that_are_no_profiles(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\x00")
    (tmp_path / "empty.toml").write_bytes(b"")
    for name, told in (("folder", "not readable (Is a directory)"), ("binary", "not readable as TOML ("),
                       ("empty", "name, title, vendor, kind, target")):  # fmt: skip
        with pytest.raises(ProfileError) as raised:
            load_profile(tmp_path / f"{name}.toml")
        assert told in str(raised.value) and "\n" not in str(raised.value)


def test_a_name_that_several_hold_is_asked_back() -> None:
    with pytest.raises(ProfileError, match=r"unknown profile 'a100' \(did you mean a100-40gb or a100-80gb\?\); known"):
        load_profile("a100")


def test_a_wrong_profile_is_told_before_another_is_built(tiny_bundle: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*.json")}

    before = times()
    result = CliRunner().invoke(build_command, [str(tiny_bundle), "--profile", "cpu", "--profile", "rtx409"])
    assert isinstance(result.exception, ProfileError) and "did you mean rtx4090?" in str(result.exception)
    assert times() == before


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nowhere\.toml: no such file; `moedge profiles` lists the known profiles"):
        load_profile(tmp_path / "nowhere.toml")


def test_command_lists_and_shows() -> None:
    listed = CliRunner().invoke(profiles_command, [], env={"COLUMNS": "160"})
    assert listed.exit_code == 0 and all(name in listed.stdout for name in SHIPPED)
    shown = CliRunner().invoke(profiles_command, ["rtx4090"], env={"COLUMNS": "200"})
    assert "1,008 GB/s" in shown.stdout and "NVIDIA Ada GPU Architecture whitepaper" in shown.stdout
    assert "assumption: RunPod" in shown.stdout


def test_command_json_is_one_document() -> None:
    documents = json.loads(CliRunner().invoke(profiles_command, ["--json"]).stdout)
    assert [document["name"] for document in documents] == SHIPPED
    document = json.loads(CliRunner().invoke(profiles_command, ["rtx4090", "--json"]).stdout)
    assert document["compute_capability"] == [8, 9] and document["flops"]["int8"] == 660.6e12
    assert document["sources"]["power_w"].startswith("NVIDIA")


def _toml() -> str:
    return (Path(device_module.__file__).parent / "devices/rtx4090.toml").read_text()


@pytest.mark.parametrize("spelling", ["rtx4090", "rtx-4090", "RTX_4090", "a100-80GB", "jetson-orin-nx16gb"])
def test_names_are_found_in_any_spelling_and_listed_in_one(spelling: str) -> None:
    profile = load_profile(spelling)
    assert profile.name in list_profiles() and plain_name(profile.name) == plain_name(spelling)
    assert len({plain_name(name) for name in list_profiles()}) == len(list_profiles())


def test_the_list_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for width, shown in ((80, False), (160, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = CliRunner().invoke(profiles_command).stdout.splitlines()
        assert max(map(len, lines)) <= width and not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
        assert ("NVIDIA GeForce RTX 4090" in "\n".join(lines)) == shown
        assert sum(line.split()[:1] == ["rtx4090"] for line in lines) == 1
