"""Cut tensors and bring the attributes that count them along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nervure._kit import BadModel, Unsupported
from nervure.core import forward
from nervure.core.channels.copies import METHOD, every, tensors, twin
from nervure.core.channels.groups import Keep, Table


def cut(model: nn.Module, table: Table, keep: Keep) -> nn.Module:
    """Return a copy of a model with channels cut.

    Args:
        model: The model.
        table: Its table.
        keep: As in `Table.removed`.

    Returns:
        A model of the same class.

    Raises:
        BadModel: If the model is not the one the table was made of.
    """
    removed = table.removed(keep)
    held = dict(every(model))
    smaller = {id(held[name]): tensor for name, tensor in _smaller(held, _touched(table, removed))}
    others = {id(tensor): _like(tensor, tensor.detach().clone()) for tensor in held.values()}
    copied = twin(model, others | smaller)
    _settle(copied, table, removed)
    return copied


def cut_(model: nn.Module, table: Table, keep: Keep) -> None:
    """Cut channels in place; only the parameters concerned are touched.

    Args:
        model: The model.
        table: Its table.
        keep: As in `Table.removed`.

    Raises:
        BadModel: If the model is not the one the table was made of.
    """
    removed = table.removed(keep)
    touched = _touched(table, removed)
    owners = {alias: _owner(model, alias) for name in touched for alias in table.aliases[name]}
    held = {name: _tensor(owners[name], name) for name in touched}
    for name, tensor in _smaller(held, touched):
        for alias in table.aliases[name]:
            setattr(owners[alias], alias.rpartition(".")[2], tensor)
    _settle(model, table, removed)


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Return the module that holds a tensor; several times faster than `get_submodule`.

    Raises:
        BadModel: If there is none.
    """
    module: nn.Module | None = model
    for part in name.split(".")[:-1]:
        module = module._modules.get(part) if module is not None else None
    if module is None:
        raise BadModel(f"the model has no {name}, which the channel graph saw")
    return module


def _tensor(module: nn.Module, name: str) -> Tensor:
    attribute = name.rpartition(".")[2]
    held = module._parameters if attribute in module._parameters else module._buffers
    found: Tensor | None = held.get(attribute)
    if found is None:
        raise BadModel(f"the model has no {name}, which the channel graph saw")
    return found


def mask(model: nn.Module, table: Table, keep: Keep) -> nn.Module:
    """Return a copy of a model with all slices of the channels to cut set to zero.

    Args:
        model: The model.
        table: Its table.
        keep: As in `Table.removed`.

    Returns:
        A model of the same shape.

    Raises:
        BadModel: If the model is not the one the table was made of.
    """
    removed = table.removed(keep)
    held = dict(every(model))
    copies = {name: _like(tensor, tensor.detach().clone()) for name, tensor in held.items()}
    with torch.no_grad():
        for name, axes in _touched(table, removed).items():
            _check(held, name, axes)
            for axis, gone in axes.items():
                copies[name].index_fill_(axis, _indices(gone, copies[name]), 0)
    return twin(model, {id(held[name]): copy for name, copy in copies.items()})


def _touched(table: Table, removed: NDArray[np.bool_]) -> dict[str, dict[int, NDArray[np.bool_]]]:
    """Return the tensors that lose something: name -> axis -> which indices go."""
    found: dict[str, dict[int, NDArray[np.bool_]]] = {}
    for place in table.places(removed):
        segment = table.segments[place]
        if not segment.attribute:
            gone = removed[table.bounds[place] : table.bounds[place + 1]]
            found.setdefault(segment.owner, {})[segment.axis] = gone
    return found


def _check(tensors: dict[str, Tensor], name: str, axes: dict[int, NDArray[np.bool_]]) -> None:
    if name not in tensors or any(tensors[name].shape[axis] != len(gone) for axis, gone in axes.items()):
        found = tuple(tensors[name].shape) if name in tensors else "no such parameter"
        raise BadModel(
            f"{name} is not as the channel graph saw it", found=found, try_="graph.after(keep) for a cut model"
        )


