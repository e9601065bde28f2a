"""Text in, text out: prompts become requests, the sampler runs, results are cut and named."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bdjax import sharding
from bdjax.base import merged_model, restore_model, write_run
from bdjax.checkpoint import read_config
from bdjax.config import MeshConfig, TrainConfig, check_seed, config_from_json
from bdjax.hf_folder import is_pretrained
from bdjax.importing import config_of, parameters_of, read_pretrained
from bdjax.objective import Alignment
from bdjax.policies import Dynamic, Policy
from bdjax.sampler import UNLIMITED, Controls, Request, Sampler, State, advance, start
from bdjax.seeds import Purpose, key_for
from bdjax.stats import CANDIDATES
from bdjax.step import Model

# Cache lengths and prefills are rounded up to multiples of these, so that few programs compile.
_SLOTS, _PREFILL = 64, 32
# Outside, float32 divides logits to infinity, or a banned token's down to the others'.
_COLDEST, _HOTTEST = 1e-6, 1e6


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A trained model with everything needed to use it."""

    config: TrainConfig
    model: Model
    params: Any


def load(
    directory: str | Path,
    step: int | None = None,
    *,
    dtype: str | None = None,
    mesh: MeshConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """The model of a run's newest whole checkpoint, or of `step`, on the mesh of its config.

    Where that needs more devices than this machine has, on one: what a pod trained, a laptop
    samples. A folder of the Hugging Face hub is read as it is, see `import_model`. dtype: of
    arithmetic and parameters, None for what is stored. mesh: another one. progress: called with
    bytes read and bytes to read, of a Hugging Face folder.

    Raises CheckpointError for a missing, torn or foreign checkpoint, PretrainedError for a model
    folder that cannot be read.
    """
    if is_pretrained(directory):
        pretrained = read_pretrained(directory)
        config = config_of(pretrained, dtype=dtype, mesh=mesh or MeshConfig())
        with jax.set_mesh(config.mesh.build()):
            params = parameters_of(pretrained, config, dtype=dtype, progress=progress)
        return LanguageModel(config=config, model=config.build_model(), params=params)
    config = config_from_json(read_config(directory, step), directory)
    if mesh is not None or config.mesh.devices > jax.device_count():
        config = replace(config, mesh=mesh or MeshConfig())
    if dtype is not None:
        config = replace(config, model=replace(config.model, dtype=dtype))
    model = config.build_model()
    with jax.set_mesh(config.mesh.build()):
        params = restore_model(directory, model, step, dtype=dtype)
    return LanguageModel(config=config, model=model, params=params)


def merge(language_model: LanguageModel) -> LanguageModel:
    """The same network without LoRA: each pair added to its matrix in float32, then gone."""
    config = language_model.config
    with jax.set_mesh(config.mesh.build()):
        config, params = merged_model(config, language_model.params)
    return LanguageModel(config=config, model=config.build_model(), params=params)


def save(language_model: LanguageModel, directory: str | Path) -> None:
    """Writes a run that `load` reads and `TrainConfig.start_from` takes, with nothing to resume.

    Raises CheckpointError or ValueError when the folder holds a run.
    """
    with jax.set_mesh(language_model.config.mesh.build()):
        write_run(directory, language_model.config, language_model.params)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One written text. `text` and `tokens` follow the prompt; `tokens` includes a stop token.

    finish: "stop" or "length". Per token: `step` of its block at which it was filled (-1: given),
    entropy in nats, log-probabilities at temperature 1 and under the distribution drawn from.
    `start`: the first token's absolute position. forwards, commits: network calls used.
    """

    text: str
    tokens: Int[np.ndarray, "T"]
    finish: str
    start: int
    step: Int[np.ndarray, "T"]
    entropy: Float[np.ndarray, "T"]
    logprob_raw: Float[np.ndarray, "T"]
    logprob_drawn: Float[np.ndarray, "T"]
    forwards: int
    commits: int


class Snapshot(NamedTuple):
    """The rows between two forwards, on the host: what a watcher sees."""

    tokens: Int[np.ndarray, "N S"]
    filled: Bool[np.ndarray, "N S"]
    limit: Int[np.ndarray, "N"]
    prompt: Int[np.ndarray, "N"]


Prompt = str | Sequence[int | None]


def generate(
    language_model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    policy: Policy | None = None,
    block_size: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] | None = None,
    fused: bool | None = None,
    seed: int = 0,
    watch: Callable[[Snapshot], None] | None = None,
) -> list[Generation]:
    """Continues every prompt; prompts of different lengths share one batch.

    A prompt is text, or token ids in which None is a slot to fill: given tokens stay as they are,
    and a slot sees those of its own block and of everything before, never further right.
    max_new_tokens come after the prompt, none if 0 and it has slots to fill. max_length (default:
    the training rows' length) bounds prompt and text together. policy defaults
    to `Dynamic(threshold=0.9)`, stop to the tokens that end a text, fused to True where the model's
    alignment allows it. `watch` is called after every forward.

    Raises ValueError for a prompt that does not fit, holds the mask token, or ids outside the
    vocabulary, and for options out of range.
    """
    config = language_model.config
    size = config.block_size(block_size)
    _check_options(temperature, top_k, top_p, max_new_tokens)
    check_seed(seed)
    longest = config.data.row_length if max_length is None else max_length
    rows = prompt_ids(language_model, prompts, max_length)
    if not rows:
        return []
    shards = config.mesh.data * config.mesh.fsdp
    padded = -(-len(rows) // shards) * shards
    for number, row in enumerate(rows):
        if max_new_tokens == 0 and None not in row:
            raise ValueError(
                f"max_new_tokens=0 leaves nothing to write: prompt {number} has no slot to fill; "
                "type --tokens 128"
            )
    limits = [min(len(row) + max_new_tokens, longest) for row in rows]
    # A canvas longer than every text is cut: where the text is one block, nothing else changes.
    size = min(size, -(-max(limits) // _SLOTS) * _SLOTS)
    slots = -(-max(*limits, size) // _SLOTS) * _SLOTS
    request = _request(rows, limits, size, padded, slots)
    heads = [int(p) // size * size for p in request.prompt]
    prefill = min(-(-max(heads) // _PREFILL) * _PREFILL, slots)

    alignment = config.objective.alignment
    sampler = Sampler(
        model=language_model.model,
        process=config.objective.process,
        canvas=size,
        alignment=alignment,
        fused=alignment is not Alignment.SHIFTED_NOISY if fused is None else fused,
    )
    with jax.set_mesh(config.mesh.build()):
        on_rows = _per_row(padded)
        controls = Controls(
            policy=policy or Dynamic(threshold=0.9, steps=size),
            temperature=on_rows(temperature, np.float32),
            top_k=None if top_k is None else on_rows(top_k, np.int32),
            top_p=None if top_p is None else on_rows(top_p, np.float32),
            bias=None,
            stop=jnp.asarray(config.tokenizer.stop_ids if stop is None else stop, jnp.int32),
        )
        placed = jax.tree.map(_on_batch, request)
        key = key_for(jax.random.key(seed), Purpose.SAMPLING)
        first = start(sampler, language_model.params, placed, controls, key, prefill)
        for state in _run(sampler, language_model.params, first, watch is not None):
            if watch is not None:
                watch(_snapshot(state))
    ends = [int(x) for x in np.asarray(controls.stop)]
    return [_result(config, state, number, ends) for number in range(len(rows))]


def prompt_ids(
    language_model: LanguageModel, prompts: Sequence[Prompt], max_length: int | None = None
) -> list[list[int | None]]:
    """The ids of each prompt, with BOS where there has to be one; errors count prompts from 0.

    Raises ValueError as `generate` does for prompts and max_length.
    """
    config = language_model.config
    longest = config.data.row_length if max_length is None else max_length
    if longest < 2:
        raise ValueError(
            f"max_length={longest} has no room for BOS and a token; type --max-length "
            f"{config.data.row_length}"
        )
    if isinstance(prompts, str):
        raise ValueError("prompts is a text, and should be a list of them; type [prompt]")
    return [_prompt_ids(config, number, prompt, longest) for number, prompt in enumerate(prompts)]


def _run(sampler: Sampler, params, state: State, watched: bool) -> Iterator[State]:
    """States to look at: after every forward if watched, the last one alone otherwise."""
    if not watched:
        yield advance(sampler, params, state, UNLIMITED)
        return
    while not sharding.to_host(state.done).all():
        state = advance(sampler, params, state, 1)
        yield state


def _check_options(temperature, top_k, top_p, max_new_tokens) -> None:
    if temperature != 0 and not _COLDEST <= temperature <= _HOTTEST:
        raise ValueError(
            f"temperature={temperature} must be 0 (most probable) or from {_COLDEST:g} to "
            f"{_HOTTEST:g}; type --temperature 1"
        )
    if top_k is not None and not 1 <= top_k <= CANDIDATES:
        raise ValueError(f"top_k={top_k} must be from 1 to {CANDIDATES}; type --top-k 50")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; type --top-p 0.9")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative; type --tokens 128")


def _prompt_ids(config: TrainConfig, number: int, prompt: Prompt, longest: int) -> list[int | None]:
    """BOS, where the tokenizer starts with it or the prompt is empty, and the ids, checked."""
    tokenizer = config.tokenizer
    ids = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else list(prompt)
    for place, token in enumerate(ids):
        if token == tokenizer.mask_id:
            raise ValueError(
                f"prompt {number} holds the mask token {token} at place {place}; "
                "give None there to have it filled"
            )
        if token is not None and not 0 <= token < tokenizer.vocab_size:
            raise ValueError(
                f"prompt {number} holds {token} at place {place}; ids are 0 to "
                f"{tokenizer.vocab_size - 1}"
            )
    if not ids or (tokenizer.starts_with_bos and ids[0] != tokenizer.bos_id):
        ids = [tokenizer.bos_id, *ids]
    blanks = sum(token is None for token in ids)
    if len(ids) > longest or (len(ids) == longest and not blanks):
        raise ValueError(
            f"prompt {number} has {len(ids)} tokens with BOS, which leaves no room in max_length="
            f"{longest}; shorten it or type --max-length {2 * len(ids)}"
        )
    return ids


def _request(rows, limits, size: int, padded: int, slots: int) -> Request:
    """Host arrays; rows added for the mesh have nothing to do (prompt = limit = 0)."""
    events = np.zeros((padded, slots), np.int32)
    given = np.zeros((padded, slots), bool)
    prompt, limit = np.zeros((padded,), np.int32), np.zeros((padded,), np.int32)
    for number, row in enumerate(rows):
        known = np.array([token is not None for token in row])
        events[number, : len(row)] = [token or 0 for token in row]
        given[number, : len(row)] = known
        prompt[number] = len(row) if known.all() else int(known.argmin())
        limit[number] = limits[number]
    sizes = np.full((padded,), size, np.int32)
    return Request(events, given, prompt, limit, sizes, np.arange(padded, dtype=np.int32))


def _on_batch(x: np.ndarray):
    return sharding.reshard(jnp.asarray(x), "batch", *["length"] * (x.ndim - 1))


def _per_row(rows: int):
    return lambda value, dtype: _on_batch(np.full((rows,), value, dtype))


def _snapshot(state: State) -> Snapshot:
    fields = (state.events, state.filled, state.limit, state.prompt)
    return Snapshot(*(sharding.to_host(x) for x in fields))


def _result(config: TrainConfig, state: State, number: int, ends: list[int]) -> Generation:
    """The row from its prompt's end up to the first stop token or its limit."""

    def row(x):
        return sharding.to_host(x)[number]

    begin, limit = int(row(state.prompt)), int(row(state.limit))
    tokens = row(state.events)[begin:limit]
    stops = np.flatnonzero(np.isin(tokens, ends))
    length = int(stops[0]) + 1 if len(stops) else len(tokens)
    cut = slice(begin, begin + length)
    shown = tokens[: length - 1] if len(stops) else tokens
    return Generation(
        text=config.tokenizer.decode(shown),
        tokens=tokens[:length],
        finish="stop" if len(stops) else "length",
        start=begin,
        step=row(state.record.step)[cut],
        entropy=row(state.record.entropy)[cut],
        logprob_raw=row(state.record.logprob_raw)[cut],
        logprob_drawn=row(state.record.logprob_drawn)[cut],
        forwards=int(row(state.forwards)),
        commits=int(row(state.commits)),
    )
