"""Somebody else's model as ours: a `TrainConfig` out of its facts, and its parameters on a mesh.

pretrained = read_pretrained("Qwen3-0.6B")
config = config_of(pretrained)
with jax.set_mesh(config.mesh.build()):
    params = parameters_of(pretrained, config)
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from bdjax import dit, presets, weights
from bdjax.base import check_free, write_run
from bdjax.chat_template import TEMPLATE_NAME, ChatTemplate
from bdjax.config import EvaluationConfig, MeshConfig, TrainConfig
from bdjax.data import Tail
from bdjax.families import Decoding, Family, family_of
from bdjax.family_config import ConfigReader, decoder_config, rows_of
from bdjax.gguf_file import open_gguf
from bdjax.hf_folder import is_gguf, read_folder
from bdjax.hf_tokenizer import HuggingFaceTokenizer
from bdjax.objective import Alignment
from bdjax.presets import Recipe
from bdjax.pretrained import Pretrained, PretrainedError
from bdjax.sources import DataConfig
from bdjax.weights import Progress
from pallas_kernels import CleanMode

# Training rows of an imported model, unless it takes fewer: `bdjax evaluate` uses them.
_ROW = 2048
# The share of an embedding's rows that a tokenizer must name at least. Tables are padded to
# multiples of 64 to 512 rows; another model's tokenizer misses by far more.
_NAMED = 0.9
# What these read is one wrapped text, whatever documents it is made of.
_ALONG_ROWS = (Decoding.WHOLE, Decoding.WHOLE_SHIFTED, Decoding.WRAPPED_BLOCKS)
# Key of config.json in which an export says what transformers has no word for.
OWN_KEY = "block_diffusion"


def read_pretrained(path: str | Path) -> Pretrained:
    """The model at `path`, a folder of the Hugging Face hub or a GGUF file; only headers are read.

    Raises PretrainedError for what is neither.
    """
    path = Path(path)
    if is_gguf(path):
        return open_gguf(path)
    if not path.is_dir():
        raise PretrainedError(
            f"{path} is no folder; type the folder that has the config.json, or a .gguf file"
        )
    return read_folder(path)


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What a model has to be sampled with."""

    mask_id: int | None
    block_size: int
    decoding: Decoding
    clean: CleanMode
    alignment: Alignment


def config_of(
    pretrained: Pretrained, *, dtype: str | None = None, mesh: MeshConfig = MeshConfig()
) -> TrainConfig:
    """The run that this model would be step 0 of: its network, tokenizer and way of writing.

    dtype: of the arithmetic, None for that of the files. An AR model has blocks of one token, each
    read from the clean token before it, and a mask beyond its ids that nothing is read from.

    Raises PretrainedError for a config, tokenizer or special id that does not fit.
    """
    family = family_of(pretrained.config.get("model_type"), pretrained.where)
    rows = rows_of(pretrained, family)
    facts = _facts(pretrained, family)
    read = ConfigReader(pretrained, family)
    longest = read.integer("max_position_embeddings", _ROW)
    row = min(longest, _ROW)
    if facts.block_size > row:
        raise read.fail(family.block_key, f"blocks of at most {row} tokens")
    row -= row % max(facts.block_size, 1) if facts.block_size else 0
    decoder = replace(decoder_config(pretrained, family, dtype), clean=facts.clean)
    try:
        tokenizer = _tokenizer(pretrained, family, rows, facts.mask_id)
        recipe = _recipe(facts, tokenizer.mask_id, row)
        return TrainConfig(
            name=Path(pretrained.where).name or "imported",
            steps=1,
            model=decoder,
            objective=recipe.objective,
            data=DataConfig(
                row_length=row,
                batch_size=mesh.data * mesh.fsdp,
                aligned=facts.decoding not in _ALONG_ROWS,
                tail=Tail.SHORT if facts.decoding is Decoding.SEEDED_BLOCKS else Tail.FILL,
            ),
            mesh=mesh,
            evaluation=EvaluationConfig(every=0),
            tokenizer=tokenizer,
            chat_template=_template(pretrained),
        )
    except PretrainedError:
        raise
    except ValueError as error:
        raise PretrainedError(f"{pretrained.where} cannot be imported: {error}") from error


