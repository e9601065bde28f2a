"""Checkpoints: every Orbax call, and what a torn or foreign folder is told apart by.

    RUN/checkpoints/<step>/arrays/         the state, by Orbax: `params`, and the `rest`
                           config.json     the resolved config (`overrides.to_json`)
                           data/<process>  the data iterator's state, JSON
                           bdjax.json      format, leaves and the size of every file above

`bdjax.json` is written last, so a folder without it is a save that never finished. Nothing in a
checkpoint is executed.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

FORMAT = "bdjax checkpoint"
FORMAT_VERSION = 1


class CheckpointError(Exception):
    """A folder that cannot be read as a checkpoint; the text says why and what to type."""


class TornCheckpointError(CheckpointError):
    """An unfinished or damaged checkpoint: the one before it may still be whole."""


class Checkpoints:
    """The checkpoints of one run, in `directory/checkpoints`; the newest `keep` whole ones stay.

    Use as a context manager: whatever a save still has to do is done when it closes. Raises
    ValueError for keep below 1.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep} would delete every checkpoint; type keep=1 or more")
        self._run = Path(directory).absolute()
        self._keep = keep

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        # Saves are synchronous so far: they leave nothing to wait for.
        return None

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, rising."""
        return [int(path.name) for path in self._whole()]

    def save(self, step: int, state: Any, config_json: str, data_state: dict | None = None) -> Path:
        """Writes the arrays of `state`, a dict or NamedTuple with `params`, and returns the folder.

        `data_state`: JSON, one per process. Every process calls this; earlier checkpoints go only
        when this one is whole. Raises CheckpointError when there is a whole one of this step.
        """
        path = self._run / "checkpoints" / str(step)
        first = jax.process_index() == 0
        if path.exists():
            try:
                _read_manifest(path)
            except TornCheckpointError:
                if first:
                    shutil.rmtree(path)
            else:
                raise CheckpointError(
                    f"{path} is already a whole checkpoint; resume the run or choose another folder"
                )
        _barrier(f"bdjax-clear-{step}")
        ocp.save_checkpointables(path / "arrays", _halves(state))
        (path / "data").mkdir(exist_ok=True)
        (path / "data" / f"{jax.process_index()}.json").write_text(json.dumps(data_state))
        _barrier(f"bdjax-written-{step}")
        if first:
            (path / "config.json").write_text(config_json)
            _write_manifest(path, state)
            for old in self._whole()[: -self._keep]:
                # Without its manifest a half-deleted checkpoint reads as unfinished.
                (old / "bdjax.json").unlink()
                shutil.rmtree(old)
        _barrier(f"bdjax-done-{step}")
        return path

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any, dict | None]:
        """(step, state, data state) of the newest whole checkpoint, or of `step`.

        `abstract_state` gives structure, shapes and shardings (`jax.eval_shape` of the
        initialiser under the mesh in force), which may differ from those at the save. A torn
        newest checkpoint is passed over with a warning if another is whole.

        Raises CheckpointError: nothing there, torn, foreign, a future format, other shapes, or
        saved by another number of processes.
        """

        def load(path: Path, manifest: dict):
            _check_leaves(path, manifest["leaves"], abstract_state, everything=True)
            if manifest["processes"] != jax.process_count():
                raise CheckpointError(
                    f"{path} holds the data state of {manifest['processes']} processes, and this "
                    f"run has {jax.process_count()}; start as many, or begin a new run from its "
                    "parameters"
                )
            loaded = _load(path, _halves(jax.tree.map(_placed, abstract_state)))
            nested = loaded.get("rest", {}) | {"params": loaded["params"]}
            data = (path / "data" / f"{jax.process_index()}.json").read_text()
            return manifest["step"], _like(abstract_state, nested), json.loads(data)

        return _newest(self._run, step, load)

    def _whole(self) -> list[Path]:
        return [path for path in _numbered(self._run / "checkpoints") if _is_whole(path)]


def restore_params(
    directory: str | Path, abstract_params: Any, step: int | None = None
) -> tuple[int, Any]:
    """(step, parameters) alone, in the dtype and sharding of `abstract_params`.

    `directory` is a run, its `checkpoints` or one checkpoint. Raises as `Checkpoints.restore`.
    """

    def load(path: Path, manifest: dict):
        wanted = {"params": abstract_params}
        _check_leaves(path, manifest["leaves"], wanted, everything=False)
        loaded = _load(path, _halves(jax.tree.map(_placed, wanted)))
        return manifest["step"], _like(abstract_params, loaded["params"])

    return _newest(directory, step, load)


def read_config(directory: str | Path, step: int | None = None) -> str:
    """The config's JSON, as saved. `directory` and errors as for `restore_params`."""
    return _newest(directory, step, lambda path, _: (path / "config.json").read_text())


