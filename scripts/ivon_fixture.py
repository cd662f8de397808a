"""Write tests/optim/assets/ivon.npz: steps of ivon-opt 0.1.3 with its noise. Run with `.venv-bench/bin/python -P`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import ivon

STEPS, SAMPLES = 12, 2
OPTIONS = {"lr": 0.05, "ess": 50.0, "hess_init": 0.25, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.01}


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    weight = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    bias = torch.randn(2, dtype=torch.float64).requires_grad_()
    start = [weight.detach().clone(), bias.detach().clone()]
    optimizer = ivon.IVON([weight, bias], clip_radius=5.0, **OPTIONS)
    noise, means, hessians = [], [], []
    for _ in range(STEPS):
        for _ in range(SAMPLES):
            state = torch.random.get_rng_state()
            noise.append(torch.randn(8, dtype=torch.float64).numpy())
            torch.random.set_rng_state(state)
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                (torch.tanh(x @ weight.T + bias) - y).square().mean().backward()
        optimizer.step()
        means.append(torch.cat([weight.detach().flatten(), bias.detach()]).numpy().copy())
        hessians.append(optimizer.param_groups[0]["hess"].numpy().copy())
    np.savez(
        Path(__file__).parent.parent / "tests" / "optim" / "assets" / "ivon.npz",
        x=x.numpy(),
        y=y.numpy(),
        weight=start[0].numpy(),
        bias=start[1].numpy(),
        noise=np.array(noise),
        means=np.array(means),
        hessians=np.array(hessians),
    )


if __name__ == "__main__":
    main()
