"""Somebody else's model as read from its files: what every importer produces and builds from.

Names, shapes and configuration keys are those of the Hugging Face library `transformers`, whatever
the files were; matrices are [out, in]. Nothing here, and nothing read, is executed.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np


class PretrainedError(ValueError):
    """Files of a model that cannot be read, or not exactly; the text says which and what to do."""


@runtime_checkable
class Tensors(Protocol):
    """The arrays of a model's files by their names, read slice by slice."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        ...

    @property
    def dtypes(self) -> dict[str, str]:
        """What `read` returns of every tensor: "float32", "bfloat16" or "float16"."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One box of a tensor; one slice per axis, step 1. Other bytes are not read where the
        format allows that.

        Raises PretrainedError for bytes that are not there.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model as its author stored it.

    config: contents of config.json; `model_type` names the family. generation: those of
    generation_config.json, {} without one. tokenizer_json: the text of tokenizer.json, not its
    path. chat_template: the Jinja source, not run. where: the folder or file, for messages.
    """

    config: dict[str, Any] = field(repr=False)
    tensors: Tensors = field(repr=False)
    where: str
    generation: dict[str, Any] = field(default_factory=dict, repr=False)
    tokenizer_json: str | None = field(default=None, repr=False)
    tokenizer_config: dict[str, Any] = field(default_factory=dict, repr=False)
    chat_template: str | None = field(default=None, repr=False)
