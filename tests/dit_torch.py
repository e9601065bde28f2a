"""A diffusion transformer as BD3-LM and MDLM publish it, in torch: the importer's reference.

Written from a description of the checkpoints alone, without our model in view, so that an error in
reading the names, the layout of q, k and v or the modulation is not made twice in the same way.
"""

import math

import torch
from torch import nn
from torch.nn import functional


def rotate(x: torch.Tensor, positions: torch.Tensor, base: float = 1e4) -> torch.Tensor:
    """RoPE on (B, T, N, H) with the halves of a head paired."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = positions[..., None].float() * frequency
    cos, sin = angle.cos()[..., None, :], angle.sin()[..., None, :]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Scale(nn.Module):
    """LayerNorm with a weight and no bias, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return functional.layer_norm(x.float(), x.shape[-1:], eps=1e-5) * self.weight


class SigmaMap(nn.Module):
    """Sinusoids of the noise level (cosines first), then a two-layer SiLU network."""

    def __init__(self, cond: int, frequencies: int):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, cond), nn.SiLU(), nn.Linear(cond, cond))

    def forward(self, sigma):
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        angle = sigma[:, None] * rates
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, cond: int):
        super().__init__()
        self.heads = heads
        self.norm1 = Scale(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Scale(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = nn.Linear(cond, 6 * width)

    def forward(self, x, c, positions, visible):
        six = self.adaLN_modulation(c)[:, None, :].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = six
        h = self.norm1(x) * (1 + scale_attn) + shift_attn
        rows, length, width = h.shape
        qkv = self.attn_qkv(h).reshape(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.unbind(dim=2)
        q, k = rotate(q, positions), rotate(k, positions)
        scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
        weight = scores.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1)
        out = torch.einsum("bnts,bsnh->btnh", weight, v).reshape(rows, length, width)
        x = x + gate_attn * self.attn_out(out)
        h = self.norm2(x) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.mlp(h)


class Embedding(nn.Module):
    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab, width))

    def forward(self, tokens):
        return self.embedding[tokens]


class OutputLayer(nn.Module):
    def __init__(self, width: int, vocab: int, cond: int):
        super().__init__()
        self.norm_final = Scale(width)
        self.linear = nn.Linear(width, vocab)
        self.adaLN_modulation = nn.Linear(cond, 2 * width)

    def hidden(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None, :].chunk(2, dim=-1)
        return self.norm_final(x) * (1 + scale) + shift


class Backbone(nn.Module):
    def __init__(
        self, *, width: int, heads: int, blocks: int, vocab: int, cond: int, frequencies: int = 256
    ):
        super().__init__()
        self.vocab_embed = Embedding(width, vocab)
        self.sigma_map = SigmaMap(cond, frequencies)
        self.blocks = nn.ModuleList(Block(width, heads, cond) for _ in range(blocks))
        self.output_layer = OutputLayer(width, vocab, cond)

    def forward(self, tokens, positions, visible):
        """Final hidden states (B, T, D) and logits (B, T, V); `visible` (B, T, T): where seen."""
        c = functional.silu(self.sigma_map(torch.zeros(len(tokens))))
        x = self.vocab_embed(tokens)
        for block in self.blocks:
            x = block(x, c, positions, visible)
        hidden = self.output_layer.hidden(x, c)
        return hidden, self.output_layer.linear(hidden)


def random_backbone(seed: int, **sizes) -> Backbone:
    """Every weight drawn, those of the modulation (zero in a fresh model) and of the norms too."""
    torch.manual_seed(seed)
    model = Backbone(**sizes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif weight.ndim == 1:
                weight.copy_(0.3 * torch.randn_like(weight))
            elif name == "vocab_embed.embedding":
                weight.copy_(0.02 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) / math.sqrt(weight.shape[1]))
    return model.eval()
