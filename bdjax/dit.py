"""A diffusion transformer's tensors (BD3-LM, MDLM) as those of a plain pre-norm transformer.

Its layers are modulated by the noise level, at which these models always read zero: the modulation
is a constant of the checkpoint. It goes into the weights, by rows of the files' matrices:

    c = silu(sigma_map(0)),  shift, scale, gate = adaLN_modulation(c)
    norm(x) w (1 + scale) + shift      a LayerNorm of weight w (1 + scale) and bias shift
    gate (W y + b)                     a linear layer of weight gate W and bias gate b

Equal up to the rounding of each new weight to float32 (Peebles & Xie 2023 for the modulation).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from bdjax.families import Family
from bdjax.family_config import ConfigReader
from bdjax.model import DecoderConfig
from bdjax.pretrained import Pretrained, Tensors
from bdjax.weights import check_shapes

# Sinusoids of the noise level: cosines, one each at level zero, then as many sines, zero.
_FREQUENCIES = 256
_MODULATION = "adaLN_modulation"
# The modulation's parts in their order, of a layer and of the output layer.
_LAYER = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
_OUTPUT = ("shift", "scale")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A tensor of the plain network: rows of a file's tensor from `first` on, times `factor` of the
    modulation `of` that layer (plus `one`); the factor alone without a source."""

    shape: tuple[int, ...]
    source: str | None = None
    first: int = 0
    of: str | None = None
    factor: int = 0
    one: float = 0.0


def folded(pretrained: Pretrained, family: Family, config: DecoderConfig, rows: int) -> Pretrained:
    """The same model with the tensors of the family's table, (rows, ...) of the vocabulary.

    They are made when they are read, in float32. Raises PretrainedError for a wrong cond_dim, and
    for all of the files' tensors that are missing, unused or of another shape.
    """
    shapes = pretrained.tensors.shapes
    prefix = "backbone." if any(name.startswith("backbone.") for name in shapes) else ""
    cond = ConfigReader(pretrained, family).integer("cond_dim")
    expected = {prefix + n: s for n, s in _file_shapes(config, rows, cond).items()}
    # The band of noise levels that training drew from: no part of the network.
    spare = frozenset(("sampling_eps_min", "sampling_eps_max"))
    check_shapes(pretrained, family, expected, spare)
    return replace(pretrained, tensors=_Folded(pretrained.tensors, prefix, _parts(config, rows)))


def _file_shapes(config: DecoderConfig, rows: int, cond: int) -> dict[str, tuple[int, ...]]:
    """What a checkpoint holds."""
    d, f = config.width, config.mlp_width
    layer: Mapping[str, tuple[int, ...]] = {
        "norm1.weight": (d,),
        "attn_qkv.weight": (3 * d, d),
        "attn_out.weight": (d, d),
        "norm2.weight": (d,),
        "mlp.0.weight": (f, d),
        "mlp.0.bias": (f,),
        "mlp.2.weight": (d, f),
        "mlp.2.bias": (d,),
        f"{_MODULATION}.weight": (len(_LAYER) * d, cond),
        f"{_MODULATION}.bias": (len(_LAYER) * d,),
    }
    found: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (rows, d),
        "sigma_map.mlp.0.weight": (cond, _FREQUENCIES),
        "sigma_map.mlp.0.bias": (cond,),
        "sigma_map.mlp.2.weight": (cond, cond),
        "sigma_map.mlp.2.bias": (cond,),
        "output_layer.norm_final.weight": (d,),
        "output_layer.linear.weight": (rows, d),
        "output_layer.linear.bias": (rows,),
        f"output_layer.{_MODULATION}.weight": (len(_OUTPUT) * d, cond),
        f"output_layer.{_MODULATION}.bias": (len(_OUTPUT) * d,),
    }
    for number in range(config.num_layers):
        found |= {f"blocks.{number}.{name}": shape for name, shape in layer.items()}
    return found


