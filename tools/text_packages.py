"""Packages and their files: Debian archives by apt-get and dpkg-deb, npm archives by npm.

Nothing is installed, root is not needed, and an archive that is in the cache is not fetched again.
"""

import gzip
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Paths in an archive, such as usr/share/doc/sqlite3/about.html, and what is there.
Files = Mapping[str, bytes]

_INSTALL = {
    "apt-get": "run this on Debian or Ubuntu",
    "apt-cache": "run this on Debian or Ubuntu",
    "dpkg-deb": "type sudo apt-get install dpkg",
    "npm": "type sudo apt-get install npm",
}
_WARNINGS = ("W: ", "npm warn", "npm WARN")


class PackageError(ValueError):
    """A package that cannot be had or opened; the text says what to type."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """Base of the packages, fetched into a folder and read without being unpacked there."""

    name: str

    def cached(self, cache: Path) -> list[Path]:
        """The archives of this package in the folder, sorted."""
        raise NotImplementedError

    def download(self, folder: Path) -> None:
        """Puts the archive into an empty folder. Raises PackageError."""
        raise NotImplementedError

    def identity(self, archive: Path) -> tuple[str, str]:
        """Name and version, as the archive says. Raises PackageError for a damaged one."""
        raise NotImplementedError

    def tar(self, archive: Path) -> bytes:
        """The package's files as a tar archive. Raises PackageError for a damaged one."""
        raise NotImplementedError

    def fetch(self, cache: Path) -> Path:
        """The archive in the cache, downloaded if it is not there. Raises PackageError."""
        found = self.cached(cache)
        if not found:
            # Whole or not at all: another run may look into the cache while this one fetches.
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                self.download(Path(folder))
                for path in Path(folder).iterdir():
                    path.replace(cache / path.name)
            found = self.cached(cache)
        if not found:
            raise PackageError(f"{self.name} was downloaded and is not in {cache}")
        return found[-1]

    def files(self, archive: Path, wanted: str) -> Files:
        """The plain files whose whole path matches the regular expression, sorted by path.

        Raises PackageError for a damaged archive.
        """
        pattern, found = re.compile(wanted), {}
        try:
            with tarfile.open(fileobj=io.BytesIO(self.tar(archive))) as tar:
                for member in tar:
                    path = member.name.removeprefix("./")
                    # Links to files would be the same text again.
                    if member.isreg() and pattern.fullmatch(path):
                        found[path] = tar.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise _damaged(archive, str(error).partition("\n")[0]) from error
        return dict(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class Debian(Package):
    """A Debian package. `name` may hold a * where the content's version stands in it, as in
    python3.*-doc; `meta` is then the package that depends on the current one.
    """

    meta: str | None = None

    def cached(self, cache: Path) -> list[Path]:
        """The .deb files of any version."""
        return sorted(cache.glob(f"{self.name}_*.deb"))

    def download(self, folder: Path) -> None:
        """Asks apt-get. Raises PackageError, which says what to type without package lists."""
        try:
            _run(["apt-get", "download", "-q", self._current()], folder)
        except _FailedError as error:
            raise PackageError(
                f"apt-get cannot fetch {self.name} ({error}); where apt has no package lists, type "
                "sudo apt-get update"
            ) from error

    def _current(self) -> str:
        if self.meta is None:
            return self.name
        depends = _run(["apt-cache", "depends", self.meta]).decode()
        pattern = re.escape(self.name).replace(r"\*", r"\d+")
        found = re.search(rf"Depends: ({pattern})$", depends, re.MULTILINE)
        if found is None:
            raise _FailedError(f"{self.meta} depends on no {self.name}")
        return found[1]

    def identity(self, archive: Path) -> tuple[str, str]:
        """From the package's control file."""
        try:
            said = _run(["dpkg-deb", "-f", str(archive), "Package", "Version"]).decode()
        except _FailedError as error:
            raise _damaged(archive, str(error)) from error
        fields = dict(line.partition(": ")[::2] for line in said.splitlines())
        if not fields.keys() >= {"Package", "Version"}:
            raise _damaged(archive, "it names no package and version")
        return fields["Package"], fields["Version"]

    def tar(self, archive: Path) -> bytes:
        """What dpkg-deb would unpack."""
        try:
            return _run(["dpkg-deb", "--fsys-tarfile", str(archive)])
        except _FailedError as error:
            raise _damaged(archive, str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Npm(Package):
    """An npm package of one version; a published version never changes."""

    version: str

    def cached(self, cache: Path) -> list[Path]:
        """The .tgz file that npm pack writes."""
        stem = self.name.removeprefix("@").replace("/", "-")
        return sorted(cache.glob(f"{stem}-{self.version}.tgz"))

    def download(self, folder: Path) -> None:
        """Asks npm. Raises PackageError."""
        try:
            _run(["npm", "pack", "--loglevel=error", f"{self.name}@{self.version}"], folder)
        except _FailedError as error:
            raise PackageError(f"npm cannot fetch {self.name} ({error})") from error

    def identity(self, archive: Path) -> tuple[str, str]:
        """From package.json."""
        try:
            about = json.loads(self.files(archive, "package/package.json")["package/package.json"])
            return about["name"], about["version"]
        except (LookupError, TypeError, json.JSONDecodeError) as error:
            raise _damaged(archive, "its package.json names no package and version") from error

    def tar(self, archive: Path) -> bytes:
        """Unpacked as a whole: only the end has the checksum."""
        packed = archive.read_bytes()
        try:
            return gzip.decompress(packed)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _damaged(archive, str(error)) from error


class _FailedError(Exception):
    """A command that ended with an error; the text is the first error that it named."""


def _run(words: list[str], folder: Path | None = None) -> bytes:
    """What the command writes; its messages in English."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, env=environment)
    except FileNotFoundError as error:
        raise PackageError(f"{words[0]} is not installed; {_INSTALL[words[0]]}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines()
        errors = [line for line in said if line.strip() and not line.startswith(_WARNINGS)]
        first = errors[0] if errors else f"exit code {done.returncode}"
        raise _FailedError(first.removeprefix("E: ").removeprefix("npm error "))
    return done.stdout


def _damaged(archive: Path, why: str) -> PackageError:
    return PackageError(f"{archive} is damaged ({why}); delete it and type the command again")
