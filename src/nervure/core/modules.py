"""Find parameters and modules by name, and swap modules everywhere they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from nervure._kit import NoEffect

NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.LocalResponseNorm,
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    *CONVOLUTIONS,
    *TRANSPOSED,
)


def owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return, for each parameter's first name, every (module, attribute) that holds it.

    A shared module counts once; a tied weight has as many owners as modules hold it.

    Args:
        model: The model.

    Returns:
        Name -> owners.
    """
    first: dict[int, str] = {id(parameter): name for name, parameter in model.named_parameters()}
    table: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in first.values()}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                table[first[id(parameter)]].append((module, attribute))
    return table


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters with two or more axes that carry connections, each once.

    Biases, norm scales, and parameters with one long axis (tokens, broadcast shifts) are no connections and are
    left out; matrices of Linear, Conv, Embedding, attention and recurrent layers are in, and so is a raw matrix.

    Args:
        model: The model.

    Returns:
        Name -> parameter, in the order of `named_parameters`.

    Examples:
        >>> list(weights(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))))
        ['0.weight', '2.weight']
    """
    of_norms = {
        id(parameter) for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()
    }
    of_layers = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LAYERS)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in of_norms
        and (id(parameter) in of_layers or _is_raw_matrix(parameter))
    }


def _is_raw_matrix(parameter: Tensor) -> bool:
    """Tell a bare matrix from a bare vector made to broadcast, such as a shift of shape (1, n)."""
    return parameter.ndim >= 2 and parameter.shape[0] > 1 and sum(length > 1 for length in parameter.shape) >= 2


def output_head(model: nn.Module) -> str | None:
    """Return the name of the output layer's weight: the last Linear or Conv weight registered.

    Args:
        model: The model.

    Returns:
        The name, or None where there is no such layer.
    """
    last: Tensor | None = None
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            last = module.weight
    return next((name for name, parameter in model.named_parameters() if parameter is last), None)


def fan_in(parameter: Tensor) -> int:
    """Return the number of inputs each output of a weight sums over.

    Args:
        parameter: A weight of shape (out, in, ...).

    Returns:
        The product of all axes but the first.
    """
    return parameter[0].numel() if parameter.ndim > 1 else parameter.numel()


def replace_modules(
    model: nn.Module,
    rule: Callable[[str, nn.Module], nn.Module | None],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[str]:
    """Swap modules in place, a shared module once and at every place it is used.

    Args:
        model: The model; the root itself cannot be swapped.
        rule: From (qualified name, module) to the new module, or None to leave it.
        optimizer: If given, its parameter groups drop the old modules' parameters and take the new ones in the
            group where the old module's first parameter was; parameters that live on keep their state.

    Returns:
        The first names of the swapped modules.

    Raises:
        NoEffect: If the rule matched nothing.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> replace_modules(net, lambda name, module: nn.Tanh() if isinstance(module, nn.ReLU) else None)
        ['1']
    """
    swapped: dict[int, nn.Module] = {}
    names: list[str] = []
    old_modules: list[nn.Module] = []
    for name, module in list(model.named_modules()):
        new = rule(name, module) if name else None
        if new is not None and new is not module:
            swapped[id(module)] = new
            names.append(name)
            old_modules.append(module)
    if not swapped:
        raise NoEffect("no module matched", try_="a rule that matches one of the model's modules")
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and id(child) in swapped and parent is not swapped[id(child)]:
                setattr(parent, attribute, swapped[id(child)])
    if optimizer is not None:
        _follow(optimizer, model, [(old, swapped[id(old)]) for old in old_modules])
    return names


def _follow(optimizer: torch.optim.Optimizer, model: nn.Module, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Keep the optimizer's groups in step with the model after a swap."""
    alive = {id(parameter) for parameter in model.parameters()}
    known = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for old, new in pairs:
        group = next((known[id(p)] for p in old.parameters() if id(p) in known), optimizer.param_groups[0])
        for parameter in new.parameters():
            if id(parameter) not in known:
                group["params"].append(parameter)
                known[id(parameter)] = group
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in alive:
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in alive]


def named_flat(named: Mapping[str, Tensor]) -> Tensor:
    """Return the tensors as one vector, in the mapping's order.

    Args:
        named: Name -> tensor; at least one.

    Returns:
        One vector.
    """
    return torch.cat([tensor.reshape(-1) for tensor in named.values()])


def leaf_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules without children, each once.

    Args:
        model: The model.

    Yields:
        (qualified name, module).
    """
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            yield name, module