def _smaller(
    tensors: dict[str, Tensor], touched: dict[str, dict[int, NDArray[np.bool_]]]
) -> Iterator[tuple[str, Tensor]]:
    for name, axes in touched.items():
        _check(tensors, name, axes)
        value = tensors[name].detach()
        gradient = tensors[name].grad
        for axis, gone in axes.items():
            indices = _indices(~gone, value)
            value = value.index_select(axis, indices)
            gradient = gradient.index_select(axis, indices) if gradient is not None else None
        new = _like(tensors[name], value)
        new.grad = gradient
        yield name, new


def _indices(flags: NDArray[np.bool_], like: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(flags)).to(like.device)


def _like(old: Tensor, value: Tensor) -> Tensor:
    """Return a value as the kind of tensor another is; its gradient is not taken along."""
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def _settle(model: nn.Module, table: Table, removed: NDArray[np.bool_]) -> None:
    """Set what counts channels: the attributes seen in the forward, and those of torch's own modules."""
    counted: set[tuple[str, str]] = set()
    owners: set[str] = set()
    for place in table.places(removed):
        segment = table.segments[place]
        if segment.attribute:
            counted.add((segment.owner, segment.attribute))
            owners.add(segment.owner)
        else:
            owners.update(alias.rpartition(".")[0] for alias in table.aliases[segment.owner])
    for owner, path in counted:
        *parents, attribute = path.split(".")
        holder: Any = _owner(model, f"{owner}." if owner else "")
        for parent in parents:
            holder = getattr(holder, parent)
        values = tuple(
            int((~removed[table.bounds[place] : table.bounds[place + 1]]).sum())
            for place in table.attributes[owner, path]
        )
        holder.__dict__[attribute] = values if attribute == "normalized_shape" else values[0]
    for owner in owners:
        _recount(_owner(model, f"{owner}." if owner else ""))


def _recount(module: nn.Module) -> None:
    """Make the attributes of one of torch's own modules agree with its tensors."""
    held: dict[str, Any] = {**module._parameters, **module._buffers}
    weight = held.get("weight", held.get("weight_orig"))  # torch's pruning keeps it under the second name
    weight = getattr(module, "weight", None) if weight is None else weight
    shape = weight.shape if isinstance(weight, Tensor) else torch.Size()
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        first, second = shape[:2]
        sides = (second * module.groups, first) if not module.transposed else (first, second * module.groups)
        module.in_channels, module.out_channels = sides
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = held.get("weight") if held.get("weight") is not None else held.get("running_mean")
        module.num_features = len(known) if known is not None else module.num_features
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(held["weight"]) if held.get("weight") is not None else module.num_channels
    elif isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        module.hidden_size, module.input_size = held["weight_ih_l0"].shape[0] // gates, held["weight_ih_l0"].shape[1]
        module.proj_size = held["weight_hh_l0"].shape[1] if module.proj_size else 0
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = held["weight_ih"].shape[1], held["weight_hh"].shape[1]
    elif isinstance(module, nn.MultiheadAttention):
        module.embed_dim = module.out_proj.weight.shape[0]
        module.head_dim = module.embed_dim // module.num_heads
        separate = held.get("in_proj_weight") is None
        module.kdim = held["k_proj_weight"].shape[1] if separate else module.embed_dim
        module.vdim = held["v_proj_weight"].shape[1] if separate else module.embed_dim
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape.numel()


@torch.no_grad()
def check(model: nn.Module, inputs: Any, shapes: list[torch.Size]) -> None:
    """Run a cut model and compare the shapes of its outputs.

    Args:
        model: The cut model.
        inputs: The inputs it was traced with.
        shapes: The shapes the outputs had.

    Raises:
        Unsupported: If it does not run or gives other shapes; names the module that failed.
    """
    names = {id(module): name for name, module in model.named_modules()}
    running: list[str] = []
    entering = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: running.append(names.get(id(module), type(module).__name__))
    )
    try:
        with forward.mode(model, train=False):
            found = [tensor.shape for tensor in tensors(forward.call(model, inputs))]
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        where = running[-1] if running else "the model"
        raise Unsupported(METHOD, where or type(model).__name__, why=f"it does not run when cut ({error})") from error
    finally:
        entering.remove()
    if found != shapes:
        raise Unsupported(METHOD, model, why=f"its outputs change shape when cut, {shapes} to {found}")