def parameters_of(
    pretrained: Pretrained,
    config: TrainConfig,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Any:
    """The parameters, in the shards of the mesh in force; every device's bytes are read once.

    config: from `config_of`. dtype: of the parameters, None for that of the files; training wants
    "float32". progress: called with bytes done and bytes to do.

    Raises PretrainedError naming all missing, unused and wrong tensors together.
    """
    family = family_of(pretrained.config.get("model_type"), pretrained.where)
    table, rows = config.build_model().table(), rows_of(pretrained, family)
    if family.modulated:
        pretrained = dit.folded(pretrained, family, config.model, rows)
    wanted = weights.stored(family, table, rows)
    weights.check_tensors(pretrained, family, wanted)
    return weights.load_parameters(pretrained, wanted, dtype, progress)


def import_model(
    path: str | Path,
    run: str | Path,
    *,
    dtype: str | None = None,
    mesh: MeshConfig = MeshConfig(),
    progress: Progress | None = None,
) -> TrainConfig:
    """The model at `path` as step 0 of a new run, which needs the folder no more.

    dtype: of arithmetic and parameters, None for that of the files. A run that cannot be finished
    is taken away again. Raises PretrainedError for a model that cannot be read, CheckpointError
    where `run` has checkpoints already or the disk is full.
    """
    check_free(run)
    pretrained = read_pretrained(path)
    config = config_of(pretrained, dtype=dtype, mesh=mesh)
    with jax.set_mesh(mesh.build()):
        params = parameters_of(pretrained, config, dtype=dtype, progress=progress)
        write_run(run, config, params)
    return config


def _facts(pretrained: Pretrained, family: Family) -> _Facts:
    """By family, unless an export of ours says otherwise."""
    config = pretrained.config
    read = ConfigReader(pretrained, family)
    decoding, mask_id = family.decoding, family.mask_id
    if mask_id is not None and config.get("mask_token_id") is not None:
        mask_id = config["mask_token_id"]
    elif family.modulated and rows_of(pretrained, family) != mask_id + 1:
        # The mask is the id after a tokenizer's own, or a token of it that has that name.
        raise read.fail("mask_token_id", f"the number of the mask there unless it is {mask_id}")
    size = 1 if decoding is Decoding.TOKENS else 0
    if decoding not in (Decoding.TOKENS, Decoding.WHOLE, Decoding.WHOLE_SHIFTED):
        size = read.integer(family.block_key, family.block_size)
    if decoding is Decoding.WRAPPED_BLOCKS and size == read.integer("max_position_embeddings"):
        decoding, size = Decoding.WHOLE, 0
    alignment = {
        Decoding.TOKENS: Alignment.SHIFTED_CLEAN,
        Decoding.SEEDED_BLOCKS: Alignment.SHIFTED_NOISY,
        Decoding.WHOLE_SHIFTED: Alignment.SHIFTED_NOISY,
    }.get(decoding, Alignment.SAME_POSITION)
    clean = CleanMode.TOKEN if decoding is Decoding.TOKENS else CleanMode.BLOCK
    own = config.get(OWN_KEY)
    if own is not None:
        try:
            decoding, mask_id = Decoding(own["decoding"]), own["mask_token_id"]
            clean, alignment = CleanMode(own["clean"]), Alignment(own["alignment"])
            size = own["block_size"]
            if type(size) is not int or size < 0:
                raise ValueError(f"block_size={size}")
        except (ValueError, TypeError, KeyError) as error:
            expected = "decoding, mask_token_id, block_size, clean and alignment there"
            raise read.fail(OWN_KEY, expected) from error
    if mask_id is not None and (type(mask_id) is not int or mask_id < 0):
        raise read.fail("mask_token_id", "the number of the mask token there")
    return _Facts(
        mask_id=mask_id, block_size=size, decoding=decoding, clean=clean, alignment=alignment
    )


def _recipe(facts: _Facts, mask_id: int, row: int) -> Recipe:
    """The preset nearest to how the family was trained, with the model's own block size."""
    if facts.decoding is Decoding.TOKENS and facts.mask_id is None:
        return presets.ar(mask_id=mask_id)
    if facts.decoding in (Decoding.WHOLE, Decoding.WHOLE_SHIFTED):
        recipe = presets.mdlm(mask_id=mask_id, row_length=row)
    elif facts.decoding is Decoding.SEEDED_BLOCKS:
        recipe = presets.fast_dllm_v2(mask_id=mask_id, block_size=facts.block_size)
    elif facts.decoding is Decoding.WRAPPED_BLOCKS:
        recipe = presets.bd3lm(mask_id=mask_id, block_size=facts.block_size)
    elif facts.decoding is Decoding.BLOCKS:
        recipe = presets.sdar(mask_id=mask_id, block_size=facts.block_size)
    else:
        recipe = presets.default(mask_id=mask_id, block_size=facts.block_size)
    return Recipe(replace(recipe.objective, alignment=facts.alignment), facts.clean)


def _template(pretrained: Pretrained) -> ChatTemplate | None:
    """The model's own, if it has one."""
    if pretrained.chat_template is None:
        return None
    path = Path(pretrained.where) / TEMPLATE_NAME
    return ChatTemplate(path=str(path), source=pretrained.chat_template)


def _tokenizer(
    pretrained: Pretrained, family: Family, rows: int, mask_id: int | None
) -> HuggingFaceTokenizer:
    where = pretrained.where
    if pretrained.tokenizer_json is None:
        source = family.tokenizer or where
        raise PretrainedError(
            f"{where} has no tokenizer.json; write it with transformers: "
            f"AutoTokenizer.from_pretrained({source!r}).save_pretrained({where!r})"
        )
    ends = _ids(pretrained, "eos", rows)
    if not ends:
        raise PretrainedError(
            f"{where} names no end-of-sequence token; type eos_token_id in its config.json"
        )
    begins = _ids(pretrained, "bos", rows) or ends
    found = HuggingFaceTokenizer(
        path=_tokenizer_path(pretrained),
        text=pretrained.tokenizer_json,
        bos=begins[0],
        eos=ends[0],
        # An AR model has no use for a mask: its own is no row of the embedding, so that banning it
        # takes no probability away.
        mask=rows if mask_id is None else mask_id,
        stops=tuple(ends[1:]),
        size=rows,
        draws_specials=True,
    )
    if mask_id is not None and mask_id >= rows:
        raise PretrainedError(
            f"{where} has mask token {mask_id} and an embedding of {rows} rows; type the right "
            "mask_token_id in its config.json"
        )
    named = found.file_size
    if not _NAMED * rows <= named <= rows:
        raise PretrainedError(
            f"{where} has a tokenizer.json of {named} ids and an embedding of {rows} rows; use the "
            "tokenizer.json that belongs to the model"
        )
    return replace(found, leads=family.leads or found.adds_bos())


def _tokenizer_path(pretrained: Pretrained) -> str:
    """For messages: the text was read already, and may come out of another file."""
    return str(Path(pretrained.where) / "tokenizer.json")


def _ids(pretrained: Pretrained, name: str, rows: int) -> list[int]:
    """The ids of BOS or EOS: config.json's first, then generation_config.json's, each once.

    Where both are silent, the token that tokenizer_config.json spells out.
    """
    key = f"{name}_token_id"
    found: list[int] = []
    for source in (pretrained.config, pretrained.generation):
        value = source.get(key)
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            if type(one) is not int or not 0 <= one < rows:
                raise PretrainedError(
                    f"{pretrained.where} has {key}={str(value)[:80]}; expected ids from 0 to "
                    f"{rows - 1} in config.json and generation_config.json"
                )
            found += [one] if one not in found else []
    spelled = pretrained.tokenizer_config.get(f"{name}_token")
    spelled = spelled.get("content") if isinstance(spelled, dict) else spelled
    if not found and isinstance(spelled, str) and pretrained.tokenizer_json is not None:
        reader = HuggingFaceTokenizer(
            path=_tokenizer_path(pretrained),
            text=pretrained.tokenizer_json,
            bos=spelled,
            eos=spelled,
            mask=rows,
        )
        found.append(reader.eos_id)
    return found
