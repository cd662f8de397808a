"""Kolmogorov complexity and the bias of networks: online code length of labels, phrases of emitted strings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import BadData, Unsupported, UsageError
from nervure.core import rng
from nervure.core.capture import undisturbed
from nervure.core.forward import batch_size as count_of
from nervure.core.forward import mode, outputs, predict, take
from nervure.core.graph import as_batches, joined
from nervure.core.vectors import only, select
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="nfl-kolmogorov",
    n=65,
    title="The No Free Lunch Theorem, Kolmogorov Complexity, and the Role of Inductive Biases in Machine Learning",
    year=2023,
    link="https://arxiv.org/abs/2304.05366",
    family="inspect",
    summary=(
        "Real labels are compressible, and networks prefer what is: trained as they go, they spend far fewer bits on "
        "real labels than the uniform code and none fewer on shuffled ones, also away from the domain they were made "
        "for; and sequence models with random weights emit strings simpler than coin flips."
    ),
    tags=(
        "Kolmogorov complexity",
        "no free lunch",
        "prequential code",
        "description length",
        "Lempel-Ziv",
        "simplicity",
    ),
    provides=("online_code", "CodeLength", "code_bits", "emitted", "phrases", "expression_sizes"),
    protocol="diagnostic",
    claims=("networks_prefer_the_simple",),
    needs=("data", "labels"),
    deviations=(
        "The code is sent in blocks that grow by a half; the network starts anew for each from the weights it had, and "
        "a twentieth of its prediction is the uniform one, so that a confident error costs little.",
        "Strings are those of the zoo's small causal transformer with torch's own initialisation, not of GPT-2 and "
        "GPT-3; their simplicity is that of Lempel and Ziv's phrases. Nearly all of it is gone against coins of each "
        "string's own share of ones (0.9 of 8.3 phrases left in a rehearsal): a measure beside the claim.",
        "The paper's language of expressions is not known here; ours has the index, small numbers, +, * and mod.",
        "The learner that fits small and large samples alike is not part of this.",
    ),
    verified=(
        "The online code of a counting predictor against the Krichevsky-Trofimov closed form to 1e-9 bits.",
        "Phrases against the textbook sequence and a search by definition; expressions against every tree written out.",
    ),
)


class Learner(Protocol):
    """Predict labels, and learn those that were seen."""

    def probabilities(self, inputs: Any) -> Tensor:
        """Return the chances of every class, shape (n, ..., k)."""

    def learn(self, inputs: Any, targets: Tensor) -> None:
        """Learn from all samples sent so far."""


def code_bits(learner: Learner, batch: Batch, *, ends: Sequence[int]) -> Tensor:
    """Return the bits of each sample's label: -log2 of the chance that was given to it before it was learnt.

    Args:
        learner: It predicts a block, then learns all samples up to its end.
        batch: Inputs, and class numbers, shape (N, ...).
        ends: Where the blocks end, rising; the last is N.

    Returns:
        Shape (N,).

    Raises:
        UsageError: If the blocks do not end at N.
    """
    inputs, targets = batch
    if [*ends] != sorted(set(ends)) or not ends or ends[0] < 1 or ends[-1] != len(targets):
        raise UsageError("the blocks do not cover the samples", expected=f"rising to {len(targets)}", found=[*ends])
    found = []
    for start, end in zip((0, *ends), ends, strict=False):
        if start:
            learner.learn(take(inputs, slice(0, start)), targets[:start])
        block = targets[start:end, ..., None]
        chances = learner.probabilities(take(inputs, slice(start, end)))
        found.append(-chances.double().gather(-1, block).log2().reshape(end - start, -1).sum(1))
    return torch.cat(found)


@dataclass(frozen=True)
class CodeLength:
    """Report the online code of a data set's labels.

    Args:
        bits: Of each sample, in the order they were sent, shape (N,).
        uniform: Bits of a sample in the uniform code: log2 of the classes, times the labels it has.
        ends: Where the blocks ended.
    """

    bits: Tensor
    uniform: float
    ends: tuple[int, ...]

    @property
    def total(self) -> float:
        """Bits of all labels."""
        return float(self.bits.sum())

    @property
    def ratio(self) -> float:
        """Bits over those of the uniform code: below 1 the network has found structure, with no data held out."""
        return self.total / (self.uniform * len(self.bits))

    @property
    def verdict(self) -> str:
        """Return "ok" where labels are compressed, "warn" where not, "cannot tell" within 20 bits of the uniform code.

        A code that is shorter by b bits happens to random labels with chance 2^-b at most.
        """
        spared = self.uniform * len(self.bits) - self.total
        return "cannot tell" if abs(spared) < 20 else "ok" if spared > 0 else "warn"


class _Network:
    """Train a copy anew for each block."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
        *,
        parameters: Iterable[str] | None,
        epochs: int,
        batch_size: int,
        floor: float,
        seed: int,
    ) -> None:
        self.start, self.model = model, copy.deepcopy(model)
        self.names = list(select(model, parameters))
        self.optimizer = optimizer or (lambda each: torch.optim.Adam(each, lr=2e-3))
        self.epochs, self.batch_size, self.floor, self.seed = epochs, batch_size, floor, seed

    def probabilities(self, inputs: Any) -> Tensor:
        chances = predict(self.model, inputs).double().softmax(-1)
        return (1 - self.floor) * chances + self.floor / chances.shape[-1]

    def learn(self, inputs: Any, targets: Tensor) -> None:
        self.model = copy.deepcopy(self.start)
        chosen = select(self.model, self.names)
        optimizer = self.optimizer(list(chosen.values()))
        count = len(targets)
        with rng.scope("online code", self.seed, count), only(self.model, chosen), mode(self.model, train=True):
            for _ in range(self.epochs):
                # Parts of nearly equal size: a lone last sample has no batch statistics.
                for index in torch.randperm(count).tensor_split(math.ceil(count / self.batch_size)):
                    optimizer.zero_grad()
                    scores = outputs(self.model, take(inputs, index))
                    F.cross_entropy(scores.flatten(0, -2), targets[index].flatten()).backward()
                    optimizer.step()


