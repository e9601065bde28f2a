"""Other people's attention for tools/bench_attention.py, under the same mask where they take it.

Each function is (case, inputs, intervals) -> Runner and raises where it cannot serve.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from attention_race import Runner, causal, jax_runner, only


def cudnn_causal(case, inputs, seen) -> Runner:
    """cuDNN's causal attention over rows of the same length."""
    only("gpu")

    def call(q, k, v, _):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    return jax_runner(call, inputs, causal(case))


def tokamax_masked(case, inputs, seen) -> Runner:
    """tokamax's Mosaic kernel with the mask as booleans."""
    import tokamax

    def call(q, k, v, seen):
        mask = seen.mask(k.shape[1])[:, None]
        return tokamax.dot_product_attention(q, k, v, mask=mask, implementation="mosaic")

    return jax_runner(call, inputs, seen)


def tokamax_causal(case, inputs, seen) -> Runner:
    """tokamax's Mosaic kernel, plain causal."""
    import tokamax

    def call(q, k, v, _):
        return tokamax.dot_product_attention(q, k, v, is_causal=True, implementation="mosaic")

    return jax_runner(call, inputs, causal(case))


def splash_kernel(case, tile: int | None = None):
    """JAX's splash kernel for one row, mask computed lazily: q (N, T, H) scaled by the caller."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    class TwoStream(masks._ComputableMask):
        """The predicate itself; splash wants its masks hashable."""

        __eq__ = object.__eq__
        __hash__ = object.__hash__

    length = 2 * case.length
    tile = tile or next((t for t in (512, 256, 128) if length % t == 0), length)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    mask = masks.MultiHeadMask([TwoStream((length, length), case.visible)] * case.heads)
    sizes = kernels.BlockSizes(**{f"block_{name}": tile for name in names})
    kernel = kernels.make_splash_mha_single_device(mask, block_sizes=sizes)
    # As numpy: a compiler for another machine takes no arrays of this one.
    return jax.tree.map(np.asarray, kernel), tile


def splash(case, inputs, seen) -> Runner:
    """JAX's splash attention on a TPU, fed in its own layout (heads first, queries scaled)."""
    only("tpu")
    kernel, tile = splash_kernel(case)
    visited = (np.asarray(kernel.fwd_mask_info.block_mask) != 0).sum() * tile**2
    visited = visited / kernel.fwd_mask_info.block_mask.shape[0] * case.rows
    scale, swap = case.head_dim**-0.5, partial(jnp.swapaxes, axis1=1, axis2=2)

    def enter(q, k, v, d_out):
        return swap(q * scale), swap(k), swap(v), swap(d_out)

    def leave(out, *grads):
        grads = grads and (swap(grads[0]) * scale, *map(swap, grads[1:]))
        return (swap(out), *grads)

    def call(q, k, v, _):
        return jax.vmap(kernel)(q, k, v)

    return jax_runner(call, inputs, seen, visited=visited, enter=enter, leave=leave)


def flex(case, inputs, seen, device: str = "cuda") -> Runner:
    """PyTorch's FlexAttention, compiled, in its own layout (heads first)."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError(f"torch {torch.__version__} sees no CUDA device")
    length, dtype = 2 * case.length, getattr(torch, case.dtype)

    def moved(x):
        x = np.array(x.astype(jnp.float32).swapaxes(1, 2))
        return torch.from_numpy(x).to(device=device, dtype=dtype)

    def seen_by(row, head, query, key):
        return case.visible(query, key)

    q, k, v, d_out = map(moved, inputs)
    mask = torch.compile(create_block_mask)(seen_by, None, None, length, length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = case.heads != case.kv_heads

    def call(q, k, v):
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped)

    def forward():
        with torch.no_grad():
            return (call(q, k, v),)

    def backward():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, d_out))

    def results(found):
        return tuple(x.float().transpose(1, 2).cpu().numpy() for x in found)

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    visited = (1 - mask.sparsity() / 100) * length**2 * case.rows
    programs = {"forward": forward, "backward": backward}
    return Runner(lambda which, _: programs[which], results, wait, seen, visited, bundles=False)


PEERS = {
    "cudnn-causal": cudnn_causal,
    "splash": splash,
    "tokamax": tokamax_masked,
    "tokamax-causal": tokamax_causal,
    "flex": flex,
}
