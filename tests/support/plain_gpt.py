"""GPTs in plain torch that compute what Megatron's do, with the names of Megatron's parameters.

Nothing of Megatron is used, so that a run of these is an independent account of what Megatron's run should be. What
Megatron fuses (queries, keys and values; gate and up) are layers of their own here, as in most models, and as
Megatron's metrics have them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """Of a GPT. `llama`: RMSNorm, SwiGLU, rotary positions, no biases, untied; else LayerNorm, GELU, learned, tied."""

    hidden: int
    ffn: int
    llama: bool
    layers: int = 2
    heads: int = 4
    groups: int = 4
    vocabulary: int = 64
    length: int = 32


class Attention(nn.Module):
    """Causal attention; a key and a value for each group of queries."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.size = sizes, sizes.hidden // sizes.heads
        heads = {"q": sizes.heads, "k": sizes.groups, "v": sizes.groups}
        self.linear_qkv = nn.ModuleDict(
            {name: nn.Linear(sizes.hidden, n * self.size, bias=not sizes.llama) for name, n in heads.items()}
        )
        self.linear_proj = nn.Linear(sizes.hidden, sizes.hidden, bias=not sizes.llama)

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, s, d] of [b, s, d]."""
        query, key, value = (layer(x).unflatten(-1, (-1, self.size)) for layer in self.linear_qkv.values())
        if self.sizes.llama:
            query, key = rotated(query), rotated(key)
        key, value = (t.repeat_interleave(self.sizes.heads // self.sizes.groups, dim=2) for t in (key, value))
        scores = torch.einsum("bshd,bthd->bhst", query, key) / self.size**0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        mixed: Tensor = self.linear_proj(torch.einsum("bhst,bthd->bshd", weights, value).flatten(2))
        return mixed


def rotated(x: Tensor) -> Tensor:
    """Return rotary positions' rotation of [b, s, heads, size], base 10000, halves paired."""
    size = x.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequencies).repeat(1, 2)[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


class Mlp(nn.Module):
    """GELU, or SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.linear_fc1: nn.Module
        if sizes.llama:
            of = {name: nn.Linear(sizes.hidden, sizes.ffn, bias=False) for name in ("gate", "up")}
            self.linear_fc1 = nn.ModuleDict(of)
        else:
            self.linear_fc1 = nn.Linear(sizes.hidden, sizes.ffn)
        self.linear_fc2 = nn.Linear(sizes.ffn, sizes.hidden, bias=not sizes.llama)

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, s, d] of [b, s, d]."""
        if isinstance(self.linear_fc1, nn.ModuleDict):
            x = functional.silu(self.linear_fc1["gate"](x)) * self.linear_fc1["up"](x)
        else:
            x = functional.gelu(self.linear_fc1(x))
        out: Tensor = self.linear_fc2(x)
        return out


def norm(sizes: Sizes) -> nn.Module:
    """Return what normalises [..., d]."""
    return nn.RMSNorm(sizes.hidden, eps=1e-5) if sizes.llama else nn.LayerNorm(sizes.hidden, eps=1e-5)


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = norm(sizes)
        self.self_attention = Attention(sizes)
        self.pre_mlp_layernorm = norm(sizes)
        self.mlp = Mlp(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, s, d] of [b, s, d]."""
        x = x + self.self_attention(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.pre_mlp_layernorm(x))
        return out


class Embedding(nn.Module):
    """Of words, and of positions where these are learned."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocabulary, sizes.hidden)
        if not sizes.llama:
            self.position_embeddings = nn.Embedding(sizes.length, sizes.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [b, s, d] of [b, s]."""
        x: Tensor = self.word_embeddings(tokens)
        if hasattr(self, "position_embeddings"):
            x = x + self.position_embeddings(torch.arange(tokens.shape[1]))
        return x


class Decoder(nn.Module):
    """The layers and the last norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.final_layernorm = norm(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, s, d] of [b, s, d]."""
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.final_layernorm(x)
        return out


class Gpt(nn.Module):
    """A GPT; its parameters have the names that Megatron's GPTModel gives them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = Embedding(sizes)
        self.decoder = Decoder(sizes)
        self.output_layer = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        if not sizes.llama:
            self.output_layer.weight = self.embedding.word_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [b, s, V] of tokens [b, s]."""
        logits: Tensor = self.output_layer(self.decoder(self.embedding(tokens)))
        return logits


def unfused(values: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return, by the names of a `Gpt` here, what `values` has for each of Megatron's parameters.

    Rows of weights and biases are split: `linear_qkv` holds for each group its queries, its key, its value;
    `linear_fc1` of SwiGLU the gate's rows, then those it gates. What is no tensor counts for all parts.
    """
    size, each = sizes.hidden // sizes.heads, sizes.heads // sizes.groups
    found: dict[str, Any] = {}
    for name, value in values.items():
        layer, _, kind = name.rpartition(".")
        whole = isinstance(value, Tensor)
        if layer.endswith("linear_qkv"):
            rows = value.unflatten(0, (sizes.groups, each + 2, size)) if whole else None
            for part, which in {"q": slice(each), "k": slice(each, each + 1), "v": slice(each + 1, None)}.items():
                found[f"{layer}.{part}.{kind}"] = value if rows is None else rows[:, which].flatten(0, 2)
        elif layer.endswith("linear_fc1") and sizes.llama:
            gate, up = value.chunk(2) if whole else (value, value)
            found |= {f"{layer}.gate.{kind}": gate, f"{layer}.up.{kind}": up}
        else:
            found[name] = value
    return found