def _newest(directory: str | Path, step: int | None, read):
    """`read(path, manifest)` of the newest checkpoint that is not torn, or of `step`."""
    paths = _find(Path(directory).absolute(), step)
    for path, before in zip(paths, [*paths[1:], None], strict=True):
        try:
            return read(path, _read_manifest(path))
        except TornCheckpointError as error:
            if before is None:
                raise
            warnings.warn(f"{error}; reading {before} instead", stacklevel=3)
    raise AssertionError("_find returns at least one path")


def _find(directory: Path, step: int | None) -> list[Path]:
    """Folders that should be checkpoints, newest first; at least one."""
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no folder {directory}; type the folder of a run, which holds checkpoints/"
        )
    if (directory / "bdjax.json").exists() or (
        directory.name.isdecimal() and directory.parent.name == "checkpoints"
    ):
        return [directory]
    inside = directory / "checkpoints"
    paths = _numbered(inside if inside.is_dir() else directory)[::-1]
    if not paths:
        raise CheckpointError(
            f"{directory} holds no checkpoint: expected folders like "
            f"{directory / 'checkpoints' / '100'}; type the folder of a run"
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


def _numbered(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(paths, key=lambda path: int(path.name))


def _is_whole(path: Path) -> bool:
    try:
        _read_manifest(path)
    except CheckpointError:
        return False
    return True


def _write_manifest(path: Path, state) -> None:
    files = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*") if f.is_file()}
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "step": int(path.name),
        "processes": jax.process_count(),
        "leaves": {k: [list(v.shape), str(v.dtype)] for k, v in _leaves(state).items()},
        "files": files,
    }
    part = path / "bdjax.json.part"
    part.write_text(json.dumps(manifest, indent=1))
    part.rename(path / "bdjax.json")


def _read_manifest(path: Path) -> dict:
    """bdjax.json, once every file it lists is there in full."""
    file = path / "bdjax.json"
    if not file.exists():
        if any(path.glob("arrays*")) or not any(path.iterdir()):
            raise TornCheckpointError(f"{path} is a save that never finished (no bdjax.json)")
        raise CheckpointError(
            f"{path} was not written by bdjax (no bdjax.json); type the folder of a bdjax run"
        )
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise TornCheckpointError(f"{file} is damaged, expected JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f'{file} is not ours: expected "format": "{FORMAT}"; type the folder of a bdjax run'
        )
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('version')}, and this bdjax reads format "
            f"{FORMAT_VERSION}; type pip install --upgrade bdjax"
        )
    kinds = {"step": int, "processes": int, "leaves": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise TornCheckpointError(f"{file} is damaged: expected {name} to be {kind.__name__}")
    for name, size in manifest["files"].items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            raise TornCheckpointError(f"{path} is damaged: {name} is missing") from None
        if found != size:
            raise TornCheckpointError(
                f"{path} is damaged: {name} has {found} bytes, expected {size}"
            )
    return manifest


def _check_leaves(path: Path, saved: dict, abstract, everything: bool) -> None:
    wanted = {name: list(leaf.shape) for name, leaf in _leaves(abstract).items()}
    there = {name: shape for name, (shape, _) in saved.items()}
    if not everything:
        there = {name: shape for name, shape in there.items() if name.split("/")[0] == "params"}
    wrong = [
        f"{name} is {there.get(name, 'absent')} in it and {wanted.get(name, 'absent')} here"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{path} does not fit this config: {wrong[0]}{more}; "
            f"use the config it was saved with, {path / 'config.json'}"
        )


def _load(path: Path, abstract: dict) -> dict:
    try:
        return ocp.load_checkpointables(path / "arrays", abstract)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TornCheckpointError(f"{path} is damaged: Orbax answers {reason}") from error


def _leaves(tree) -> dict[str, Any]:
    """Leaves by their path, "params/layers/wq": the same for dicts and NamedTuples."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}


def _halves(state) -> dict[str, dict]:
    """`state` as plain nested dicts: `params`, and the `rest` if there is any."""
    nested: dict[str, Any] = {}
    for name, leaf in _leaves(state).items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    if "params" not in nested:
        raise ValueError(f"a state holds `params`; this one has {', '.join(nested) or 'nothing'}")
    params = {"params": nested.pop("params")}
    return params | {"rest": nested} if nested else params


def _like(abstract, nested: dict):
    """The loaded leaves in the structure of `abstract`."""
    loaded = _leaves(nested)
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[k] for k in _leaves(abstract)])


def _placed(leaf) -> jax.ShapeDtypeStruct:
    """The leaf on real devices: eval_shape names only an abstract mesh, or nothing at all."""
    place = getattr(leaf, "sharding", None)
    if place is None or isinstance(place, NamedSharding):
        mesh = jax.sharding.get_mesh()
        named = isinstance(place, NamedSharding)
        if named and isinstance(place.mesh, jax.sharding.Mesh):
            mesh = place.mesh
        spec = place.spec if named else PartitionSpec()
        place = SingleDeviceSharding(jax.local_devices()[0])
        if not mesh.empty:
            place = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
