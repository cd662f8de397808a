"""Which units follow the rule and which remember: Fourier concentration, and accuracy as units are silenced by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import BadData, NoEffect, Unsupported, UsageError
from nervure.core import forward, rng
from nervure.core.taps import hooked
from nervure.inspect._delayed import quadratic_mlp, shuffled, squared_loss, table_task, train
from nervure.inspect.grokking import operation
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="grokking-corrupted",
    n=226,
    title="To grok or not to grok: Disentangling generalization and memorization on corrupted algorithmic datasets",
    year=2023,
    link="https://openreview.net/forum?id=UHjE5v5MB7",
    family="inspect",
    summary=(
        "Trained on modular arithmetic of which some answers are wrong, a network can fit the wrong answers and "
        "generalise at once. Units with weights periodic in the token follow the rule, those with a spread Fourier "
        "spectrum remember; silencing the latter, or weight decay, removes what was remembered."
    ),
    tags=("grokking", "label noise", "memorisation", "Fourier", "inverse participation ratio", "pruning", "units"),
    provides=("ipr", "silenced", "silence_by", "UnitPruning", "corrupt"),
    claims=("low_ipr_units_remember",),
    needs=("data", "labels"),
    deviations=(
        "A frequency and its negative, which are one for real weights, are counted together, so that 1 is the most.",
        "The claim takes p = 53 and a width of 256; the paper's phase diagrams, dropout and batch normalisation are "
        "not in it.",
        "Units are silenced at their output for the time of a block; no weight is changed.",
    ),
    verified=(
        "The spectrum against sums written out and numpy.fft; a network of cosines, which solves the task exactly, has "
        "the largest value in every unit.",
        "Silenced units against networks from which their weights were removed.",
    ),
)


def ipr(values: Tensor, *, shape: Sequence[int] | None = None, r: float = 2.0) -> Tensor:
    """Return the inverse participation ratio of each column's Fourier spectrum, sum_k p_k^r / (sum_k p_k)^r.

    p_k is the energy of frequency k and its negative. One frequency gives 1, a flat spectrum the least.

    Args:
        values: One function on a cyclic group a column, such as an embedding with a row for each token, shape (n, m).
        shape: Orders of the cyclic groups whose product the group is, tokens in row-major order; (n,) by default.
        r: The power, above 1.

    Returns:
        Numbers in (0, 1], 0 for a column of zeros; shape (m,), float64.

    Raises:
        UsageError: If the rows are not as many as elements, or r is not above 1.

    Examples:
        >>> t = torch.arange(7) * (2 * torch.pi / 7)
        >>> [round(x, 4) for x in ipr(torch.stack([torch.cos(3 * t), torch.cos(t) + torch.cos(2 * t)], 1)).tolist()]
        [1.0, 0.5]
    """
    orders = tuple(shape) if shape is not None else (len(values),)
    count = int(torch.tensor(orders).prod())
    if values.ndim != 2 or count != len(values) or r <= 1:
        raise UsageError("no such spectrum", expected=f"r > 1, ({count}, m)", found=(r, tuple(values.shape)))
    axes = tuple(range(len(orders)))
    energy = torch.fft.fftn(values.detach().double().reshape(*orders, -1), dim=axes).abs().square()
    # Frequency -k is k flipped and rolled by one; a frequency that is its own negative is not doubled.
    partner = energy.flip(axes).roll([1] * len(orders), axes)
    energy, partner = energy.reshape(count, -1), partner.reshape(count, -1)
    numbers = torch.arange(count).reshape(orders)
    mate = numbers.flip(axes).roll([1] * len(orders), axes).flatten()
    numbers = numbers.flatten()
    folded = torch.where((numbers == mate)[:, None], energy, energy + partner)[numbers <= mate]
    total = folded.sum(0)
    shares = folded / total.clamp_min(torch.finfo(total.dtype).tiny)
    return shares.pow(r).sum(0)


def corrupt(targets: Tensor, share: float, classes: int, *, seed: object = 0) -> tuple[Tensor, Tensor]:
    """Return targets of which a random share is replaced by another class, each wrong one equally likely.

    Args:
        targets: Classes, shape (N,).
        share: Share of wrong ones, in [0, 1].
        classes: Number of classes, at least 2.
        seed: Draws which and how.

    Returns:
        The targets, and which of them are wrong.

    Raises:
        UsageError: If a number is outside its range.
    """
    if not 0 <= share <= 1 or classes < 2:
        raise UsageError("nothing to corrupt so", expected="0 <= share <= 1, classes >= 2", found=(share, classes))
    draw = rng.generator("corrupt", seed)
    wrong = torch.zeros(len(targets), dtype=torch.bool)
    wrong[torch.randperm(len(targets), generator=draw)[: round(share * len(targets))]] = True
    shift = torch.randint(1, classes, targets.shape, generator=draw)
    return torch.where(wrong, (targets + shift) % classes, targets), wrong


@contextmanager
def silenced(model: nn.Module, layer: str, units: Tensor, *, axis: int = -1) -> Iterator[None]:
    """Set some units of a layer's output to zero during the block; the model is not changed.

    Args:
        model: The model.
        layer: Qualified name of the layer, such as an activation function.
        units: Which units, as numbers or as a mask.
        axis: The units' axis of the layer's output; 1 for channels of a convolution.

    Yields:
        Nothing.

    Raises:
        NoEffect: If there is no such layer.
        Unsupported: If the layer returns something else than one tensor.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with silenced(net, "1", torch.tensor([0, 2])):
        ...     out = net(torch.full((1, 2), 9.0))
        >>> out[0, 0].item(), out[0, 2].item()
        (0.0, 0.0)
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        raise NoEffect(f"the model has no module {layer!r}", expected="a name from named_modules()")

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise Unsupported("silenced", module, why="it returns no single tensor", try_="the layer that follows")
        return output.index_fill(axis, places.to(output.device), 0.0)

    places = units.nonzero()[:, 0] if units.dtype == torch.bool else units
    with hooked([(modules[layer], hook)]):
        yield


