"""A dense decoder by configuration: Llama, Qwen2/2.5, Qwen3 and DiT, as a thin Linen shell.

Pre-norm residual layers of grouped-query attention with RoPE and an MLP. Float32 masters, computed
in `dtype`; norms, RoPE and softmax in float32. Parameters are the plain dict of `table`.
"""

from dataclasses import dataclass
from enum import Enum

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from bdjax.attention import Implementation, Prefix, attend
from bdjax.cache import Cache, KeyValues
from bdjax.lora import LoraConfig, low_rank, pair_names, with_pairs
from bdjax.parameters import Parameter, Role, Table
from bdjax.sharding import reshard, spec
from bdjax.unstacking import unstacked
from pallas_kernels import KEPT, CleanMode, Intervals


class Remat(Enum):
    """What the backward pass keeps of a layer."""

    NONE = "none"  # everything
    DOTS = "dots"  # matrix products and the attention kernel's results
    FULL = "full"  # the layer's input only


class Norm(Enum):
    """What is done before attention, MLP and readout."""

    RMS = "rms"  # division by the root mean square, and a weight
    LAYER = "layer"  # the mean taken away first, a weight and a bias


class Mlp(Enum):
    """What a layer does to each token by itself."""

    SWIGLU = "swiglu"  # down(silu(gate x) * up x), no biases
    GELU = "gelu"  # down gelu(up x), in the tanh form, both with biases


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """RoPE frequency scaling of Llama 3.1 (factor 8) and 3.2 (factor 32)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and variant of the decoder. `head_dim` does not depend on `width`.

    Llama: the defaults. Qwen2/2.5: qkv_bias=True. Qwen3: qk_norm=True. The DiT of BD3-LM and MDLM,
    its modulation folded into the weights: norm=layer, mlp=gelu, head_bias=True. `tied_head` reads
    logits out with the embedding's matrix, `head_bias` adds a number per token to them. `attention`
    None chooses an implementation by shape. `dropout` zeroes that share of the embedding's, the
    attention's and the MLP's outputs in training (never of the attention's probabilities, which no
    kernel holds); it is rounded to 1/256. `rope_layers` says which layers rotate queries and keys
    (SmolLM3: three of four), None that all do. `unroll`: layers in one iteration of the loop over
    them. With all of them there is no loop, so that nothing is copied in and out of stacks; the
    program grows with the depth. `lora`: low-rank pairs beside some matrices are trained, and
    nothing else.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    clean: CleanMode = CleanMode.TOKEN
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    rope_layers: tuple[bool, ...] | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    norm: Norm = Norm.RMS
    mlp: Mlp = Mlp.SWIGLU
    tied_head: bool = False
    head_bias: bool = False
    dtype: str = "bfloat16"
    dropout: float = 0.0
    remat: Remat = Remat.FULL
    unroll: int = 1
    attention: Implementation | None = None
    lora: LoraConfig | None = None

    def __post_init__(self):
        sizes = ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
                f"{self.num_kv_heads}; type num_kv_heads={self.num_heads} for one each"
            )
        if not 1 <= self.unroll <= self.num_layers:
            raise ValueError(
                f"unroll={self.unroll} must be from 1 to num_layers={self.num_layers}; "
                "type unroll=1"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for RoPE")
        if self.rope_layers is not None and len(self.rope_layers) != self.num_layers:
            raise ValueError(
                f"rope_layers has {len(self.rope_layers)} entries for num_layers="
                f"{self.num_layers}; type one for each, or rope_layers=none"
            )
        if not 0 <= self.dropout <= 255 / 256:
            raise ValueError(
                f"dropout={self.dropout} must be from 0 to {255 / 256}; type dropout=0.1"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; type 'bfloat16' or 'float32'")
        if self.lora is not None and self.mlp is Mlp.GELU and "w_gate" in self.lora.targets:
            raise ValueError(
                "lora.targets has w_gate, which an MLP with mlp=gelu lacks; type "
                f"lora.targets={','.join(x for x in self.lora.targets if x != 'w_gate')}"
            )

    @property
    def unrolled(self) -> bool:
        """Whether there is no loop over the layers."""
        return self.unroll == self.num_layers

    def layer_table(self) -> Table:
        """The parameters of one layer (without the layers axis)."""
        d, n, k, h, f = (
            self.width,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.mlp_width,
        )

        def matrix(shape, axes, contracted):
            init = _fan_in(len(shape), contracted, stacked=False)
            return Parameter(
                shape=shape, axes=axes, init=init, role=Role.MATRIX, contracted=contracted
            )

        def norm(size, axis):
            init = jax.nn.initializers.ones
            return Parameter(shape=(size,), axes=(axis,), init=init, role=Role.NORM)

        def bias(heads, axis):
            init = jax.nn.initializers.zeros
            return Parameter(shape=(heads, h), axes=(axis, "head_dim"), init=init, role=Role.BIAS)

        def flat_bias(size, axis):
            init = jax.nn.initializers.zeros
            return Parameter(shape=(size,), axes=(axis,), init=init, role=Role.BIAS)

        table: Table = {
            "attn_norm": norm(d, "embed"),
            "wq": matrix((d, n, h), ("embed_in", "heads", "head_dim"), (0,)),
            "wk": matrix((d, k, h), ("embed_in", "kv_heads", "head_dim"), (0,)),
            "wv": matrix((d, k, h), ("embed_in", "kv_heads", "head_dim"), (0,)),
            "wo": matrix((n, h, d), ("heads", "head_dim", "embed_in"), (0, 1)),
            "mlp_norm": norm(d, "embed"),
        }
        if self.mlp is Mlp.SWIGLU:
            table["w_gate"] = matrix((d, f), ("embed_in", "mlp"), (0,))
        table |= {
            "w_up": matrix((d, f), ("embed_in", "mlp"), (0,)),
            "w_down": matrix((f, d), ("mlp", "embed_in"), (0,)),
        }
        if self.mlp is Mlp.GELU:
            table |= {"b_up": flat_bias(f, "mlp"), "b_down": flat_bias(d, "embed")}
        if self.norm is Norm.LAYER:
            table |= {"attn_norm_bias": _shift(d), "mlp_norm_bias": _shift(d)}
        if self.qkv_bias:
            table |= {"bq": bias(n, "heads"), "bk": bias(k, "kv_heads"), "bv": bias(k, "kv_heads")}
        if self.qk_norm:
            table |= {"q_norm": norm(h, "head_dim"), "k_norm": norm(h, "head_dim")}
        return table if self.lora is None else with_pairs(table, self.lora)

    def table(self) -> Table:
        """The parameters of the trunk, layers stacked."""

        def stacked(p: Parameter) -> Parameter:
            init = p.init
            if p.role is Role.MATRIX or (p.role is Role.ADAPTER and p.axes[-1] == "rank"):
                init = _fan_in(len(p.shape), p.contracted, stacked=True)
            return Parameter(
                shape=(self.num_layers, *p.shape),
                axes=("layers", *p.axes),
                init=init,
                role=p.role,
                contracted=tuple(i + 1 for i in p.contracted),
            )

        final = Parameter(
            shape=(self.width,), axes=("embed",), init=jax.nn.initializers.ones, role=Role.NORM
        )
        layers = {name: stacked(p) for name, p in self.layer_table().items()}
        shift = {"final_norm_bias": _shift(self.width)} if self.norm is Norm.LAYER else {}
        return {"layers": layers, "final_norm": final} | shift


def _shift(width: int) -> Parameter:
    """The bias of a LayerNorm: float32 and undecayed, like its weight."""
    init = jax.nn.initializers.zeros
    return Parameter(shape=(width,), axes=("embed",), init=init, role=Role.NORM)


def _fan_in(rank: int, contracted: tuple[int, ...], stacked: bool):
    """Normal with variance 1 / fan-in over the contracted axes, of one layer or a stack of them."""
    shift = 1 if stacked else 0
    return jax.nn.initializers.variance_scaling(
        1.0,
        "fan_in",
        "normal",
        in_axis=tuple(i + shift for i in contracted),
        out_axis=tuple(i + shift for i in range(rank) if i not in contracted),
        batch_axis=(0,) if stacked else (),
    )


def rms_norm(
    x: Float[Array, "*b D"], weight: Float[Array, "D"], eps: float
) -> Float[Array, "*b D"]:
    """x / sqrt(mean(x^2) + eps) * weight, statistics in float32 (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*b D"], weight: Float[Array, "D"], bias: Float[Array, "D"], eps: float
) -> Float[Array, "*b D"]:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in float32 (Ba et al. 2016)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight + bias).astype(x.dtype)


