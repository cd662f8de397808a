"""The five largest Hessian eigenvalues of a residual conv net with 7,706 parameters, 256 images of 12 x 12."""

from __future__ import annotations

import json
import sys
from typing import Any

import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.persample import fastest, installed, peers, row
from nervure.core.lanczos import eigenpairs
from nervure.core.operators import hessian


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(16 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.a(x)))
        x = torch.relu(self.c(torch.relu(x)))
        return self.head(F.avg_pool2d(x, 4).flatten(1))


def _problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = _Residual()
    y = torch.randint(0, 4, (256,))
    centres = torch.randn(4, 1, 12, 12)
    x = centres[y] + torch.randn(256, 1, 12, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def _ours(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return eigenpairs(hessian(model, (x, y), F.cross_entropy), 5, tolerance=1e-4).values


def _scipy(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    operator = hessian(model, (x, y), F.cross_entropy)
    linear = scipy.sparse.linalg.LinearOperator(
        (operator.size, operator.size),
        matvec=lambda v: (operator @ torch.as_tensor(v, dtype=torch.float32).flatten()).numpy(),
        dtype="float32",
    )
    return scipy.sparse.linalg.eigsh(linear, 5, tol=1e-4)[0]


def main() -> list[dict[str, Any]]:
    model, x, y = _problem()
    seconds = fastest({"ours": lambda: _ours(model, x, y), "scipy": lambda: _scipy(model, x, y)}, rounds=2)
    return [
        row("top 5 eigenvalues against eigsh on our operator", seconds["ours"], seconds["scipy"], 1.0),
        *peers(__file__, ["top 5 eigenvalues against PyHessian", "top 5 eigenvalues against curvlinops with eigsh"]),
    ]


def peer() -> list[dict[str, Any]]:
    model, x, y = _problem()
    truth = eigenpairs(hessian(model.double(), (x.double(), y), F.cross_entropy), 5, tolerance=1e-8).values
    model.float()
    rows = []
    for package, name, arm in (
        ("pyhessian", "top 5 eigenvalues against PyHessian", _pyhessian),
        ("curvlinops", "top 5 eigenvalues against curvlinops with eigsh", _curvlinops),
    ):
        if not installed(package):
            rows.append(row(name, None, None, None, note=f"absent: {package}"))
            continue
        errors = []
        for function in (_ours, arm):
            values = torch.as_tensor(function(model, x, y)).double()
            values = values[values.abs().argsort(descending=True)]
            errors.append(float(((values - truth) / truth).abs().max()))
        seconds = fastest({"ours": lambda: _ours(model, x, y), "theirs": lambda arm=arm: arm(model, x, y)}, rounds=2)
        note = f"largest relative error {errors[0]:.1e}, theirs {errors[1]:.1e}"
        rows.append(row(name, seconds["ours"], seconds["theirs"], 2.0 if package == "pyhessian" else 1.0, note=note))
    return rows


def _pyhessian(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    from pyhessian import hessian as theirs

    torch.manual_seed(0)
    return theirs(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False).eigenvalues(top_n=5, tol=1e-4, maxIter=200)[0]


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    from curvlinops import HessianLinearOperator

    parameters = list(model.parameters())
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)
    return scipy.sparse.linalg.eigsh(operator.to_scipy(), 5, tol=1e-4)[0]


if __name__ == "__main__":
    print(json.dumps(peer() if sys.argv[1:] == ["peer"] else main()))
