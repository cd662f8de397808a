"""Strings of the (embedded) Reber grammar, and a data set of such strings among perturbed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from nervure._kit import UsageError
from nervure.core import rng
from nervure.data.splits import Splits

SYMBOLS = "BTPSXVE"
# State -> the two ways on: (symbol, next state); state 5 is left by E.
_EDGES: tuple[tuple[tuple[str, int], tuple[str, int]], ...] = (
    (("T", 1), ("P", 2)),
    (("S", 1), ("X", 3)),
    (("T", 2), ("V", 4)),
    (("X", 2), ("S", 5)),
    (("P", 3), ("V", 5)),
)


def valid(text: str) -> bool:
    """Tell whether a string belongs to the embedded Reber grammar: B x R x E, with R a Reber string and x T or P.

    Args:
        text: The string.

    Returns:
        Whether it does.

    Examples:
        >>> valid("BTBTXSETE"), valid("BTBTXSEPE"), valid("BPBPVVEPE")
        (True, False, True)
    """
    if len(text) < 4 or text[0] != "B" or text[-1] != "E" or text[1] not in "TP" or text[-2] != text[1]:
        return False
    return _plain(text[2:-2])


def _plain(text: str) -> bool:
    if len(text) < 2 or text[0] != "B" or text[-1] != "E":
        return False
    state = 0
    for symbol in text[1:-1]:
        state = dict(_EDGES[state]).get(symbol, -1) if state < len(_EDGES) else -1
        if state < 0:
            return False
    return state == len(_EDGES)


def draw(generator: torch.Generator, *, longest: int = 30) -> str:
    """Draw a string of the embedded Reber grammar, each way on with probability one half.

    Args:
        generator: Draws the ways.
        longest: Most symbols; longer strings are drawn again.

    Returns:
        The string.

    Raises:
        UsageError: If no string is that short.

    Examples:
        >>> valid(draw(torch.Generator().manual_seed(0)))
        True
    """
    if longest < 9:
        raise UsageError("no embedded Reber string is so short", expected="longest >= 9", found=longest)
    while True:
        ways = torch.randint(0, 2, (longest,), generator=generator).tolist()
        ends, state, symbols = "TP"[ways.pop()], 0, []
        while state < len(_EDGES) and ways:
            symbol, state = _EDGES[state][ways.pop()]
            symbols.append(symbol)
        text = f"B{ends}B{''.join(symbols)}E{ends}E"
        if state == len(_EDGES) and len(text) <= longest:
            return text


def perturb(text: str, generator: torch.Generator) -> str:
    """Change one symbol so that the string leaves the grammar.

    Args:
        text: A string of the embedded Reber grammar.
        generator: Draws place and symbol.

    Returns:
        A string of the same length.
    """
    while True:
        place = int(torch.randint(0, len(text), (), generator=generator))
        symbol = SYMBOLS[int(torch.randint(0, len(SYMBOLS), (), generator=generator))]
        changed = text[:place] + symbol + text[place + 1 :]
        if not valid(changed):
            return changed


def encode(texts: list[str], *, longest: int = 30) -> Tensor:
    """Turn strings into one-hot symbols, with zeros before the first.

    Args:
        texts: The strings.
        longest: Length of every sequence.

    Returns:
        Shape (N, longest, 7).
    """
    out = torch.zeros(len(texts), longest, len(SYMBOLS))
    for row, text in enumerate(texts):
        places = torch.tensor([SYMBOLS.index(symbol) for symbol in text])
        out[row, torch.arange(longest - len(text), longest), places] = 1
    return out


def embedded_reber(
    count: int = 4000, *, test: int = 1000, longest: int = 30, shuffled: bool = False, seed: int = 0
) -> Splits:
    """Return distinct strings, half of them of the embedded Reber grammar (class 1) and half with one symbol changed.

    No string stands in both parts.

    Args:
        count: Strings in all, even.
        test: Strings of the test part.
        longest: Most symbols.
        shuffled: Whether labels are permuted, so that there is nothing to learn.
        seed: Draws everything.

    Returns:
        The data set, inputs of shape (N, longest, 7).

    Raises:
        UsageError: If the numbers do not fit, or there are not so many strings.

    Examples:
        >>> data = embedded_reber(40, test=10)
        >>> data.train_x.shape, data.classes
        (torch.Size([30, 30, 7]), 2)
    """
    if count < 2 or count % 2 or not 0 < test < count:
        raise UsageError("there are no such parts", expected="an even count above test > 0", found=(count, test))
    generator = rng.generator("reber", seed)
    right: dict[str, None] = {}
    wrong: dict[str, None] = {}
    for _ in range(100 * count):
        if len(right) < count // 2:
            right[draw(generator, longest=longest)] = None
        elif len(wrong) < count // 2:
            wrong[perturb(draw(generator, longest=longest), generator)] = None
        else:
            break
    if len(wrong) < count // 2:
        raise UsageError("there are not so many strings", expected="fewer, or longer ones", found=(count, longest))
    x = encode([*right, *wrong], longest=longest)
    y = torch.tensor([1] * len(right) + [0] * len(wrong))
    order = torch.randperm(count, generator=generator)
    x, y = x[order], y[order]
    if shuffled:
        y = y[torch.randperm(count, generator=generator)]
    name = "embedded-reber-shuffled" if shuffled else "embedded-reber"
    return Splits(name, 2, x[test:], y[test:], x[:0], y[:0], x[:test], y[:test])