def online_code(
    model: nn.Module,
    batch: Batch | Sequence[Batch],
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    parameters: Iterable[str] | None = None,
    epochs: int = 30,
    batch_size: int = 32,
    start: int = 8,
    growth: float = 1.5,
    floor: float = 0.05,
    seed: int = 0,
) -> CodeLength:
    """Measure how many bits a network needs for the labels of a data set when it learns as it goes.

    bits = -sum_i log2 p(y_i | x_i, all labels before its block): the length of a code the receiver can undo, who has
    the inputs and the untrained network.

    Args:
        model: An untrained classifier, outputs (N, ..., k); a trained one has seen labels that the code must not know.
        batch: Inputs and class numbers, one batch or several.
        optimizer: From parameters to an optimizer; Adam of rate 0.002 by default.
        parameters: Names or prefixes of what is trained; None takes all that require a gradient.
        epochs: Passes over the samples sent, for each block.
        batch_size: Samples in a step.
        start: Samples of the first block, at least 2, coded by the untrained network.
        growth: How many times more samples are known after a block than before it.
        floor: Share of the uniform prediction in every prediction, between 0 and 1.
        seed: Draws the order of the samples and of training.

    Returns:
        The report.

    Raises:
        BadData: If the targets are no classes of the outputs, or there are fewer than two samples.
        UsageError: If a number is out of range.

    Examples:
        >>> x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        >>> fast = lambda parameters: torch.optim.SGD(parameters, lr=0.5)
        >>> online_code(nn.Linear(4, 2), (x, (x[:, 0] > 0).long()), optimizer=fast, epochs=10).verdict
        'ok'
    """
    if min(epochs, batch_size) < 1 or start < 2 or growth <= 1 or not 0 < floor < 1:
        raise UsageError(
            "a number is out of range",
            expected="epochs, batch_size >= 1, start >= 2, growth > 1, 0 < floor < 1",
            found=(epochs, batch_size, start, growth, floor),
        )
    inputs, targets = joined(as_batches(batch))
    count = count_of(inputs)
    with undisturbed(model):
        shape = predict(model, take(inputs, slice(0, 2))).shape
    if targets.is_floating_point() or shape[1:-1] != targets.shape[1:] or count < 2 or int(targets.max()) >= shape[-1]:
        raise BadData("the targets are no classes of the outputs", expected=tuple(shape), found=tuple(targets.shape))
    order = torch.randperm(count, generator=rng.generator("online code", seed))
    ends = [min(start, count)]
    while ends[-1] < count:
        ends.append(min(count, max(ends[-1] + 1, int(growth * ends[-1]))))
    learner = _Network(
        model, optimizer, parameters=parameters, epochs=epochs, batch_size=batch_size, floor=floor, seed=seed
    )
    with undisturbed(model):
        bits = code_bits(learner, (take(inputs, order), targets[order]), ends=ends)
    return CodeLength(bits, math.log2(shape[-1]) * targets[0].numel(), tuple(ends))