@dataclass(frozen=True)
class UnitPruning:
    """Hold accuracies as units are silenced, those with the lowest scores first, and as many at random.

    Args:
        shares: Shares of the units silenced, shape (S,).
        lowest: Name of a batch -> accuracies, shape (S,), lowest scores first.
        chance: Name of a batch -> accuracies, units in random order.
    """

    shares: Tensor
    lowest: Mapping[str, Tensor]
    chance: Mapping[str, Tensor]

    def gain(self, name: str) -> float:
        """Return how much accuracy choosing by score keeps over choosing at random, over all shares.

        Args:
            name: The batch.

        Returns:
            The mean difference; near 0 where the scores tell nothing of it, below 0 where they find what it needs.
        """
        return float((self.lowest[name] - self.chance[name]).mean())


def silence_by(
    model: nn.Module,
    layer: str,
    scores: Tensor,
    batches: Mapping[str, Batch],
    *,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    axis: int = -1,
    seed: int = 0,
) -> UnitPruning:
    """Measure accuracies while units are silenced by their scores, beside a random order of the same units.

    Args:
        model: A classifier; it is left as it is.
        layer: As in `silenced`.
        scores: One for each unit, such as the mean `ipr` of the weights that go in; shape (width,).
        batches: Name -> (inputs, classes), such as wrongly labelled, rightly labelled and unseen samples.
        shares: Shares of the units to silence, in [0, 1].
        axis: As in `silenced`.
        seed: Draws the random order.

    Returns:
        The accuracies.

    Raises:
        BadData: If the scores are not one for each unit.
    """
    orders = {
        "lowest": scores.argsort(stable=True),
        "chance": torch.randperm(len(scores), generator=rng.generator("silence_by", seed)),
    }
    widths: set[int] = set()

    def width(module: nn.Module, args: Any, output: Any) -> None:
        widths.add(forward.logits(output).shape[axis])

    found: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in batches} for arm in orders}
    for arm, order in orders.items():
        for share in shares:
            units = order[: round(share * len(scores))]
            with silenced(model, layer, units, axis=axis), hooked([(model.get_submodule(layer), width)]):
                for name, (inputs, targets) in batches.items():
                    right = forward.predict(model, inputs).argmax(-1) == targets
                    found[arm][name].append(float(right.double().mean()))
            if widths - {len(scores)}:
                raise BadData("the scores are not one for each unit", expected=widths, found=len(scores))
    curves = {arm: {name: torch.tensor(each) for name, each in found[arm].items()} for arm in orders}
    return UnitPruning(torch.tensor(list(shares)), curves["lowest"], curves["chance"])


