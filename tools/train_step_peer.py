"""PyTorch's side of tools/bench_train_step.py: FlexAttention, torch.compile, fused AdamW.

The same mathematics as bdjax's step: the same mask, exact counts, loss on the same number of masked
rows alone, clipped gradients. What makes it fast: query, key and value in one product, gate and up
in one; each layer and the head compiled, so that casts, norms, RoPE, SwiGLU and the cross-entropy
are fused; the head sees the masked rows only, gathered to a fixed number, and keeps its bf16
logits, so no product is run twice. "full" checkpoints each layer, "none" keeps everything.
"""

import math
import time

import torch
import torch.nn.functional as F
from attention_race import Case
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from train_step_case import Contestant, Shape, timed

_EPS = 1e-6
# Stratified counts leave their mean by a few entries; a row of 4096 in blocks of 32 by about 6.
_SPARE = 64
_FAR_BELOW = -1e30


class Norm(nn.Module):
    """RMSNorm with statistics in float32."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        """x / sqrt(mean(x^2) + eps) * weight, in the dtype of x."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)
        return (wide * self.weight).to(x.dtype)


def rope(x, cos, sin):
    """Rotates pairs (x_i, x_{i + H/2}); x is (B, T, N, H), the angles' cosines (T, 1, H/2)."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)


class Layer(nn.Module):
    """One pre-norm layer: grouped-query attention with qk-norm and RoPE, SwiGLU."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.sizes = shape.heads, shape.kv_heads, shape.head_dim
        wide = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.attn_norm, self.mlp_norm = Norm(shape.width), Norm(shape.width)
        self.q_norm, self.k_norm = Norm(shape.head_dim), Norm(shape.head_dim)
        self.qkv = _matrix(wide, shape.width)
        self.out = _matrix(shape.width, shape.heads * shape.head_dim)
        self.gate_up = _matrix(2 * shape.mlp, shape.width)
        self.down = _matrix(shape.width, shape.mlp)

    def forward(self, x, cos, sin, mask):
        """The stream after this layer; masters are cast to the stream's dtype here."""
        heads, kv_heads, size = self.sizes
        rows, length, _ = x.shape
        qkv = F.linear(self.attn_norm(x), self.qkv.to(x.dtype))
        q, k, v = qkv.view(rows, length, -1, size).split((heads, kv_heads, kv_heads), dim=2)
        q, k = rope(self.q_norm(q), cos, sin), rope(self.k_norm(k), cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        grouped = heads != kv_heads
        mixed = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)
        x = x + F.linear(mixed.reshape(rows, length, -1), self.out.to(x.dtype))
        gate, up = F.linear(self.mlp_norm(x), self.gate_up.to(x.dtype)).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down.to(x.dtype))


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)


def weighted_nll(hidden, table, labels, weight, mask_id: int):
    """Sum of weight * -log p(label) over gathered rows; the mask token has probability zero."""
    logits = F.linear(hidden, table.to(hidden.dtype)).float()
    banned = torch.arange(logits.shape[1], device=logits.device) == mask_id
    logits = torch.where(banned, _FAR_BELOW, logits)
    return (F.cross_entropy(logits, labels, reduction="none") * weight).sum()