def rope_angles(config: DecoderConfig, position: Int[Array, "B T"]) -> Float[Array, "B T 1 half"]:
    """Angle of every rotated pair: position * theta^(-2i/H), frequencies scaled if Llama 3."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if (s := config.rope_scaling) is not None:
        turns = s.original_length * frequency / (2 * jnp.pi)  # over the original context
        smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        frequency = frequency * (smooth + (1 - smooth) / s.factor)
    return position[:, :, None, None].astype(jnp.float32) * frequency


def rope(x: Float[Array, "B T N H"], angles: Float[Array, "B T 1 half"]) -> Float[Array, "B T N H"]:
    """Rotates pairs (x_i, x_{i + H/2}) by their angles (Su et al. 2021, half-split layout)."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def dropped(
    x: Float[Array, "B T D"], keys: Key[Array, "B"] | None, rate: float, site: int | Int[Array, ""]
) -> Float[Array, "B T D"]:
    """x with a share `rate` zeroed and the rest scaled up (Srivastava et al. 2014); x if no keys.

    One key per row: what is zeroed depends on neither the mesh nor a split of the batch.
    """
    kept = round(256 * (1 - rate))
    if keys is None or kept == 256:
        return x

    def bits(key):
        # Bytes take a quarter of the random words that floats would.
        return jax.random.bits(jax.random.fold_in(key, site), x.shape[1:], jnp.uint8)

    return jnp.where(jax.vmap(bits)(keys) < kept, x * (256 / kept), 0).astype(x.dtype)


