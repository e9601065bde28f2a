"""bdjax.json: what a checkpoint consists of, and how a torn or foreign folder is told apart.

It is written last and lists the size and CRC-32 of every other file, and its own CRC-32. A folder
without it is a save that never finished; a folder that differs from it is damaged.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

FORMAT = "bdjax checkpoint"
FORMAT_VERSION = 2
NAME = "bdjax.json"
# What may be left of a save, or of a deletion, that never finished.
_PARTS = ("arrays", "config.json", "data", f"{NAME}.part")
_CHUNK = 1 << 22
_READERS = 8


class CheckpointError(Exception):
    """A folder that cannot be read as a checkpoint; the text says why and what to type."""


class TornCheckpointError(CheckpointError):
    """An unfinished or damaged checkpoint: the one before it may still be whole."""


class NoRunError(CheckpointError):
    """What was named is no run: no folder, or one without checkpoints."""


def list_files(path: Path) -> list[str]:
    """Names, relative and sorted, of all files of a checkpoint but its manifest."""
    found = (str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    return sorted(name for name in found if name not in (NAME, f"{NAME}.part"))


def settle(path: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Forces files to the disk and returns [bytes, CRC-32] of each."""

    def one(name: str) -> tuple[str, list[int]]:
        with (path / name).open("rb") as file:
            os.fsync(file.fileno())
        return name, _contents(path / name)

    with ThreadPoolExecutor(_READERS) as readers:
        return dict(readers.map(one, names))


def verify(path: Path, manifest: dict, names: Iterable[str]) -> None:
    """Reads files and raises TornCheckpointError for the first that is not as it was written."""
    with ThreadPoolExecutor(_READERS) as readers:
        names = list(names)
        for name, found in zip(
            names, readers.map(_contents, (path / n for n in names)), strict=True
        ):
            if found != manifest["files"][name]:
                raise TornCheckpointError(f"{path} is damaged: the bytes of {name} have changed")


def write(path: Path, step: int, leaves: dict[str, list], files: dict[str, list[int]]) -> None:
    """Makes the folder whole: from here on it counts as a checkpoint, even if the machine dies."""
    for folder in [*(d for d in path.rglob("*") if d.is_dir()), path, path.parent]:
        _sync_folder(folder)
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "step": step,
        "leaves": leaves,
        "files": files,
    }
    part = path / f"{NAME}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest | {"crc32": checksum(manifest)}, indent=1))
        file.flush()
        os.fsync(file.fileno())
    part.rename(path / NAME)
    _sync_folder(path)


def read(path: Path) -> dict:
    """The manifest, once every file it lists is there in full; contents are `verify`'s business.

    Raises TornCheckpointError for an unfinished or damaged folder, CheckpointError for one of
    another program or format.
    """
    file = path / NAME
    if not file.exists():
        if all(child.name.startswith(_PARTS) for child in path.iterdir()):
            raise TornCheckpointError(f"{path} is a save that never finished (no {NAME})")
        raise CheckpointError(
            f"{path} was not written by bdjax (no {NAME}); type the folder of a bdjax run"
        )
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise TornCheckpointError(f"{file} is damaged, expected JSON ({error})") from error
    ours = isinstance(manifest, dict)
    written = manifest.pop("crc32", None) if ours else None
    changed = TornCheckpointError(f"{file} is damaged: its bytes have changed")
    if written is not None and written != checksum(manifest):
        raise changed
    if not ours or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f'{file} is not ours: expected "format": "{FORMAT}"; type the folder of a bdjax run'
        )
    version = manifest.get("version")
    if version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        raise CheckpointError(
            f"{path} has checkpoint format {version}, and this bdjax reads format {FORMAT_VERSION};"
            + (" read it with the bdjax that wrote it" if older else " type pip install -U bdjax")
        )
    if written is None:
        raise changed
    kinds = {"step": int, "leaves": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise TornCheckpointError(f"{file} is damaged: expected {name} to be {kind.__name__}")
    for name, (size, _) in manifest["files"].items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            raise TornCheckpointError(f"{path} is damaged: {name} is missing") from None
        if found != size:
            raise TornCheckpointError(
                f"{path} is damaged: {name} has {found} bytes, expected {size}"
            )
    return manifest


class Condition(Enum):
    """What a folder is: a whole checkpoint, an unfinished or damaged one, or none of ours."""

    WHOLE = "whole"
    TORN = "torn"
    FOREIGN = "foreign"


def condition(path: Path) -> Condition:
    """Judged by the manifest and the sizes of its files."""
    try:
        read(path)
    except TornCheckpointError:
        return Condition.TORN
    except CheckpointError:
        return Condition.FOREIGN
    return Condition.WHOLE


def remove(path: Path) -> None:
    """Deletes a checkpoint, the manifest first: half deleted, it reads as unfinished."""
    (path / NAME).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def checksum(manifest: dict) -> int:
    """CRC-32 of the manifest's fields, whatever the spaces between them."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def find(directory: Path, step: int | None) -> list[Path]:
    """Folders that should be checkpoints, newest first; at least one.

    `directory` is a run, its `checkpoints` or one checkpoint. Raises NoRunError when there is none,
    CheckpointError when there is none of `step`.
    """
    if not directory.is_dir():
        raise NoRunError(
            f"there is no folder {directory}; type the folder of a run, which holds checkpoints/, "
            "or of a model, which holds config.json"
        )
    if (directory / "bdjax.json").exists() or (
        directory.name.isdecimal() and directory.parent.name == "checkpoints"
    ):
        return [directory]
    inside = directory / "checkpoints"
    paths = numbered(inside if inside.is_dir() else directory)[::-1]
    if not paths:
        raise NoRunError(
            f"{directory} holds no checkpoint: expected folders like "
            f"{directory / 'checkpoints' / '100'}; type the folder of a run, or of a model, which "
            "holds config.json"
        )
    if step is None:
        return paths
    chosen = [path for path in paths if path.name == str(step)]
    if not chosen:
        names = ", ".join(path.name for path in paths[::-1])
        raise CheckpointError(
            f"{directory} holds no checkpoint of step {step}; type one of {names}"
        )
    return chosen


def numbered(folder: Path) -> list[Path]:
    """Folders named by a step, rising."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(paths, key=lambda path: int(path.name))


def _contents(file: Path) -> list[int]:
    size, crc = 0, 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        # Some network file systems cannot, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)
