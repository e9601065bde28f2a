"""Files that a run keeps a copy of, so that it needs nothing outside its folder."""

from pathlib import Path


def keep_file(copy: Path, data: bytes, source: str, key: str, write: bool) -> None:
    """Writes `data` to `copy`, if `write` and unless it is there; either way nothing else is.

    source: where the data come from, key: what they are in a config, for messages. Raises
    ValueError when `copy` holds something else.
    """
    if copy.exists():
        if copy.read_bytes() != data:
            kind = key.replace("_", " ")
            raise ValueError(
                f"{copy} is not {source}: the run in {copy.parent} has another {kind}; type "
                f"{key}.path={copy} to go on with it, or --run with another folder"
            )
        return
    if write:
        copy.parent.mkdir(parents=True, exist_ok=True)
        part = copy.with_name(copy.name + ".part")
        part.write_bytes(data)
        part.rename(copy)
