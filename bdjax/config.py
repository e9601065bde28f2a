"""What a run is: frozen objects composed in a Python file, checked when they are built."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from bdjax import noise, objective
from bdjax.chat import encode_conversations
from bdjax.chat_template import TEMPLATE_NAME, ChatTemplate
from bdjax.corpus import Document
from bdjax.data import PackingConfig
from bdjax.embedding import TokenEmbedding
from bdjax.hf_tokenizer import FILE_NAME, HuggingFaceTokenizer
from bdjax.learning_rate import CosineDecay, StableDecay
from bdjax.lora import LoraConfig
from bdjax.model import DecoderConfig, Llama3Scaling
from bdjax.objective import Objective
from bdjax.optim import OptimConfig
from bdjax.overrides import from_json
from bdjax.readout import TokenReadout
from bdjax.sharding import make_mesh
from bdjax.sources import (
    ChatLines,
    DataConfig,
    JsonLines,
    Mixture,
    Parquet,
    StandardLibrary,
    Sums,
    TextFiles,
    Weighted,
)
from bdjax.step import Model
from bdjax.tokenizer import ByteTokenizer, Tokenizer
from bdjax.watchdog import WatchdogConfig
from pallas_kernels import Blockwise, Cudnn, Dense, Hopper, Mosaic

# Padding the vocabulary to a multiple of this keeps the head divisible over a tensor axis.
_VOCAB_MULTIPLE = 8


def check_seed(seed: int) -> None:
    """Refuses what is no 32-bit seed: JAX would cut it to one without a word."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 to {2**32 - 1}; type seed=0")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices split the batch (data), batch and weights (fsdp), heads and mlp (tensor).

    With several processes: one that sends no sign of life for `heartbeat_seconds` ends the others.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    heartbeat_seconds: float = 100.0

    def __post_init__(self):
        if not self.heartbeat_seconds >= 1:
            raise ValueError(
                f"mesh.heartbeat_seconds={self.heartbeat_seconds} must be at least 1; type "
                "mesh.heartbeat_seconds=100"
            )
        for name in ("data", "fsdp", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"mesh.{name}={getattr(self, name)} must be at least 1; type mesh.{name}=1"
                )

    @property
    def devices(self) -> int:
        """How many devices the mesh takes."""
        return self.data * self.fsdp * self.tensor

    def build(self) -> jax.sharding.Mesh:
        """The explicit mesh.

        ValueError for too few devices, and with several processes for too many.
        """
        if jax.process_count() > 1 and self.devices != jax.device_count():
            raise ValueError(
                f"the mesh takes {self.devices} devices and the {jax.process_count()} processes "
                f"have {jax.device_count()}; type mesh.data={jax.device_count()} mesh.fsdp=1 "
                "mesh.tensor=1"
            )
        return make_mesh(data=self.data, fsdp=self.fsdp, tensor=self.tensor)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Every `every` steps (0: never): the bound on `batches` held-out batches, and a sample."""

    every: int = 500
    batches: int = 8
    prompt: str = ""
    tokens: int = 128

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(
                f"evaluation.every={self.every} must not be negative; type evaluation.every=0 "
                "for no evaluation"
            )
        for name, example in (("batches", 8), ("tokens", 128)):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"evaluation.{name}={getattr(self, name)} must be at least 1; type "
                    f"evaluation.{name}={example}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. Build it in `get_config()` of a Python file; `bdjax train FILE key=value`.

    The newest `keep_checkpoints` stay, and every one at a multiple of `keep_every` steps (0: none).
    `chat_template`: how messages become text, for `ChatLines` and `bdjax sample --chat`.
    `start_from`: the folder of a run whose parameters this one begins with, nothing else of it.
    """

    name: str
    steps: int
    model: DecoderConfig
    objective: Objective
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int = 0
    watchdog: WatchdogConfig = WatchdogConfig()
    seed: int = 0
    tokenizer: Tokenizer = ByteTokenizer()
    chat_template: ChatTemplate | None = None
    start_from: str | None = None

    def __post_init__(self):
        if self.keep_every < 0:
            raise ValueError(
                f"keep_every={self.keep_every} must not be negative; type keep_every=0 to keep the "
                "newest checkpoints alone"
            )
        for name, example in (("steps", 1000), ("checkpoint_every", 1000), ("keep_checkpoints", 2)):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1; type {name}={example}"
                )
        check_seed(self.seed)
        if self.data.chats and self.chat_template is None:
            raise ValueError(
                "data has conversations (ChatLines) and the run has no chat template; type "
                "chat_template=ChatTemplate chat_template.path= of a Jinja file, such as a "
                "model's chat_template.jinja"
            )
        if self.model.lora is not None and self.start_from is None:
            raise ValueError(
                "model.lora trains pairs beside frozen matrices, and nothing says which; type "
                "start_from= the folder of a run"
            )
        self.objective.check(self.model.clean)
        largest = self.objective.block_size.largest
        if largest > self.data.row_length:
            raise ValueError(
                f"objective.block_size of {largest} is longer than data.row_length="
                f"{self.data.row_length}; type data.row_length={largest}"
            )
        if self.data.aligned and self.data.row_length % largest:
            raise ValueError(
                f"data.row_length={self.data.row_length} is not a multiple of "
                f"objective.block_size of {largest}; type data.row_length="
                f"{-(-self.data.row_length // largest) * largest}, or data.aligned=false"
            )
        uneven = [x for x in self.objective.block_size.sizes if largest % x]
        if self.data.aligned and uneven:
            raise ValueError(
                f"objective.block_size of {uneven[0]} does not divide the largest of {largest}, to "
                "which documents are aligned; type data.aligned=false, or block sizes that do"
            )
        prompt = len(self.tokenizer.encode(self.evaluation.prompt)) + 1
        if self.evaluation.every and prompt >= self.data.row_length:
            raise ValueError(
                f"evaluation.prompt has {prompt} tokens with BOS, which leaves no room in "
                f"data.row_length={self.data.row_length}; type a shorter evaluation.prompt"
            )
        mask_id = getattr(self.objective.process, "mask_id", None)
        if mask_id != self.tokenizer.mask_id:
            raise ValueError(
                f"objective.process.mask_id={mask_id} is not the tokenizer's mask token; "
                f"type objective.process.mask_id={self.tokenizer.mask_id}"
            )
        shards = self.mesh.data * self.mesh.fsdp * self.optim.accumulate
        if self.data.batch_size % shards:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} cannot be split over mesh.data x "
                f"mesh.fsdp x optim.accumulate = {shards} equal parts; type data.batch_size="
                f"{-(-self.data.batch_size // shards) * shards}"
            )
        sizes = {
            "model.num_heads": (self.model.num_heads, self.mesh.tensor),
            "model.num_kv_heads": (self.model.num_kv_heads, self.mesh.tensor),
            "model.mlp_width": (self.model.mlp_width, self.mesh.tensor),
            "model.width": (self.model.width, self.mesh.fsdp),
            "the padded vocabulary": (self.vocab_size, self.mesh.tensor),
        }
        for name, (size, parts) in sizes.items():
            if size % parts:
                raise ValueError(
                    f"{name} of {size} cannot be split over {parts} devices; choose mesh.tensor "
                    "and mesh.fsdp that divide it"
                )

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the tokenizer's ids, padded."""
        return -(-self.tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

    def block_size(self, asked: int | None = None) -> int:
        """The block size to sample or evaluate with: `asked`, or the largest of the training.

        Raises ValueError for one that no training row could hold, and for more than one token of a
        model that has never seen a mask.
        """
        trained = self.objective.block_size.largest
        size = trained if asked is None else asked
        if not 1 <= size <= self.data.row_length:
            raise ValueError(
                f"block_size={size} must be from 1 to {self.data.row_length}, the length of the "
                f"training rows; type --block-size {trained}"
            )
        if size > trained and not self.objective.views:
            raise ValueError(
                f"block_size={size}: {self.name} writes token by token and was never trained to "
                "fill in a mask; type --block-size 1, or bdjax convert and train"
            )
        return size

    def packing(self) -> PackingConfig:
        """How documents share rows."""
        align = self.objective.block_size.largest if self.data.aligned else 1
        return PackingConfig(
            row_length=self.data.row_length,
            align=align,
            tail=self.data.tail,
            move_cuts=self.data.move_cuts,
        )

    def keep(self, folder: Path, write: bool) -> "TrainConfig":
        """This config with what its files hold pinned; if `write`, they are copied into `folder`.

        Raises ValueError when the folder has other files of another run.
        """
        template = self.chat_template
        return replace(
            self,
            tokenizer=self.tokenizer.keep(folder, write),
            chat_template=None if template is None else template.keep(folder, write),
        )

    def documents(self) -> tuple[list[Document], list[Document]]:
        """Training and held-out documents; a conversation became one document per answer.

        Warns of answers that fit no row, which are left out.
        """
        sides = self.data.documents()
        if self.chat_template is None or not self.data.chats:
            return sides
        length = self.data.row_length
        train, held_out = (
            encode_conversations(side, self.chat_template, self.tokenizer, length) for side in sides
        )
        return train, held_out

    def build_model(self) -> Model:
        """The network with embedding and readout, which never draws what the tokenizer bans."""
        unused = range(self.tokenizer.vocab_size, self.vocab_size)
        banned = (*self.tokenizer.banned_ids(), *unused)
        c = self.model
        return Model(
            decoder=c,
            embedding=TokenEmbedding(vocab_size=self.vocab_size, width=c.width, dtype=c.dtype),
            readout=TokenReadout(
                vocab_size=self.vocab_size,
                width=c.width,
                tied=c.tied_head,
                bias=c.head_bias,
                banned=banned,
            ),
        )


_CLASSES = (
    TrainConfig,
    DecoderConfig,
    Llama3Scaling,
    LoraConfig,
    Dense,
    Blockwise,
    Cudnn,
    Hopper,
    Mosaic,
    Objective,
    objective.BlockSize,
    objective.BlockStages,
    objective.Ramp,
    noise.Absorbing,
    noise.ExactCount,
    noise.Bernoulli,
    noise.Complement,
    noise.Bound,
    noise.Realised,
    noise.Flat,
    noise.Cart,
    noise.Uniform,
    noise.Beta,
    noise.Linear,
    noise.Cosine,
    noise.Polynomial,
    noise.LogLinear,
    noise.Rescaled,
    noise.Discrete,
    DataConfig,
    StandardLibrary,
    Sums,
    TextFiles,
    JsonLines,
    ChatLines,
    Parquet,
    Mixture,
    Weighted,
    OptimConfig,
    StableDecay,
    CosineDecay,
    MeshConfig,
    EvaluationConfig,
    ByteTokenizer,
    HuggingFaceTokenizer,
    ChatTemplate,
    WatchdogConfig,
)


def config_from_json(text: str, directory: str | Path | None = None) -> TrainConfig:
    """The config stored in a checkpoint, rebuilt from its own classes and nothing else.

    directory: the run, its `checkpoints` or one of them; the run's own tokenizer.json and
    chat_template.jinja are then read in place of those that they were copied from. Raises
    ValueError when the text is not such a config, or such a file another than the config names.
    """
    if directory is not None:
        text = _with_own_files(text, Path(directory).absolute())
    config = from_json(text, {cls.__name__: cls for cls in _CLASSES})
    if not isinstance(config, TrainConfig):
        raise ValueError(f"expected a TrainConfig, got a {type(config).__name__}")
    return config


def _with_own_files(text: str, directory: Path) -> str:
    """The config's text with the paths of the files that the run keeps, where it has them."""
    folders = (directory, *directory.parents[:2])
    try:
        found = json.loads(text)
        # A template that somebody laid beside the tokenizer is the model's, too.
        owners = {
            "tokenizer": (FILE_NAME, HuggingFaceTokenizer, found["tokenizer"]),
            "chat_template": (
                TEMPLATE_NAME,
                ChatTemplate,
                found.get("chat_template") or {"type": ChatTemplate.__name__},
            ),
        }
        for key, (name, kind, owner) in owners.items():
            copies = [folder / name for folder in folders]
            copy = next((copy for copy in copies if copy.is_file()), None)
            if copy is not None and owner["type"] == kind.__name__:
                found[key] = owner | {"path": str(copy)}
    except (ValueError, TypeError, KeyError, AttributeError):
        return text  # older than the fields, or nothing that `from_json` reads
    return json.dumps(found)
