"""Attention, recurrent and language models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention written by hand.

    Args:
        width: Model width, divisible by `heads`.
        heads: Number of heads.
        causal: Whether a position sees only earlier ones.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        q, k, v = self.qkv(x).reshape(samples, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(samples, length, width)
        return self.out(mixed)


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        width: Model width.
        heads: Number of heads.
        causal: Whether a position sees only earlier ones.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer with a class token and learned positions.

    Args:
        channels: Input channels.
        size: Height and width of the input, divisible by `patch`.
        patch: Side of a patch.
        width: Model width.
        depth: Number of blocks.
        classes: Number of outputs.
    """

    def __init__(
        self, channels: int = 1, size: int = 8, patch: int = 4, width: int = 16, depth: int = 2, classes: int = 10
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class EncoderNet(nn.Module):
    """torch's own TransformerEncoder over a sequence of vectors.

    Args:
        features: Features per position.
        width: Model width.
        classes: Number of outputs.
    """

    def __init__(self, features: int = 6, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)).mean(1))


class RecurrentNet(nn.Module):
    """LSTM or GRU whose last state is classified.

    Args:
        kind: ``"lstm"`` or ``"gru"``.
        features: Features per time step.
        width: Hidden width.
        classes: Number of outputs.
    """

    def __init__(self, kind: str = "lstm", features: int = 6, width: int = 12, classes: int = 4) -> None:
        super().__init__()
        self.cell = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](features, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cell(x)
        return self.head(states[:, -1])


class TiedLM(nn.Module):
    """Tiny causal language model whose output layer is its embedding.

    Args:
        vocabulary: Number of tokens.
        length: Longest sequence.
        width: Model width.
        depth: Number of blocks.
    """

    def __init__(self, vocabulary: int = 20, length: int = 8, width: int = 16, depth: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 2, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
