"""Dead-neuron rates: the share of zero ReLU outputs of any network, which falls as the network is pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nervure._kit import BadData, Unsupported, UsageError
from nervure.compress._aslp_trial import conv4
from nervure.compress.claim_task import ClaimTask
from nervure.compress.recipe import Recipe, chance
from nervure.core import forward, masks, rng, taps
from nervure.spec import Budget, Card, Check, Ctx, claim

CARD = Card(
    id="activate-while-pruning",
    n=284,
    title="AP: Selective Activation for De-sparsifying Pruned Neural Networks",
    year=2022,
    link="https://arxiv.org/abs/2212.06145",
    family="compress",
    summary=(
        "The dynamic dead-neuron rate is the share of ReLU outputs that are zero, averaged over samples; the static "
        "rate is the share of units that are zero for all of them. The more a network is pruned, the lower the dynamic "
        "rate becomes, and the paper adds to any pruner a step that lowers it further."
    ),
    tags=("pruning", "dead neurons", "ReLU", "activation sparsity", "diagnostic"),
    provides=("dead_neurons", "DeadNeurons"),
    claims=("rate_falls_with_density",),
    needs=("data",),
    deviations=(
        "Only the diagnostic and the observation are here. AP itself, the pruning step that wakes units, is not: "
        "neither its metric nor its rewinding could be established from a source.",
        "A unit is one entry of an activation; a convolution has one for each channel and place.",
    ),
    verified=(
        "Rates equal counts by hand on networks of modules, functions and in-place operations.",
        "On every network of the zoo rates equal those of the pre-activations that are not positive.",
    ),
)

_ATEN = torch.ops.aten
# From an operation to the name of the activation; the value is dead where the unit is off.
_ACTIVATIONS: dict[Any, str] = {
    _ATEN.relu.default: "relu",
    _ATEN.relu_.default: "relu",
    _ATEN.gelu.default: "gelu",
    _ATEN.gelu_.default: "gelu",
    _ATEN.silu.default: "silu",
    _ATEN.silu_.default: "silu",
    _ATEN.hardswish.default: "hardswish",
    _ATEN.hardswish_.default: "hardswish",
}
# Operations that are a ReLU where their lower end is 0.
_FROM_ZERO: dict[Any, str] = {
    _ATEN.hardtanh.default: "relu6",
    _ATEN.hardtanh_.default: "relu6",
    _ATEN.clamp_min.default: "clamp",
    _ATEN.clamp_min_.default: "clamp",
    _ATEN.clamp.default: "clamp",
    _ATEN.clamp_.default: "clamp",
}


@dataclass
class Rates:
    """Count the outputs of one activation.

    Args:
        dead: Outputs at or below the threshold, over all samples.
        outputs: Outputs in all.
        awake: Per unit, whether it was above the threshold for some sample; None where the first axis is not that
            of samples, or the shape changes from batch to batch.
    """

    dead: int = 0
    outputs: int = 0
    awake: Tensor | None = None

    @property
    def dynamic(self) -> float:
        """Return the share of dead outputs."""
        return self.dead / max(1, self.outputs)

    @property
    def static(self) -> float | None:
        """Return the share of units dead for all samples, or None where units cannot be told from samples."""
        return None if self.awake is None else 1 - float(self.awake.double().mean())


@dataclass(frozen=True)
class DeadNeurons:
    """Hold the dead-neuron rates of a network.

    Args:
        layers: Name -> counts. An activation module has its own name; a function is called by the module that
            calls it, its own name and, from the second on, its number.
        samples: Number of samples.
    """

    layers: Mapping[str, Rates]
    samples: int = field(default=0)

    @property
    def dynamic(self) -> float:
        """Return the share of dead outputs of all layers together, averaged over samples."""
        return sum(rates.dead for rates in self.layers.values()) / sum(one.outputs for one in self.layers.values())

    @property
    def static(self) -> float | None:
        """Return the share of units that are dead for all samples, over the layers where it is known."""
        awake = [rates.awake.flatten() for rates in self.layers.values() if rates.awake is not None]
        return 1 - float(torch.cat(awake).double().mean()) if awake else None


def dead_neurons(model: nn.Module, inputs: Any, *, threshold: float = 0.0, batch: int = 1024) -> DeadNeurons:
    """Return how many activations of a network are off, in eval mode.

    Dynamic rate = mean over samples and units of [output <= threshold]; static rate = share of units with
    output <= threshold for all samples. Counted is every ReLU, ReLU6, GELU, SiLU and hard swish that runs, be it a
    module, a function or in place, and clamping from 0: a module called twice counts twice. At threshold 0 a GELU or
    SiLU is off where its input is not positive. Tanh, sigmoid and leaky units are never off and not counted.

    Args:
        model: Any module; left as it was.
        inputs: Inputs of the samples to count over, as `nervure.core.forward.call` takes them.
        threshold: Largest output that counts as off, at least 0.
        batch: Samples per forward, at least 1.

    Returns:
        The rates, in all and by layer.

    Raises:
        Unsupported: If no such activation runs.
        BadData: If there is no sample.
        UsageError: If the threshold is negative.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]]))
        ...     _ = net[0].bias.zero_()
        >>> found = dead_neurons(net, torch.tensor([[1.0, 2.0], [-1.0, 3.0]]))
        >>> round(found.dynamic, 3), round(found.static, 3)  # the third unit never fires
        (0.667, 0.333)
    """
    if threshold < 0:
        raise UsageError("a dead output is not negative", expected="threshold >= 0", found=threshold)
    count = forward.batch_size(inputs)
    if count < 1:
        raise BadData("there is no sample to count over", expected="at least one")
    counter = _Counter(threshold)
    with counter.watching(model), rng.scope(), torch.no_grad(), forward.mode(model, train=False), _no_fused_encoder():
        for start in range(0, count, batch):
            part = forward.take(inputs, slice(start, start + batch))
            counter.begin(forward.batch_size(part))
            with counter:
                forward.call(model, part)
    if not counter.rates:
        raise Unsupported(
            "dead_neurons", model, why="it runs no activation that can be off", try_="a network with ReLU or GELU"
        )
    return DeadNeurons(counter.rates, count)


class _Counter(TorchDispatchMode):
    """Count the outputs of activations as they are computed, whatever called them."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold, self.samples = threshold, 0
        self.rates: dict[str, Rates] = {}
        self._path: list[tuple[str, nn.Module]] = []
        self._seen: Counter[str] = Counter()

    def begin(self, samples: int) -> None:
        """Start a batch."""
        self.samples = samples
        self._seen.clear()
        self._path.clear()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the module that runs."""

        def enter(name: str, module: nn.Module) -> Callable[..., None]:
            return lambda *_: self._path.append((name, module))

        def leave(*_: Any) -> None:
            self._path.pop()

        modules = list(model.named_modules())
        entering, leaving = [(m, enter(name, m)) for name, m in modules], [(m, leave) for _, m in modules]
        with taps.hooked(entering, pre=True), taps.hooked(leaving):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its output where it is an activation."""
        output = func(*args, **(kwargs or {}))
        name = _ACTIVATIONS.get(func) or (_FROM_ZERO.get(func) if _lower_end(func, args, kwargs or {}) == 0 else None)
        if name is not None and output.is_floating_point():
            self._count(name, output)
        return output

    def _count(self, activation: str, output: Tensor) -> None:
        path, module = self._path[-1] if self._path else ("", None)
        alone = module is not None and not list(module.children()) and not list(module.parameters())
        name = path if alone and path else f"{path}.{activation}" if path else activation
        self._seen[name] += 1
        key = name if self._seen[name] == 1 else f"{name}#{self._seen[name]}"
        on = output > self.threshold
        awake = on.any(0) if on.ndim > 1 and len(on) == self.samples else None
        before = self.rates.get(key)
        rates = self.rates.setdefault(key, Rates(awake=awake))
        rates.dead += on.numel() - int(on.count_nonzero())
        rates.outputs += on.numel()
        if before is not None:
            fits = rates.awake is not None and awake is not None and rates.awake.shape == awake.shape
            rates.awake = rates.awake | awake if fits else None  # type: ignore[operator]


