"""The weights and buffers of n networks of one shape, stacked along a first axis."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nervure._kit import Unsupported, UsageError

METHOD = "population"


class Stack:
    """Hold n networks whose parameters and buffers are rows of stacked tensors.

    The networks stay ordinary modules: ``members[i]`` is a copy of the i-th network whose parameters are views of row
    i, so that a batched program and a loop over members train the very same numbers.

    Args:
        networks: The networks; they are copied and left as they were.
        seeds: One seed for each, for its dropout masks and its data order.

    Raises:
        UsageError: If there is no network, or not one seed for each.
    """

    def __init__(self, networks: Sequence[nn.Module], seeds: Sequence[int]) -> None:
        if not networks or len(seeds) != len(networks):
            raise UsageError(
                "a population needs networks and one seed for each", found=f"{len(networks)}, {len(seeds)} seeds"
            )
        self.seeds = list(seeds)
        self.members = [copy.deepcopy(network) for network in networks]
        self.parameters = _stack(self.members, lambda member: dict(member.named_parameters()))
        self.buffers = _stack(self.members, lambda member: dict(member.named_buffers()))
        self.trainable = [name for name, value in self.members[0].named_parameters() if value.requires_grad]
        if not self.trainable:
            raise Unsupported(METHOD, self.members[0], why="none of its parameters asks for a gradient")
        # Leaves that share the storage of the stacked parameters and ask for gradients.
        self.leaves = {name: value.detach() for name, value in self.parameters.items()}
        for name in self.trainable:
            self.leaves[name].requires_grad_()
        self.device = self.parameters[self.trainable[0]].device
        self.rows = [self._bind(index) for index in range(len(self.members))]
        self._bound = [_slots(member) for member in self.members]
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]
        self.dropouts = _dropouts(self.members)
        self.aliases = _aliases(self.members[0])
        self._training: bool | None = None

    def __len__(self) -> int:
        return len(self.members)

    def _bind(self, index: int) -> list[nn.Parameter]:
        member = self.members[index]
        for name, value in member.named_parameters():
            value.data = self.parameters[name][index]
        for name, buffer in member.named_buffers():
            buffer.data = self.buffers[name][index]
        found = dict(member.named_parameters())
        return [found[name] for name in self.trainable]

    def collect(self, index: int) -> None:
        """Take in buffers that a member's forward replaced by new tensors instead of changing them in place.

        Args:
            index: The member.
        """
        for module, key, name, tensor in self._bound[index]:
            now = module._buffers[key]
            if now is not tensor and now is not None:
                self.buffers[name][index].copy_(now)
                module._buffers[key] = tensor

    def name(self, path: str, key: str) -> str:
        """Return the name under which a module's parameter or buffer is stacked.

        Args:
            path: The module's qualified name, empty for the network itself.
            key: The parameter's or buffer's name in the module.

        Returns:
            The name; the same one for tied parameters.
        """
        return self.aliases[f"{path}.{key}" if path else key]

    def train(self, mode: bool) -> None:
        """Put every member in train or eval mode.

        Args:
            mode: Train mode when true.
        """
        if self._training is not mode:
            for member in self.members:
                member.train(mode)
            self._training = mode

    def member(self, index: int) -> nn.Module:
        """Return a plain copy of one member that shares nothing with the population.

        Args:
            index: The member.

        Returns:
            The module.
        """
        source = self.members[index]
        # Without the memo, deepcopy would copy the whole stack behind every buffer.
        memo: dict[int, Any] = {id(value): value.detach().clone() for value in source.buffers()}
        for value in source.parameters():
            memo[id(value)] = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        return copy.deepcopy(source, memo)

    def select(self, children: list[int], parents: list[int]) -> None:
        """Overwrite the weights and buffers of some members by those of others, all at once.

        Args:
            children: The members that are overwritten.
            parents: For each of them the member that is copied.
        """
        for value in (*self.parameters.values(), *self.buffers.values()):
            value[children] = value[parents]

    def attributes(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        """Return every module with its plain attributes, all that is neither parameter, buffer nor submodule."""
        kept = {"_parameters", "_buffers", "_modules", "training"}
        return [
            (module, {key: value for key, value in vars(module).items() if key not in kept})
            for member in self.members
            for module in member.modules()
        ]

    def restore(self, attributes: list[tuple[nn.Module, dict[str, Any]]]) -> list[str]:
        """Put plain attributes back that were set since.

        Args:
            attributes: What `attributes` returned.

        Returns:
            The names of those that had been set.
        """
        found = []
        for (module, before), (_, now) in zip(attributes, self.attributes(), strict=True):
            for key in now.keys() | before.keys():
                if now.get(key, self) is not before.get(key, self):
                    found.append(key)
                    if key in before:
                        vars(module)[key] = before[key]
                    else:
                        del vars(module)[key]
        return sorted(set(found))

    def has_hooks(self) -> bool:
        """Return whether a module has hooks, which a batched program would not call."""
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return any(getattr(module, name) for member in self.members for module in member.modules() for name in names)

    @contextmanager
    def streams(self) -> Iterator[Callable[[int], None]]:
        """Lend the device's global generator to the members and give it back, also after an exception.

        Yields:
            A function that switches to a member's own stream; the stream in use before is kept for its member.
        """
        get, put = _global_state(self.device)
        before, current = get(), -1

        def keep() -> None:
            if current >= 0:
                self.generators[current].set_state(get())

        def switch(index: int) -> None:
            nonlocal current
            keep()
            current = index
            put(self.generators[index].get_state())

        try:
            yield switch
        finally:
            keep()
            put(before)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the weights, buffers, dropout rates and random streams."""
        return {
            "parameters": {name: value.clone() for name, value in self.parameters.items()},
            "buffers": {name: value.clone() for name, value in self.buffers.items()},
            "dropout": {name: [layer.p for layer in layers] for name, layers in self.dropouts.items()},
            "generators": [generator.get_state() for generator in self.generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Args:
            state: The state of a population of the same shape.

        Raises:
            UsageError: If the state is of another shape.
        """
        for mine, theirs in ((self.parameters, state["parameters"]), (self.buffers, state["buffers"])):
            if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
                raise UsageError(
                    "the state is of a population of another shape", try_="build it from the same networks"
                )
            for name, value in mine.items():
                value.copy_(theirs[name])
        for name, rates in state["dropout"].items():
            for layer, rate in zip(self.dropouts[name], rates, strict=True):
                layer.p = rate
        for generator, value in zip(self.generators, state["generators"], strict=True):
            generator.set_state(value)


def _stack(members: Sequence[nn.Module], named: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
    tables = [named(member) for member in members]
    first = tables[0]
    for value in first.values():
        if is_lazy(value):
            raise Unsupported(METHOD, members[0], why="it has lazy parameters", try_="call it once on a batch")
        if value.layout is not torch.strided or value.is_quantized:
            raise Unsupported(METHOD, members[0], why="it has sparse or quantised tensors")
    for index, (member, table) in enumerate(zip(members, tables, strict=True)):
        found = {name: (value.shape, value.dtype, value.device, value.requires_grad) for name, value in table.items()}
        wanted = {name: (value.shape, value.dtype, value.device, value.requires_grad) for name, value in first.items()}
        if found != wanted:
            odd = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
            raise Unsupported(METHOD, member, why=f"member {index} differs from member 0 in {', '.join(odd[:3])}")
    return {name: torch.stack([table[name].detach() for table in tables]).contiguous() for name in first}


def _slots(member: nn.Module) -> list[tuple[nn.Module, str, str, Tensor]]:
    """Return where each buffer hangs: module, key, canonical name, tensor."""
    names = {id(value): name for name, value in member.named_buffers()}
    return [
        (module, key, names[id(value)], value)
        for module in member.modules()
        for key, value in module._buffers.items()
        if value is not None
    ]


def _dropouts(members: Sequence[nn.Module]) -> dict[str, list[nn.modules.dropout._DropoutNd]]:
    """Return every member's dropout layers by name."""
    found: dict[str, list[nn.modules.dropout._DropoutNd]] = {}
    for member in members:
        for name, module in member.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                found.setdefault(name, []).append(module)
    return found


def _aliases(member: nn.Module) -> dict[str, str]:
    """Map every path to a parameter or buffer, shared ones included, to the name it is stacked under."""
    names = {id(value): name for name, value in (*member.named_parameters(), *member.named_buffers())}
    return {
        name: names[id(value)]
        for name, value in (
            *member.named_parameters(remove_duplicate=False),
            *member.named_buffers(remove_duplicate=False),
        )
    }


def _global_state(device: torch.device) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    if device.type == "cpu":
        return torch.get_rng_state, torch.set_rng_state
    module = torch.get_device_module(device)
    return lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)