def _parts(config: DecoderConfig, rows: int) -> dict[str, _Part]:
    """What the plain network holds, by the names of `families`."""
    d, f = config.width, config.mlp_width

    def norm(layer: str, name: str, parts: tuple[str, ...], number: str) -> dict[str, _Part]:
        shift, scale = (parts.index(part + number) for part in ("shift", "scale"))
        weight = f"{layer}.{name}.weight"
        return {
            weight: _Part(shape=(d,), source=weight, of=layer, factor=scale, one=1.0),
            f"{layer}.{name}.bias": _Part(shape=(d,), of=layer, factor=shift),
        }

    def plain(name: str, *shape: int) -> dict[str, _Part]:
        return {name: _Part(shape=shape, source=name)}

    def gated(layer: str, name: str, number: str, *shape: int) -> dict[str, _Part]:
        gate, source = _LAYER.index("gate" + number), f"{layer}.{name}"
        return {source: _Part(shape=shape, source=source, of=layer, factor=gate)}

    found = plain("vocab_embed.embedding", rows, d)
    found |= norm("output_layer", "norm_final", _OUTPUT, "")
    found |= plain("output_layer.linear.weight", rows, d)
    found |= plain("output_layer.linear.bias", rows)
    for number in range(config.num_layers):
        layer = f"blocks.{number}"
        found |= norm(layer, "norm1", _LAYER, "1") | norm(layer, "norm2", _LAYER, "2")
        for third, name in enumerate("qkv"):
            source = f"{layer}.attn_qkv.weight"
            part = _Part(shape=(d, d), source=source, first=third * d)
            found[f"{layer}.attn_{name}.weight"] = part
        found |= gated(layer, "attn_out.weight", "1", d, d)
        found |= plain(f"{layer}.mlp.0.weight", f, d) | plain(f"{layer}.mlp.0.bias", f)
        found |= gated(layer, "mlp.2.weight", "2", d, f) | gated(layer, "mlp.2.bias", "2", d)
    return found


class _Folded:
    """`Tensors` of the plain network over those of the files."""

    def __init__(self, tensors: Tensors, prefix: str, parts: Mapping[str, _Part]):
        self._tensors, self._prefix, self._parts = tensors, prefix, parts

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self._parts.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return dict.fromkeys(self._parts, "float32")

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part, (own, *others) = self._parts[name], index
        value = None
        if part.source is not None:
            moved = slice(own.start + part.first, own.stop + part.first)
            value = self._tensors.read(self._prefix + part.source, (moved, *others))
        if part.of is None:
            return value.astype(np.float32)
        begin = part.factor * part.shape[0]
        rows = slice(own.start + begin, own.stop + begin)
        factor = part.one + self._linear(f"{part.of}.{_MODULATION}", self._level, rows)
        if value is None:
            return factor.astype(np.float32)
        factor = factor.reshape(-1, *(1,) * (value.ndim - 1))
        return (factor * value.astype(np.float64)).astype(np.float32)

    @cached_property
    def _level(self) -> np.ndarray:
        """silu(sigma_map(0)), in float64."""
        waves = np.repeat((1.0, 0.0), _FREQUENCIES // 2)
        hidden = _silu(self._linear("sigma_map.mlp.0", waves))
        return _silu(self._linear("sigma_map.mlp.2", hidden))

    def _linear(self, name: str, x: np.ndarray, rows: slice | None = None) -> np.ndarray:
        """`rows` of the linear layer's output, None for all, in float64."""
        shapes, name = self._tensors.shapes, self._prefix + name
        size = shapes[f"{name}.bias"][0]
        rows = slice(0, size) if rows is None else rows
        weight = self._tensors.read(f"{name}.weight", (rows, slice(0, len(x))))
        bias = self._tensors.read(f"{name}.bias", (rows,))
        return weight.astype(np.float64) @ x + bias.astype(np.float64)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
