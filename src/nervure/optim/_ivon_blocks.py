"""The arithmetic of IVON on blocks of parameters, each small enough to stay in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nervure._kit import Unsupported
from nervure.core import rng

BLOCK = 1 << 16
"""Elements of a block; a larger parameter is a block of its own."""


class Noise:
    """Draw from one random stream for each device, apart from torch's global ones.

    Args:
        seed: The seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.streams: dict[str, torch.Generator] = {}

    def fill(self, out: Tensor) -> None:
        """Fill a tensor with standard normal numbers in place."""
        out.normal_(generator=self._stream(str(out.device)))

    def _stream(self, device: str) -> torch.Generator:
        if device not in self.streams:
            self.streams[device] = torch.Generator(device).manual_seed(rng.seed_for("ivon", self.seed, device))
        return self.streams[device]

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and the state of every stream."""
        return {"seed": self.seed, "streams": {name: stream.get_state() for name, stream in self.streams.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.seed, self.streams = state["seed"], {}
        for device, stream in state["streams"].items():
            self._stream(device).set_state(stream.cpu())


def cut(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut the trainable parameters into parts of one device and type and at most `BLOCK` elements, or one parameter.

    Args:
        params: The parameters of a group.

    Yields:
        The parts.
    """
    open_parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if not p.requires_grad:
            continue
        part = open_parts.setdefault((p.device, p.dtype), [])
        if part and sum(other.numel() for other in part) + p.numel() > BLOCK:
            yield part
            part = open_parts[p.device, p.dtype] = []
        part.append(p)
    yield from open_parts.values()


