"""The bundle: the folder that `export` writes, `build` extends and `load` reads.

Standard library only: everything that touches a bundle imports this module first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import BundleError, MoedgeError, shorten
from .manifest import check_manifest
from .progress import Progress as Progress

FORMAT = 1
MANIFEST = "moedge.json"
MODEL = "model.onnx"
WEIGHTS = "weights.bin"
ENGINES = "engines"
ENGINE_MANIFEST = "engine.json"

_HASH_CHUNK = 1 << 20


class Bundle:
    """An exported bundle on disk, opened by its manifest; nothing else is read until asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read `path`/moedge.json.

        Raises:
            BundleError: no such folder, no manifest, not JSON, a format this version cannot read, or a part that is
                not what an export writes.
        """
        root = Path(path)
        manifest_path = root / MANIFEST
        if root.exists() and not root.is_dir():
            raise BundleError(f"{root} is a file, not a folder; name the folder that `moedge export` made")
        if not root.is_dir():
            raise BundleError(f"{root}: no such folder; make a bundle with: moedge export CHECKPOINT -o {root}")
        if not manifest_path.is_file():
            hint = f"it has no {MANIFEST}"
            if (root / "config.json").is_file():
                raise BundleError(
                    f"{root} is a checkpoint, not a bundle ({hint}); export it first: moedge export {root} -o BUNDLE"
                )
            raise BundleError(f"{root} is not a bundle ({hint}); make one with: moedge export CHECKPOINT -o {root}")
        manifest = read_json(manifest_path, BundleError)
        if manifest.get("format") != FORMAT:
            raise BundleError(
                f"{manifest_path}: bundle format {shorten(manifest.get('format'))}, this version reads {FORMAT}; "
                "export the checkpoint again with this version"
            )
        if "seal" in manifest and manifest["seal"] != seal_of(manifest):
            raise BundleError(f"{manifest_path} was changed since the export; export the bundle again")
        check_manifest(manifest, str(manifest_path))
        return cls(root, manifest)

    @property
    def config(self) -> dict[str, Any]:
        """The model's MoEConfig as plain JSON."""
        config: dict[str, Any] = self.manifest["config"]
        return config

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes in weights.bin by tensor class, scales and zero points included."""
        sizes: dict[str, int] = self.manifest["sizes"]
        return sizes

    def file(self, name: str) -> Path:
        return self.path / name

    def engine_dir(self, profile: str) -> Path:
        return self.path / ENGINES / profile

    def engines(self) -> list[str]:
        """Names of the profiles that have an engine (or a prepared folder), sorted."""
        folder = self.path / ENGINES
        if not folder.is_dir():
            return []
        return sorted(entry.name for entry in folder.iterdir() if (entry / ENGINE_MANIFEST).is_file())


def read_json(path: Path, error: type[MoedgeError] = BundleError) -> dict[str, Any]:
    """The JSON object in `path`; raises `error` with one line when it is unreadable or not an object."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as cause:
        raise error(f"{path}: not readable as JSON ({str(cause).splitlines()[0]})") from None
    if not isinstance(document, dict):
        raise error(f"{path}: holds a JSON {type(document).__name__}, not an object")
    return document


def seal_of(document: Mapping[str, Any]) -> str:
    """sha256 of a manifest but for its `seal`: what was written once is not to be edited afterwards."""
    try:
        content = json.loads(json.dumps({key: value for key, value in document.items() if key != "seal"}))
    except RecursionError:
        return ""  # what was just read is as deep as can be: no manifest
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its `seal`."""
    return {**document, "seal": seal_of(document)}


def write_json(path: Path, document: Any) -> None:
    """Write `document` indented, through a file beside `path`."""
    with staged_file(path) as staged:
        staged.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def sha256_file(path: Path, progress: Progress | None = None) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    done = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(f"checking {path.parent.name}/{path.name}", done, total)  # engines have a model.onnx too
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its bytes and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def find_faults(folder: Path, files: dict[str, Any], progress: Progress | None = None) -> list[str]:
    """One line for each listed file that is missing, of another size, or of another checksum."""
    faults = []
    for name, entry in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        elif sha256_file(path, progress) != entry["sha256"]:
            faults.append(f"{path} does not have the checksum in the manifest")
    return faults


def check_files(bundle: Bundle, progress: Progress | None = None) -> None:
    """Compare every file of the bundle with the manifest.

    Raises:
        BundleError: names the first file that differs, how many do, and the remedy.
    """
    faults = find_faults(bundle.path, bundle.manifest["files"], progress)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise BundleError(f"{faults[0]}{more}: the bundle is damaged; export it again: moedge export ... --force")


@contextlib.contextmanager
def staged_directory(
    target: Path, *, force: bool = False, error: type[MoedgeError] = BundleError, replaces: str | None = None
) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` on success and vanishes on any failure.

    A `target` that holds files is refused without `force`; with it, the old folder stays whole until the new
    one is complete. `replaces`: the file that tells a folder of our own, without which `force` replaces nothing.

    Raises:
        error: `target` is not an empty folder, cannot be written, or the disk is full.
    """
    if target.exists() and not target.is_dir():
        raise error(f"{target} is a file, not a folder; name another output folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise error(f"{target} is not empty; name another output folder, or replace it with --force (force=True)")
    if target.is_dir() and any(target.iterdir()) and replaces and not (target / replaces).is_file():
        raise error(
            f"{target} holds files and no {replaces}: --force replaces bundles only; name another output folder"
        )
    target = target.resolve()  # the folder one stands in can be renamed by its name, not as "."
    _check_above(target, "folder", error)
    with _writing(target, error):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        with _writing(target, error):
            yield staged
            _sync_tree(staged)
            staged.chmod(0o777 & ~_umask())
            _swap_in(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_place(target: Path, *, error: type[MoedgeError] = BundleError) -> None:
    """Raises `error` where no file can be written to `target`: for work that takes long before it writes."""
    with _writing(target, error):
        if target.is_dir():
            raise error(f"{target} is a folder, not a file; name an output file")
        if target.exists() and not target.is_file():  # a device or a pipe would be replaced by a file
            raise error(f"{target} is no plain file; name another output file")
        _check_above(target, "file", error)


@contextlib.contextmanager
def staged_file(target: Path, *, error: type[MoedgeError] = BundleError) -> Iterator[Path]:
    """A scratch path beside `target` that is renamed onto it on success and removed on any failure."""
    check_place(target, error=error)
    with _writing(target, error):
        target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with _writing(target, error):
            yield staged
            staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(target: Path, error: type[MoedgeError]) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        # Only failures of the disk itself are the user's to mend; a FileNotFoundError from a bug is not one.
        import errno

        if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(_existing_parent(target)).free
            raise error(
                f"{target}: the disk is full ({cause.strerror}, {free / 2**20:.0f} MiB free); nothing was kept: "
                "free some space or name an output folder on another disk"
            ) from cause
        if cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG):
            raise error(f"{target}: cannot be written ({cause.strerror}); name another output folder") from cause
        raise


def _check_above(target: Path, kind: str, error: type[MoedgeError]) -> None:
    above = _existing_parent(target.parent)
    if not above.is_dir():
        raise error(f"{target}: {above} is a file, not a folder; name another output {kind}")


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _swap_in(staged: Path, target: Path) -> None:
    if not target.exists():
        staged.rename(target)
        return
    if not any(target.iterdir()):
        target.rmdir()
        staged.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / "it")
    try:
        staged.rename(target)
    except BaseException:
        (old / "it").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Flush what was written, so that a full disk shows now and not after the rename."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
