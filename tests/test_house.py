"""The house: what imports what, what the wheel holds, what the command line does with errors, a README that is true."""

from __future__ import annotations

import ast
import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import moedge
from moedge import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = [name for name in PYPROJECT["tool"]["setuptools"]["packages"] if name != "moedge.sample"]
SHIPPED = {"export", "profiles", "runtime", "sample"}  # and the root's own .py

# Imported nowhere but where the work needs it; the first three are never needed to load a CPU engine.
HEAVY = {"torch", "transformers", "optimum", "tensorrt", "tensorrt_rtx", "matplotlib"}
EXTRAS = HEAVY | {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors", "ml_dtypes"}


def folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of the package."""
    for package in PACKAGES:
        for path in sorted(folder(package).glob("*.py")):
            if path == ROOT / "setup.py":
                continue  # which is no module: it makes the wheel
            yield (package if path.stem == "__init__" else f"{package}.{path.stem}"), path


def source_files() -> list[Path]:
    """Every file that is or would be committed, relative to the root: nothing of a bundle that a user made there."""

    def listed(*kinds: str) -> list[Path]:
        command = ["git", "ls-files", "-z", *kinds]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [Path(name) for name in names.split("\0") if name]

    if (ROOT / ".git").exists():
        names = listed("--cached")
        for name in listed("--others", "--exclude-standard"):
            if not any((ROOT / folder / "moedge.json").exists() for folder in name.parents):
                names.append(name)
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [
            name
            for name in names
            if name.parts[0] == ".ci" or not re.search(r"(^|/)(\.|__pycache__|build/|\w+\.egg-info)", name.as_posix())
        ]
    return [name for name in names if (ROOT / name).is_file()]


def run_python(code: str, blocked: set[str] = frozenset()) -> str:
    """stdout of `code` in a fresh interpreter where the blocked modules are not installed."""
    block = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(blocked)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, check=False, cwd=os.sep)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Imports


def test_import_moedge_imports_nothing_heavy() -> None:
    loaded = run_python("import moedge\nprint(*{name.split('.')[0] for name in sys.modules})").split()
    assert not (EXTRAS | {"numpy", "rich", "click", "tokenizers", "jinja2"}) & set(loaded)


def test_every_module_imports_without_torch_or_tensorrt() -> None:
    # moedge.export.torch_ops and its parts are for those who have torch, and say so in their names; so for optimum.
    own = re.compile("torch|optimum|__main__")
    names = [name for name, _ in modules() if not own.search(name.rpartition(".")[2])]
    code = "import importlib, traceback\nfor name in {}:\n    importlib.import_module(name)\n"
    run_python(code.format(names), blocked=HEAVY)


def test_runtime_needs_none_of_the_extras_until_it_loads_an_engine() -> None:
    shared = ["moedge.bundle", "moedge.errors", "moedge.progress", "moedge.cli"]
    names = shared + [name for name, _ in modules() if name.startswith("moedge.runtime")]
    run_python(f"import importlib\nfor name in {names}:\n    importlib.import_module(name)\n", blocked=EXTRAS)


def test_every_help_works_and_is_light() -> None:
    """Stands for `--help` in under half a second, which a busy machine could not measure."""
    code = f"""
from moedge import cli
for command in {[[], *([name] for name in cli.COMMANDS)]}:
    cli.main([*command, "--help"], prog_name="moedge", standalone_mode=False)
"""
    shown = run_python(code, blocked=EXTRAS | {"rich", "tokenizers", "jinja2"})
    assert all(f"Usage: moedge {name}" in shown for name in cli.COMMANDS)


def imported_modules(name: str, path: Path) -> set[str]:
    """Dotted names of the package's own modules that a file imports, anywhere in it; of `from x import y` also x.y."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            found |= {target, *(f"{target}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {target for target in found if target.split(".")[0] == "moedge"}


FORBIDDEN = {
    "moedge.runtime": ("moedge.export", "moedge.profiles.targets"),
    "moedge.export": ("moedge.profiles", "moedge.runtime"),
    "moedge.bundle": ("moedge.export", "moedge.profiles", "moedge.runtime"),
    "moedge.errors": ("moedge.export", "moedge.profiles", "moedge.runtime"),
    "moedge.progress": ("moedge.export", "moedge.profiles", "moedge.runtime"),
}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_layers_import_downwards_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for name, path in modules()
        for layer, forbidden in FORBIDDEN.items()
        if inside(name, layer)
        for target in imported_modules(name, path)
        if any(inside(target, each) for each in forbidden)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_imports_itself_relatively() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == "moedge")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "moedge" for alias in node.names))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_name_at_the_root_hides_a_dependency_or_a_standard_module() -> None:
    project = PYPROJECT["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    named = {re.split(r"[^\w.-]", requirement)[0].replace("-", "_").lower() for requirement in requirements}
    taken = named | EXTRAS | set(sys.stdlib_module_names)
    entries = {name.parts[0] for name in source_files()}
    assert not {entry.removesuffix(".py") for entry in entries} & taken


def test_every_public_name_is_there() -> None:
    assert all(getattr(moedge, name) is not None for name in moedge.__all__)
    assert set(moedge.__all__) <= set(dir(moedge))
    assert callable(moedge.export) and callable(moedge.build) and callable(moedge.load)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        moedge.nothing  # noqa: B018


# The wheel


def make_wheel(place: Path, **environment: str) -> Path:
    """A wheel built from a copy of the tree."""
    copy = place / "a clone"
    for name in source_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(place)!r})"
    command, inherited = [sys.executable, "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, cwd=copy, env=inherited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = place.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    """Names of the files in it."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def unpacked(wheel: Path, place: Path) -> Path:
    """The package of a wheel as pip lays it down."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place / "moedge"


def ask_kernels(place: Path, code: str) -> str:
    """What code prints where the package unpacked under `place` is the one that is imported."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(place)!r})\n{code}"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_wheel_holds_the_package_and_nothing_else(wheel_names: set[str]) -> None:
    # One file in another package's namespace: where optimum-cli looks for commands.
    assert "optimum/commands/register/register_moedge.py" in wheel_names
    own = wheel_names - {"optimum/commands/register/register_moedge.py"}
    assert {name.split("/")[0] for name in own} == {"moedge", f"moedge-{moedge.__version__}.dist-info"}
    assert not {name.split("/")[1] for name in wheel_names} & {"tests", "scripts", "docs", "build", "conftest.py"}


def test_wheel_lacks_no_file_of_the_package(wheel_names: set[str]) -> None:
    files = [name for name in source_files() if name.parts[:2] != ("export", "optimum_register")]
    shipped = [name for name in files if name.parts[0] in SHIPPED or name.match("*.py") and not name.parts[1:]]
    shipped.remove(Path("setup.py"))  # which makes the wheel
    if any(name.endswith(".so") for name in wheel_names):  # of the kernels there is the library or what it is made of
        shipped = [name for name in shipped if name.suffix not in (".cpp", ".h")]
    missing = sorted(name.as_posix() for name in shipped if f"moedge/{name.as_posix()}" not in wheel_names)
    assert not missing, f"not in pyproject.toml's packages or package-data: {missing}"
    assert any(name.startswith("moedge/sample/") and name.endswith(".safetensors") for name in wheel_names)


def test_a_wheel_with_the_library_runs_it_without_its_sources(wheel: Path, tmp_path: Path) -> None:
    folder = unpacked(wheel, tmp_path) / "runtime" / "kernels"
    if not list(folder.glob("*.so")):
        pytest.skip("no C++ compiler here")
    assert not [*folder.glob("*.cpp"), *folder.glob("*.h")]
    asked = "from moedge.runtime import kernels; print(kernels.library(), kernels.why_not())"
    (library,) = folder.glob("libmoedge_cpu-*.so")
    assert ask_kernels(tmp_path, asked) == f"{library} None\n"
    again = "install from a clone, which compiles them: pip install --force-reinstall --no-deps CLONE"
    compiling = "from moedge.runtime.kernels.__main__ import main; print(main())"
    assert ask_kernels(tmp_path, compiling) == f"1\nerror: this install has no sources to compile; {again}\n"
    library.unlink()
    assert ask_kernels(tmp_path, asked) == f"None the kernels are not compiled; {again}\n"


def test_a_wheel_made_without_a_compiler_has_the_sources(tmp_path: Path) -> None:
    folder = unpacked(make_wheel(tmp_path, CXX="false"), tmp_path) / "runtime" / "kernels"
    here = {path.name for path in (ROOT / "runtime" / "kernels").iterdir() if path.suffix in (".cpp", ".h")}
    assert here and here == {path.name for path in folder.iterdir() if path.suffix in (".cpp", ".h", ".so")}
    asked = "from moedge.runtime import kernels; print(kernels.why_not())"
    told = "the kernels are not compiled; with a C++ compiler: python -m moedge.runtime.kernels\n"
    assert ask_kernels(tmp_path, asked) == told


def test_what_is_installed_is_below_two_megabytes_without_the_sample(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {file.filename: file.file_size for file in archive.infolist() if file.filename.startswith("moedge/")}
    assert sum(size for name, size in sizes.items() if not name.startswith("moedge/sample/")) < 2_000_000


# The command line


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_lists_each_command_as_it_describes_itself(name: str) -> None:
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None and command.help is not None
    assert command.name == name
    assert command.help.replace("\b", "").strip().splitlines()[0] == cli.COMMANDS[name].summary


def test_help_shows_every_summary_whole() -> None:
    shown = " ".join(run_python("from moedge import cli\ncli.run(['--help'])").split())
    assert all(f"{name} {' '.join(entry.summary.split())}" in shown for name, entry in cli.COMMANDS.items())


def test_python_dash_m_moedge() -> None:
    done = subprocess.run([sys.executable, "-m", "moedge", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"moedge, version {moedge.__version__}\n"


def exit_of(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> int:
    """Runs a command that raises `error`, as the console does; the exit code."""

    @click.command()
    def command() -> None:
        click.echo("some output")
        if error is not None:
            raise error

    monkeypatch.setattr(cli.main, "get_command", lambda ctx, name: command)
    with pytest.raises(SystemExit) as exit_:
        cli.run(["command"])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


FULL = OSError(errno.ENOSPC, "No space left on device", "bundle/weights.bin")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (None, 0, ""),
        (moedge.BundleError("no bundle here"), 1, "error: no bundle here\n"),
        (moedge.BundleError("one\ntwo"), 1, "error: one two\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (FULL, 1, "error: No space left on device: bundle/weights.bin\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (
            ModuleNotFoundError("No module named 'onnx.checker'", name="onnx.checker"),
            1,
            "error: onnx is not installed; install it: pip install 'moedge[export]'\n",
        ),
    ],
)
def test_an_error_is_one_line(
    error: BaseException | None,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_of(monkeypatch, error) == code
    assert capsys.readouterr().err.lstrip("\n") == text


@pytest.mark.parametrize("bug", [ZeroDivisionError("x"), EOFError("x"), FileNotFoundError(2, "x"), ImportError("x")])
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(bug)):
        exit_of(monkeypatch, bug)


def test_bad_usage_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.run(["no-such-command"])
    assert exit_.value.code == 2
    assert "No such command 'no-such-command'. There are export, build, generate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.run(["exprot", "checkpoint"])
    assert "No such command 'exprot'. Did you mean export" in capsys.readouterr().err


def test_a_closed_pipe_is_silent() -> None:
    command = f"{shlex.quote(sys.executable)} -m moedge --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


# Files that people read


def test_nothing_names_this_machine_or_a_registry() -> None:
    machine = re.compile(r"(?<![\w.:/])/(?:work|root|home|opt|Users)/")
    registry = re.compile(r"pypi\.org|pythonhosted\.org|pypi\.nvidia\.com|download\.pytorch\.org|index[-]url")
    wrong = []
    for name in source_files():
        if name.parts[0] == "sample" and name.suffix != ".md":
            continue
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), start=1)
        wrong += [f"{name}:{number}: {line}" for number, line in lines if machine.search(line) or registry.search(line)]
    assert not wrong, "\n".join(wrong)


def readme_lines(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert blocks, f"README.md has no {language} block"
    return "".join(blocks).splitlines()


def test_readme_commands_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = [line.split("#")[0].split() for line in readme_lines("sh")]
    assert ["make", "demo"] in called and ["make", "test"] in called
    for words in filter(None, called):
        assert words[0] in {"make", "moedge", "pip", ".venv/bin/moedge"}, words
        if words[0] == "make":
            assert words[1] in targets
        elif words[0].endswith("moedge"):
            command = cli.main.get_command(click.Context(cli.main), words[1])
            assert command is not None, words
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words[2:] if word.startswith("-")} <= options, words


def test_readme_python_uses_what_there_is() -> None:
    tree = ast.parse("\n".join(readme_lines("python")))
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    names = {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "moedge"}
    assert {"export", "build", "load"} <= names <= set(moedge.__all__)


def device_table() -> str:
    """The README's table of devices, from the profiles' own files."""
    rows = ["| profile | device | target | memory | bandwidth |", "| --- | --- | --- | ---: | ---: |"]
    for path in sorted((ROOT / "profiles" / "devices").glob("*.toml")):
        device = tomllib.loads(path.read_text(encoding="utf-8"))
        memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
        bandwidth = f"{device['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s"
        if device.get("this_machine"):
            memory = bandwidth = "measured"
        rows.append(f"| `{device['name']}` | {device['title']} | `{device['target']}` | {memory} | {bandwidth} |")
    return "\n".join(rows)


def test_readme_table_of_devices_is_the_profiles_own() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert device_table() in readme, f"README.md should have:\n{device_table()}"
