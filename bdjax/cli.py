"""The `bdjax` command: train, plan, sample, evaluate, import, export; by the public API alone."""

import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

import bdjax
from bdjax.arguments import parser as make_parser
from bdjax.display import Denoising, Reading, clean_text
from bdjax.interrupts import no_interrupt_lost


def _policy(args, size: int) -> bdjax.Policy:
    steps = size if args.steps is None else args.steps
    if steps < 1:
        raise ValueError(f"--steps {steps} must be at least 1; type --steps {size}")
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold} is no probability; type --threshold 0.9")
    if not args.entropy_budget >= 0:
        raise ValueError(
            f"--entropy-budget {args.entropy_budget} must be 0 nats or more; type "
            "--entropy-budget 0.1"
        )
    return {
        "dynamic": lambda: bdjax.Dynamic(threshold=args.threshold, steps=steps),
        "threshold": lambda: bdjax.Threshold(threshold=args.threshold),
        "static": lambda: bdjax.Static(steps=steps),
        "sequential": lambda: bdjax.Sequential(steps=steps),
        "entropy": lambda: bdjax.EntropyBounded(budget=args.entropy_budget),
        "entropy-sdar": lambda: bdjax.EntropyBounded(
            budget=args.entropy_budget, form=bdjax.EntropyForm.SDAR
        ),
        "random": lambda: bdjax.RandomOne(),
    }[args.policy]()


def _config(args) -> bdjax.TrainConfig:
    start = None if args.start is None else bdjax.start_config(args.start)
    config = bdjax.load_config(args.config, start)
    if start is not None and isinstance(config, bdjax.TrainConfig):
        config = replace(config, start_from=args.start)
    config = bdjax.apply_overrides(config, args.overrides)
    if not isinstance(config, bdjax.TrainConfig):
        raise ValueError(
            f"{args.config}: get_config() returned a {type(config).__name__}; expected a "
            "bdjax.TrainConfig"
        )
    return config


def _plan(args) -> int:
    found = bdjax.make_plan(_config(args), args.topology)
    print(_json(found.as_dict()) if args.json else found)
    return 0


def _train(args) -> int:
    config = _config(args)
    if args.print_config:
        print(bdjax.to_text(config))
        return 0
    given = (args.process_id, args.process_count, args.coordinator)
    if args.distributed or any(value is not None for value in given):
        bdjax.start_processes(
            process_id=args.process_id,
            process_count=args.process_count,
            coordinator=args.coordinator,
            heartbeat_seconds=config.mesh.heartbeat_seconds,
        )
    directory = args.run or f"runs/{config.name}"
    window = None if args.profile is None else _window(args.profile)
    result = bdjax.train(config, directory, resume=args.resume, profile=window)
    if jax.process_index() == 0:
        print(f"step {result.steps}/{config.steps}, run in {result.directory}")
    return 130 if result.signal == signal.SIGINT else 0


