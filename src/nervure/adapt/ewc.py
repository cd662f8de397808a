"""Elastic weight consolidation: weights that mattered to old tasks are held by springs of Fisher stiffness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import BadData, BadModel, Unsupported, UsageError
from nervure.core.forward import batch_size, mode, take
from nervure.core.jacobian import Engine
from nervure.core.operators import Likelihood, draw_labels, negative_log_likelihood
from nervure.core.persample import MEMORY, sample_losses, squared_sums
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="ewc",
    n=79,
    title="Overcoming catastrophic forgetting in neural networks",
    year=2016,
    link="https://arxiv.org/abs/1612.00796",
    family="adapt",
    summary=(
        "After each task the weights and the diagonal of their Fisher information are kept; later tasks pay a "
        "quadratic price for moving the weights that mattered."
    ),
    tags=("continual learning", "elastic weight consolidation", "Fisher information", "forgetting", "online EWC"),
    provides=("EWC", "fisher_diagonal"),
    protocol="continual-learner",
    claims=("fisher_anchor_keeps_old_tasks",),
    needs=("data", "labels"),
    deviations=(
        "The springs of all past tasks are folded into one spring for each weight, which gives the same penalty in "
        "the memory of one task.",
    ),
    verified=(
        "The Fisher diagonal equals a float64 loop over samples and classes for any batch size.",
        "The folded penalty and its gradient equal the sum over tasks in float64 to 1e-12.",
    ),
    tunes={"strength": (10.0, 100_000.0)},
)

Estimate = Literal["exact", "sampled", "empirical"]


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    estimate: Estimate = "exact",
    likelihood: Likelihood = "categorical",
    parameters: Iterable[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Measure the diagonal of the Fisher information, a mean over single samples.

    F_i = mean over x of E_{y ~ p(y|x)} (d log p(y|x) / d theta_i)^2. It is not the square of a batch's mean gradient:
    the result does not depend on how samples are batched. The model is measured in eval mode and left as it was.

    Args:
        model: The model; its outputs are logits, or means of unit variance.
        batches: Batches (inputs, targets) of the task.
        estimate: "exact" sums over all classes (outputs of shape (N, O)); "sampled" draws one label for each sample
            from the model; "empirical" takes the given targets.
        likelihood: "categorical" or "gaussian".
        parameters: Names or prefixes; None takes all that require a gradient.
        seed: Seed of the drawn labels.

    Returns:
        Name -> diagonal, shape of the parameter.

    Raises:
        BadData: If there is no sample.
        UsageError: If the estimate is unknown.

    Examples:
        >>> model = nn.Linear(3, 2)
        >>> fisher = fisher_diagonal(model, [(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))])
        >>> {name: tuple(value.shape) for name, value in fisher.items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    if estimate not in ("exact", "sampled", "empirical"):
        raise UsageError("no such estimate", expected='"exact", "sampled" or "empirical"', found=estimate)
    names = None if parameters is None else list(parameters)
    source = torch.Generator().manual_seed(seed)
    total: dict[str, Tensor] = {}
    samples, engine = 0, None
    with mode(model, train=False):
        for inputs, targets in batches:
            engine = engine or Engine(model, inputs, names, method="ewc")
            size = sum(value.numel() * value.element_size() for value in engine.chosen.values())
            chunk = max(1, MEMORY // max(1, size))
            for start in range(0, batch_size(inputs), chunk):
                part = slice(start, start + chunk)
                with engine.trace(take(inputs, part)) as trace:
                    for cotangent in _scores(trace.output.detach(), take(targets, part), estimate, likelihood, source):
                        for name, value in squared_sums(trace.rows(cotangent.unsqueeze(0))).items():
                            total[name] = total[name] + value if name in total else value
            samples += batch_size(inputs)
    if not samples:
        raise BadData("there is no sample to measure the Fisher information on", expected="at least one batch")
    return {name: (value / samples).detach() for name, value in total.items()}


def _scores(
    output: Tensor, targets: Any, estimate: Estimate, likelihood: Likelihood, source: torch.Generator
) -> Iterator[Tensor]:
    """Yield output gradients of the log-likelihood whose squared pull-backs sum to the Fisher diagonal.

    Raises:
        Unsupported: If an exact sum over classes is asked for and the outputs are not (N, O).
    """
    if estimate == "exact":
        if output.ndim != 2:
            raise Unsupported(
                "ewc", "the output", why=f"exact needs outputs (N, O), not {tuple(output.shape)}", try_="sampled"
            )
        p = output.softmax(1)
        for o in range(output.shape[1]):
            unit = torch.zeros_like(output)
            unit[:, o] = 1
            yield unit if likelihood == "gaussian" else (unit - p) * p[:, o : o + 1].sqrt()
        return
    labels = draw_labels(output, likelihood, source) if estimate == "sampled" else targets
    leaf = output.requires_grad_()
    losses = sample_losses(negative_log_likelihood(likelihood), leaf, labels)
    yield torch.autograd.grad(losses.sum(), leaf)[0]


class EWC:
    """Protect old tasks by a quadratic penalty, while the user's own loop learns new ones.

    Add `penalty` to the loss, call `end_task` after each task. The penalty is (strength / 2) sum over tasks t and
    weights i of F_ti (theta_i - theta*_ti)^2, folded into one anchor and one stiffness for each weight. With `decay` it
    is the online variant: F <- decay F + F_new around the last weights only. A head may grow: old rows keep their
    springs, new rows are free.

    Args:
        model: The model, from whose `named_parameters` names are looked up at every call.
        strength: Weight of the penalty, at least 0; it belongs to a Fisher that is a mean over samples.
        decay: The online variant's decay in [0, 1]; None keeps every task's anchor.
        estimate: As in `fisher_diagonal`.
        likelihood: "categorical" or "gaussian".
        parameters: Names or prefixes; None takes all that require a gradient at `end_task`.
        seed: Seed of drawn labels.

    Raises:
        UsageError: If a number is outside its range.

    Examples:
        >>> model = nn.Linear(3, 2)
        >>> ewc = EWC(model, strength=100.0)
        >>> ewc.end_task([(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))])
        >>> ewc.penalty().item()
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 3000.0,
        decay: float | None = None,
        estimate: Estimate = "exact",
        likelihood: Likelihood = "categorical",
        parameters: Iterable[str] | None = None,
        seed: int = 0,
    ) -> None:
        if strength < 0 or (decay is not None and not 0 <= decay <= 1):
            raise UsageError("no such penalty", expected="strength >= 0, decay in [0, 1]", found=(strength, decay))
        self.model, self.strength, self.decay = model, strength, decay
        self.estimate, self.likelihood, self.seed = estimate, likelihood, seed
        self.parameters = None if parameters is None else tuple(parameters)
        self.tasks = 0
        self.stiffness: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.constant: Tensor | float = 0.0

    def penalty(self) -> Tensor:
        """Return what is added to the loss of the present task: zero before the first task has ended.

        Returns:
            A scalar with a graph.

        Raises:
            BadModel: If a protected parameter is gone or has shrunk.
        """
        if not self.stiffness:
            return torch.zeros((), device=next(self.model.parameters()).device)
        present = dict(self.model.named_parameters())
        total: Tensor | float = self.constant
        for name, stiffness in self.stiffness.items():
            old = _require(present, name, stiffness)[_corner(stiffness)]
            total = total + (stiffness * (old - self.anchor[name]).square()).sum()
        return torch.as_tensor(0.5 * self.strength * total)

    def end_task(self, batches: Iterable[Batch]) -> None:
        """Remember the task just learnt: measure the Fisher diagonal at the present weights and fold it in.

        Args:
            batches: Batches (inputs, targets) of the task.
        """
        fisher = fisher_diagonal(
            self.model,
            batches,
            estimate=self.estimate,
            likelihood=self.likelihood,
            parameters=self.parameters,
            seed=self.seed + self.tasks,
        )
        self.absorb(fisher)

    @torch.no_grad()
    def absorb(self, fisher: Mapping[str, Tensor]) -> None:
        """Fold springs of a given stiffness around the present weights into the penalty.

        Two springs make one: F (x - a)^2 + G (x - b)^2 = (F + G) (x - m)^2 + F G / (F + G) (a - b)^2 with m their mean
        weighted by stiffness.

        Args:
            fisher: Name -> stiffness, shape of the parameter.
        """
        present = dict(self.model.named_parameters())
        for name, new in fisher.items():
            here = present[name].detach().clone()
            old, anchor = torch.zeros_like(new), here.clone()
            if name in self.stiffness:
                corner = _corner(self.stiffness[name])
                old[corner], anchor[corner] = self.stiffness[name], self.anchor[name]
            if self.decay is not None:
                self.stiffness[name], self.anchor[name] = self.decay * old + new, here
                continue
            both = old + new
            share = torch.where(both > 0, new / both.clamp_min(torch.finfo(both.dtype).tiny), 0)
            self.constant = self.constant + (old * share * (here - anchor).square()).sum()
            self.stiffness[name], self.anchor[name] = both, anchor + share * (here - anchor)
        if self.decay is not None:
            # A weight that is no longer measured keeps its anchor, and its stiffness fades like all others.
            for name in self.stiffness.keys() - fisher.keys():
                self.stiffness[name] = self.decay * self.stiffness[name]
        self.tasks += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the springs and the number of tasks, as tensors and plain numbers.

        Saved beside the model's and the optimizer's state it continues training bit for bit in another process.

        Returns:
            ``tasks``, ``constant``, and ``stiffness`` and ``anchor`` by parameter name; the tensors are copies.

        Examples:
            >>> model = nn.Linear(3, 2)
            >>> ewc, again = EWC(model), EWC(model)
            >>> ewc.end_task([(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))])
            >>> again.load_state_dict(ewc.state_dict())
            >>> again.tasks, sorted(again.stiffness)
            (1, ['bias', 'weight'])
        """
        constant = self.constant.clone() if isinstance(self.constant, Tensor) else self.constant
        springs = {key: {name: value.clone() for name, value in vars(self)[key].items()} for key in _SPRINGS}
        return {"tasks": self.tasks, "constant": constant, **springs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; nothing changes where it does not fit.

        Tensors are copied to the device and precision of the model's parameters. A head may have grown since.

        Args:
            state: The state of an `EWC` with the same arguments over the same model.

        Raises:
            BadData: If it is no such state.
            BadModel: If a protected parameter is not in this model, or smaller there.
        """
        missing = {"tasks", "constant", *_SPRINGS} - set(state)
        if missing or {k: v.shape for k, v in state["stiffness"].items()} != {
            k: v.shape for k, v in state["anchor"].items()
        }:
            found = f"no {', '.join(sorted(missing))}" if missing else "stiffness and anchor of different shapes"
            raise BadData("this is no state of EWC", expected="what state_dict returned", found=found)
        present = dict(self.model.named_parameters())
        # A copy: a later in-place change of the caller's tensors must not move the springs.
        springs = {
            key: {
                name: value.detach().to(_require(present, name, value), copy=True) for name, value in state[key].items()
            }
            for key in _SPRINGS
        }
        constant = state["constant"]
        if isinstance(constant, Tensor):
            constant = constant.detach().to(next(iter(springs["anchor"].values()), constant), copy=True)
        self.tasks, self.constant = int(state["tasks"]), constant
        self.stiffness, self.anchor = springs["stiffness"], springs["anchor"]


