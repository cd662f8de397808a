"""Self-distillation from an untrained network: no labels, no augmentation, no teacher that knows anything."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure._kit import BadBudget, UsageError
from nervure.core import forward, rng
from nervure.core.connectivity import interpolated
from nervure.learn._many_heads import width_of
from nervure.learn._teacher_trial import convolutional, noise_like, probed
from nervure.learn.loop import Loop
from nervure.spec import Card, Check, Ctx, claim

CARD = Card(
    id="random-teacher",
    n=11,
    title="Random Teachers are Good Teachers",
    year=2023,
    link="https://arxiv.org/abs/2302.12091",
    family="inspect",
    summary=(
        "A network trained to answer like a frozen, randomly initialised one of its own kind ends with better features "
        "than its teacher, without labels or augmentation. It needs real inputs, and gains most when it starts close "
        "to the teacher; what it finds is also a good start for training with labels."
    ),
    tags=("self-distillation", "self-supervised", "representation", "linear probe", "DINO", "pretraining"),
    provides=("learn_from_random", "ProjectionHead", "start_near", "reshuffled", "Distilled"),
    claims=("a_student_outgrows_its_random_teacher",),
    needs=("data", "grad"),
    deviations=(
        "A fresh draw of weights is the teacher's own entries in another order, unless another draw is given.",
        "Tensors in which both draws agree, such as scales of norms, are not rescaled to keep the variance.",
        "The loss is reported as a divergence: the cross-entropy less the teacher's own entropy, with its gradient.",
        "The claim's head is 512-512-256 to 4,096 outputs where the paper's is 2,048-2,048-256 to 65,536, with weights "
        "twice as large for its width, and it trains for 6 epochs on 4,000 images.",
        "He's draws and that scale were set after a rehearsal without them, in which the teacher's outputs hardly "
        "varied and nothing was learned; strided convolutions in place of pooling after one that took too long.",
        "Starting near is as good as afresh if it is not a point worse, a margin that is not the paper's.",
        "Finding sparse subnetworks and connected fine-tuning from the student is left to other cards.",
    ),
    verified=(
        "Weights after six steps against a loop in float64 with a softmax cross-entropy written out.",
        "A student that starts as its teacher has no gradient, and one with other batch-norm statistics has.",
        "Teacher weights and running statistics stay bit for bit; the head against its formula in numpy.",
    ),
)


class ProjectionHead(nn.Module):
    """Map features to many outputs through a bottleneck of unit length: W z / |z|, z = MLP(x), rows of W of norm 1.

    Args:
        width: Features a sample.
        hidden: Widths of the GELU layers.
        bottleneck: Entries of z.
        outputs: Number of outputs; each is a cosine.
        std: Of the first draw of the GELU layers' weights; narrower layers want 0.02 sqrt(2048 / width).

    Examples:
        >>> head = ProjectionHead(8, hidden=(16,), bottleneck=4, outputs=32)
        >>> found = head(torch.randn(5, 8))
        >>> found.shape, bool((found.abs() <= 1).all())
        (torch.Size([5, 32]), True)
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: Sequence[int] = (2048, 2048),
        bottleneck: int = 256,
        outputs: int = 65536,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        widths = [width, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=std)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.bottleneck = nn.Linear(widths[-1], bottleneck)
        self.directions = nn.Linear(bottleneck, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return cosines, shape (N, outputs)."""
        for layer in self.layers:
            x = F.gelu(layer(x))
        unit = F.normalize(self.bottleneck(x), dim=-1)
        return F.linear(unit, F.normalize(self.directions.weight, dim=-1))


class _Projected(nn.Module):
    """An encoder with a head on its flattened features."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self.head(forward.logits(self.encoder(*args, **kwargs)).flatten(1))
        return found


@dataclass(frozen=True, eq=False)
class Distilled:
    """Hold what a student learnt.

    Args:
        student: The encoder, in eval mode.
        start: It as it was before training, in eval mode.
        losses: Mean divergence from the teacher at each step, shape (steps,), nats.
    """

    student: nn.Module
    start: nn.Module
    losses: Tensor

    @property
    def last(self) -> float:
        """Return the mean divergence of the last tenth of the steps."""
        return float(self.losses[-max(1, len(self.losses) // 10) :].mean())


@torch.no_grad()
def reshuffled(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return a copy with the entries of every trainable tensor in another order.

    For weights drawn independently of one distribution that is a new draw; constants stay constants.

    Args:
        model: The network, left as it is.
        seed: Draws the orders.

    Returns:
        The copy.

    Examples:
        >>> layer = nn.Linear(3, 4)
        >>> other = reshuffled(layer)
        >>> torch.equal(layer.weight, other.weight), bool(layer.weight.sum().isclose(other.weight.sum()))
        (False, True)
    """
    made = copy.deepcopy(model)
    for name, value in made.named_parameters():
        if value.requires_grad:
            order = torch.randperm(value.numel(), generator=rng.generator("reshuffled", seed, name)).to(value.device)
            value.copy_(value.flatten()[order].view_as(value))
    return made


@torch.no_grad()
def start_near(teacher: nn.Module, fresh: nn.Module, alpha: float) -> nn.Module:
    """Return ((1 - alpha) teacher + alpha fresh) / sqrt((1 - alpha)^2 + alpha^2), of the variance of both.

    Differs from the paper: a tensor that is the same in both networks is taken as it is, not divided.

    Args:
        teacher: A network, left as it is; its buffers and what does not require a gradient are kept.
        fresh: Another draw of its weights.
        alpha: From 0, the teacher, to 1, the fresh draw.

    Returns:
        The network.

    Raises:
        UsageError: If alpha is outside [0, 1].

    Examples:
        >>> ends = [nn.Linear(200, 200) for _ in range(2)]
        >>> middle = start_near(*ends, 0.5)
        >>> bool((middle.weight.std() / ends[0].weight.std() - 1).abs() < 0.05)
        True
    """
    if not 0 <= alpha <= 1:
        raise UsageError("there is no such start", expected="alpha from 0 to 1", found=alpha)
    mine, theirs = dict(teacher.named_parameters()), dict(fresh.named_parameters())
    moving = [name for name, value in mine.items() if value.requires_grad]
    made = interpolated(teacher, fresh, alpha, parameters=moving, buffers=False)
    for name, value in made.named_parameters():
        if value.requires_grad and not torch.equal(mine[name], theirs[name].to(mine[name])):
            value.div_(math.hypot(1 - alpha, alpha))
    return made


class _Losses:
    def metrics(self, step: int, loss: float) -> dict[str, float]:
        return {"loss": loss}


def learn_from_random(
    encoder: nn.Module,
    inputs: Any,
    *,
    steps: int,
    alpha: float = 1.0,
    head: nn.Module | None = None,
    fresh: nn.Module | None = None,
    temperature: float = 1.0,
    lr: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
) -> Distilled:
    """Train a student to answer like an untrained encoder under a random head, and return the student's encoder.

    The student is a network of the same kind that starts a share alpha of the way from teacher to fresh weights and
    minimises the mean of KL(softmax(t / T) || softmax(s / T)) by AdamW without weight decay. The teacher is frozen
    and in eval mode, so that its batch norms use the statistics it came with; the student is in train mode.

    Args:
        encoder: The teacher, left as it is; its outputs are the features, a row a sample after flattening. Parameters
            with requires_grad off are the student's too, and stay.
        inputs: Unlabelled inputs of all samples.
        steps: Optimizer steps, at least 1.
        alpha: Where the student starts: 0 as the teacher, where without batch norm there is no gradient but rounding,
            which Adam soon enlarges; 1 afresh.
        head: From features to scores, drawn but not trained; None makes a `ProjectionHead` of 22 million weights.
        fresh: Another draw of the encoder's weights; None takes `reshuffled`, which suits independent draws.
        temperature: T, above 0.
        lr: Learning rate.
        batch_size: Samples a step.
        seed: Draws head, fresh weights and batches.

    Returns:
        The student, where it began, and its losses.

    Raises:
        BadBudget: If there is no step.
        UsageError: If the temperature is not above 0.

    Examples:
        >>> encoder, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU()), torch.randn(64, 6)
        >>> head = ProjectionHead(16, hidden=(16,), bottleneck=8, outputs=32)
        >>> found = learn_from_random(encoder, x, steps=60, lr=0.01, head=head)
        >>> bool(found.losses[-1] < found.losses[0] / 2)
        True
    """
    if steps < 1:
        raise BadBudget("there is nothing to train", expected="steps >= 1", found=steps)
    if temperature <= 0:
        raise UsageError("there is no such temperature", expected="above 0", found=temperature)
    with rng.scope("random teacher", seed):
        width = width_of(encoder, inputs)
        features = forward.predict(encoder, inputs).flatten(1)
        head = head or ProjectionHead(width).to(features)
    teacher = _Projected(encoder, head)
    drawn = _Projected(reshuffled(encoder, seed=seed) if fresh is None else fresh, reshuffled(head, seed=seed))
    student = start_near(teacher, drawn, alpha)
    learning = student.get_submodule("encoder")
    start = copy.deepcopy(learning).eval()

    def loss(scores: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad(), forward.mode(head, train=False):
            targets = (head(features[index.to(features.device)]) / temperature).log_softmax(-1)
        return F.kl_div((scores / temperature).log_softmax(-1), targets, reduction="batchmean", log_target=True)

    moving = [value for value in student.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=lr, weight_decay=0.0)
    samples = (inputs, torch.arange(len(features)))
    loop = Loop(student, optimizer, samples, loss=loss, batch_size=batch_size, hooks=[_Losses()], seed=seed)
    losses = torch.tensor([one["loss"] for one in loop.run(steps).history])
    optimizer.zero_grad(set_to_none=True)
    return Distilled(learning.eval(), start, losses)


@claim(
    CARD,
    checks=(
        Check(name="a point above the teacher", method="student", control="teacher", metric="probe", margin=0.01),
        Check(name="more than from noise", method="student", control="noise images", metric="probe"),
        Check(name="starting near the teacher not a point worse than afresh", method="student", control="afresh",
              metric="probe", margin=-0.01),
    ),
    sabotage={"fresh weights untrained": "student"},
    seeds=5,
    minutes=2.0,
    data=("fashion-mnist",),
)  # fmt: skip
def a_student_outgrows_its_random_teacher(ctx: Ctx) -> None:
    """A student of a random network probes better than it, by real images alone, and starting near it does not hurt.

    A convolutional encoder of three layers with batch norm, 6 epochs on 4,000 images of Fashion-MNIST in batches of
    256, alpha 0.01. Afresh is alpha 1; noise images are Gaussian of the same mean and variance. The probe is ridge
    regression on the features of the same 4,000 images, scored on 1,500 others; that on raw pixels stands beside it.
    """
    data = ctx.data("fashion-mnist", train=4000, test=1500)
    encoder, fresh = convolutional(ctx.generator("teacher")), convolutional(ctx.generator("fresh"))
    with rng.scope("head", ctx.seed_for("head")):
        head = ProjectionHead(576, hidden=(512, 512), bottleneck=256, outputs=4096, std=0.04)
    steps = ctx.scaled(6, 1) * (len(data.train_x) // 256)

    def taught(images: Tensor, alpha: float) -> Distilled:
        return learn_from_random(
            encoder, images, steps=steps, alpha=alpha, head=head, fresh=fresh, seed=ctx.seed_for("run")
        )

    ctx.measure("pixels", probe=probed(nn.Flatten(), data))
    ctx.measure("teacher", probe=probed(encoder, data))
    near = taught(data.train_x, 0.01)
    ctx.measure("student", probe=probed(near.student, data), loss=near.last)
    ctx.progress(1, 3, "afresh")
    afresh = taught(data.train_x, 1.0)
    ctx.measure("afresh", probe=probed(afresh.student, data), loss=afresh.last)
    ctx.measure("fresh weights untrained", probe=probed(afresh.start, data))
    ctx.progress(2, 3, "noise images")
    noise = taught(noise_like(data.train_x, ctx.generator("noise")), 0.01)
    ctx.measure("noise images", probe=probed(noise.student, data), loss=noise.last)