class Layer(nn.Module):
    """One decoder layer. Returns the stream and this window's keys and values."""

    config: DecoderConfig

    def weight(self, name: str) -> Array:
        """The parameter in the compute dtype, gathered over fsdp after the cast: half the bytes."""
        p = self.config.layer_table()[name]
        master = self.param(name, p.init, p.shape, jnp.float32)
        if p.role is Role.NORM:
            return master
        axes = ("embed" if axis == "embed_in" else axis for axis in p.axes)
        return reshard(master.astype(self.config.dtype), *axes)

    def norm(self, x, name: str):
        """The stream as a sublayer reads it."""
        c = self.config
        if c.norm is Norm.RMS:
            return rms_norm(x, self.weight(name), c.norm_eps)
        return layer_norm(x, self.weight(name), self.weight(f"{name}_bias"), c.norm_eps)

    def product(self, equation: str, x: Array, name: str, *out: str) -> Array:
        """x times a matrix, and its low-rank pair if it has one."""
        sharded, lora = spec(*out), self.config.lora
        y = jnp.einsum(equation, x, self.weight(name), out_sharding=sharded)
        if lora is None or name not in lora.targets:
            return y
        a, b = map(self.weight, pair_names(name))
        return y + low_rank(equation, x, a, b, lora.scale, sharded)

    @nn.compact
    def __call__(self, x, each, angles, own: Intervals, cache, keys):
        c = self.config
        layer, turned = each
        if turned is not None:
            # By an angle of zero nothing turns, exactly: cos is 1 and sin is 0.
            angles = angles * turned

        def project(h, name, heads, bias):
            out = self.product("btd,dnh->btnh", h, name, "batch", "length", heads, "head_dim")
            return out + self.weight(bias) if c.qkv_bias else out

        with jax.named_scope("attention"):
            h = self.norm(x, "attn_norm")
            q = project(h, "wq", "heads", "bq")
            k = project(h, "wk", "kv_heads", "bk")
            v = project(h, "wv", "kv_heads", "bv")
            if c.qk_norm:
                q = rms_norm(q, self.weight("q_norm"), c.norm_eps)
                k = rms_norm(k, self.weight("k_norm"), c.norm_eps)
            q, k = rope(q, angles), rope(k, angles)
            prefix = None
            if cache is not None:
                (cache_k, cache_v), seen = cache
                prefix = Prefix(cache_k, cache_v, layer, seen)
            mixed = attend(q, k, v, own, prefix, c.attention)
            embed = ("batch", "length", "embed")
            out = self.product("btnh,nhd->btd", mixed, "wo", *embed)
            x = x + dropped(out, keys, c.dropout, 1 + 2 * layer)
        with jax.named_scope("mlp"):
            h = self.norm(x, "mlp_norm")
            mlp = ("batch", "length", "mlp")
            if c.mlp is Mlp.SWIGLU:
                gate = self.product("btd,df->btf", h, "w_gate", *mlp)
                up = self.product("btd,df->btf", h, "w_up", *mlp)
                down = jax.nn.silu(gate) * up
            else:
                up = self.product("btd,df->btf", h, "w_up", *mlp)
                down = jax.nn.gelu(up + self.weight("b_up"), approximate=True)
            out = self.product("btf,fd->btd", down, "w_down", *embed)
            if c.mlp is Mlp.GELU:
                out = out + self.weight("b_down")
            x = x + dropped(out, keys, c.dropout, 2 + 2 * layer)
        return x, KeyValues(k, v)


