"""Put the units of one network in the order of another's: matching by weights and by activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nervure._kit import BadModel
from nervure.core import rng
from nervure.core.features import features, units
from nervure.core.permutation import Orders, PermutationGraph, Permutations, Place, Units, compose
from nervure.core.similarity import Moments

Certificate = Literal["exact", "optimum", "local optimum", "nothing to match"]
_EXACT = 1e-6


@dataclass(frozen=True)
class Matching:
    """Hold the order in which a second network is most like a first.

    Args:
        permutations: Group -> from which unit of the second each unit comes.
        distance: |first - permuted second| over the parameters.
        before: The same before permuting.
        certificate: ``"exact"`` where the permuted second is the first to 1e-6; ``"optimum"`` where the distance is
            provably least; ``"local optimum"`` where no exchange within one group lessens it, but another start
            might; ``"nothing to match"`` where no unit may move.
        start: The start the result came from.
        sweeps: Passes over all groups, those of all starts together.
    """

    permutations: Mapping[int, Tensor]
    distance: float
    before: float
    certificate: Certificate
    start: str
    sweeps: int


def weight_matching(
    first: nn.Module,
    second: nn.Module,
    graph: PermutationGraph,
    *,
    starts: Sequence[Permutations] = (),
    restarts: int = 2,
    limit: int = 100,
    seed: int = 0,
) -> Matching:
    """Find the permutations P that make |first - P second| small, by weights alone.

    One group after another is solved exactly as a linear assignment, the others held, until nothing improves
    (Ainsworth et al., 2023). That depends on the start. The first start compares the units by their weights sorted
    along every axis that may itself be permuted, which finds a permuted copy at once; then come the order as it is,
    the given ones and random ones. The best is kept.

    Args:
        first: A network, left as it is.
        second: Another of the same shape, left as it is.
        graph: The permutation graph of either.
        starts: Further starts.
        restarts: Number of random starts, at least 0.
        limit: Most passes over the groups from one start, at least 1.
        seed: Draws the random starts and the order of the groups.

    Returns:
        The permutations of the second network, for `nervure.core.permutation.permuted`.

    Examples:
        >>> from nervure.core.permutation import permuted
        >>> net = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
        >>> graph = PermutationGraph.of(net, torch.ones(1, 3))
        >>> other = permuted(net, graph, graph.random(seed=0))
        >>> weight_matching(net, other, graph).certificate
        'exact'
    """
    problem = _Problem(first, second, graph)
    draw = rng.generator("matching", seed)
    tries: list[tuple[str, Callable[[], _State]]] = [("as it is", lambda: _State(problem, {}))]
    if not problem.separable:  # else every start ends at the same place
        given = [(f"given {place}", one) for place, one in enumerate(starts)]
        given += [(f"random {place}", graph.random(seed=rng.seed_for(seed, place))) for place in range(restarts)]
        tries.insert(0, ("sorted weights", _State(problem, {}).sort))
        tries += [(name, partial(_State, problem, graph.orders(one))) for name, one in given]
    best: tuple[float, str, Orders] | None = None
    sweeps = 0
    for name, start in tries:
        state = start()
        sweeps += state.ascend(limit, draw)
        distance = problem.distance(state.held)
        if best is None or distance < best[0]:
            best = distance, name, state.orders
        if best[0] <= _EXACT * problem.size:
            break
    assert best is not None
    return problem.report(best[2], start=best[1], sweeps=sweeps)


def activation_matching(
    first: nn.Module, second: nn.Module, graph: PermutationGraph, batches: Iterable[Any], *, limit: int = 20
) -> Matching:
    """Find the permutations that make the activations of two networks correlate most, unit by unit.

    The sum over all modules that produce a group's units of the correlations of matched units is maximised, one group
    after another. A group no module's output shows, such as the features within torch's own attention, is matched by
    its weights.

    Args:
        first: A network, left as it is.
        second: Another of the same shape, left as it is.
        graph: The permutation graph of either.
        batches: Inputs.
        limit: Most passes over the groups, at least 1.

    Returns:
        The permutations of the second network; the certificate speaks of its weights.
    """
    problem = _Problem(first, second, graph)
    shown = {number: _shown(first, group, graph) for number, group in enumerate(graph.groups)}
    names = sorted({name for group in shown.values() for name in group})
    alike = _correlations(first, second, names, batches)
    shown = {number: {name: at for name, at in group.items() if name in alike} for number, group in shown.items()}
    state = _State(problem, {})
    sweeps = 0
    for sweeps in range(1, limit + 1):
        moved = False
        for number, group in enumerate(graph.groups):
            cost = torch.zeros(group.size, group.size, dtype=torch.float64)
            for name, place in shown[number].items():
                now = state.orders.get((place.tensor, place.axis))
                rows, columns = _seen(place, alike[name], None), _seen(place, alike[name], now)
                if sweeps == 1 and problem.shared(place):  # what is inside the units has no order yet
                    inside = alike[name][rows[:, None, :, None], columns[None, :, None, :]]
                    cost += inside.amax(3).sum(2)
                else:
                    cost += alike[name][rows[:, None], columns[None]].sum(2)
            if not shown[number]:
                cost = problem.cost(group, state.held)
            moved |= state.move(group, _assign(cost))
        if not moved:
            break
    return problem.report(state.orders, start="activations", sweeps=sweeps)


def _seen(place: Place, matrix: Tensor, order: Tensor | None) -> Tensor:
    """Return where units show in a module's output; the gates of a recurrent unit show as one."""
    if matrix.shape[0] == len(place.index) < place.index.numel():
        unit = torch.arange(len(place.index))
        if order is not None:
            owner = torch.empty_like(order)
            owner[place.index.flatten()] = unit.repeat_interleave(place.index.shape[1])
            unit = owner[order[place.index[:, 0]]]
        return unit[:, None]
    return place.index if order is None else order[place.index]


