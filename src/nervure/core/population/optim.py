"""SGD, Adam and AdamW on stacked weights, every hyper-parameter per member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from nervure._kit import UsageError

Rate = float | Sequence[float] | Tensor
# From about this many weights a member, one fused call for each member beats several broadcast passes over memory.
_FUSED_FROM = 30_000


class Optimizer:
    """Update stacked weights; the base of `SGD`, `Adam` and `AdamW`.

    Args:
        **hyper: The hyper-parameters: one number for all members, or one for each.
    """

    slots: tuple[str, ...] = ()

    def __init__(self, **hyper: Rate) -> None:
        self._given = hyper
        self.hyper: dict[str, Tensor] = {}
        self.state: dict[str, list[Tensor]] = {}
        self.steps: list[Tensor] = []
        self._cache: dict[object, Any] = {}
        self._versions: tuple[int, ...] = ()
        self._views: dict[tuple[int, str], list[Tensor]] = {}

    def attach(self, parameters: Sequence[Tensor]) -> None:
        """Make the state for stacked parameters.

        Args:
            parameters: The trainable parameters, each (n, ...).

        Raises:
            UsageError: If a hyper-parameter has not one value for each member or the optimizer is already in use.
        """
        if self.hyper:
            raise UsageError("the optimizer belongs to another population", try_="a new optimizer for each population")
        count = len(parameters[0])
        for name, value in self._given.items():
            values = torch.as_tensor(value, dtype=torch.float64).cpu()
            if values.ndim > 1 or (values.ndim == 1 and len(values) != count):
                raise UsageError(
                    f"{name} has the wrong length", expected=f"1 or {count} numbers", found=tuple(values.shape)
                )
            self.hyper[name] = values.expand(count).clone()
        self.state = {slot: [torch.zeros_like(value) for value in parameters] for slot in self.slots}
        # One counter for each parameter and member, as torch keeps them: a parameter without a gradient does not count.
        self.steps = [torch.zeros(count, device=value.device) for value in parameters]

    def set(self, index: int, **hyper: float) -> None:
        """Change hyper-parameters of one member.

        Args:
            index: The member.
            **hyper: The new values.

        Raises:
            UsageError: If the optimizer has no hyper-parameter of that name.
        """
        for name, value in hyper.items():
            if name not in self.hyper:
                raise UsageError(f"there is no {name!r}", expected=" or ".join(self.hyper))
            self.hyper[name][index] = value

    def values(self, index: int) -> dict[str, float]:
        """Return one member's hyper-parameters.

        Args:
            index: The member.

        Returns:
            Name -> value.
        """
        return {name: float(value[index]) for name, value in self.hyper.items()}

    def select(self, children: list[int], parents: list[int]) -> None:
        """Overwrite the state of some members by those of others, all at once.

        Args:
            children: The members that are overwritten.
            parents: For each of them the member that is copied.
        """
        for values in (*self.state.values(), self.steps):
            for value in values:
                value[children] = value[parents]

    def update(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take one step on all members.

        Args:
            parameters: The stacked parameters, changed in place.
            gradients: Their gradients; a parameter without one is left alone.
        """
        used = [i for i, value in enumerate(gradients) if value is not None]
        weights, grads = [parameters[i] for i in used], [value for value in gradients if value is not None]
        if sum(value[0].numel() for value in weights) >= _FUSED_FROM:
            grads = [value.contiguous() for value in grads]
            for member in range(len(parameters[0])):
                self._fused([w[member] for w in weights], [g[member] for g in grads], used, member)
        else:
            self._stacked(weights, grads, used)

    def update_member(self, index: int, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take one step on one member.

        Args:
            index: The member.
            parameters: Its parameters, changed in place.
            gradients: Their gradients; a parameter without one is left alone.
        """
        used = [i for i, value in enumerate(gradients) if value is not None]
        # The fused kernels walk through memory and never look at strides.
        grads = [value.contiguous() for value in gradients if value is not None]
        self._fused([parameters[i] for i in used], grads, used, index)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the hyper-parameters, the state and the step counts."""
        return {
            "hyper": {name: value.clone() for name, value in self.hyper.items()},
            "state": {name: [value.clone() for value in values] for name, values in self.state.items()},
            "steps": [value.clone() for value in self.steps],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Args:
            state: The state of an optimizer of the same kind and shape.
        """
        for name, value in self.hyper.items():
            value.copy_(state["hyper"][name])
        for mine, theirs in ((self.state, state["state"]), ({"steps": self.steps}, {"steps": state["steps"]})):
            for name, values in mine.items():
                for value, other in zip(values, theirs[name], strict=True):
                    value.copy_(other)

    def _fresh(self) -> dict[object, Any]:
        """Return the cache of values derived from the hyper-parameters, emptied when one of them changed."""
        versions = tuple(value._version for value in self.hyper.values())
        if versions != self._versions:
            self._cache, self._versions = {}, versions
        return self._cache

    def _floats(self) -> dict[str, list[float]]:
        cache = self._fresh()
        if "floats" not in cache:
            cache["floats"] = {name: value.tolist() for name, value in self.hyper.items()}
        found: dict[str, list[float]] = cache["floats"]
        return found

    def _rows(self, slot: str, used: Sequence[int], member: int) -> list[Tensor]:
        # Views of the state stay valid for good: it is only ever changed in place.
        if (member, slot) not in self._views:
            values = self.steps if slot == "steps" else self.state[slot]
            self._views[member, slot] = [value[member] for value in values]
        views = self._views[member, slot]
        return views if len(used) == len(views) else [views[i] for i in used]

    def _fused(self, weights: list[Tensor], grads: list[Tensor], used: Sequence[int], member: int) -> None:
        raise NotImplementedError

    def _stacked(self, weights: list[Tensor], grads: list[Tensor], used: Sequence[int]) -> None:
        raise NotImplementedError


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """Return per-member numbers in the shape (n, 1, ...) and the dtype of a stacked weight."""
    return value.to(weight, copy=True).view(-1, *[1] * (weight.ndim - 1))


class SGD(Optimizer):
    """Step down the gradient: b = momentum b + g + weight_decay w, w = w - lr b (as `torch.optim.SGD`).

    Args:
        lr: Learning rate, at least 0: one for all members, or one for each.
        momentum: Momentum in [0, 1), one or each.
        weight_decay: Weight decay, at least 0, one or each.
        nesterov: Look ahead along the momentum.

    Examples:
        >>> SGD(lr=[0.1, 0.3], momentum=0.9).slots
        ('momentum',)
    """

    slots = ("momentum",)

    def __init__(
        self, lr: Rate = 1e-3, *, momentum: Rate = 0.0, weight_decay: Rate = 0.0, nesterov: bool = False
    ) -> None:
        super().__init__(lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.nesterov = nesterov

    def set(self, index: int, **hyper: float) -> None:
        """Change hyper-parameters of one member; momentum that is switched on starts from an empty buffer.

        Args:
            index: The member.
            **hyper: The new values.
        """
        if hyper.get("momentum") and not self.hyper["momentum"][index]:
            for buffer in self.state["momentum"]:
                buffer[index].zero_()
        super().set(index, **hyper)

    def _fused(self, weights: list[Tensor], grads: list[Tensor], used: Sequence[int], member: int) -> None:
        floats = self._floats()
        momentum = floats["momentum"][member]
        buffers: list[Tensor | None] = [*self._rows("momentum", used, member)] if momentum else [None] * len(used)
        sgd(
            weights,
            grads,
            buffers,
            fused=True,
            weight_decay=floats["weight_decay"][member],
            momentum=momentum,
            lr=floats["lr"][member],
            dampening=0.0,
            nesterov=self.nesterov and momentum != 0,
            maximize=False,
        )

    def _stacked(self, weights: list[Tensor], grads: list[Tensor], used: Sequence[int]) -> None:
        cache = self._fresh()
        if "any" not in cache:
            cache["any"] = bool(self.hyper["momentum"].any()), bool(self.hyper["weight_decay"].any())
        momentum, decay = cache["any"]
        for i, weight, grad in zip(used, weights, grads, strict=True):
            if i not in cache:
                names = ("lr", "momentum", "weight_decay")
                cache[i] = [_like(self.hyper[name], weight) for name in names]
                cache[i][0].neg_()
            minus_lr, mu, shrink = cache[i]
            if decay:
                grad = torch.addcmul(grad, weight, shrink)
            if momentum:
                buffer = self.state["momentum"][i]
                torch.addcmul(grad, buffer, mu, out=buffer)
                grad = torch.addcmul(grad, buffer, mu) if self.nesterov else buffer
            weight.addcmul_(grad, minus_lr)


class Adam(Optimizer):
    """Step by the gradient's running mean over the root of its running square (as `torch.optim.Adam`).

    Args:
        lr: Learning rate, at least 0: one for all members, or one for each.
        beta1: Decay of the mean in [0, 1), one or each.
        beta2: Decay of the square in [0, 1), one or each.
        eps: Added to the root, above 0.
        weight_decay: Weight decay, at least 0, one or each; added to the gradient.
    """

    slots = ("mean", "square")
    decoupled = False

    def __init__(
        self,
        lr: Rate = 1e-3,
        *,
        beta1: Rate = 0.9,
        beta2: Rate = 0.999,
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
    ) -> None:
        super().__init__(lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        self.eps = eps

    def _fused(self, weights: list[Tensor], grads: list[Tensor], used: Sequence[int], member: int) -> None:
        floats = self._floats()
        adam(
            weights,
            grads,
            self._rows("mean", used, member),
            self._rows("square", used, member),
            [],
            self._rows("steps", used, member),
            fused=True,
            decoupled_weight_decay=self.decoupled,
            amsgrad=False,
            beta1=floats["beta1"][member],
            beta2=floats["beta2"][member],
            lr=floats["lr"][member],
            weight_decay=floats["weight_decay"][member],
            eps=self.eps,
            maximize=False,
        )

    def _stacked(self, weights: list[Tensor], grads: list[Tensor], used: Sequence[int]) -> None:
        cache = self._fresh()
        if "decay" not in cache:
            cache["decay"] = bool(self.hyper["weight_decay"].any())
        for i, weight, grad in zip(used, weights, grads, strict=True):
            if i not in cache:
                one = {name: 1 - self.hyper[name] for name in ("beta1", "beta2")}
                keep = 1 - self.hyper["lr"] * self.hyper["weight_decay"]
                cache[i] = [
                    _like(value, weight) for value in (one["beta1"], one["beta2"], self.hyper["weight_decay"], keep)
                ]
            rest1, rest2, shrink, keep = cache[i]
            self.steps[i] += 1
            if cache["decay"] and self.decoupled:
                weight.mul_(keep)
            elif cache["decay"]:
                grad = torch.addcmul(grad, weight, shrink)
            mean, square = self.state["mean"][i], self.state["square"][i]
            mean.lerp_(grad, rest1)
            square.lerp_(grad * grad, rest2)
            # The corrections in float64, as torch computes them in Python numbers.
            count = self.steps[i].double().cpu()
            size = self.hyper["lr"] / (1 - self.hyper["beta1"] ** count)
            root = (1 - self.hyper["beta2"] ** count).sqrt()
            scale = square.sqrt().div_(_like(root, weight)).add_(self.eps)
            weight.addcmul_(mean / scale, _like(-size, weight))


class AdamW(Adam):
    """Adam with decoupled weight decay: w = (1 - lr weight_decay) w before the step (as `torch.optim.AdamW`).

    Args:
        lr: Learning rate, at least 0: one for all members, or one for each.
        beta1: Decay of the mean in [0, 1), one or each.
        beta2: Decay of the square in [0, 1), one or each.
        eps: Added to the root, above 0.
        weight_decay: Weight decay, at least 0, one or each; 0.01 as in torch.
    """

    decoupled = True

    def __init__(
        self,
        lr: Rate = 1e-3,
        *,
        beta1: Rate = 0.9,
        beta2: Rate = 0.999,
        eps: float = 1e-8,
        weight_decay: Rate = 1e-2,
    ) -> None:
        super().__init__(lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
