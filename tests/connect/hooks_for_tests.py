"""A network, its batches and one hook of every kind, to be carried by nervure's loop and by a host's."""

import torch
from torch import nn

from nervure.core.recorder import Recorder
from nervure.learn import Loop

STEPS, SIZE = 20, 16


def network():
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.05)


def samples():
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loop(hooks, model=None, **options):
    model = network() if model is None else model
    found = hooks(model) if callable(hooks) else hooks
    return Loop(model, adam(model), samples(), batch_size=SIZE, hooks=found, seed=4, **options)


def in_order(steps=STEPS):
    """Return the samples one after the other as nervure's loop would draw them."""
    drawn = [loop([]).batch(step) for step in range(steps)]
    return torch.cat([x for x, _ in drawn]), torch.cat([y for _, y in drawn])


def same(one, other, tolerance=1e-6):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=tolerance, rtol=0) for a, b in pairs)


class Mask:
    """Zero half of each matrix and keep it so."""

    def __init__(self, model):
        self.masks = {p: (torch.arange(p.numel()).view_as(p) % 2).to(p) for p in model.parameters() if p.ndim == 2}

    @torch.no_grad()
    def after_step(self, step):
        for parameter, mask in self.masks.items():
            parameter.mul_(mask)


class Norm:
    """Bound the norm of every row."""

    def __init__(self, model, bound=1.0):
        self.model, self.bound = model, bound

    @torch.no_grad()
    def after_step(self, step):
        for parameter in self.model.parameters():
            if parameter.ndim == 2:
                parameter.renorm_(2, 0, self.bound)


class Gradients:
    """Leave the biases as they are, and centre the other gradients."""

    def gradients(self, named):
        return {name: g - g.mean() for name, g in named.items() if not name.endswith("bias")}


class Decay:
    """Pull the weights to zero by the loss."""

    def loss(self, loss, model):
        return 1.5 * loss + 0.01 * sum((p**2).sum() for p in model.parameters())


class Flip:
    """Mirror every second sample."""

    def batch(self, inputs, targets):
        inputs = inputs.clone()
        inputs[::2] *= -1
        return inputs, targets


class Early:
    """End after some steps; count what it was asked."""

    def __init__(self, last=7):
        self.last, self.losses = last, []

    def stop(self, step, loss):
        self.losses.append(loss)
        return step == self.last


class Measured:
    """Keep the loss and the norm; has a state of its own."""

    def __init__(self, model):
        self.model = model
        self.recorder = Recorder({"norm": lambda: next(model.parameters()).norm()}, every=3)

    def after_step(self, step):
        self.recorder.step(step)

    def metrics(self, step, loss):
        return {"loss": loss}

    def state_dict(self):
        return self.recorder.state_dict()

    def load_state_dict(self, state):
        self.recorder.load_state_dict(state)


class Heat:
    """A schedule of its own: shrink the weights by what the step says."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def after_step(self, step):
        for parameter in self.model.parameters():
            parameter.mul_(1 - 0.1 / (1 + step))


KINDS = {
    "mask": lambda model: [Mask(model)],
    "constraint": lambda model: [Norm(model)],
    "gradients": lambda model: [Gradients()],
    "penalty": lambda model: [Decay()],
    "augmentation": lambda model: [Flip()],
    "stop": lambda model: [Early()],
    "schedule": lambda model: [Heat(model)],
    "all": lambda model: [Flip(), Decay(), Gradients(), Mask(model), Heat(model), Measured(model), Early(18)],
}
