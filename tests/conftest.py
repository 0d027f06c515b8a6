"""What all tests share: how they are collected, and which of them can run here."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


class RootIsNoTestPackage:
    """The root has an `__init__.py` because it is the package `moedge`; pytest would import it as a package of tests
    under the name of the clone's folder. Registered as a plugin: a conftest's own hooks see only what lies beside."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsNoTestPackage(), "root-is-no-test-package")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it puts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not gpu_present():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def gpu_present() -> bool:
    """Whether the driver on this machine lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3 checkpoint of 0.2M parameters with a byte-level tokenizer; tests that change it copy it."""
    from checkpoints import make_model, save_model
    from fake_engine import write_tokenizer

    folder = save_model(make_model(seed=7), tmp_path_factory.mktemp("tiny") / "checkpoint")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` at int4, with a cpu engine; tests that change it copy it."""
    import moedge

    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    moedge.export(tiny_checkpoint, folder, weights="int4", group_size=32)
    moedge.build(folder, "cpu")
    return folder


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled kernels: what the install made, or made now where it did not."""
    from moedge.runtime import kernels
    from moedge.runtime.kernels import compiling

    installed = kernels.library()
    if installed is not None:
        return installed
    if compiling.find_compiler() is None:
        pytest.skip("no C++ compiler")
    return compiling.compile_library(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def forms(library: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """Every form of the kernels that runs here and the library it is in: the best first, plain C++ last."""
    from kernel_cases import instruction_sets

    from moedge.runtime.kernels import compiling

    portable = compiling.compile_library(tmp_path_factory.mktemp("portable"), ("-O1",), compiling.PORTABLE)
    return [*((name, library) for name in instruction_sets(library)), ("portable", portable)]


@pytest.fixture
def compiled(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library where `kernels` looks for it, whatever the environment asks for."""
    from moedge.runtime import kernels

    monkeypatch.setattr(kernels, "FOLDER", library.parent)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