# Scores are products with batch dimensions: never kept.
_POLICIES = {
    Remat.DOTS: jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KEPT),
    ),
    Remat.FULL: None,
}


class Decoder(nn.Module):
    """The trunk: scanned layers and the final norm."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        own: Intervals,
        cache: Cache | None = None,
        seen: Intervals | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """Final-norm hidden states and the window's keys and values, (layers, B, T, K, H).

        `own`: intervals over the window's keys; `seen`: over the cache's slots. `keys`: of the
        rows' dropout, None for none of it.
        """
        c = self.config
        read = None if cache is None else ((cache.k, cache.v), seen)
        angles = rope_angles(c, position)
        x = dropped(x, keys, c.dropout, 0)
        each = jnp.arange(c.num_layers), None
        if c.rope_layers is not None:
            each = each[0], jnp.array(c.rope_layers, jnp.float32)
        layers = self._unrolled if c.unrolled else self._scanned
        x, new = layers(x, each, angles, own, read, keys)
        final = self.param("final_norm", jax.nn.initializers.ones, (c.width,), jnp.float32)
        if c.norm is Norm.RMS:
            return rms_norm(x, final, c.norm_eps), new
        shift = self.param("final_norm_bias", jax.nn.initializers.zeros, (c.width,), jnp.float32)
        return layer_norm(x, final, shift, c.norm_eps), new

    def _scanned(self, x, each, *constants):
        c = self.config
        layer = Layer
        if c.remat is not Remat.NONE:
            layer = nn.remat(Layer, prevent_cse=False, policy=_POLICIES[c.remat])
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * len(constants)),
            length=c.num_layers,
            unroll=c.unroll,
        )
        return stack(c, name="layers")(x, each, *constants)

    def _unrolled(self, x, each, *constants):
        c, kinds = self.config, self.config.layer_table()
        own = {
            name: unstacked(stack, stack.dtype if kinds[name].role is Role.NORM else c.dtype)
            for name, stack in self.get_variable("params", "layers").items()
        }

        # One trace serves all layers: their kernels are lowered once.
        @jax.jit
        def layer(params, x, each, *constants):
            with jax.named_scope("layers"):
                return Layer(c, parent=None).apply({"params": params}, x, each, *constants)

        if c.remat is not Remat.NONE:
            # With no loop between them XLA would find what is computed again computed already, and
            # keep all of it.
            layer = jax.checkpoint(layer, prevent_cse=True, policy=_POLICIES[c.remat])
        kept = []
        for n in range(c.num_layers):
            params = {name: weights[n] for name, weights in own.items()}
            x, new = layer(params, x, jax.tree.map(lambda v, n=n: v[n], each), *constants)
            kept.append(new)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *kept)
