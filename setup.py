"""Compiles the CPU kernels at install where a C++ compiler is there; where it is not, onnxruntime's own ops are used.

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

SOURCE = Path(__file__).resolve().parent / "runtime" / "kernels" / "compiling.py"
spec = importlib.util.spec_from_file_location("compiling", SOURCE)
assert spec is not None and spec.loader is not None
compiling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiling)


class BuildKernels(build_ext):
    """The library is no Python extension: it has its own compiler call and a name without a Python's version."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        try:
            compiling.compile_library(folder)
        except compiling.CompileError as error:
            raise CompileError(str(error)) from error  # which an optional extension survives, with a warning
        # What is installed has the library or its sources: they are as large as a third of it.
        for source in [] if folder.samefile(SOURCE.parent) else compiling.sources():
            (folder / source.name).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], compiling.library_name()))


class BuildPackage(build_py):
    """The root is the package; this file is not of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


class TagWheel(bdist_wheel):
    """One wheel for every Python on this platform; for every platform where nothing was compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        built = any(Path(self.bdist_dir).rglob("libmoedge_cpu-*.so"))
        return "py3", "none", platform if built else "any"


setup(
    ext_modules=[Extension("moedge.runtime.kernels.libmoedge_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage, "bdist_wheel": TagWheel},
)
