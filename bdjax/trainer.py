"""The training loop: a thin driver of the step. Nothing of a run is lost when it is interrupted."""

import contextlib
import errno
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bdjax import likelihood
from bdjax.base import keep_base, restore_base, start_params
from bdjax.checkpoint import Checkpoints, NoSpaceError, read_config
from bdjax.config import TrainConfig, check_seed, config_from_json
from bdjax.data import describe_rows, evaluation_batches, merge_states, training_batches
from bdjax.display import clean_text
from bdjax.distributed import Agreement, Peers
from bdjax.generation import LanguageModel, generate
from bdjax.interrupts import Interrupts
from bdjax.metrics import Progress, Writer, cut_log
from bdjax.optim import make_optimiser
from bdjax.overrides import to_json, to_text
from bdjax.prefetch import Prefetched
from bdjax.sharding import own_rows
from bdjax.speed import Profile, Speed, speed_of
from bdjax.train_step import FiniteWatch, TrainState, initial_state, train_step
from bdjax.watchdog import Watchdog

# What may change on the way, like `optim.accumulate`: none of it changes a number beyond rounding.
_FREE = ("mesh", "evaluation", "checkpoint_every", "keep_checkpoints", "keep_every", "watchdog")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train` leaves: the run's folder, its metrics, and whether a `signal` interrupted it."""

    directory: Path
    history: list[tuple[int, dict[str, float]]]
    steps: int
    interrupted: bool
    signal: int
    model: LanguageModel


def train(
    config: TrainConfig,
    directory: str | Path,
    *,
    resume: bool = False,
    profile: tuple[int, int] | None = None,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Trains `config` into `directory`: checkpoints, metrics.jsonl and TensorBoard events.

    resume: go on from the newest whole checkpoint there, with the same noise and data as if never
    stopped; when there is none, from the start. Ctrl-C or SIGTERM writes a checkpoint and returns
    with `interrupted`. Of several processes (`start_processes`) the first writes and says what
    there is to say. A save for which the disk has no room is a warning, and the next one tries
    again. profile: first and last step of a profiler trace in the folder "profile".

    Raises FileExistsError when the folder holds a run and `resume` is not asked for, ValueError
    when it holds another config (how a run is watched, saved, accumulated and spread over devices
    may change), CheckpointError for torn or foreign checkpoints and when the last save fails,
    OSError naming the folder when the log has no room, PeerError when the other processes do not
    come, NonFiniteError when gradients stay non-finite.
    """
    directory = Path(directory)
    say = say if jax.process_index() == 0 else _silent
    advice = f"start all processes again with --resume to go on from what {directory} holds"
    with (
        jax.set_mesh(config.mesh.build()),
        Peers(config.mesh.heartbeat_seconds, advice),
        Checkpoints(directory, config.keep_checkpoints, config.keep_every) as kept,
    ):
        saved = kept.steps()
        if not saved:
            kept.check_readable()
        if saved and not resume:
            raise FileExistsError(
                f"{directory} holds a run up to step {saved[-1]}; type --resume to go on with it, "
                "or --run with another folder"
            )
        # Read first: a document that cannot be read leaves no folder behind.
        train_documents, held_out = config.documents()
        config = config.keep(directory, write=jax.process_index() == 0)
        if saved:
            before = config_from_json(read_config(directory), directory)
            _check_same(config, before, directory)
        elif resume:
            say(f"{directory} holds no whole checkpoint: starting from step 0")
        model = config.build_model()
        optimiser = make_optimiser(config.optim, model.trained_table(), config.steps)
        data = training_batches(
            train_documents,
            config.tokenizer,
            config.packing(),
            config.data.batch_size,
            config.seed,
            rows=own_rows(config.data.batch_size),
            lanes=config.data.lanes,
            weights=config.data.source.weights(),
        )
        base = None
        if config.start_from is not None and not saved:
            base = start_params(config)
            if model.decoder.lora is not None:
                keep_base(directory, config, base)
        elif model.decoder.lora is not None:
            base = restore_base(directory, model)
        state = initial_state(config.seed, model, optimiser, base)
        begin = 0
        if saved:
            abstract = jax.tree.map(_abstract, state._replace(frozen=None))
            begin, restored, data_states = kept.restore(abstract)
            state = restored._replace(frozen=state.frozen)
            data.set_state(merge_states(data_states))
            say(f"resumed from step {begin}")
        root = jax.random.key(config.seed)
        step = partial(train_step, config.objective, model, optimiser)
        done, asked = begin, 0
        saves = _Saves(kept, to_json(config), begin if saved else -1)
        speed = speed_of(config, model)
        agreed = Agreement(jax.sharding.get_mesh())
        finite = FiniteWatch(config.optim)

        def language_model() -> LanguageModel:
            return LanguageModel(config=config, model=model, params=state.averaged)

        def save():
            # The save in flight may hold room that the log needs, and give it back. What the log
            # says of these steps is on the disk before the checkpoint is.
            saves.settle()
            show(writer.flush())
            saves.save(done, state, data.get_state())

        def show(late):
            if late is not None:
                values = late[1]
                finite.see(late[0], values)
                tokens, mfu = int(values["tokens"]), values.get("mfu")
                progress.update(late[0], loss=values["loss"], tokens=tokens, mfu=mfu)

        with (
            _naming(directory),
            Interrupts() as interrupts,
            Watchdog(config.watchdog, directory) as watchdog,
            Prefetched(data, depth=4) as data,
            _log(directory, begin, speed) as writer,
            Profile(profile, directory / "profile", say) as profiler,
            _progress(config.steps) as progress,
        ):
            while done < config.steps and not asked:
                rows = next(data)
                if done == 0:
                    say(describe_rows(rows, config.tokenizer))
                speed.hand(done + 1, rows["segment"], rows["trainable"])
                batch = likelihood.to_device(rows, config.data.batch_size)
                state, metrics = profiler.step(done + 1, step, state, batch, root)
                done += 1
                show(writer.write(done, metrics))
                asked = agreed(interrupts.asked)
                watchdog.alive(done)
                saves.check()
                if _due(config, done) and not asked:
                    watchdog.alive(done, compiling=True)
                    report = evaluate_model(language_model(), held_out, config.evaluation.batches)
                    writer.add(report.scalars())
                    writer.write_text(done, "evaluation", str(report))
                    say(f"step {done}: {report}")
                    say(_sample(language_model(), config, writer, done))
                    watchdog.alive(done)
                    speed.restart()
                if done % config.checkpoint_every == 0:
                    watchdog.alive(done, compiling=True)
                    save()
                    watchdog.alive(done)
            watchdog.alive(done, compiling=True)
            save()
            saves.close(done, state, data.get_state())
        if asked:
            say(f"interrupted: checkpoint of step {done} is in {directory}; --resume goes on")
        return TrainResult(
            directory=directory,
            history=writer.history,
            steps=done,
            interrupted=bool(asked),
            signal=asked,
            model=language_model(),
        )


class _Saves:
    """When to save is the loop's business; this is what happens when a save finds no room."""

    def __init__(self, kept: Checkpoints, config_json: str, written: int):
        self._kept = kept
        self._config = config_json
        self._written = written

    def check(self) -> None:
        """A save that has failed: no room is a warning, anything else is raised."""
        self._warning(self._kept.check)

    def settle(self) -> None:
        """Waits for the save in flight; no room is a warning."""
        self._warning(self._kept.wait)

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Starts to save `step`, once."""
        self.settle()
        if step > self._written:
            # What is frozen stands in the run's base, once.
            self._kept.save(step, state._replace(frozen=None), self._config, data_state)
            self._written = step

    def close(self, step: int, state: TrainState, data_state: Any) -> None:
        """Waits for the last save, and tries once more when it found no room."""
        self.save(step, state, data_state)
        self._kept.wait()

    def _warning(self, look: Callable[[], None]) -> None:
        try:
            look()
        except NoSpaceError as error:
            self._written = -1
            if jax.process_index() == 0:
                warnings.warn(f"{error}; the run goes on and tries again", stacklevel=2)


@contextlib.contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Says which folder had no room: the system does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{directory} has no room for the run's log ({error.strerror}); free some space and "
            "type --resume"
        ) from error


def _log(directory: Path, begin: int, speed: Speed) -> Writer:
    """The log, in which every step stands once: those after `begin` will be run again."""
    cut_log(directory, begin)
    return Writer(directory, derive=speed)


def _progress(steps: int) -> Progress:
    return Progress(steps) if jax.process_index() == 0 else Progress(steps, file=io.StringIO())


def _silent(text: str) -> None:
    """Where only the first process speaks."""


def _check_same(config: TrainConfig, saved: TrainConfig, directory: Path) -> None:
    """Refuses a resume that would not be the run that was saved.

    The learning rate depends on `steps`, so these are part of the run too.
    """
    saved = replace(saved, **{name: getattr(config, name) for name in _FREE})
    saved = replace(saved, optim=replace(saved.optim, accumulate=config.optim.accumulate))
    if saved == config:
        return
    before, now = (
        dict(line.partition(" = ")[::2] for line in to_text(c).splitlines())
        for c in (saved, config)
    )
    key = next(key for key in before if before[key] != now.get(key))
    raise ValueError(
        f"{directory} holds a run with {key}={before[key]}, and this config has {key}={now[key]}; "
        f"type {key}={before[key]} to go on with it, or --run with another folder"
    )


def _abstract(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _due(config: TrainConfig, done: int) -> bool:
    every = config.evaluation.every
    return every > 0 and done % every == 0 and done < config.steps


def evaluate_model(
    language_model: LanguageModel, documents, batches: int | None = None, **options
) -> likelihood.Evaluation:
    """The bound on the rows of `documents`, on all of them or the first `batches` batches.

    Options as for `bdjax.likelihood.evaluate`: block_size, draws, exact, seed. Raises ValueError
    for options out of range.
    """
    config = language_model.config
    if batches is not None and batches < 1:
        raise ValueError(f"batches={batches} must be at least 1; type --batches 1 or leave it out")
    check_seed(options.get("seed", 0))
    options["block_size"] = config.block_size(options.get("block_size"))
    rows = evaluation_batches(documents, config.tokenizer, config.packing(), config.data.batch_size)
    with jax.set_mesh(config.mesh.build()):
        return likelihood.evaluate(
            config.objective,
            language_model.model,
            language_model.params,
            rows if batches is None else itertools.islice(rows, batches),
            config.tokenizer.token_bytes(),
            **options,
        )


def _sample(language_model: LanguageModel, config: TrainConfig, writer: Writer, step: int) -> str:
    wanted = config.evaluation
    written = generate(
        language_model, [wanted.prompt], max_new_tokens=wanted.tokens, seed=config.seed
    )[0]
    text = wanted.prompt + written.text
    writer.write_text(step, "sample", text)
    return clean_text(text)