def _window(text: str) -> tuple[int, int]:
    """First and last step of "20:25"."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--profile {text!r} is not FIRST:LAST; type --profile 20:25")
    return int(first), int(last)


def _blanks(tokenizer, text: str, blank: str) -> list[int | None]:
    """Token ids of a template, None for each blank."""
    if len(blank) != 1:
        raise ValueError(f"--blank {blank!r} must be one character, as in --blank _")
    ids: list[int | None] = []
    for number, part in enumerate(text.split(blank)):
        ids += [None] * (number > 0) + tokenizer.encode(part).tolist()
    if None not in ids:
        raise ValueError(
            f"--infill {text!r} has no blank {blank!r} to fill; type one, as in --infill "
            f"{text + blank!r}, or use --prompt"
        )
    return ids


def _load(args) -> bdjax.LanguageModel:
    with Reading() as reading:
        return bdjax.load(args.run, dtype=args.dtype, progress=reading.update)


def _import(args) -> int:
    with Reading() as reading:
        config = bdjax.import_model(args.model, args.run, dtype=args.dtype, progress=reading.update)
    size = config.objective.block_size.largest
    print(
        f"{args.run}: {config.model.num_layers} layers of width {config.model.width}, "
        f"{config.tokenizer.vocab_size} ids, blocks of {size}, mask {config.tokenizer.mask_id}"
    )
    return 0


def _convert(args) -> int:
    with Reading() as reading:
        config = bdjax.convert_model(
            args.model,
            args.run,
            mask_id=args.mask_id,
            block_size=args.block_size,
            seed=args.seed,
            progress=reading.update,
        )
    print(
        f"{args.run}: mask {config.tokenizer.mask_id} of {config.vocab_size} rows; type bdjax "
        f"train configs/convert_default.py --start {args.run}"
    )
    return 0


def _export(args) -> int:
    loaded = bdjax.load(args.run)
    with Reading("writing") as writing:
        out = bdjax.export_model(
            loaded,
            args.out,
            model_type=args.model_type,
            dtype=args.dtype,
            max_length=args.max_length,
            progress=writing.update,
        )
    print(f"{out}: type AutoModelForCausalLM.from_pretrained({str(out)!r}) to load it elsewhere")
    return 0


def _check_sample(args) -> None:
    """Raises ValueError for flags that do not go together, whatever the model."""
    if args.tokens < 1:
        raise ValueError(f"--tokens {args.tokens} must be at least 1; type --tokens 128")
    if (args.chat or args.prompts) and (args.prompt or args.infill or args.watch):
        raise ValueError("--chat and --prompts go without --prompt, --infill and --watch")
    if args.chat and (args.prompts or args.json):
        raise ValueError("--chat goes without --prompts and --json; type --prompts FILE --json")
    if args.chat_template and not (args.chat or args.prompts):
        raise ValueError(
            "--chat-template writes messages, and --prompt is no message; type --chat, or "
            "--prompts with a .jsonl file of messages"
        )


def _sample(args) -> int:
    # Before a model is read, which may take minutes.
    _check_sample(args)
    questions = bdjax.read_questions(args.prompts) if args.prompts else []
    loaded = _load(args)
    tokenizer = loaded.config.tokenizer
    size = loaded.config.block_size(args.block_size)
    infill = args.infill or []
    prompts = list(args.prompt or ([] if infill else [""]))
    templates = [_blanks(tokenizer, text, args.blank) for text in infill]
    names = prompts + [text.split(args.blank)[0] for text in infill]
    options = {
        "max_length": args.max_length,
        "policy": _policy(args, size),
        "block_size": size,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "fused": False if args.separate_commit else None,
        "seed": args.seed,
    }
    if args.chat:
        bdjax.converse(loaded, template=args.chat_template, max_new_tokens=args.tokens, **options)
        return 0
    if args.prompts:
        return _sample_file(args, loaded, questions, options)

    def run(watch=None):
        """Prompts go on until they stop; templates keep all of their own text and end with it."""
        ended = bdjax.generate(loaded, prompts, max_new_tokens=args.tokens, watch=watch, **options)
        filled = bdjax.generate(
            loaded,
            templates,
            max_new_tokens=0,
            stop=(),
            watch=None if prompts else watch,
            **options,
        )
        return ended + filled

    console = Console()
    watched = args.watch and console.is_terminal and not args.json
    if watched:
        with Denoising(console) as view:
            results = run(lambda snapshot: show(view, tokenizer, names[0], snapshot))
            # What is left on the screen is the text as it is returned, cut at its stop token.
            view.update(names[0], [results[0].text])
    else:
        results = run()
    if args.json:
        for name, result in zip(names, results, strict=True):
            print(_json({"prompt": name} | asdict(result)))
        return 0
    for name, result in list(zip(names, results, strict=True))[watched:]:
        print(clean_text(name + result.text))
    for result in results:
        written = int((result.step >= 0).sum())
        rate = written / max(result.forwards, 1)
        print(
            f"[{written} tokens, {result.forwards} forwards, {rate:.2f} tokens per forward, ended "
            f"by {result.finish}]",
            file=sys.stderr,
        )
    return 0


def _sample_file(args, loaded: bdjax.LanguageModel, questions: list, options: dict) -> int:
    """Answers to a file of prompts, each as soon as its rows are done."""
    options |= {"rows": args.rows, "template": args.chat_template, "max_new_tokens": args.tokens}
    found = bdjax.answer(loaded, questions, **options)
    bar = track(found, "sampling", len(questions), console=Console(stderr=True), transient=True)
    for question, result in zip(questions, bar, strict=True):
        text = clean_text((question if isinstance(question, str) else "") + result.text)
        print(_json({"prompt": question} | asdict(result)) if args.json else f"{text}\n")
    return 0


def show(view: Denoising, tokenizer, prompt: str, snapshot: bdjax.Snapshot) -> None:
    """Row 0 of a snapshot on a `Denoising` view: one piece per token, None for an open slot."""
    begin, limit = int(snapshot.prompt[0]), int(snapshot.limit[0])
    tokens, filled = snapshot.tokens[0, begin:limit], snapshot.filled[0, begin:limit]
    last = int(np.flatnonzero(filled)[-1]) + 1 if filled.any() else 0
    pieces = [
        tokenizer.decode([token]) if known else None
        for token, known in zip(tokens[:last], filled[:last], strict=True)
    ]
    view.update(prompt, pieces)


def _json(value) -> str:
    """One line of strict JSON: arrays are lists, and null stands for what is no finite number."""

    def plain(value):
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), allow_nan=False)


def _evaluate(args) -> int:
    loaded = _load(args)
    if args.files:
        documents = bdjax.TextFiles(paths=tuple(args.files)).documents()
    else:
        documents = loaded.config.documents()[1]
    found = bdjax.evaluate(
        loaded,
        documents,
        batches=args.batches,
        block_size=args.block_size,
        draws=args.draws,
        exact=args.exact,
        seed=args.seed,
    )
    print(_json(asdict(found)) if args.json else found)
    return 0


def _tokenizer(args) -> int:
    train, held_out = (
        bdjax.TextFiles(paths=tuple(args.files), first=first, last=last).documents()
        for first, last in ((0.0, 0.9), (0.9, 1.0))
    )
    made = bdjax.train_tokenizer(train, args.vocab_size, args.out)
    size = sum(len(document.data) for document in held_out)
    tokens = sum(made.encode(document.data).size for document in held_out)
    print(f"{made.vocab_size} ids in {made.path}")
    print(f"{size / tokens:.3f} bytes per token on {size} held-out bytes")
    print("in TrainConfig, and mask_id=tokenizer.mask_id in the recipe:")
    print(f"    tokenizer=bdjax.HuggingFaceTokenizer(path={made.path!r}, cut={made.cut!r})")
    return 0


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning is a sentence to the user; where in the code it arose is not."""
    print(f"bdjax: warning: {clean_text(str(message))}", file=sys.stderr)