@torch.no_grad()
def emitted(model: nn.Module, *, length: int, strings: int = 32, vocabulary: int = 2, seed: int = 0) -> Tensor:
    """Sample strings from an autoregressive model, token by token; the first is drawn evenly.

    Args:
        model: From tokens, shape (N, T), to scores of the next one, shape (N, T, V).
        length: Tokens of a string.
        strings: How many.
        vocabulary: V.
        seed: Draws them.

    Returns:
        Shape (strings, length).

    Raises:
        Unsupported: If the outputs are no scores of the next token.
    """
    draw = rng.generator("emitted", seed)
    tokens = torch.randint(vocabulary, (strings, 1), generator=draw)
    for _ in range(length - 1):
        scores = predict(model, tokens)
        if scores.shape != (*tokens.shape, vocabulary):
            raise Unsupported("emitted", model, why=f"its outputs {tuple(scores.shape)} are no scores of a next token")
        following = torch.multinomial(scores[:, -1].double().softmax(-1).cpu(), 1, generator=draw)
        tokens = torch.cat([tokens, following], 1)
    return tokens


def phrases(sequence: Sequence[int]) -> int:
    """Return the number of phrases of Lempel and Ziv (1976): each the shortest that cannot be copied from before.

    Args:
        sequence: Numbers from 0 to 255.

    Returns:
        The number; the last phrase may be one that was there before.

    Examples:
        >>> phrases([0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1])
        6
    """
    text, place, count = bytes(sequence), 0, 0
    while place < len(text):
        size = 1
        # A copy may run into itself: it has only to begin before.
        while place + size <= len(text) and text.find(text[place : place + size], 0, place + size - 1) >= 0:
            size += 1
        place, count = place + size, count + 1
    return count


def expression_sizes(*, length: int, most: int = 5, constants: Sequence[int] = (1, 2, 3)) -> dict[tuple[int, ...], int]:
    """Return the size of the smallest expression for every sequence that has one: its Kolmogorov complexity here.

    An expression is the index i (from 0), a constant, or a + b, a * b, a mod b of two; its size counts all of these.

    Args:
        length: Terms of a sequence.
        most: Largest size.
        constants: The constants.

    Returns:
        Sequence -> size.

    Examples:
        >>> expression_sizes(length=4)[0, 1, 4, 9]
        3
    """
    leaves = [tuple(range(length)), *((one,) * length for one in constants)]
    found = dict.fromkeys(leaves, 1)
    for size in range(3, most + 1, 2):
        new: set[tuple[int, ...]] = set()
        known = [*found.items()]
        for left, first in known:
            for right, second in known:
                if first + second + 1 == size:
                    new.add(tuple(a + b for a, b in zip(left, right, strict=True)))
                    new.add(tuple(a * b for a, b in zip(left, right, strict=True)))
                    if 0 not in right:
                        new.add(tuple(a % b for a, b in zip(left, right, strict=True)))
        found = {**dict.fromkeys(new, size), **found}
    return found


