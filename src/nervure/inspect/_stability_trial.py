"""What the claims on the stability of SGD run: random quadratic problems, and a small network at its minimum."""

from __future__ import annotations

import torch
from torch import Tensor

from nervure.spec import Ctx


def problem(draw: torch.Generator, *, size: int = 4, most: int = 8) -> tuple[Tensor, int, float]:
    """Draw sample Hessians of rank one, a batch size below their number, and rate times sharpness in [0.2, 20].

    Returns:
        Hessians, shape (n, d, d); the batch size; rate times sharpness.
    """
    samples = int(torch.randint(2, most + 1, (), generator=draw))
    rows = torch.randn(samples, size, generator=draw, dtype=torch.float64)
    rows *= torch.randn(samples, 1, generator=draw, dtype=torch.float64).exp()
    batch = int(torch.randint(1, samples, (), generator=draw))
    step = 2 * 10 ** (2 * float(torch.rand((), generator=draw)) - 1)
    return rows.unsqueeze(2) * rows.unsqueeze(1), batch, step


class Net:
    """Run copies of a two-layer tanh network of one output side by side, each parameter with a first axis of copies.

    Args:
        parameters: Hidden weights (R, h, d), hidden biases (R, h), output weights (R, h).
    """

    def __init__(self, parameters: tuple[Tensor, Tensor, Tensor]) -> None:
        self.W, self.b, self.v = parameters

    def residuals(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden values (R, N, h) and output less target (R, N)."""
        hidden = torch.tanh(x @ self.W.mT + self.b.unsqueeze(1))
        return hidden, (hidden @ self.v.unsqueeze(-1)).squeeze(-1) - y

    def step(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Go one step against the sum of the weighted gradients of r^2 / 2, in place; return the squared residuals."""
        hidden, rest = self.residuals(x, y)
        pull = weights * rest
        inner = (pull.unsqueeze(-1) * self.v.unsqueeze(1)) * (1 - hidden.square())
        self.v = self.v - (pull.unsqueeze(1) @ hidden).squeeze(1)
        self.W = self.W - inner.mT @ x
        self.b = self.b - inner.sum(1)
        return rest.square().mean(1)


def interpolated(ctx: Ctx, *, samples: int = 40, inputs: int = 5, width: int = 30) -> tuple[Net, Tensor, Tensor, float]:
    """Fit drawn targets to rounding error by Gauss-Newton steps of least norm from a random start.

    Returns:
        The network (one copy), inputs, targets and the mean squared residual.
    """
    draw = ctx.generator("network")
    x, y, W, b, v = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((samples, inputs), (samples,), (1, width, inputs), (1, width), (1, width))
    )
    net = Net((W / inputs**0.5, b * 0.1, v / width**0.5))
    for _ in range(200):
        rows, rest = jacobian(net, x, y)
        # Damped while far from a fit, so that a step stays where the linear model holds.
        damp = 0.1 * float(rest.square().mean())
        gram = rows @ rows.T + damp * torch.eye(samples, dtype=torch.float64)
        move = rows.T @ torch.linalg.solve(gram, rest)
        parts = move.split([width * inputs, width, width])
        net = Net((net.W - parts[0].view(1, width, inputs), net.b - parts[1], net.v - parts[2]))
        if float(rest.square().mean()) < 1e-28:
            break
    return net, x, y, float(net.residuals(x, y)[1].square().mean())


def jacobian(net: Net, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows d output / d parameters of one copy, shape (N, P), and the residuals."""
    hidden, rest = net.residuals(x, y)
    inner = net.v[:, None] * (1 - hidden.square())
    return torch.cat([(inner.unsqueeze(-1) * x.unsqueeze(1)).flatten(2), inner, hidden], 2)[0], rest[0]


def escapes(
    net: Net, x: Tensor, y: Tensor, *, rate: float, batch: int, draw: torch.Generator, runs: int, steps: int
) -> float:
    """Return the share of runs that leave: residuals that grow ten-thousandfold from a start one millionth away."""
    shift = [1 + 1e-6 * torch.randn(runs, *value.shape[1:], generator=draw, dtype=torch.float64)
             for value in (net.W, net.b, net.v)]  # fmt: skip
    copies = Net((net.W * shift[0], net.b * shift[1], net.v * shift[2]))
    left = torch.zeros(runs, dtype=torch.bool)
    start = copies.residuals(x, y)[1].square().mean(1)
    for _ in range(steps):
        chosen = torch.rand(runs, len(x), generator=draw, dtype=torch.float64) < batch / len(x)
        found = copies.step(x, y, chosen * (rate / batch))
        left |= ~(found < 1e8 * start)
    return float(left.double().mean())
