"""bdjax: block-diffusion language models in JAX; one mask predicate, one step."""

from bdjax.asking import answer, converse, read_questions
from bdjax.base import start_config
from bdjax.chat_template import ChatTemplate
from bdjax.checkpoint import CheckpointError
from bdjax.config import (
    EvaluationConfig,
    MeshConfig,
    TrainConfig,
)
from bdjax.converting import conversion_config, convert_model
from bdjax.distributed import PeerError, start_processes
from bdjax.exporting import export_model
from bdjax.generation import Generation, LanguageModel, Snapshot, generate, load, merge, save
from bdjax.hf_tokenizer import HuggingFaceTokenizer, train_tokenizer
from bdjax.importing import import_model
from bdjax.learning_rate import CosineDecay, StableDecay
from bdjax.likelihood import EXACT_UP_TO, Evaluation
from bdjax.lora import LoraConfig
from bdjax.manifest import NoRunError
from bdjax.messages import ConversationError
from bdjax.model import DecoderConfig, Remat
from bdjax.objective import Alignment, BlockSize, Objective
from bdjax.optim import OptimConfig
from bdjax.overrides import apply_overrides, load_config, to_text
from bdjax.plan import Plan, make_plan
from bdjax.policies import (
    Dynamic,
    EntropyBounded,
    EntropyForm,
    Policy,
    RandomOne,
    Sequential,
    Static,
    Threshold,
)
from bdjax.pretrained import PretrainedError
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
from bdjax.tokenizer import ByteTokenizer, Tokenizer
from bdjax.train_step import NonFiniteError
from bdjax.trainer import TrainResult, train
from bdjax.trainer import evaluate_model as evaluate

__version__ = "0.1.0"

__all__ = [
    "EXACT_UP_TO",
    "Alignment",
    "BlockSize",
    "ByteTokenizer",
    "ChatLines",
    "ChatTemplate",
    "CheckpointError",
    "ConversationError",
    "CosineDecay",
    "DataConfig",
    "DecoderConfig",
    "Dynamic",
    "EntropyBounded",
    "EntropyForm",
    "Evaluation",
    "EvaluationConfig",
    "Generation",
    "HuggingFaceTokenizer",
    "JsonLines",
    "LanguageModel",
    "LoraConfig",
    "MeshConfig",
    "NoRunError",
    "NonFiniteError",
    "Mixture",
    "Objective",
    "OptimConfig",
    "Plan",
    "Parquet",
    "PeerError",
    "PretrainedError",
    "Policy",
    "RandomOne",
    "Remat",
    "Sequential",
    "Snapshot",
    "StableDecay",
    "StandardLibrary",
    "Static",
    "Sums",
    "TextFiles",
    "Threshold",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "Weighted",
    "answer",
    "apply_overrides",
    "converse",
    "conversion_config",
    "convert_model",
    "evaluate",
    "export_model",
    "generate",
    "import_model",
    "load",
    "load_config",
    "make_plan",
    "merge",
    "read_questions",
    "save",
    "start_config",
    "start_processes",
    "to_text",
    "train",
    "train_tokenizer",
]