class Block:
    """Hold some parameters of one group, device and type, with their state in contiguous memory.

    Args:
        params: The parameters.
        group: Their group, the source of the hyper-parameters.
        state: The optimizer's state; what it holds is taken over, and it then holds views of this block's memory.

    Raises:
        Unsupported: If the parameters are complex.
    """

    def __init__(self, params: list[Tensor], group: dict[str, Any], state: Any) -> None:
        like = params[0]
        if not like.is_floating_point():
            raise Unsupported("IVON", "parameter", why=f"its type is {like.dtype}", try_="real parameters")
        self.params, self.group = params, group
        self.sizes = [p.numel() for p in params]
        kind = torch.float64 if like.dtype is torch.float64 else torch.float32
        flat = torch.zeros(6, sum(self.sizes), dtype=kind, device=like.device)
        # root is sqrt(h + delta) from a sample to its step, mean the mean in the state's precision.
        self.hess, self.momentum, self.eps, self.root, self.mean, self.grad = flat
        self.saved = self.mean if like.dtype is kind else torch.empty_like(self.mean, dtype=like.dtype)
        self.sampled = torch.empty_like(self.saved)
        self.saved_views, self.sampled_views, self.mean_views = map(self._views, (self.saved, self.sampled, self.mean))
        self.hess.fill_(group["hess_init"])
        for p, hess, momentum in zip(params, self._views(self.hess), self._views(self.momentum), strict=True):
            old = state[p]
            for name, view in (("hess", hess), ("momentum", momentum)):
                if name in old:
                    view.copy_(old[name])
                old[name] = view
            old.setdefault("step", 0)
        self.product: Tensor | None = None
        self.raw: Tensor | None = None

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self.sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def perturb(self, noise: Noise) -> None:
        """Remember the mean and add eps / sqrt(ess (h + delta)) to the parameters."""
        if self.product is None:
            torch.add(self.hess, self.group["weight_decay"], out=self.root).sqrt_()
        noise.fill(self.eps)
        torch._foreach_copy_(self.saved_views, self.params)
        if self.mean is not self.saved:
            self.mean.copy_(self.saved)
        value = self.group["ess"] ** -0.5
        if self.mean is self.saved:
            torch.addcdiv(self.mean, self.eps, self.root, value=value, out=self.sampled)
        else:
            self.sampled.copy_(torch.addcdiv(self.mean, self.eps, self.root, value=value))
        torch._foreach_copy_(self.params, self.sampled_views)

    def restore(self) -> None:
        """Put the mean back into the parameters."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.saved_views)

    def keep(self) -> None:
        """Keep gradient times noise of the first sample before the second one overwrites the noise."""
        if self.product is None:
            self.raw = self._pack().clone() if self.raw is None else self.raw
            self.product = self.eps * self.raw

    def forget(self) -> None:
        """Forget the samples of the last step."""
        self.product = self.raw = None

    def merge(self, before: Sequence[Tensor | None], count: int) -> None:
        """Average the block's gradient with those of the samples before it.

        Args:
            before: Gradients from before this sample, or None.
            count: Number of samples, this one included.
        """
        if count == 1 and all(grad is None for grad in before):
            return
        change = self._pack()
        if self.product is None or self.raw is None:
            self.raw = change.clone()
        else:
            self.product.lerp_(self.eps * change, 1 / count)
            change.sub_(self.raw).div_(count)
            self.raw += change
        for p, old, new in zip(self.params, before, self._views(change), strict=True):
            if old is not None or p.grad is not None:
                p.grad = (new.clone() if old is None else old + new).to(p.dtype)

    def _pack(self) -> Tensor:
        """Return the gradients as one vector in the state's precision, zeros where there is none.

        Raises:
            Unsupported: If a gradient is sparse.
        """
        grads = [p.grad for p in self.params]
        if any(grad is not None and grad.layout is not torch.strided for grad in grads):
            raise Unsupported("IVON", "parameter", why="its gradient is sparse", try_="sparse=False")
        parts = [
            torch.zeros_like(p).view(-1) if grad is None else grad.reshape(-1)
            for p, grad in zip(self.params, grads, strict=True)
        ]
        if parts[0].dtype is self.grad.dtype:
            return torch.cat(parts, out=self.grad)
        return self.grad.copy_(torch.cat(parts))

    def update(self, state: Any, scale: Tensor | None) -> None:
        """Move mean, momentum and Hessian; a parameter without a gradient stays as it is.

        Args:
            state: The optimizer's state, for the step counts.
            scale: What the gradients were multiplied by, or None.
        """
        idle = [place for place, p in enumerate(self.params) if p.grad is None]
        if len(idle) == len(self.params):
            return
        grad = self._pack()
        if scale is not None:
            grad.div_(scale.to(grad.device))
        kept = [(row, [row.split(self.sizes)[place].clone() for place in idle]) for row in (self.hess, self.momentum)]
        steps = self._count(state)
        group = self.group
        beta1, beta2 = group["betas"]
        rate, delta = 1 - beta2, group["weight_decay"]
        if self.product is None:
            self.eps.mul_(grad)
        else:
            self._rescale(grad)
        self.momentum.lerp_(grad, 1 - beta1)
        # f is h minus its estimate g eps sqrt(ess (h + delta)), then f / sqrt(h + delta).
        f = torch.addcmul(self.hess, self.eps, self.root, value=-(group["ess"] ** 0.5), out=self.eps)
        self.hess.add_(f, alpha=-rate)
        f.div_(self.root)
        self.hess.addcmul_(f, f, value=0.5 * rate**2)
        for row, values in kept:
            for place, value in zip(idle, values, strict=True):
                row.split(self.sizes)[place].copy_(value)
        precision = torch.add(self.hess, delta, out=self.root)
        self._move(precision, [1 - beta1**step if step else 1.0 for step in steps])
        moved = [(p, view) for p, view in zip(self.params, self.mean_views, strict=True) if p.grad is not None]
        torch._foreach_copy_([p for p, _ in moved], [view for _, view in moved])

    def _count(self, state: Any) -> list[int]:
        steps = []
        for p in self.params:
            one = state[p]
            one["step"] += p.grad is not None
            steps.append(one["step"])
        return steps

    def _move(self, precision: Tensor, debias: list[float]) -> None:
        """Set mean <- mean - lr clip((momentum / debias + delta mean) / precision)."""
        group, delta = self.group, self.group["weight_decay"]
        lr = float(group["lr"]) * (group["hess_init"] + delta if group["rescale_lr"] else 1.0)
        self.mean_from_params()
        if len(set(debias)) == 1:
            torch.mul(self.momentum, 1 / debias[0], out=self.grad)
        else:
            torch._foreach_copy_(self._views(self.grad), torch._foreach_div(self._views(self.momentum), debias))
        push = self.grad.add_(self.mean, alpha=delta)
        if group["clip_radius"] < float("inf"):
            push.div_(precision).clamp_(-group["clip_radius"], group["clip_radius"])
            self.mean.add_(push, alpha=-lr)
        else:
            self.mean.addcdiv_(push, precision, value=-lr)

    def mean_from_params(self) -> None:
        """Take the mean from the parameters, which may have been changed since the sample."""
        torch._foreach_copy_(self.mean_views, self.params)

    def _rescale(self, grad: Tensor) -> None:
        """Put the mean of gradient times noise in eps, scaled as the gradients were between sample and step."""
        assert self.product is not None
        assert self.raw is not None
        for out, new, raw, product in zip(
            *(row.split(self.sizes) for row in (self.eps, grad, self.raw, self.product)), strict=True
        ):
            size = raw.dot(raw)
            torch.mul(product, torch.where(size > 0, new.dot(raw) / size, 0.0), out=out)
