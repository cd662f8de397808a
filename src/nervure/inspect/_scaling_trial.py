"""What the claims on scaling laws train on: Python source, shuffled bytes and a Markov source of known entropy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CONTEXT = 8


@dataclass(frozen=True)
class Source:
    """Hold samples of a stream of symbols.

    Args:
        train: Contexts, shape (N, 8), and the symbols that follow, shape (N,).
        validation: The same of another part of the stream.
        symbols: Number of different symbols.
        entropy: Nats a symbol; NaN where it is not known.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    symbols: int
    entropy: float


def cut(stream: Tensor, symbols: int, entropy: float, *, held: int = 8000) -> Source:
    """Cut a stream into contexts and next symbols; its end is for validation."""
    windows = stream.unfold(0, CONTEXT + 1, 1)
    pairs = windows[:, :CONTEXT], windows[:, CONTEXT]
    train = tuple(each[: -held - CONTEXT] for each in pairs)
    validation = tuple(each[-held:] for each in pairs)
    return Source((train[0], train[1]), (validation[0], validation[1]), symbols, entropy)


def code(draw: torch.Generator, *, size: int = 300_000) -> Source:
    """Join files of Python's standard library, in an order drawn, up to a size; bytes above 127 are left out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = bytearray()
    for place in torch.randperm(len(files), generator=draw).tolist():
        text += bytes(byte for byte in files[place].read_bytes() if byte < 128)
        if len(text) >= size:
            break
    return cut(torch.frombuffer(text[:size], dtype=torch.uint8).long(), 128, math.nan)


def shuffled(source: Source, draw: torch.Generator) -> Source:
    """Shuffle a source's bytes, whose entropy is then that of single bytes."""
    stream = source.train[1][torch.randperm(len(source.train[1]), generator=draw)]
    shares = torch.bincount(stream, minlength=source.symbols).double() / len(stream)
    return cut(stream, source.symbols, float(-(shares * shares.clamp_min(1e-300).log()).sum()))


def markov(draw: torch.Generator, *, symbols: int = 4, size: int = 500_000) -> Source:
    """Draw a Markov source of order two, whose next-symbol laws are softmax of normal numbers times 1.5."""
    table = torch.softmax(1.5 * torch.randn(symbols, symbols, symbols, generator=draw, dtype=torch.float64), 2)
    sums, chance = table.cumsum(2).tolist(), torch.rand(size, generator=draw, dtype=torch.float64).tolist()
    one, two, stream = 0, 0, []
    for value in chance:
        three = next((k for k, edge in enumerate(sums[one][two]) if value < edge), symbols - 1)
        stream.append(three)
        one, two = two, three
    # Many are held back: the losses are to be known to half a percent.
    return cut(torch.tensor(stream), symbols, entropy_rate(table), held=size // 10)


def entropy_rate(table: Tensor) -> float:
    """Return the entropy of the next symbol under the stationary law of pairs, from p(c | a, b)."""
    pairs = torch.full(table.shape[:2], 1 / table[..., 0].numel(), dtype=torch.float64)
    for _ in range(500):
        pairs = torch.einsum("ab,abc->bc", pairs, table)
    return float(-(pairs[..., None] * table * table.log()).sum())


def language_model(symbols: int) -> Callable[[int], nn.Module]:
    """Return a factory: from a width to a perceptron on eight embedded symbols."""

    def make(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Embedding(symbols, 8), nn.Flatten(), nn.Linear(8 * CONTEXT, width), nn.ReLU(), nn.Linear(width, symbols)
        )

    return make
