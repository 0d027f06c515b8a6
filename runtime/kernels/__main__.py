"""`python -m moedge.runtime.kernels`: compile the kernels on this machine."""

from __future__ import annotations

import sys

from .compiling import FOLDER, CompileError, compile_library


def main() -> int:
    try:
        print(compile_library(FOLDER))
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
