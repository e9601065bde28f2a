"""The parameters that a run begins with, and those that LoRA leaves as they are.

    RUN/checkpoints/    what training moves: with LoRA its pairs alone
    RUN/base/           with LoRA, a run of its own: a copy of what the pairs stand beside

A LoRA run reads nothing outside its folder, and writes the large part of its parameters once.
"""

import dataclasses
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.checkpoint import CheckpointError, Checkpoints, read_config, restore_params
from bdjax.config import TrainConfig, config_from_json
from bdjax.hf_folder import is_pretrained
from bdjax.hf_tokenizer import HuggingFaceTokenizer
from bdjax.interrupts import Interrupts
from bdjax.lora import join, merged, split
from bdjax.overrides import to_json
from bdjax.pretrained import PretrainedError
from bdjax.step import Model
from bdjax.tokenizer import Tokenizer

FOLDER = "base"

# What changes the numbers and no shape: a run may start with other ones, and should know.
_QUIET = ("rope_theta", "rope_scaling", "rope_layers", "norm_eps")


def restore_model(
    directory: str | Path, model: Model, step: int | None = None, *, dtype: str | None = None
) -> Any:
    """All parameters of a run's newest whole checkpoint, or of `step`, on the mesh in force.

    dtype: theirs, None for that in which they were saved. They are the moving average where the run
    kept one. Raises CheckpointError for a missing, torn or foreign checkpoint, and for a LoRA run
    without its base.
    """
    moved, frozen = split(_abstract(model, dtype), model.decoder.lora)
    _, found = restore_params(directory, moved, step, stored_dtype=dtype is None)
    return found if frozen is None else join(found, restore_base(directory, model, dtype=dtype))


def restore_base(directory: str | Path, model: Model, *, dtype: str | None = None) -> Any:
    """What a LoRA run leaves as it is, from its folder; dtype as for `restore_model`.

    Raises CheckpointError if it is missing.
    """
    _, frozen = split(_abstract(model, dtype), model.decoder.lora)
    place = Path(directory).absolute()
    folders = [folder / FOLDER for folder in (place, *place.parents[:2])]
    kept = next((folder for folder in folders if folder.is_dir()), None)
    if kept is None:
        raise CheckpointError(
            f"{directory} holds a LoRA run without its folder {FOLDER}, in which the frozen "
            "parameters are; copy the whole run"
        )
    return restore_params(kept, frozen, stored_dtype=dtype is None)[1]


def _abstract(model: Model, dtype: str | None) -> Any:
    """Shapes and shardings of all parameters, in `dtype` or float32."""
    found = jax.eval_shape(model.init, jax.random.key(0))
    if dtype is None:
        return found
    return jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(dtype)), found)


def merged_model(config: TrainConfig, params: Any) -> tuple[TrainConfig, Any]:
    """Config and parameters without LoRA, its pairs added to their matrices in float32.

    Without LoRA they are what was given. On the mesh in force.
    """
    model = config.build_model()
    lora = model.decoder.lora
    if lora is None:
        return config, params
    table = model.table()
    params = jax.jit(lambda p: merged(p, table, lora))(params)
    return without_lora(config), params


def without_lora(config: TrainConfig) -> TrainConfig:
    """The config of the same network with every parameter its own."""
    return replace(config, model=replace(config.model, lora=None), start_from=None)