@claim(
    CARD,
    checks=(
        Check.at_least("wrong answers are fitted", method="decay 0", metric="wrong", bound=0.95),
        Check.at_least("and it generalises", method="decay 0", metric="test", bound=0.9),
        Check.at_most("pruning by IPR forgets them", method="pruned", metric="wrong", bound=0.3),
        Check.at_least("and not the rule", method="pruned", metric="test", bound=0.9),
        Check.at_least("random pruning forgets the rule", method="random pruned", metric="test_drop", bound=0.2),
        Check.at_most("strong decay unlearns them", method="decay 6", metric="wrong", bound=0.5),
        Check.at_least("and not the rule", method="decay 6", metric="test", bound=0.9),
    ),
    sabotage={"random pruned": "pruned", "p = 31": "decay 0", "shuffled table": "decay 0"},
    seeds=5,
    minutes=1.5,
)  # fmt: skip
def low_ipr_units_remember(ctx: Ctx) -> None:
    """A network fits wrong answers and generalises at once, and its units of low Fourier concentration remember them.

    Silencing the half of the units with the lowest inverse participation ratio wipes out the wrong answers and not the
    rule, a random half spoils both, and strong weight decay makes the network unlearn the wrong answers. Addition
    modulo 53, 60% of the pairs, a fifth of them answered wrongly, f = V (U x)^2 of width 256, squared loss, AdamW 0.01,
    1,200 full-batch steps. With p = 31, and on a table of products with its cells shuffled, the network only
    remembers.
    """
    addition, steps = operation("a+b", 53), ctx.scaled(1200, 300)
    model, batches = _trained(ctx, addition, 0.0, steps)
    into, out = model.get_parameter("0.weight"), model.get_parameter("2.weight")
    scores = (ipr(into[:, :53].T) + ipr(into[:, 53:].T) + ipr(out)) / 3
    found = silence_by(model, "1", scores, batches, shares=(0.0, 0.5), seed=ctx.seed_for("units"))
    clean = {name: float(each[0]) for name, each in found.lowest.items()}
    ctx.measure("decay 0", **clean)
    for arm, curves in (("pruned", found.lowest), ("random pruned", found.chance)):
        after = {name: float(each[1]) for name, each in curves.items()}
        ctx.measure(arm, test_drop=clean["test"] - after["test"], **after)
    others = {
        "decay 6": (addition, 6.0),
        "p = 31": (operation("a+b", 31), 0.0),
        "shuffled table": (shuffled(operation("a*b", 53), ctx.seed_for("table")), 0.0),
    }
    for arm, (table, decay) in others.items():
        model, batches = _trained(ctx, table, decay, steps)
        ctx.measure(arm, **{name: ctx.accuracy(model, *batch) for name, batch in batches.items()})


def _trained(ctx: Ctx, table: Tensor, decay: float, steps: int) -> tuple[nn.Module, dict[str, Batch]]:
    """Train on 60% of a table's cells, a fifth of them answered wrongly; return what the network is asked about too."""
    p = len(table)
    clean = table_task(table, 0.6, seed=ctx.seed_for("cells", p), build=quadratic_mlp, loss=squared_loss)
    x, y = clean.train
    told, wrong = corrupt(y, 0.2, p, seed=ctx.seed_for("wrong", p))

    def tick(step: int) -> None:
        if step % 100 == 0:
            ctx.progress(0, 0, f"step {step:,}")

    task, seed = replace(clean, train=(x, told)), ctx.seed_for("weights")
    model = train(task, decay=decay, seed=seed, steps=steps, after_step=tick).model
    return model, {"wrong": (x[wrong], told[wrong]), "right": (x[~wrong], told[~wrong]), "test": clean.test}