_SPRINGS = ("stiffness", "anchor")


def _require(present: Mapping[str, Tensor], name: str, stored: Tensor) -> Tensor:
    """Return the parameter a spring holds.

    Raises:
        BadModel: If it is gone or has shrunk.
    """
    value = present.get(name)
    if (
        value is None
        or value.ndim != stored.ndim
        or any(now < old for now, old in zip(value.shape, stored.shape, strict=True))
    ):
        found = "nothing" if value is None else tuple(value.shape)
        raise BadModel(f"the protected parameter {name} is gone", expected=tuple(stored.shape), found=found)
    return value


def _corner(stored: Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, length) for length in stored.shape)


def _network(source: torch.Generator) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    with torch.no_grad():
        for value in model.parameters():
            fan = value.shape[1] if value.ndim > 1 else 0
            value.copy_(
                torch.randn(value.shape, generator=source) * (2 / fan) ** 0.5 if fan else torch.zeros_like(value)
            )
    return model


def _altered(fisher: dict[str, Tensor], arm: str, source: torch.Generator) -> dict[str, Tensor]:
    """Return the Fisher diagonal, its mean everywhere (the L2 anchor), or its entries shuffled within each tensor."""
    if arm == "l2":
        mean = torch.cat([value.flatten() for value in fisher.values()]).mean()
        return {name: mean.expand_as(value).clone() for name, value in fisher.items()}
    if arm == "shuffled":
        return {
            name: value.flatten()[torch.randperm(value.numel(), generator=source)].view_as(value)
            for name, value in fisher.items()
        }
    return fisher


