"""SmolLM2 in numpy, from the description of the Llama architecture and of the file alone.

The file is read by the `gguf` package's own reader; rows of queries and keys stay as they are
stored and RoPE turns neighbours, so that nothing of `bdjax` is believed.
"""

import gguf
import numpy as np


def weights(path):
    """Every tensor of the file in float32 by its GGUF name, and the numbers of its metadata."""
    reader = gguf.GGUFReader(path)
    arrays = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    names = {
        "layers": "block_count",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "eps": "attention.layer_norm_rms_epsilon",
        "theta": "rope.freq_base",
    }
    return arrays, {key: reader.fields[f"llama.{name}"].contents() for key, name in names.items()}


class Reference:
    """The decoder with the keys and values of what it has read."""

    def __init__(self, path):
        self.w, self.n = weights(path)
        self.forget()

    def forget(self):
        self.keys = [[] for _ in range(self.n["layers"])]
        self.values = [[] for _ in range(self.n["layers"])]
        self.length = 0

    def _norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.n["eps"]) * self.w[name]

    def _turn(self, x):
        """Neighbours (2i, 2i + 1) as complex numbers, turned by position * theta^(-2i/H)."""
        half = x.shape[-1] // 2
        frequency = self.n["theta"] ** (-np.arange(half) / half)
        angle = (self.length + np.arange(len(x)))[:, None, None] * frequency
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape).astype(np.float32)

    def _attention(self, x, layer):
        w = {name: self.w[f"blk.{layer}.attn_{name}.weight"] for name in ("q", "k", "v", "output")}
        heads, kv_heads = self.n["heads"], self.n["kv_heads"]
        size = w["q"].shape[0] // heads
        count = len(x)
        q = self._turn((x @ w["q"].T).reshape(count, heads, size))
        self.keys[layer].append(self._turn((x @ w["k"].T).reshape(count, kv_heads, size)))
        self.values[layer].append((x @ w["v"].T).reshape(count, kv_heads, size))
        k, v = (np.concatenate(part[layer]) for part in (self.keys, self.values))
        # (K, G, T, H): queries of a group share their keys and values.
        q = q.reshape(count, kv_heads, heads // kv_heads, size).transpose(1, 2, 0, 3)
        k, v = k.transpose(1, 2, 0)[:, None], v.transpose(1, 0, 2)[:, None]
        scores = q @ k / np.float32(np.sqrt(size))
        ahead = np.arange(k.shape[-1]) > (self.length + np.arange(count))[:, None]
        scores = np.where(ahead, np.float32(-np.inf), scores)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        mixed = (weight @ v).transpose(2, 0, 1, 3).reshape(count, -1)
        return mixed @ w["output"].T

    def _mlp(self, x, layer):
        gate, up, down = (
            self.w[f"blk.{layer}.ffn_{name}.weight"] for name in ("gate", "up", "down")
        )
        g = x @ gate.T
        return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T

    def logits(self, ids):
        """(T, V) logits of the next token after each of `ids`, which follow what was read."""
        x = self.w["token_embd.weight"][np.asarray(ids)]
        for layer in range(self.n["layers"]):
            x = x + self._attention(self._norm(x, f"blk.{layer}.attn_norm.weight"), layer)
            x = x + self._mlp(self._norm(x, f"blk.{layer}.ffn_norm.weight"), layer)
        self.length += len(ids)
        return self._norm(x, "output_norm.weight") @ self.w["token_embd.weight"].T

    def nll(self, ids):
        """-log p(ids[t] | ids[:t]) in nats for t = 1 .., the first token given."""
        self.forget()
        logits = self.logits(ids[:-1]).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        total = np.log(np.exp(logits).sum(-1))
        return total - np.take_along_axis(logits, np.asarray(ids)[1:, None], 1)[:, 0]

    def greedy(self, ids, count):
        """The `count` most probable next tokens, one after the other, and the smallest lead."""
        self.forget()
        written, lead, more = [], np.inf, list(ids)
        for _ in range(count):
            last = self.logits(more)[-1]
            second, first = np.sort(last)[-2:]
            lead = min(lead, float(first - second))
            more = [int(last.argmax())]
            written += more
        return written, lead