def write_run(directory: str | Path, config: TrainConfig, params: Any, step: int = 0) -> None:
    """A run with one checkpoint of `params` and nothing to resume: for `load` and `start_from`.

    What was made of a run that cannot be finished is taken away again. After Ctrl-C, too, once the
    writers have ended: they cannot be called off, and would make anew what goes before. Raises
    CheckpointError when there is a whole checkpoint of this step, or no room.
    """
    directory = Path(directory)
    before = set(directory.iterdir()) if directory.exists() else None

    def told() -> None:
        warnings.warn(
            f"interrupted: {directory} goes as soon as its writers have ended", stacklevel=2
        )

    try:
        config = config.keep(directory, write=jax.process_index() == 0)
        with Checkpoints(directory, keep=1) as kept, Interrupts(told) as interrupts:
            kept.save(step, {"params": params}, to_json(config))
            kept.wait()
        if interrupts.asked:
            raise KeyboardInterrupt
    except BaseException:
        if before is None:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            for path in set(directory.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def check_free(run: str | Path) -> None:
    """Raises CheckpointError for a folder that has checkpoints or that nothing can be written to,
    before anything is read for it."""
    run = Path(run)
    there = next(place for place in (run, *run.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise CheckpointError(f"{there} is no folder; type --run with another place for the run")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{there} cannot be written to; type --run with another place for the run"
        )
    if (run / "checkpoints").exists():
        raise CheckpointError(f"{run} has checkpoints already; type another folder for the run")


def keep_base(directory: Path, config: TrainConfig, params: Any) -> None:
    """Writes what a LoRA run leaves as it is into its folder, in place of what was there."""
    folder = directory / FOLDER
    with Checkpoints(folder, keep=1) as kept:
        # A folder that never came to a checkpoint may hold another base: this one is newer.
        step = max(kept.steps(), default=-1) + 1
        kept.save(step, {"params": params}, to_json(without_lora(config)))


def start_config(place: str | Path) -> TrainConfig:
    """The config of the run at `place`, for a `get_config(start)` to build on.

    Its prompts begin with BOS, whatever those of a model that somebody else made do: every document
    that it is trained on here does.

    Raises CheckpointError where there is no such run, PretrainedError for somebody else's model.
    """
    if is_pretrained(place):
        raise PretrainedError(
            f"{place} is no run of ours yet; type bdjax import {place} --run RUN, and start from "
            "that run"
        )
    config = config_from_json(read_config(place), place)
    if isinstance(config.tokenizer, HuggingFaceTokenizer):
        config = replace(config, tokenizer=replace(config.tokenizer, leads=True))
    return config


def start_params(config: TrainConfig) -> Any:
    """The parameters of the run that `config.start_from` names, merged, on the mesh in force.

    Raises ValueError when they do not fit the config's model, or were trained with another
    tokenizer; CheckpointError where there is no such run. Warns of numbers that differ.
    """
    place = config.start_from
    assert place is not None
    theirs = start_config(place)
    ours = without_lora(config)
    if _shapes(ours) != _shapes(without_lora(theirs)):
        raise ValueError(
            f"start_from={place} does not fit: it has {_difference(theirs, ours)}, or take "
            "another run"
        )
    if _words(theirs.tokenizer) != _words(config.tokenizer):
        raise ValueError(
            f"start_from={place} was trained with another tokenizer: the same ids would mean other "
            "text; use the tokenizer of that run"
        )
    for name in _QUIET:
        a, b = getattr(theirs.model, name), getattr(config.model, name)
        if a != b:
            warnings.warn(
                f"start_from={place} was trained with model.{name}={a}, and goes on with {b}",
                stacklevel=2,
            )
    return merged_model(theirs, restore_model(place, theirs.build_model(), dtype="float32"))[1]


def _shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters by their paths."""
    tree = jax.eval_shape(config.build_model().init, jax.random.key(0))
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def _difference(theirs: TrainConfig, ours: TrainConfig) -> str:
    """The first setting of the model that differs, or the vocabularies."""
    for field in dataclasses.fields(theirs.model):
        a, b = getattr(theirs.model, field.name), getattr(ours.model, field.name)
        if a != b and isinstance(a, int):
            name = f"model.{field.name}"
            return f"{name}={a}, and this config {name}={b}; type {name}={str(a).lower()}"
    return (
        f"{theirs.vocab_size} ids, and this config {ours.vocab_size}; use the tokenizer of that run"
    )


def _words(tokenizer: Tokenizer) -> tuple:
    """What the ids mean: kind and file."""
    return type(tokenizer), getattr(tokenizer, "sha256", None)
