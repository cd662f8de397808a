"""Concatenated features of networks that differ in their seed alone: richer than those of any one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import Unsupported, UsageError
from nervure.core import forward, rng, taps
from nervure.learn._cat_trial import of_classes, probed
from nervure.learn._many_heads import distil_heads, head_targets
from nervure.spec import Card, Check, Ctx, claim

__all__ = ["Concat", "distil_heads", "head_layer", "head_targets"]

CARD = Card(
    id="cat-representations",
    n=47,
    title="Learning useful representations for shifting tasks and distributions",
    year=2022,
    link="https://arxiv.org/abs/2212.07346",
    family="inspect",
    summary=(
        "A network learns the features its task needs and drops those that would tell nothing more. Networks of other "
        "seeds drop others, so their penultimate features side by side serve a new task better, though on the first "
        "task they add little. The heads of all can be distilled into one network."
    ),
    tags=("transfer", "representation", "seeds", "ensemble", "linear probe", "distillation", "few labels"),
    provides=("Concat", "head_layer"),
    claims=("more_seeds_probe_better",),
    needs=("data", "labels", "grad"),
    deviations=(
        "The claim's networks are small MLPs and its new task five other classes of the same data set.",
        "Fine-tuning and self-supervised networks are left to the user: a Concat is a module like any other.",
        "Features are 16 wide, set after a rehearsal at 64 in which one network reached 0.834, four 0.851 and the "
        "wide one 0.838: how much is gained depends on that width.",
    ),
    verified=(
        "Features equal the inputs of each zoo model's last linear layer; a network concatenated with itself gives the "
        "kernel of one, times their number.",
        "Seeds that pick one of two redundant features by chance: the concatenation spans both.",
    ),
)


def head_layer(model: nn.Module, inputs: Any) -> str:
    """Return the name of the linear layer the outputs come from.

    Args:
        model: The network; it is left as it is.
        inputs: A batch's inputs.

    Returns:
        Its qualified name.

    Raises:
        Unsupported: If the outputs are not those of an nn.Linear.

    Examples:
        >>> head_layer(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.ones(4, 3))
        '2'
    """
    seen: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        return lambda module, args, output: seen.append((name, output))

    linear = [(module, note(name)) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with taps.hooked(linear), forward.mode(model, train=False), torch.no_grad(), rng.scope("head"):
        scores = forward.outputs(model, inputs)
    for name, output in reversed(seen):
        if output.shape == scores.shape and torch.equal(output, scores):
            return name
    raise Unsupported("Concat", model, why="its outputs are not those of an nn.Linear", try_="layers=")


class Concat(nn.Module):
    """Put the features of several networks side by side: the inputs of one layer of each.

    The networks are held, not copied, and run as they are: freeze them, or train them together with a head.

    Args:
        models: The networks, of whatever kinds and widths, that take the same inputs.
        inputs: A batch's inputs, to find the layers; not needed where they are named.
        layers: For each network the name of the layer whose inputs are its features; None takes the last linear one.

    Raises:
        UsageError: If there is no network, or not one layer for each.

    Examples:
        >>> nets = [nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)) for width in (4, 5)]
        >>> x = torch.randn(6, 3)
        >>> features = Concat(nets, x)
        >>> features(x).shape
        torch.Size([6, 9])
        >>> nn.Sequential(features, nn.Linear(9, 7))(x).shape
        torch.Size([6, 7])
    """

    def __init__(self, models: Sequence[nn.Module], inputs: Any = None, *, layers: Sequence[str] | None = None) -> None:
        super().__init__()
        if not models or (layers is None and inputs is None) or (layers is not None and len(layers) != len(models)):
            raise UsageError("nothing to concatenate", expected="networks, and inputs or a layer for each",
                             found=f"{len(models)} networks, layers {layers}")  # fmt: skip
        self.models = nn.ModuleList(models)
        self.layers = tuple(layers) if layers is not None else tuple(head_layer(model, inputs) for model in models)
        for model, layer in zip(models, self.layers, strict=True):
            if layer not in dict(model.named_modules()):
                raise UsageError(f"the network has no layer {layer!r}", expected="a name from named_modules()")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the features, shape (N, ..., sum of the widths).

        Raises:
            Unsupported: If a layer was not called.
        """
        found: list[Tensor] = []
        for model, layer in zip(self.models, self.layers, strict=True):
            seen: list[Tensor] = []

            def keep(module: nn.Module, given: tuple[Any, ...], seen: list[Tensor] = seen) -> None:
                seen[:] = given[:1]

            with taps.hooked([(model.get_submodule(layer), keep)], pre=True):
                model(*args, **kwargs)
            if not seen:
                raise Unsupported("Concat", layer, why="the network does not call this layer")
            found += seen
        return torch.cat(found, -1)


@claim(
    CARD,
    checks=(
        Check(name="3 points above a single network", method="concatenation", control="single", metric="probe",
              margin=0.03),
        Check(name="1 point above a wide network", method="concatenation", control="wide", metric="probe",
              margin=0.01),
    ),
    sabotage={"one network four times": "concatenation"},
    seeds=5,
    minutes=2.0,
    data=("fashion-mnist",),
)  # fmt: skip
def more_seeds_probe_better(ctx: Ctx) -> None:
    """Features of four seeds side by side probe better on new classes than one network's, and than a wide network's.

    MLPs 784-256-16-5 trained for 500 steps on the first five classes of Fashion-MNIST, and a ridge probe on 300 images
    of the other five, scored on 2,000. The wide network has four times the units in each layer, so that its features
    are as many as the concatenation's. Single is the mean over the four. Accuracy on the first five classes stands
    beside it: of one network, of the mean output of four, and of the wide one.
    """
    data = ctx.data("fashion-mnist", train=12_000, test=6_000)
    source, new = of_classes(data, range(5)), of_classes(data, range(5, 10))
    steps = ctx.scaled(500, 50)
    ctx.plan(5 * steps)

    def trained(draw: str, scale: int = 1) -> nn.Module:
        model = ctx.model("mlp", draw=draw, features=784, hidden=(256 * scale, 16 * scale), classes=5)
        return ctx.train(model, source, steps=steps, order=("order", draw))

    nets, wide = [trained(f"seed {number}") for number in range(4)], trained("wide", 4)
    probes = [probed(Concat([net], source.test_x[:8]), new) for net in nets]
    ctx.measure("single", probe=sum(probes) / 4, source=ctx.accuracy(nets[0], source.test_x, source.test_y))
    ctx.measure("one network four times", probe=probed(Concat([nets[0]] * 4, source.test_x[:8]), new))
    mean = head_targets(nets, source.test_x).mean(1).argmax(1)
    ctx.measure(
        "concatenation",
        probe=probed(Concat(nets, source.test_x[:8]), new),
        source=float((mean == source.test_y).double().mean()),
    )
    ctx.measure("wide", probe=probed(Concat([wide], source.test_x[:8]), new),
                source=ctx.accuracy(wide, source.test_x, source.test_y))  # fmt: skip