class Decoder(nn.Module):
    """The whole network; `loss` is one forward over [clean; noisy] rows."""

    def __init__(self, shape: Shape, remat: str):
        super().__init__()
        self.shape, self.remat = shape, remat
        self.embed = nn.Parameter(torch.randn(shape.vocab, shape.width) * 0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.final_norm = Norm(shape.width)

    def prepare(self, device: str, compiled: bool) -> None:
        """Mask and angles of the rows; compiles the layers' and the head's code."""
        shape = self.shape
        case = Case(length=shape.length, block=shape.block)
        build = torch.compile(create_block_mask) if compiled else create_block_mask
        self.mask = build(
            lambda row, head, query, key: case.visible(query, key),
            None,
            None,
            2 * shape.length,
            2 * shape.length,
            device=device,
        )
        half = shape.head_dim // 2
        frequency = shape.rope_theta ** (-torch.arange(half, device=device) / half)
        position = torch.arange(shape.length, device=device).repeat(2)
        angles = (position[:, None] * frequency)[:, None]
        self.cos, self.sin = angles.cos(), angles.sin()
        self.nll = weighted_nll
        if compiled:
            # One program serves all layers; should one be compiled for each, that is no error.
            torch._dynamo.config.recompile_limit = 2 * shape.layers
            self.nll = torch.compile(weighted_nll, dynamic=False, fullgraph=True)
            for layer in self.layers:
                layer.compile(dynamic=False, fullgraph=True)

    def loss(self, tokens, noisy, rows, labels, weight):
        """Weighted nats of the entries: `rows` index the outputs of all rows, one after another."""
        row = torch.cat([tokens, noisy], dim=1)
        # Not compiled: PyTorch's own gradient sorts ids, a compiled one adds atomically, and half
        # of a noisy view is one id.
        x = F.embedding(row, self.embed).to(torch.bfloat16)
        for layer in self.layers:
            if self.remat == "full":
                # Nothing here is random: no generator's state is read and set again.
                x = checkpoint(
                    *(layer, x, self.cos, self.sin, self.mask),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = layer(x, self.cos, self.sin, self.mask)
        x = self.final_norm(x.flatten(0, 1)[rows])
        return self.nll(x, self.embed, labels, weight, self.shape.mask_id)


def exact_counts(rows: int, length: int, block: int, device: str):
    """Masks and weights, (rows, length): n of a block's tokens at weight B / n, n stratified.

    The first token of a row is BOS, never masked.
    """
    blocks = length // block
    sizes = torch.full((blocks,), block, device=device)
    sizes[0] -= 1
    cell = torch.rand(rows, blocks, device=device).argsort(dim=1)
    u = (cell + torch.rand(rows, blocks, device=device)) / blocks
    n = torch.minimum(1 + (u * sizes).long(), sizes)
    noise = torch.rand(rows, blocks, block, device=device)
    noise[:, 0, 0] = 2.0
    masked = noise.argsort(dim=2).argsort(dim=2) < n[..., None]
    weight = torch.where(masked, (sizes / n)[..., None], 0.0)
    return masked.reshape(rows, length), weight.reshape(rows, length)


def entries(shape: Shape, tokens, masked, weight, capacity: int):
    """Output rows, labels and weights of what is scored, masked rows first, cut to a fixed number.

    Rows that fill up the number weigh nothing. The next-token entries of the clean stream follow
    where they are trained.
    """
    count, length = tokens.shape
    start = torch.arange(count, device=tokens.device)[:, None] * 2 * length
    index = torch.arange(length, device=tokens.device)
    # A sort, not a search for what is set: its size would have to come to the host.
    order = masked.flatten().to(torch.int8).argsort(descending=True, stable=True)[:capacity]
    trainable = count * (length - 1)
    rows = (start + length + index).flatten()[order]
    labels, weight = tokens.flatten()[order], weight.flatten()[order] / trainable
    if shape.ar_weight > 0:
        rows = torch.cat([rows, (start + index[:-1]).flatten()])
        labels = torch.cat([labels, tokens[:, 1:].flatten()])
        each = shape.ar_weight / trainable
        weight = torch.cat([weight, torch.full((trainable,), each, device=tokens.device)])
    return rows, labels, weight


def measure(
    who: Contestant,
    shape: Shape,
    *,
    steps: int,
    samples: int,
    device: str = "cuda",
    compiled: bool = True,
) -> dict:
    """Times the step. Parameters, gradients and moments are in `who.master`, products in bf16."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    begin = time.perf_counter()
    with torch.device(device):
        model = Decoder(shape, who.remat).to(getattr(torch, who.master))
    model.prepare(device, compiled)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, shape.mask_id, (who.rows, shape.length), device=device)
    share = (shape.block + 1) / (2 * shape.block)
    capacity = math.ceil(share * tokens.numel()) + _SPARE * who.rows
    first_loss, built = None, time.perf_counter() - begin

    def step():
        nonlocal first_loss
        masked, weight = exact_counts(who.rows, shape.length, shape.block, device)
        noisy = torch.where(masked, shape.mask_id, tokens)
        loss = model.loss(tokens, noisy, *entries(shape, tokens, masked, weight, capacity))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        first_loss = loss.detach() if first_loss is None else first_loss
        return loss.detach()

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    found = timed(step, wait, steps=steps, samples=samples)
    moments = {str(m.dtype) for s in optimiser.state.values() for m in s.values() if m.ndim}
    cuda = device == "cuda"
    return found | {
        "device": torch.cuda.get_device_name() if cuda else device,
        "versions": {"torch": torch.__version__},
        "compile_seconds": built + found["first_step_seconds"],
        "first_loss": float(first_loss),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtypes": {
            "parameters": who.master,
            "moments": "+".join(sorted(moments)).replace("torch.", ""),
            "compute": "bfloat16",
        },
    }