# Errors of ours whose text says what to do, and those of what a command was given to read.
_TOLD = (bdjax.CheckpointError, bdjax.NonFiniteError, bdjax.PeerError)
_UNREADABLE = (bdjax.PretrainedError, bdjax.NoRunError, bdjax.ConversationError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Exit codes: 0 done, 1 a clear error, 2 bad usage, or a model or conversations that cannot be
    read, 130 interrupted.
    """
    parser = make_parser()
    # argparse takes overrides only right after the config file: those behind a flag come as rest.
    args, rest = parser.parse_known_args(argv)
    if rest and (
        args.command not in ("train", "plan") or any(word.startswith("-") for word in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    run = {
        "train": _train,
        "plan": _plan,
        "sample": _sample,
        "evaluate": _evaluate,
        "import": _import,
        "convert": _convert,
        "export": _export,
        "tokenizer": _tokenizer,
    }[args.command]
    try:
        with no_interrupt_lost(), warnings.catch_warnings():
            warnings.showwarning = _warn
            return run(args)
    except (ValueError, OSError, *_TOLD) as error:
        # The text may quote a checkpoint that somebody else wrote.
        print(f"bdjax: {clean_text(str(error))}", file=sys.stderr)
        return _leave(2 if isinstance(error, _UNREADABLE) else 1)
    except KeyboardInterrupt:
        print("bdjax: interrupted", file=sys.stderr)
        return _leave(130)


def _leave(code: int) -> int:
    """The exit code; one of several processes goes at once: at exit JAX waits for the others."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