@claim(
    CARD,
    checks=(
        Check(name="beats plain training", method="ewc", control="plain", metric="accuracy", rule="every-seed"),
        Check(name="beats the L2 anchor", method="ewc", control="l2", metric="accuracy", rule="every-seed"),
        Check.at_most("halves the forgetting", method="ewc", metric="forgetting_ratio", bound=0.5),
        Check.at_most(
            "a shuffled Fisher keeps less than half of the gain", method="shuffled", metric="share_of_gain", bound=0.5
        ),
    ),
    sabotage={"shuffled": "ewc"},
    seeds=5,
    minutes=4.0,
    data=("fashion-mnist",),
)  # fmt: skip
def fisher_anchor_keeps_old_tasks(ctx: Ctx) -> None:
    """Weighting the anchor by the Fisher diagonal retains old tasks where a uniform anchor of the same mean does not.

    Three permutations of Fashion-MNIST, 8,000 images each, MLP 784-256-256-10, two epochs of Adam at 1e-3, strength
    3000. Controls: plain training, and the L2 anchor of the same mean stiffness. The sabotage shuffles Fisher entries
    within each tensor; the share of the gain it keeps is measured too.
    """
    data = ctx.data("fashion-mnist", train=ctx.scaled(8000, 1000), test=2000)
    x, z = data.train_x.flatten(1), data.test_x.flatten(1)
    orders = [torch.randperm(784, generator=ctx.generator("permutation", task)) for task in range(3)]
    forgetting: dict[str, float] = {}
    for arm in ("plain", "ewc", "l2", "shuffled"):
        model = _network(ctx.generator("start"))
        ewc = EWC(model, strength=0.0 if arm == "plain" else 3000.0)
        table = torch.zeros(3, 3, dtype=torch.float64)
        for task, order in enumerate(orders):
            ctx.progress(task, 3, arm)
            _learn(ctx, model, ewc, x[:, order], data.train_y, task)
            if arm != "plain":
                fisher = fisher_diagonal(model, [(x[:, order], data.train_y)])
                ewc.absorb(_altered(fisher, arm, ctx.generator("shuffle", task)))
            for past in range(task + 1):
                table[task, past] = ctx.accuracy(model, z[:, orders[past]], data.test_y)
        forgetting[arm] = float((table[:2, :2].max(0).values - table[2, :2]).mean())
        ratio = forgetting[arm] / max(forgetting["plain"], 1e-9)
        ctx.measure(arm, accuracy=float(table[2].mean()), forgetting=forgetting[arm], forgetting_ratio=ratio)
    gain = forgetting["plain"] - forgetting["ewc"]
    kept = (forgetting["plain"] - forgetting["shuffled"]) / max(gain, 1e-9)
    ctx.measure("shuffled", share_of_gain=kept)


def _learn(ctx: Ctx, model: nn.Module, ewc: EWC, x: Tensor, y: Tensor, task: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    source = ctx.generator("order", task)
    for _ in range(2):
        for index in torch.randperm(len(x), generator=source).split(64):
            optimizer.zero_grad()
            (F.cross_entropy(model(x[index]), y[index]) + ewc.penalty()).backward()
            optimizer.step()