def _assign(cost: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(cost.numpy(), maximize=True)[1])


_SHOWS = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.Linear, nn.LayerNorm, nn.RMSNorm,
    nn.Embedding, nn.RNNBase,
)  # fmt: skip


def _shown(model: nn.Module, group: Units, graph: PermutationGraph) -> dict[str, Place]:
    """Return the modules whose outputs show the units, with where they lie there."""
    modules = dict(model.named_modules())
    found: dict[str, Place] = {}
    for place in group.places:
        owner, _, attribute = place.tensor.rpartition(".")
        module = modules.get(owner)
        if place.produces and attribute.startswith("weight") and isinstance(module, _SHOWS):
            one_way = not isinstance(module, nn.RNNBase) or (module.num_layers == 1 and not module.bidirectional)
            if one_way and module.__dict__.get("proj_size", 0) == 0:
                found.setdefault(owner, place)
    return found


def _correlations(first: nn.Module, second: nn.Module, names: list[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the correlations of the units of each module of one network with those of the other."""
    moments: dict[str, Moments] = {}
    modules = dict(first.named_modules())
    for inputs in batches:
        mine, theirs = (features(model, inputs, names) for model in (first, second))
        for name in mine.keys() & theirs.keys():  # torch's attention reads the weights of some layers itself
            moments.setdefault(name, Moments()).update(*(units(one[name], modules[name]) for one in (mine, theirs)))
    return {name: one.correlations().nan_to_num() for name, one in moments.items()}


class _Problem:
    """Hold the parameters of both networks, and what they cost in which order."""

    def __init__(self, first: nn.Module, second: nn.Module, graph: PermutationGraph) -> None:
        self.graph = graph
        self.axes: dict[str, list[tuple[int, int]]] = {}  # tensor -> (axis, group)
        mine, theirs = dict(first.named_parameters()), dict(second.named_parameters())
        shapes = [{name: value.shape for name, value in one.items()} for one in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise BadModel("units are matched between networks of one shape", found="two shapes")
        for number, group in enumerate(graph.groups):
            for place in group.places:
                if place.tensor in mine:
                    if mine[place.tensor].shape[place.axis] != graph.lengths[place.tensor, place.axis]:
                        raise BadModel(f"{place.tensor} is not as the permutation graph saw it")
                    self.axes.setdefault(place.tensor, []).append((place.axis, number))
        self.first, self.second = (
            {name: value.detach().double().cpu() for name, value in one.items() if value.is_floating_point()}
            for one in (mine, theirs)
        )
        self.size = sum(float(value.square().sum()) for value in self.first.values()) ** 0.5

    @property
    def separable(self) -> bool:
        """Whether each tensor is touched by one group, along one axis: then one pass finds the optimum."""
        return all(len(found) == 1 for found in self.axes.values())

    def places(self, group: Units) -> list[Place]:
        return [place for place in group.places if place.tensor in self.first]

    def shared(self, place: Place) -> bool:
        """Whether another group moves indices along the same axis."""
        return sum(axis == place.axis for axis, _ in self.axes.get(place.tensor, ())) > 1

    def cost(self, group: Units, held: Mapping[str, Tensor]) -> Tensor:
        """Return, for each unit of the first and of the second, the inner product of what belongs to them."""
        total = torch.zeros(group.size, group.size, dtype=torch.float64)
        for place in self.places(group):
            mine, theirs = (
                one[place.tensor].movedim(place.axis, 0)[place.index].flatten(1) for one in (self.first, held)
            )
            total += mine @ theirs.T
        return total

    def sorted_cost(self, group: Units, held: Mapping[str, Tensor]) -> Tensor:
        """Return the same for weights sorted wherever they themselves may be permuted."""
        total = torch.zeros(group.size, group.size, dtype=torch.float64)
        for place in self.places(group):
            total += self._sorted(self.first[place.tensor], place) @ self._sorted(held[place.tensor], place).T
        return total

    def _sorted(self, value: Tensor, place: Place) -> Tensor:
        rows = value.movedim(place.axis, 0)[place.index]  # (units, m, the other axes)
        moving = {axis for axis, _ in self.axes[place.tensor]} - {place.axis}
        others = [axis for axis in range(value.ndim) if axis != place.axis]
        free = [2 + spot for spot, axis in enumerate(others) if axis in moving]
        if self.shared(place):
            free.append(1)
        fixed = [axis for axis in range(1, rows.ndim) if axis not in free]
        width = int(torch.tensor([rows.shape[axis] for axis in free]).prod()) if free else 1
        return rows.permute(0, *fixed, *free).reshape(len(rows), -1, width).sort(-1).values.flatten(1)

    def distance(self, held: Mapping[str, Tensor]) -> float:
        return sum(float((value - held[name]).square().sum()) for name, value in self.first.items()) ** 0.5

    def report(self, orders: Orders, *, start: str, sweeps: int) -> Matching:
        held = _reordered(self.second, orders)
        distance = self.distance(held)
        certificate: Certificate = "local optimum"
        if not self.graph.groups:
            certificate = "nothing to match"
        elif distance <= _EXACT * self.size:
            certificate = "exact"
        elif self.separable and start != "activations":
            certificate = "optimum"
        return Matching(self.graph.read(orders), distance, self.distance(self.second), certificate, start, sweeps)


def _reordered(tensors: Mapping[str, Tensor], orders: Orders) -> dict[str, Tensor]:
    made = dict(tensors)
    for (name, axis), order in orders.items():
        if name in made:
            made[name] = made[name].index_select(axis, order)
    return made


class _State:
    """Hold the second network in some order."""

    def __init__(self, problem: _Problem, orders: Orders) -> None:
        self.problem, self.orders = problem, orders
        self.held = _reordered(problem.second, orders)

    def move(self, group: Units, permutation: Tensor) -> bool:
        """Permute a group; tell whether that changed anything."""
        if torch.equal(permutation, torch.arange(group.size)):
            return False
        step: Orders = {}
        compose(step, group, permutation, self.problem.graph.lengths)
        self.held = _reordered(self.held, step)
        compose(self.orders, group, permutation, self.problem.graph.lengths)
        return True

    def sort(self) -> _State:
        """Match the units of every group by their sorted weights; heads come before what is in them."""
        for group in self.problem.graph.groups:
            self.move(group, _assign(self.problem.sorted_cost(group, self.held)))
        return self

    def ascend(self, limit: int, draw: torch.Generator) -> int:
        """Improve one group after another until nothing improves; return the number of passes."""
        graph = self.problem.graph
        for sweep in range(1, limit + 1):
            better = False
            for number in torch.randperm(len(graph.groups), generator=draw).tolist():
                better |= self._improve(graph.groups[number])
            if not better:
                return sweep
        return limit

    def _improve(self, group: Units) -> bool:
        """Solve the assignment of one group; where a tensor holds it twice that is a guess, kept if it is better."""
        cost = self.problem.cost(group, self.held)
        permutation = _assign(cost)
        gain = float(cost[torch.arange(group.size), permutation].sum() - cost.diagonal().sum())
        if gain <= 1e-9 * self.problem.size**2:
            return False
        names = [place.tensor for place in self.problem.places(group)]
        held, orders = dict(self.held), dict(self.orders)
        before = self._agreement(set(names))
        self.move(group, permutation)
        if len(set(names)) == len(names) or self._agreement(set(names)) > before + 1e-9 * self.problem.size**2:
            return True
        self.held, self.orders = held, orders
        return False

    def _agreement(self, names: Iterable[str]) -> float:
        return sum(float((self.problem.first[name] * self.held[name]).sum()) for name in names)