def _lower_end(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the lower end of a clamping operation, or None."""
    if func not in _FROM_ZERO:
        return None
    found = args[1] if len(args) > 1 else kwargs.get("min", kwargs.get("min_val"))
    return found if isinstance(found, int | float) else None


@contextmanager
def _no_fused_encoder() -> Iterator[None]:
    """Keep encoder layers from running as one fused operation, in which no activation is seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _falls(network: str) -> Check:
    return Check.at_most(
        f"the dynamic rate falls with every pruning, {network}", method="imp", metric=f"{network}_spearman", bound=-0.9
    )


@claim(
    CARD,
    checks=(_falls("mlp"), _falls("vgg")),
    sabotage={"rounds permuted": "imp"},
    seeds=5,
    minutes=5,
    data=("fashion-mnist",),
)
def rate_falls_with_density(ctx: Ctx) -> None:
    """The dynamic dead-neuron rate falls as iterative magnitude pruning goes on: its rank correlation is -0.9 or less.

    Fashion-MNIST, LeNet-300-100 (500 steps of Adam a round) and a small VGG on images of half the size (300), eight
    rounds of lottery-ticket pruning to 5% density; the rate of each trained round on 2,000 test samples against its
    sparsity. Beside it, for the first network: random pruning in as many rounds, and the masks of each round on
    weights at their start. The sabotage permutes the rounds.
    """
    data = ctx.data("fashion-mnist", test=2000)
    rounds, full = 8, {"mlp": ctx.scaled(500, 50), "vgg": ctx.scaled(300, 30)}
    ctx.plan((rounds + 1) * (2 * full["mlp"] + full["vgg"]))
    imp = Recipe(name="IMP", when="train", allocator="global")
    arms = {
        ("mlp", "imp"): imp,
        ("vgg", "imp"): imp,
        ("mlp", "random"): Recipe(name="random", score=chance, when="train", allocator="global"),
    }
    for (network, arm), recipe in arms.items():
        model = ctx.model("lenet-300-100", data=data)
        if network == "vgg":
            with rng.scope("vgg", ctx.seed_for("weights")):
                model = conv4(data)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        sparsity, rates, untrained = [], [], []
        for index in recipe.iterate(
            model, ClaimTask(ctx, data), Budget(target=0.05), count=rounds, steps=full[network], seed=ctx.seed
        ):
            kept = masks.read(model)
            sparsity.append(1 - masks.density(kept) if kept else 0.0)
            rates.append(dead_neurons(model, data.test_x).dynamic)
            ctx.measure(arm, step=index, **{f"{network}_rate": rates[-1]})
            untrained.append(_rate_at(model, start, data.test_x))
        ctx.measure(
            arm,
            **{
                f"{network}_spearman": _rank_correlation(sparsity, rates),
                f"{network}_first": rates[0],
                f"{network}_last": rates[-1],
                f"{network}_accuracy": ctx.accuracy(model, data.test_x, data.test_y),
            },
        )
        if arm == "imp":
            order = torch.randperm(len(rates), generator=ctx.generator("order", network)).tolist()
            found = _rank_correlation(sparsity, [rates[place] for place in order])
            ctx.measure("rounds permuted", **{f"{network}_spearman": found})
            ctx.measure("at start", **{f"{network}_spearman": _rank_correlation(sparsity, untrained)})


def _rank_correlation(x: list[float], y: list[float]) -> float:
    return float(stats.spearmanr(x, y).statistic)


@torch.no_grad()
def _rate_at(model: nn.Module, start: list[Tensor], inputs: Tensor) -> float:
    """Return the rate with the masks at hand on the first weights, and put the trained ones back."""
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter, first in zip(model.parameters(), start, strict=True):
        parameter.copy_(first)
    rate = dead_neurons(model, inputs).dynamic  # the model's forward puts its masks in force
    for parameter, value in zip(model.parameters(), trained, strict=True):
        parameter.copy_(value)
    return rate
