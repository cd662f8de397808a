"""Mono-Forward: every block learns from its own cross-entropy through a projection of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure._kit import BadData, Diverged, Unsupported, UsageError
from nervure.core import blocks, forward, rng
from nervure.core.budget import Meter
from nervure.learn.loop import Loop, cross_entropy
from nervure.spec import Batch, Card, Check, Ctx, Data, claim

CARD = Card(
    id="mono-forward",
    n=127,
    title=(
        "Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training Harnessing Local Errors"
    ),
    year=2025,
    link="https://arxiv.org/abs/2501.09238",
    family="train",
    summary=(
        "Every hidden layer has a projection to class scores, its goodness, and learns with it from the cross-entropy "
        "of those scores alone; what it hands on is detached. One forward pass a step, no negative data, and the "
        "activations of one layer in memory at a time."
    ),
    tags=("local learning", "forward-forward", "backpropagation-free", "memory", "layer-wise", "goodness"),
    provides=("MonoForward",),
    protocol="training-rule",
    claims=("accuracy", "memory"),
    needs=("data", "labels", "grad"),
    deviations=(
        "The projection of the last hidden layer is the network's own output layer, so that the trained network can "
        "be used by itself; its forward is the back-propagation reading of the paper.",
        "Blocks may be more than one layer; convolutional activations are flattened, or pooled on demand.",
        "The authors' second version (arXiv v2, 2026) claims a competitive baseline, no longer a match of "
        "back-propagation everywhere; the claim here is the first version's.",
    ),
    verified=(
        "Every block's gradient equals autograd of its own loss with a detached input, in float64.",
        "The gradient of a block's loss by every other block's parameters is exactly zero.",
        "Saved bytes of a step equal a count by hand and do not grow with depth.",
    ),
)

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Features = Literal["flatten", "pool"]


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


class MonoForward:
    """Train a network block by block, each from its own loss; at no time do two blocks' activations exist for backward.

    Block i gives a_i from the detached a_{i-1} and G_i = M_i a_i; its parameters and M_i follow the gradient of
    cross-entropy(G_i, y). The last block holds the network's output layer and needs no projection of its own.

    Args:
        model: A classifier, changed in place by `step`.
        inputs: Example inputs, from which the shapes of the blocks are read.
        parts: The blocks in order, as in `nervure.core.blocks.cut`; by default they are found by tracing and the
            output layer joins the last hidden block.
        optimizer: From parameters to a torch optimizer; each block gets one.
        features: What a projection reads of an activation with more than one axis: all of it, flattened, or its
            mean over positions.
        reading: How `predict` answers: ``"bp"`` by the network's own output, ``"ff"`` by the sum of all goodnesses.
        seed: Draws the projections and the random stream of Dropout.

    Raises:
        Unsupported: If the network cannot be cut, is one block, or shares a parameter between blocks.
        UsageError: If an option is unknown.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> x, y = torch.randn(64, 8), torch.arange(64) % 3
        >>> rule = MonoForward(net, x)
        >>> losses = [rule.step((x, y))["loss"] for _ in range(50)]
        >>> losses[-1] < losses[0]
        True
        >>> torch.equal(rule.predict(x), net(x))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        parts: Sequence[blocks.Part | Sequence[blocks.Part]] | None = None,
        optimizer: Optimizers = _adam,
        features: Features | Callable[[Tensor], Tensor] = "flatten",
        reading: Literal["bp", "ff"] = "bp",
        seed: int = 0,
    ) -> None:
        if reading not in ("bp", "ff") or (isinstance(features, str) and features not in ("flatten", "pool")):
            raise UsageError("unknown option", expected="bp or ff; flatten or pool", found=f"{reading}; {features}")
        self.model, self.features, self.reading = model, features, reading
        cuts = blocks.cut(model, parts=parts)
        self.blocks = cuts if parts is not None else [*cuts[:-2], blocks.Chain(cuts[-2:])]
        _refuse(model, self.blocks)
        shapes = blocks.check(self.blocks, model, inputs)
        self._per_position = shapes[-1].ndim > 2
        self.projections = nn.ModuleList()
        with rng.scope("mono-forward", seed):
            for index, activation in enumerate(shapes[:-1]):
                width = self._read(activation, index).shape[-1]
                made = nn.Linear(width, shapes[-1].shape[-1], bias=False)
                self.projections.append(made.to(device=activation.device, dtype=activation.dtype))
        self.optimizers = [self._optimizer(optimizer, index) for index in range(len(self.blocks))]
        self.steps = 0
        self._stream = rng.generator("mono-forward", "stream", seed).get_state()

    def _optimizer(self, make: Optimizers, index: int) -> torch.optim.Optimizer | None:
        own = [*self.blocks[index].parameters()]
        own += [*self.projections[index].parameters()] if index < len(self.projections) else []
        trainable = [parameter for parameter in own if parameter.requires_grad]
        return make(trainable) if trainable else None

    def _read(self, activation: Tensor, index: int) -> Tensor:
        """Return the vector a projection reads: per sample, or per position where there is a target for each."""
        if not isinstance(self.features, str):
            return self.features(activation)
        if self._per_position or activation.ndim == 2:
            return activation
        if self.features == "flatten":
            return activation.flatten(1)
        channels_first = activation.ndim > 3 or any(
            isinstance(module, nn.Conv1d) for module in self.blocks[index].modules()
        )
        positions = range(2, activation.ndim) if channels_first else range(1, activation.ndim - 1)
        return activation.mean(tuple(positions))

    def goodness(self, index: int, output: Any) -> Tensor:
        """Return the class scores of one block.

        Args:
            index: Number of the block, from 0.
            output: What the block returned.

        Returns:
            Scores, shape (N, classes), or (N, positions, classes).
        """
        found = forward.logits(output)
        return found if index == len(self.projections) else self.projections[index](self._read(found, index))

    def local_loss(self, index: int, output: Any, targets: Tensor) -> Tensor:
        """Return the loss one block learns from.

        Args:
            index: Number of the block, from 0.
            output: What the block returned.
            targets: Class numbers.

        Returns:
            A scalar.
        """
        return cross_entropy(self.goodness(index, output), targets)

    def step(self, batch: Batch) -> Mapping[str, float]:
        """Learn from one batch: forward, backward and update of one block after the other.

        Args:
            batch: Inputs and class numbers.

        Returns:
            ``loss`` of the output, and ``loss/i`` of every block.

        Raises:
            BadData: If inputs and targets differ in length.
            Diverged: If a loss is NaN or infinite; the blocks before have then taken their step, others not.
        """
        value, targets = batch
        if forward.batch_size(value) != len(targets):
            raise BadData("inputs and targets differ in length", found=f"{forward.batch_size(value)}, {len(targets)}")
        losses: dict[str, float] = {}
        with forward.mode(self.model, train=True), rng.scope():
            torch.set_rng_state(self._stream)
            for index, (block, optimizer) in enumerate(zip(self.blocks, self.optimizers, strict=True)):
                with torch.set_grad_enabled(optimizer is not None):
                    output = forward.call(block, value) if index == 0 else block(value)
                    loss = self.local_loss(index, output, targets)
                losses[f"loss/{index}"] = float(loss.detach())
                if not math.isfinite(losses[f"loss/{index}"]):
                    raise Diverged(self.steps, losses[f"loss/{index}"])
                if optimizer is not None:
                    optimizer.zero_grad(set_to_none=True)  # the user may have left gradients there
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                # The detached activation is all the next block gets; this one's graph is freed here.
                value = forward.logits(output).detach()
                del output, loss
            self._stream = torch.get_rng_state()
        self.steps += 1
        return {"loss": losses[f"loss/{len(self.blocks) - 1}"], **losses}

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return class scores in eval mode, by the rule's reading.

        Args:
            x: Inputs, as the model takes them.

        Returns:
            Scores, shape (N, classes) or (N, positions, classes).
        """
        if self.reading == "bp":
            return forward.predict(self.model, x, batch=max(1, forward.batch_size(x)))
        with forward.mode(self.model, train=False):
            value, total = x, torch.zeros(())
            for index, block in enumerate(self.blocks):
                output = forward.call(block, value) if index == 0 else block(value)
                total = self.goodness(index, output) + total
                value = forward.logits(output)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on bit for bit."""
        return {
            "model": self.model.state_dict(),
            "projections": self.projections.state_dict(),
            "optimizers": [made.state_dict() if made else None for made in self.optimizers],
            "steps": self.steps,
            "stream": self._stream,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` returned, from a rule with the same model and options.
        """
        self.model.load_state_dict(state["model"])
        self.projections.load_state_dict(state["projections"])
        for made, values in zip(self.optimizers, state["optimizers"], strict=True):
            if made is not None:
                made.load_state_dict(values)
        self.steps, self._stream = state["steps"], state["stream"]


def _refuse(model: nn.Module, parts: Sequence[nn.Module]) -> None:
    if len(parts) < 2:
        raise Unsupported("MonoForward", model, why="with one hidden block it is back-propagation", try_="a deeper one")
    owner: dict[int, int] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, block in enumerate(parts):
        for parameter in block.parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise Unsupported("MonoForward", names[id(parameter)], why="two blocks share this parameter")
    left = [name for key, name in names.items() if key not in owner]
    if left:
        raise Unsupported("MonoForward", left[0], why="no block holds this parameter", try_="listing it in `parts`")


class _ShuffledHidden(MonoForward):
    """The sabotage: hidden blocks learn wrong labels."""

    def local_loss(self, index: int, output: Any, targets: Tensor) -> Tensor:
        if index < len(self.projections):
            targets = targets[torch.randperm(len(targets))]
        return super().local_loss(index, output, targets)


RATES = (3e-4, 1e-3, 3e-3)


def _train(ctx: Ctx, model: nn.Module, data: Data, *, rule: type[MonoForward], rate: float, steps: int) -> None:
    """Train by a rule, on the batches `ctx.train` would draw."""
    made = rule(model, data.train_x[:4], optimizer=lambda own: torch.optim.Adam(own, lr=rate), seed=ctx.seed_for("mf"))
    order = Loop(model, torch.optim.SGD(model.parameters()), (data.train_x, data.train_y), seed=ctx.seed_for("order"))
    for step in range(steps):
        made.step(order.batch(step))


def _random_features(ctx: Ctx, model: nn.Module, data: Data, rate: float, steps: int) -> None:
    """Train the output layer alone."""
    own = set(blocks.cut(model)[-1].parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in own)
    ctx.train(model, data, steps=steps, optimizer=lambda left: torch.optim.Adam(left, lr=rate))


def _back_propagation(ctx: Ctx, model: nn.Module, data: Data, rate: float, steps: int) -> None:
    ctx.train(model, data, steps=steps, optimizer=lambda own: torch.optim.Adam(own, lr=rate))


def _within_a_point(metric: str) -> tuple[Check, Check]:
    return (
        Check(name=f"MF is not 1 point below BP: {metric}", method="MF", control="BP", metric=metric, margin=-0.01),
        Check(name=f"MF is not 1 point above BP: {metric}", method="BP", control="MF", metric=metric, margin=-0.01),
    )


@claim(
    CARD,
    checks=(
        *_within_a_point("digits_mlp"),
        *_within_a_point("fashion_mlp"),
        Check(
            name="MF is clearly above random features",
            method="MF",
            control="random features",
            metric="fashion_mlp",
            margin=0.01,
        ),
    ),
    sabotage={"MF, hidden labels shuffled": "MF"},
    seeds=5,
    minutes=5,
    data=("digits", "fashion-mnist"),
)
def accuracy(ctx: Ctx) -> None:
    """An MLP trained by Mono-Forward is within one point of back-propagation and clearly above random features.

    MLP 3x256 on digits and 12,000 of Fashion-MNIST, each arm with the best of three learning rates by validation
    accuracy. A small CNN, a residual net of four blocks and a depth sweep on digits are measured at the rate 1e-3,
    without a bound.
    """
    steps = ctx.scaled(600, 30)
    digits = ctx.data("digits", test=450, validation=200).flat()
    clothes = ctx.data("fashion-mnist", train=ctx.scaled(12_000, 600), test=2000, validation=1000)
    hidden = (256, 256, 256)
    problems: dict[str, tuple[Callable[[], nn.Module], Data, int]] = {
        "digits_mlp": (lambda: ctx.model("mlp", features=64, hidden=hidden), digits, steps),
        "fashion_mlp": (lambda: ctx.model("mlp", features=784, hidden=hidden), clothes, steps),
        "fashion_cnn": (lambda: ctx.model("lenet"), clothes, steps // 3),
        "fashion_residual": (lambda: ctx.model("residual-conv", widths=(8, 16, 16, 16)), clothes, steps // 3),
    }
    arms: dict[str, Callable[[nn.Module, Data, float, int], None]] = {
        "BP": lambda net, data, rate, count: _back_propagation(ctx, net, data, rate, count),
        "MF": lambda net, data, rate, count: _train(ctx, net, data, rule=MonoForward, rate=rate, steps=count),
        "random features": lambda net, data, rate, count: _random_features(ctx, net, data, rate, count),
        "MF, hidden labels shuffled": lambda net, data, rate, count: _train(
            ctx, net, data, rule=_ShuffledHidden, rate=rate, steps=count
        ),
    }
    jobs = [(arm, problem) for problem in problems for arm in arms if "mlp" in problem or arm in ("BP", "MF")]
    for done, (arm, problem) in enumerate(jobs):
        build, data, count = problems[problem]
        reached = []
        for rate in RATES if "mlp" in problem else (1e-3,):
            net = build()
            arms[arm](net, data, rate, count)
            reached.append(
                (ctx.accuracy(net, data.validation_x, data.validation_y), ctx.accuracy(net, data.test_x, data.test_y))
            )
        ctx.measure(arm, **{problem: max(reached, key=lambda pair: pair[0])[1]})
        ctx.progress(done + 1, len(jobs) + 6, problem)
    for depth in (3, 6, 12):
        for arm in ("BP", "MF"):
            net = ctx.model("mlp", features=64, hidden=(128,) * depth, classes=10)
            arms[arm](net, digits, 1e-3, steps)
            ctx.measure(arm, step=depth, digits_by_depth=ctx.accuracy(net, digits.test_x, digits.test_y))


@claim(
    CARD,
    checks=(Check.at_most("memory grows little with depth", method="MF", metric="growth", bound=0.3),),
    sabotage={"BP": "MF"},
    seeds=5,
    minutes=1,
)
def memory(ctx: Ctx) -> None:
    """The peak of saved bytes grows by less than 30% of back-propagation's for every further layer.

    MLPs of width 256 and depth 3 to 12, batch 128, bytes that autograd keeps during one step.
    """
    depths = (3, 6, 9, 12)
    draw = ctx.generator("batch")
    x, y = torch.randn(128, 64, generator=draw), torch.randint(10, (128,), generator=draw)
    peaks: dict[str, list[int]] = {"BP": [], "MF": []}
    for depth in depths:
        net = ctx.model("mlp", features=64, hidden=(256,) * depth, classes=10)
        rule = MonoForward(net, x)
        with Meter(net) as meter:
            F.cross_entropy(net(x), y).backward()
        peaks["BP"].append(meter.peak_saved_bytes)
        net.zero_grad(set_to_none=True)
        with Meter(net, rule.projections) as meter:
            rule.step((x, y))
        peaks["MF"].append(meter.peak_saved_bytes)
        for arm, counts in peaks.items():
            ctx.measure(arm, step=depth, peak_saved_bytes=counts[-1])
    slopes = {arm: (counts[-1] - counts[0]) / (depths[-1] - depths[0]) for arm, counts in peaks.items()}
    for arm, slope in slopes.items():
        ctx.measure(arm, bytes_per_layer=slope, growth=slope / slopes["BP"])
