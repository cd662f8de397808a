"""How much pruning recurrent networks bear: input and hidden matrices apart, gate by gate."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nervure._kit import Unsupported, UsageError
from nervure.core import allocate, masks, rng
from nervure.data.reber import embedded_reber
from nervure.spec import Card, Check, Ctx, Data, claim

CARD = Card(
    id="sparse-rnn-study",
    n=146,
    title="Investigating Sparsity in Recurrent Neural Networks",
    year=2024,
    link="https://arxiv.org/abs/2407.20601",
    family="compress",
    summary=(
        "Prunes trained plain, GRU and LSTM networks by magnitude, input-to-hidden and hidden-to-hidden matrices "
        "apart, on the task of telling Reber strings from perturbed ones, and asks how much each bears and how soon "
        "retraining gives the accuracy back."
    ),
    tags=("pruning", "recurrent", "LSTM", "GRU", "Reber grammar", "gates"),
    provides=("prune_recurrent_", "recurrent_matrices"),
    claims=("hidden_weights_bear_less",),
    needs=("data", "labels", "grad"),
    deviations=(
        "The second half of the thesis, recurrent networks made from random graphs, is not here.",
        "Single gates can be pruned, which the thesis does not do.",
        "Recovery is measured after one epoch of retraining, not by counting epochs.",
    ),
    verified=(
        "Masks equal torch.nn.utils.prune.l1_unstructured on each matrix, entry for entry, also applied twice.",
        "Grammar strings agree with a regular expression of the embedded Reber grammar.",
    ),
)

Matrix = Literal["input", "hidden", "both"]
GATES: dict[type[nn.Module], str] = {
    nn.RNN: "h",
    nn.GRU: "rzn",
    nn.LSTM: "ifgo",
    nn.RNNCell: "h",
    nn.GRUCell: "rzn",
    nn.LSTMCell: "ifgo",
}
_PREFIXES = {"input": ("weight_ih",), "hidden": ("weight_hh",), "both": ("weight_ih", "weight_hh")}


def recurrent_matrices(model: nn.Module, matrix: Matrix = "both") -> dict[str, str]:
    """Return the matrices of all recurrent layers of a model, every level and direction.

    Args:
        model: Any module with nn.RNN, nn.GRU or nn.LSTM layers, or their cells.
        matrix: Input-to-hidden, hidden-to-hidden, or both.

    Returns:
        Parameter name -> letters of the gates stacked in its rows, in order: h, rzn or ifgo.

    Raises:
        Unsupported: If the model has no such layer.

    Examples:
        >>> recurrent_matrices(nn.LSTM(3, 5, num_layers=2), "hidden")
        {'weight_hh_l0': 'ifgo', 'weight_hh_l1': 'ifgo'}
    """
    gates = {
        id(parameter): letters
        for module in model.modules()
        for kind, letters in GATES.items()
        if isinstance(module, kind)
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith(_PREFIXES[matrix])
    }
    if not gates:
        raise Unsupported("prune_recurrent_", model, why="it has no recurrent layer", try_="a pruner for any layer")
    return {name: gates[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in gates}


def prune_recurrent_(
    model: nn.Module,
    amount: float,
    *,
    matrix: Matrix = "both",
    gates: str | None = None,
    by: Literal["magnitude", "chance"] = "magnitude",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Drop the share `amount` of the surviving weights of each recurrent matrix, the smallest first; in place.

    The masks hold in any further training. Called again, it drops a share of what is left.

    Args:
        model: As in `recurrent_matrices`.
        amount: Share of each matrix's survivors, in [0, 1]; with `gates`, of the survivors in their rows.
        matrix: Which matrices.
        gates: Letters of the gates to prune, of r, z, n (GRU), i, f, g, o (LSTM) and h (plain); None for all.
        by: ``"magnitude"``, or ``"chance"`` for the control.
        seed: Draws which weights go by chance.

    Returns:
        Parameter name -> its mask.

    Raises:
        UsageError: If the amount is outside its range, or a layer has none of the gates.

    Examples:
        >>> net = nn.LSTM(3, 5)
        >>> kept = prune_recurrent_(net, 0.4, matrix="hidden", gates="f")
        >>> kept["weight_hh_l0"].view(4, 25).sum(1).tolist()  # i, f, g, o
        [25, 15, 25, 25]
    """
    if not 0 <= amount <= 1:
        raise UsageError("no such share of weights", expected="0 <= amount <= 1", found=amount)
    present, named, new = masks.read(model), dict(model.named_parameters()), {}
    for name, letters in recurrent_matrices(model, matrix).items():
        chosen = [place for place, letter in enumerate(letters) if gates is None or letter in gates]
        if not chosen:
            raise UsageError(f"{name} has none of the gates {gates!r}", expected=f"some of {letters!r}")
        weight = named[name].detach()
        mask = present.get(name, torch.ones_like(weight, dtype=torch.bool)).clone()
        worth = weight.abs()
        if by == "chance":
            worth = torch.rand(weight.shape, generator=rng.generator("recurrent", seed, name)).to(weight.device)
        shape = (len(letters), weight.shape[0] // len(letters), weight.shape[1])
        rows = mask.view(shape)[chosen]
        count = round(amount * int(rows.sum()))
        mask.view(shape)[chosen] = allocate.drop_smallest(worth.view(shape)[chosen], rows, count)
        new[name] = mask
    masks.attach(model, new)
    return new


_PLAIN, _GATED = ("rnn-tanh", "rnn-relu"), ("gru", "lstm")
_CELLS = _PLAIN + _GATED
_MATRICES: tuple[Matrix, ...] = ("input", "hidden")
_ARMS: dict[str, Literal["magnitude", "chance"]] = {"magnitude": "magnitude", "random": "chance"}
_AMOUNTS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_HIDDEN = 50


class _Reader(nn.Module):
    """Read a sequence and classify it by the last state."""

    def __init__(self, cell: str, features: int, classes: int) -> None:
        super().__init__()
        if cell.startswith("rnn"):
            self.cell: nn.RNNBase = nn.RNN(features, _HIDDEN, nonlinearity=cell.removeprefix("rnn-"), batch_first=True)
        else:
            self.cell = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](features, _HIDDEN, batch_first=True)
        self.head = nn.Linear(_HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


@claim(
    CARD,
    checks=(
        Check.at_least(
            "hidden weights bear less than input weights in three of four cells",
            method="magnitude",
            metric="third_gap",
            bound=0.0,
        ),
        Check.at_least(
            "gated cells bear more than plain ones", method="magnitude", metric="gated_advantage", bound=0.0
        ),
        Check.at_least(
            "one epoch gives back half of the loss up to 70%", method="magnitude", metric="restored", bound=0.5
        ),
        Check(name="random pruning is worse", method="magnitude", control="random", metric="accuracy"),
        Check.at_most("shuffled labels are not learnt", method="shuffled", metric="accuracy", bound=0.55),
    ),
    sabotage={"random": "magnitude"},
    seeds=5,
    minutes=5,
)
def hidden_weights_bear_less(ctx: Ctx) -> None:
    """Pruning hurts hidden-to-hidden weights more than input-to-hidden weights, and plain cells more than gated ones.

    One epoch of retraining restores most of what pruning up to 70% costs. 4,000 embedded Reber strings, half of them
    with one symbol changed, hidden size 50, 15 epochs of Adam 3e-3; each matrix pruned by 10, 30, 50, 70, 90 and 100%.
    What a matrix bears is the mean fall of accuracy over these; the first check asks the third largest of the four
    cells' gaps (hidden minus input) to be above 0. Random pruning is both control and sabotage.
    """
    data = embedded_reber(4000, test=1000, seed=ctx.seed_for("strings"))
    epoch = len(data.train_x) // 64
    first, again = ctx.scaled(15, 2) * epoch, epoch
    ctx.plan(5 * first + 2 * len(_CELLS) * 2 * 4 * again)
    falls: dict[str, dict[tuple[str, Matrix], float]] = {arm: {} for arm in _ARMS}
    kept: dict[str, list[float]] = {arm: [] for arm in _ARMS}
    lost, back = dict.fromkeys(_ARMS, 0.0), dict.fromkeys(_ARMS, 0.0)
    for cell in _CELLS:
        dense = _trained(ctx, cell, data, first)
        whole = _accuracy(ctx, dense, data)
        ctx.measure("dense", **{f"{cell}_accuracy": whole})
        for matrix in _MATRICES:
            for arm, by in _ARMS.items():
                found = []
                for amount in _AMOUNTS:
                    twin = copy.deepcopy(dense)
                    prune_recurrent_(twin, amount, matrix=matrix, by=by, seed=ctx.seed_for("chance", amount))
                    found.append(_accuracy(ctx, twin, data))
                    if amount <= 0.7:
                        _train(ctx, twin, data, again, order="again")
                        lost[arm] += whole - found[-1]
                        back[arm] += _accuracy(ctx, twin, data) - found[-1]
                    ctx.measure(arm, step=amount, **{f"{cell}_{matrix}": found[-1]})
                falls[arm][cell, matrix] = whole - _mean(found)
                kept[arm] += found
    for arm, each in falls.items():
        gaps = {cell: each[cell, "hidden"] - each[cell, "input"] for cell in _CELLS}
        plain, gated = ([each[cell, matrix] for cell in cells for matrix in _MATRICES] for cells in (_PLAIN, _GATED))
        ctx.measure(
            arm,
            third_gap=sorted(gaps.values(), reverse=True)[2],
            gated_advantage=_mean(plain) - _mean(gated),
            restored=back[arm] / lost[arm] if lost[arm] > 0 else 1.0,
            accuracy=_mean(kept[arm]),
            **{f"{cell}_gap": gap for cell, gap in gaps.items()},
        )
    noise = embedded_reber(4000, test=1000, seed=ctx.seed_for("strings"), shuffled=True)
    ctx.measure("shuffled", accuracy=_accuracy(ctx, _trained(ctx, "gru", noise, first), noise))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _accuracy(ctx: Ctx, model: nn.Module, data: Data) -> float:
    return ctx.accuracy(model, data.test_x, data.test_y)


def _trained(ctx: Ctx, cell: str, data: Data, steps: int) -> nn.Module:
    with rng.scope("reader", ctx.seed_for(cell)):
        model = _Reader(cell, data.train_x.shape[-1], data.classes)
    return _train(ctx, model, data, steps, order="order")


def _train(ctx: Ctx, model: nn.Module, data: Data, steps: int, *, order: str) -> nn.Module:
    def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=3e-3, fused=True)

    ctx.train(model, data, steps=steps, optimizer=adam, order=order)
    return model