@claim(
    CARD,
    checks=(
        Check.at_least("simpler than fair coins, six of six", method="transformers", metric="below_fair", bound=6.0),
        Check.at_least("simpler than coins of equal bias, five of six", method="transformers", metric="below_biased",
                       bound=5.0),
        Check.at_most("digits: real labels are compressed", method="digits", metric="ratio", bound=0.6),
        Check.at_most("wine: real labels are compressed", method="wine", metric="ratio", bound=0.6),
        Check.at_least("digits: shuffled labels are not", method="digits shuffled", metric="ratio", bound=0.98),
        Check.at_least("wine: shuffled labels are not", method="wine shuffled", metric="ratio", bound=0.98),
    ),
    sabotage={
        "uniform outputs": "transformers", "biased coins": "transformers",
        "digits shuffled again": "digits", "digits in the open": "digits shuffled",
    },
    seeds=3,
    minutes=3.0,
    data=("digits", "wine"),
)  # fmt: skip
def networks_prefer_the_simple(ctx: Ctx) -> None:
    """Random transformers emit strings simpler than coins of their bias; online code shortens real labels alone.

    Six causal transformers of three blocks and width 32, 32 strings of 60 bits each; the mean number of phrases is
    compared with fair coins and with coins of the transformer's share of ones. A measure beside it takes coins of each
    string's own share. Labels are coded by an MLP (64, 32) on digits and wine. The sabotages: a readout of zeros,
    strings of biased coins in place of the transformer's, shuffled labels in place of the real ones, and a code that
    has learnt its block before it sends it.
    """
    counts = dict.fromkeys(("transformers", "uniform outputs", "biased coins"), (0, 0, 0))
    gaps: dict[str, list[float]] = {"fair": [], "biased": [], "own": []}
    for number in range(6):
        draw = ctx.generator("coins", number)
        model = ctx.model("tied-lm", draw=f"transformer {number}", vocabulary=2, length=60, width=32, depth=3)
        seed = ctx.seed_for("strings", number)
        strings = {"transformers": emitted(model, length=60, seed=seed)}
        strings["biased coins"] = _coins(strings["transformers"], draw)
        model.get_submodule("head").weight = nn.Parameter(torch.zeros(2, 32))
        strings["uniform outputs"] = emitted(model, length=60, seed=seed)
        fair = _mean_phrases(torch.randint(2, (32, 60), generator=draw))
        for arm, found in strings.items():
            mean = _mean_phrases(found)
            biased, own = _mean_phrases(_coins(found, draw)), _mean_phrases(_coins(found, draw, each=True))
            below = (mean < fair, mean < biased, mean < own)
            counts[arm] = tuple(a + b for a, b in zip(counts[arm], below, strict=True))  # type: ignore[assignment]
            if arm == "transformers":
                for key, value in (("fair", fair), ("biased", biased), ("own", own)):
                    gaps[key].append(value - mean)
    for arm, (fairer, biased_too, own_too) in counts.items():
        ctx.measure(arm, below_fair=fairer, below_biased=biased_too, below_own=own_too)
    ctx.measure("transformers", **{f"gap_{key}": sum(values) / len(values) for key, values in gaps.items()})
    for name in ("digits", "wine"):
        data = ctx.data(name).flat()
        x = data.train_x[: ctx.scaled(1400, 300)]
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
        y = data.train_y[: len(x)]
        model = ctx.model("mlp", draw=name, features=x.shape[1], classes=data.classes)
        shuffles = [y[torch.randperm(len(y), generator=ctx.generator(name, part))] for part in range(2)]
        arms = {name: y, f"{name} shuffled": shuffles[0], f"{name} shuffled again": shuffles[1]}
        for arm, labels in arms.items():
            code = online_code(model, (x, labels), seed=ctx.seed_for("order") % 2**31)
            ctx.measure(arm, ratio=code.ratio)
        learner = _Network(model, None, parameters=None, epochs=100, batch_size=32, floor=0.05, seed=0)
        learner.learn(x, shuffles[0])
        seen = code_bits(learner, (x, shuffles[0]), ends=[len(x)])
        ctx.measure(f"{name} in the open", ratio=float(seen.mean()) / math.log2(data.classes))
        ctx.progress(1 + (name == "wine"), 2, name)


def _coins(strings: Tensor, draw: torch.Generator, *, each: bool = False) -> Tensor:
    """Return coin flips of the strings' share of ones, that of each string or of all."""
    share = strings.double().mean(1, keepdim=True) if each else strings.double().mean()
    return (torch.rand(strings.shape, generator=draw, dtype=torch.float64) < share).long()


def _mean_phrases(strings: Tensor) -> float:
    return sum(phrases(one) for one in strings.tolist()) / len(strings)
