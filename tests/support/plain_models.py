"""Small torch models with a layer of every kind, each with a ratio of its own to its proxy."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mixed(nn.Module):
    """Tokens through an embedding, a norm, convolutions and linear layers to an untied output layer.

    Width d reads 3d after fc1, so that fc1 and fc2 have fan-ins of their own; d and `inner` are given separately, so
    that a proxy may have another ratio for each.
    """

    def __init__(self, d: int = 16, inner: int = 24, channels: int = 8, vocabulary: int = 13) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.norm = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, inner)
        self.fc2 = nn.Linear(inner, d, bias=False)
        self.mixing = nn.Conv1d(d, channels, 3, padding=1)
        self.depthwise = nn.Conv1d(channels, channels, 3, padding=2, dilation=2, groups=2, bias=False)
        self.back = nn.Linear(channels, d)
        self.scale = nn.Parameter(torch.ones(d))
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [b, s, V] of tokens [b, s]."""
        x = self.norm(self.embedding(tokens))
        x = x + self.fc2(functional.gelu(self.fc1(x)))
        mixed = self.depthwise(functional.gelu(self.mixing(x.transpose(1, 2)))).transpose(1, 2)
        logits: Tensor = self.head(self.scale * (x + self.back(mixed)))
        return logits


def mixed(seed: int = 0, **sizes: int) -> Mixed:
    """Return the model with weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mixed(**sizes)


def proxy() -> Mixed:
    """Return the proxy of the default sizes, without memory: m is 4 for d, 3 for inner, 2 for channels."""
    with torch.device("meta"):
        return Mixed(d=4, inner=8, channels=4)


MIXED = {
    "embedding.weight": ("embedding", 1.0),
    "norm.weight": ("vector", 1.0),
    "norm.bias": ("vector", 1.0),
    "fc1.weight": ("matrix", 4.0),
    "fc1.bias": ("vector", 1.0),
    "fc2.weight": ("matrix", 3.0),
    "mixing.weight": ("matrix", 4.0),
    "mixing.bias": ("vector", 1.0),
    "depthwise.weight": ("matrix", 2.0),
    "back.weight": ("matrix", 2.0),
    "back.bias": ("vector", 1.0),
    "scale": ("vector", 1.0),
    "head.weight": ("output", 4.0),
}
"""Class and m of every parameter, by hand."""
