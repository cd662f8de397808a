"""What the claim on flatness trains: two-layer ReLU networks on a parity of two bits, several side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nervure.spec import Ctx

INPUTS, WIDTH = 30, 256


class TwoLayer(nn.Module):
    """Compute v' relu(W x + b), or v' relu(z / |z| sqrt(h)) of z = W x + b.

    Args:
        W: Shape (h, d).
        b: Shape (h,), or None for a network without biases.
        v: Shape (h,).
        normed: Whether z is divided by its length, a layer norm without its mean.
    """

    def __init__(self, W: Tensor, b: Tensor | None, v: Tensor, *, normed: bool = False) -> None:
        super().__init__()
        self.W, self.v = nn.Parameter(W.clone()), nn.Parameter(v.clone())
        self.b = None if b is None else nn.Parameter(b.clone())
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.W.T
        z = z if self.b is None else z + self.b
        z = z / z.norm(dim=1, keepdim=True) * len(self.v) ** 0.5 if self.normed else z
        return z.relu() @ self.v


def cube(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw points of {-1, 1}^d and the product of their first two coordinates."""
    x = torch.randint(0, 2, (count, INPUTS), generator=draw).float() * 2 - 1
    return x, x[:, 0] * x[:, 1]


class Arm:
    """Say what one network of a run is.

    Args:
        bias: Whether it has biases.
        normed: Whether it has a layer norm.
        rho: Radius of the perturbation for each sample; 0 is plain SGD.
        labels: Targets of all points.
    """

    def __init__(self, labels: Tensor, *, bias: bool, normed: bool = False, rho: float = 0.1) -> None:
        self.labels, self.bias, self.normed, self.rho = labels, bias, normed, rho


def trained(ctx: Ctx, x: Tensor, arms: dict[str, Arm], *, steps: int, rate: float = 0.005) -> dict[str, TwoLayer]:
    """Train all arms from one start by steps on one sample of r^2 each; the rate falls to zero over the last quarter.

    Returns:
        The network of each arm.
    """
    draw, given = ctx.generator("start"), list(arms.values())

    def start(*shape: int, fan: int) -> Tensor:
        value = (2 * torch.rand(*shape, generator=draw) - 1) / fan**0.5
        return value.expand(len(given), *shape).clone()

    W, b, v = start(WIDTH, INPUTS, fan=INPUTS), start(WIDTH, fan=INPUTS), start(WIDTH, fan=WIDTH)
    biased = torch.tensor([[float(arm.bias)] for arm in given])
    normed = torch.tensor([[arm.normed] for arm in given])
    rho = torch.tensor([arm.rho for arm in given])
    labels = torch.stack([arm.labels for arm in given])
    b *= biased

    def gradient(W: Tensor, b: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the residual and the gradients of the output; that of W is an outer product with x."""
        z = W @ x[n] + b
        scale = torch.where(normed, WIDTH**0.5 / z.norm(dim=1, keepdim=True), 1.0)
        hidden = (z * scale).relu()
        inner = v * (hidden > 0)
        unit = z / z.norm(dim=1, keepdim=True)
        flat = inner - unit * (unit * inner).sum(1, keepdim=True)
        inner = torch.where(normed, flat * scale, inner)
        return (hidden * v).sum(1) - labels[:, n], inner, inner * biased, hidden

    square = float(INPUTS)
    for step in range(steps):
        n = int(torch.randint(len(x), (), generator=draw))
        rest, inner, bias, outer = gradient(W, b, v, n)
        length = (inner.square().sum(1) * square + bias.square().sum(1) + outer.square().sum(1)).sqrt()
        # The gradient of r^2 is 2 r times that of the output; its direction is the sign of r times that.
        move = (rho * rest.sign() / length.clamp_min(1e-12)).unsqueeze(1)
        near = (W + (move * inner).unsqueeze(2) * x[n], b + move * bias, v + move * outer)
        rest, inner, bias, outer = gradient(*near, n)
        pull = (2 * rate * min(1.0, 4 * (1 - step / steps)) * rest).unsqueeze(1)
        W -= (pull * inner).unsqueeze(2) * x[n]
        b -= pull * bias
        v -= pull * outer
        if step % 500 == 0:
            ctx.progress(step, steps, f"step {step}")
    return {
        name: TwoLayer(W[i], b[i] if arm.bias else None, v[i], normed=arm.normed)
        for i, (name, arm) in enumerate(arms.items())
    }
