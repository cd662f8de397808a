"""The hooks of LSUV: draw a layer's weights before its first call, scale them after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from nervure._kit import Unsupported
from nervure.core import modules

LAYERS = (nn.Linear, *modules.CONVOLUTIONS, *modules.TRANSPOSED)
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3, nn.RNN: 1, nn.RNNCell: 1}


def orthonormal_(weight: Tensor, draw: torch.Generator | None, *, outputs: int = 0, groups: int = 1) -> None:
    """Fill a weight with orthonormal rows, or columns where there are more rows than columns.

    Args:
        weight: The weight, each group flattened to a matrix.
        draw: Source of randomness on the CPU, or None to leave the weight.
        outputs: The axis of the outputs, 0, or 1 for transposed convolutions.
        groups: Number of groups, each a matrix of its own.
    """
    if draw is None:
        return
    for part in weight.chunk(groups, 0):
        view = part.transpose(0, outputs)
        rows, columns = view.shape[0], view[0].numel()
        kind = torch.float64 if weight.dtype is torch.float64 else torch.float32
        tall = torch.randn(max(rows, columns), min(rows, columns), dtype=kind, generator=draw)
        q, r = torch.linalg.qr(tall)
        q = q * r.diagonal().sign()  # uniform over all orthonormal matrices
        view.copy_((q if rows >= columns else q.T).reshape(view.shape).to(view))


class Treatment:
    """Treat every layer of a model at its first call.

    Args:
        model: The model.
        skip: Names to leave alone.
        tol: Allowed deviation of the relative variance from 1.
        target: Name -> standard deviation wanted.
        draw: Source of new weights, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        skip: set[str],
        tol: float,
        target: Callable[[str], float],
        draw: torch.Generator | None,
    ) -> None:
        self.model, self.skip, self.tol, self.target, self.draw = model, skip, tol, target, draw
        self.names: dict[nn.Module, str] = {}
        for name, module in model.named_modules():
            if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
                raise Unsupported("LSUV", name, why="it is lazy", try_="running the model once first")
            if isinstance(module, (*LAYERS, *RECURRENT, nn.MultiheadAttention)):
                self.names[module] = name
        self.inner = {m.out_proj for m in self.names if isinstance(m, nn.MultiheadAttention)}
        self.holders: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for p in module._parameters.values():
                if p is not None:
                    self.holders.setdefault(id(p), []).append(module)
        self.scales: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.seen: set[nn.Module] = set()
        self.open: set[nn.Module] = set()
        self.treated: dict[int, str] = {}

    def hooked(self) -> list[nn.Module]:
        """Return the modules the two hooks belong on."""
        return [module for module in self.names if module not in self.inner]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Draw the weights of a module that is called for the first time."""
        if module in self.seen:
            return
        self.seen.add(module)
        name = self.names[module]
        why = self._obstacle(module, name)
        if why:
            self.skipped[name] = why
            return
        if isinstance(module, LAYERS):
            self.open.add(module)
            transposed = isinstance(module, modules.TRANSPOSED)
            orthonormal_(module.weight, self.draw, outputs=int(transposed), groups=getattr(module, "groups", 1))
            self._zero(module.bias)
            self.treated[id(module.weight)] = name
        elif isinstance(module, nn.MultiheadAttention):
            self.open.add(module)
            self._attention(module, name, args, kwargs)
        else:
            self._recurrent(module, name, args[0] if args else kwargs["input"])

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Scale the weights of a module that is called for the first time, and correct its output.

        Returns:
            The corrected output, or None where it stays.
        """
        if module not in self.open:
            return None
        self.open.remove(module)
        name = self.names[module]
        if isinstance(module, nn.MultiheadAttention):
            scale = self._scale(f"{name}.out_proj", output[0], module.out_proj.weight)
            return None if scale == 1 else (output[0] / scale, *output[1:])
        assert isinstance(module.weight, Tensor)
        scale = self._scale(name, output, module.weight)
        return None if scale == 1 else output / scale

    def finish(self) -> None:
        """Give a reason for everything that was left alone."""
        for module, name in self.names.items():
            if module not in self.seen and module not in self.inner:
                self.skipped[name] = "it was not called"
        known = {id(p) for m in self.names for p in m.parameters(recurse=True)}
        for name, p in self.model.named_parameters():
            if p.ndim >= 2 and id(p) not in known:
                self.skipped[name] = "it belongs to no linear, convolution, attention or recurrent layer"

    def _obstacle(self, module: nn.Module, name: str) -> str | None:
        weights = [p for p in module.parameters() if p.ndim >= 2]
        kinds = (*LAYERS, *RECURRENT, nn.MultiheadAttention)
        own = next(kind for kind in kinds if isinstance(module, kind))
        holders = [holder for p in weights for holder in self.holders[id(p)] if holder is not module]
        before = next((self.treated[id(p)] for p in weights if id(p) in self.treated), None)
        if name in self.skip:
            return "it is in skip"
        if any(parametrize.is_parametrized(part) for part in module.modules()) or any(
            part._forward_pre_hooks and "weight_g" in part._parameters for part in module.modules()
        ):
            return "its weight is parametrised"
        if type(module).forward is not own.forward:
            return "its forward is its own"
        if not all(p.requires_grad for p in weights):
            return "it is frozen"
        if before is not None:
            return f"it shares its weight with {before}"
        if any(not isinstance(holder, LAYERS) for holder in holders):
            return "its weight is tied to a layer of another kind"
        if getattr(module, "proj_size", 0):
            return "its states are projected"
        return None

    def _zero(self, bias: Tensor | None) -> None:
        if bias is not None:
            bias.zero_()

    def _scale(self, name: str, output: Tensor, weight: Tensor) -> float:
        """Divide the weight so that the output has the target's spread; return what it was divided by."""
        wanted = self.target(name)
        spread = float(output.double().std(correction=0)) / wanted if output.numel() > 1 else 0.0
        if not math.isfinite(spread) or spread < 1e-12:
            self.skipped[name] = "its output does not vary on this batch"
            return 1.0
        scale = 1.0 if abs(spread**2 - 1) <= self.tol else spread
        weight.div_(scale)
        self.scales[name] = scale
        return scale

    def _attention(
        self, module: nn.MultiheadAttention, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs = [*args[:3], *(kwargs[key] for key in ("query", "key", "value")[len(args[:3]) :])]
        if module._qkv_same_embed_dim:
            parts = list(module.in_proj_weight.chunk(3))
        else:
            parts = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        for kind, weight, x in zip("qkv", parts, inputs, strict=True):
            orthonormal_(weight, self.draw)
            self._scale(f"{name}.{kind}", x @ weight.T, weight)
        for bias in (module.in_proj_bias, module.out_proj.bias):
            self._zero(bias)
        orthonormal_(module.out_proj.weight, self.draw)

    def _recurrent(self, module: nn.Module, name: str, x: Tensor | PackedSequence) -> None:
        kind = next(kind for kind in RECURRENT if isinstance(module, kind))
        if not isinstance(module, nn.RNNBase):
            self._gates(module, name, "", x, _GATES[kind])
            return
        for layer in range(module.num_layers):
            ends = [f"_l{layer}", f"_l{layer}_reverse"][: 1 + module.bidirectional]
            for end in ends:
                self._gates(module, name, end, x, _GATES[kind])
            if layer + 1 < module.num_layers:
                x = _one_layer(module, kind, layer)(x)[0]

    def _gates(self, module: nn.Module, name: str, end: str, x: Tensor | PackedSequence, gates: int) -> None:
        data = x.data if isinstance(x, PackedSequence) else x
        weight, recurrent = getattr(module, f"weight_ih{end}"), getattr(module, f"weight_hh{end}")
        orthonormal_(recurrent, self.draw, groups=gates)
        orthonormal_(weight, self.draw, groups=gates)
        for bias in ("bias_ih", "bias_hh"):
            self._zero(getattr(module, f"{bias}{end}", None))
        for place, part in enumerate(weight.chunk(gates)):
            self._scale(f"{name}.weight_ih{end}[{place}]", data @ part.T, part)


def _one_layer(module: nn.RNNBase, kind: Any, layer: int) -> nn.Module:
    """Return one layer of a recurrent network as a network of its own."""
    width = module.input_size if layer == 0 else module.hidden_size * (1 + module.bidirectional)
    options = {"nonlinearity": module.nonlinearity} if kind is nn.RNN else {}
    one = kind(
        width,
        module.hidden_size,
        bias=module.bias,
        batch_first=module.batch_first,
        bidirectional=module.bidirectional,
        **options,
    ).to(module.weight_ih_l0)
    for own, p in one.named_parameters():
        p.copy_(getattr(module, own.replace("_l0", f"_l{layer}")))
    return one
