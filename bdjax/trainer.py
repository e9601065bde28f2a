"""The training loop: a thin driver of the step. Nothing of a run is lost when it is interrupted."""

import itertools
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bdjax import likelihood
from bdjax.checkpoint import Checkpoints, read_config
from bdjax.config import TrainConfig, check_seed, config_from_json
from bdjax.data import evaluation_batches, training_batches
from bdjax.display import clean_text
from bdjax.generation import LanguageModel, generate
from bdjax.metrics import Progress, Writer
from bdjax.optim import make_optimiser
from bdjax.overrides import to_json, to_text
from bdjax.train_step import initial_state, train_step


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train` leaves: the run's folder, its metrics, and whether it was interrupted."""

    directory: Path
    history: list[tuple[int, dict[str, float]]]
    steps: int
    interrupted: bool
    model: LanguageModel


class _Interrupt:
    """Ctrl-C and SIGTERM end the loop after the step in flight; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def train(
    config: TrainConfig,
    directory: str | Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Trains `config` into `directory`: checkpoints, metrics.jsonl and TensorBoard events.

    resume: go on from the newest whole checkpoint there, with the same noise and data as if never
    stopped; when there is none, from the start. Ctrl-C or SIGTERM writes a checkpoint and returns
    with `interrupted`. Raises FileExistsError when the folder holds a run and `resume` is not asked
    for, ValueError when it holds another config (evaluation and checkpointing may change),
    CheckpointError for torn or foreign checkpoints.
    """
    directory = Path(directory)
    with jax.set_mesh(config.mesh.build()), Checkpoints(directory, config.keep_checkpoints) as kept:
        saved = kept.steps()
        if saved and not resume:
            raise FileExistsError(
                f"{directory} holds a run up to step {saved[-1]}; type --resume to go on with it, "
                "or --run with another folder"
            )
        if saved:
            _check_same(config, config_from_json(read_config(directory, saved[-1])), directory)
        elif resume:
            say(f"{directory} holds no whole checkpoint: starting from step 0")
        train_documents, held_out = config.documents()
        model = config.build_model()
        optimiser = make_optimiser(config.optim, model.table(), config.steps)
        data = training_batches(
            train_documents,
            config.tokenizer,
            config.packing(),
            config.data.batch_size,
            config.seed,
        )
        state = initial_state(config.seed, model, optimiser)
        begin = 0
        if saved:
            abstract = jax.tree.map(_abstract, state)
            begin, state, data_state = kept.restore(abstract)
            data.set_state(data_state)
            say(f"resumed from step {begin}")
        root = jax.random.key(config.seed)
        text = to_json(config)
        step = partial(train_step, config.objective, model, optimiser)
        done, written = begin, begin if saved else -1

        def save():
            nonlocal written
            if done > written:
                kept.save(done, state, text, data.get_state())
                written = done

        def language_model() -> LanguageModel:
            return LanguageModel(config=config, model=model, params=state.params)

        with (
            _Interrupt() as interrupt,
            Writer(directory) as writer,
            Progress(config.steps) as progress,
        ):
            while done < config.steps and not interrupt.asked:
                state, metrics = step(state, likelihood.to_device(next(data)), root)
                done += 1
                late = writer.write(done, metrics)
                if late is not None:
                    values = late[1]
                    progress.update(late[0], loss=values["loss"], tokens=int(values["tokens"]))
                if done % config.checkpoint_every == 0:
                    save()
                if _due(config, done):
                    report = evaluate_model(language_model(), held_out, config.evaluation.batches)
                    writer.write_text(done, "evaluation", str(report))
                    say(f"step {done}: {report}")
                    say(_sample(language_model(), config, writer, done))
            late = writer.flush()
            if late is not None:
                progress.update(late[0], loss=late[1]["loss"], tokens=int(late[1]["tokens"]))
            save()
        if interrupt.asked:
            say(f"interrupted: checkpoint of step {done} is in {directory}; --resume goes on")
        return TrainResult(
            directory=directory,
            history=writer.history,
            steps=done,
            interrupted=interrupt.asked,
            model=language_model(),
        )


def _check_same(config: TrainConfig, saved: TrainConfig, directory: Path) -> None:
    """Refuses a resume that would not be the run that was saved.

    The learning rate depends on `steps`, so these are part of the run too.
    """
    saved = replace(
        saved,
        evaluation=config.evaluation,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
    )
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
