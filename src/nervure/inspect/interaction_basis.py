"""The interaction basis: directions of a layer that are active and that later layers read, one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.core.forward import batch_size
from nervure.core.rng import generator, seed_for
from nervure.inspect._interaction_basis_trial import (
    Appended,
    conditioned,
    dependent,
    deviation,
    fitted,
    inserted,
    linear,
    plain,
    principal,
)
from nervure.inspect._layer_basis import LayerBasis, collected, solved
from nervure.inspect._sections import METHOD, Runs, Sections, pulled, rows, signs_of, single_of
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="interaction-basis",
    n=1,
    title="Using Degeneracy in the Loss Landscape for Mechanistic Interpretability",
    year=2024,
    link="https://arxiv.org/abs/2405.10927",
    family="inspect",
    summary=(
        "A layer's directions that are never active, or that nothing after it reads, cost parameters and do nothing. "
        "Whitened activations, rotated to the principal axes of the gradients that later layers send back, give a "
        "basis without them, which no invertible map inserted in the network can change. Edges between such "
        "directions make a graph whose modularity tells parts that work apart."
    ),
    tags=("interpretability", "degeneracy", "basis", "Gram matrix", "Jacobian", "rank", "modularity", "ReLU"),
    provides=("interaction_rotations", "InteractionBasis", "interaction_graph", "InteractionGraph"),
    protocol="diagnostic",
    claims=("no_inserted_map_changes_it",),
    needs=("data",),
    deviations=(
        "Gradients are taken at the data, or each integrated over scaled inputs with `points`; which of the two the "
        "final version recommends is open. The model's output keeps its own units.",
        "A layer looks at all later layers that depend on it directly, so that residual paths count; in a chain that "
        "is the next layer.",
        "Each linear, convolutional and normalising bias is fed by the constant unit, at all positions alike; what is "
        "added inside recurrent cells and torch's own attention belongs to the map between layers.",
        "Tolerances are relative to the largest eigenvalue, the square root of the precision of float64.",
        "Modules are found by Louvain on the square roots of the edges.",
        "The language models are not studied.",
        "The claim's inverse map is merged into the weights that follow. After a first rehearsal the second hidden "
        "layer was given weights of full rank for the appended units: read through the old ones, independent units "
        "were dropped too.",
    ),
    verified=(
        "Jacobians by torch.func.jacrev and dense eigendecompositions in float64 on a network of 20 units.",
        "The same, sample by sample, on 14 models of the zoo: residual, grouped, attention, recurrent, tied.",
        "The authors' code on a ReLU network of 24 units: C and its inverse agree to 2e-10, with and without points.",
    ),
)

_TOLERANCE = 2.0**-26


@dataclass(frozen=True)
class InteractionBasis:
    """Report the basis of every layer.

    Args:
        layers: Layer -> basis of what it reads, in order of execution; "#2" marks a second call.
        points: Points at which gradients were integrated.
    """

    layers: Mapping[str, LayerBasis]
    points: int

    @property
    def verdict(self) -> str:
        """Return "warn" where a layer surely has directions that do nothing, "ok" if surely none, or "cannot tell"."""
        if any(one.sure and one.wasted for one in self.layers.values()):
            return "warn"
        return "ok" if all(one.sure for one in self.layers.values()) else "cannot tell"


def interaction_rotations(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    layers: Sequence[str] | None = None,
    points: int = 0,
    probes: int = 128,
    tolerance: float = _TOLERANCE,
    seed: int = 0,
) -> InteractionBasis:
    """Compute the interaction basis of what every layer reads, in float64 and eval mode, from the output backwards.

    With f the activations and a constant one, G = E f f' = U D U' without its small eigenvalues, and M' the mean over
    samples and positions of the sum of g g', where g is the gradient of one direction of a later layer: R = U D^-1/2,
    M = R^+ M' R^+' = V L V', and C = R V |L|^1/2 without the small |L|. Positions of images and sequences are samples.

    Args:
        model: The model; a copy is examined.
        batches: One batch (inputs, targets) or a sequence of batches; targets are not read. With several, each is run
            again for every layer.
        layers: Names of modules whose input is looked at, such as a whole block for the residual stream that enters
            it; None takes all linear, convolutional and recurrent layers.
        points: Points of a Gauss-Legendre rule, at which gradients are taken with all that a section reads scaled
            from 0 to 1; 0 takes the gradient at the data.
        probes: Most gradients a batch and layer; where a layer has more directions times positions, as many random
            sign combinations stand for them, without bias.
        tolerance: Eigenvalues below this share of the largest count as zero, in (0, 1).
        seed: Draws the signs.

    Returns:
        The report.

    Raises:
        UsageError: If a number is out of range.
        BadData: If there are fewer than two samples.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> found = interaction_rotations(model, (torch.randn(200, 4), torch.zeros(200)))
        >>> {name: (one.active, one.directions) for name, one in found.layers.items()}
        {'0': (5, 5), '2': (9, 3)}
    """
    if points < 0 or probes < 1 or not 0 < tolerance < 1:
        expected = "points >= 0, probes >= 1, 0 < tolerance < 1"
        raise UsageError("a number is out of range", expected=expected, found=(points, probes, tolerance))
    sections = Sections(model, batches, layers)
    sizes = [batch_size(inputs) for inputs in sections.inputs]
    if sum(sizes) < 2:
        raise BadData("too few samples for a basis", expected="at least 2", found=sum(sizes))
    with sections.ready():
        runs = Runs(sections, points)
        halves = [min(max(sum(sizes) // 2 - sum(sizes[:place]), 0), size) for place, size in enumerate(sizes)]
        names, moments = collected(runs, halves, seed)
        found: dict[int, LayerBasis] = {}
        for index in reversed(range(len(moments))):
            moment = moments[index]
            if index < len(names):
                found[index] = solved(moment, tolerance)
            # The output keeps its own units.
            C = found[index].rotation if index in found else torch.eye(len(moment.gram[0])).to(moment.gram)[:, :-1]
            draw = generator(METHOD, seed, index)
            for cuts, half in zip(runs, halves, strict=True):
                for signs, weight in signs_of(cuts[0], index, C.shape[1], probes, draw):
                    for parent, gradients in pulled(cuts, index, C, signs).items():
                        moments[parent].add(gradients, half, weight)
    return InteractionBasis({name: found[index] for index, name in enumerate(names)}, points)


@dataclass(frozen=True)
class InteractionGraph:
    """Report how strongly the directions of one layer act on those of the next.

    Args:
        edges: (layer, later layer or "output") -> strengths, shape (later directions, directions).
        modules: Sets of (layer, direction) that act on each other most.
        modularity: Share of the weight inside modules less what chance would put there, below 1; 0 without edges.
    """

    edges: Mapping[tuple[str, str], Tensor]
    modules: tuple[frozenset[tuple[str, int]], ...]
    modularity: float


def interaction_graph(
    model: nn.Module, batches: Batch | Sequence[Batch], basis: InteractionBasis, *, probes: int = 128, seed: int = 0
) -> InteractionGraph:
    """Measure the edges between the directions of layers that depend on each other, and the graph's modules.

    An edge is E_ij = E (sum_t h_tj dh'_i / dh_tj)^2, summed over the positions of the later direction i, where h_tj
    is coordinate j at position t of the earlier layer. Modules maximise the modularity of sqrt(E), by Louvain.

    Args:
        model: The model.
        batches: As in `interaction_rotations`.
        basis: What that returned for this model.
        probes: Most positions of a later layer that are looked at one by one; of more, as many random sign sums.
        seed: Draws the signs and the order in which modules are joined.

    Returns:
        The graph.

    Raises:
        BadData: If the basis is not one of this model.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = (torch.randn(200, 4), torch.zeros(200))
        >>> graph = interaction_graph(model, batch, interaction_rotations(model, batch))
        >>> {ends: tuple(one.shape) for ends, one in graph.edges.items()}
        {('0', '2'): (3, 5), ('2', 'output'): (3, 3)}
    """
    layers = list(dict.fromkeys(name.partition("#")[0] for name in basis.layers))
    sections = Sections(model, batches, layers)
    edges: dict[tuple[str, str], Tensor] = {}
    total = sum(batch_size(inputs) for inputs in sections.inputs)
    draw = generator(METHOD, seed, "edges")
    with sections.ready():
        for cuts in Runs(sections, basis.points):
            reads = cuts[0].reads
            if [(read.name, rows(read).shape[-1]) for read in reads[:-1]] != [
                (name, one.units) for name, one in basis.layers.items()
            ]:
                raise BadData("the basis is not one of this model", found=list(basis.layers))
            here = [basis.layers[read.name].coordinates(rows(read)) for read in reads[:-1]]
            for index, read in enumerate(reads):
                own = torch.eye(rows(read).shape[-1] + 1).to(read.leaf)[:, :-1]
                C = basis.layers[read.name].rotation if read.name in basis.layers else own
                for signs, directions, weight in single_of(cuts[0], index, C.shape[1], probes, draw):
                    for parent, gradients in pulled(cuts, index, C, signs).items():
                        name = reads[parent].name
                        acts = (gradients @ basis.layers[name].inverse.T * here[parent]).sum(2).square().sum(1)
                        new = acts.new_zeros(C.shape[1], acts.shape[1])
                        table = edges.setdefault((name, read.name), new)
                        table.index_add_(0, directions, acts, alpha=weight / (total * here[parent].shape[1]))
    return InteractionGraph(edges, *_modules(edges, seed))


def _modules(
    edges: Mapping[tuple[str, str], Tensor], seed: int
) -> tuple[tuple[frozenset[tuple[str, int]], ...], float]:
    """Return the modules that Louvain's method finds, and their modularity."""
    import networkx  # type: ignore[import-untyped]

    graph = networkx.Graph()
    for (layer, later), table in edges.items():
        for i, row in enumerate(table.sqrt().tolist()):
            weighted = [((layer, j), (later, i), weight) for j, weight in enumerate(row) if weight > 0]
            graph.add_weighted_edges_from(weighted)
    if not graph.number_of_edges():
        return (), 0.0
    found = networkx.community.louvain_communities(graph, seed=seed_for(METHOD, seed) % 2**32)
    return tuple(frozenset(one) for one in found), float(networkx.community.modularity(graph, found))


@claim(
    CARD,
    checks=(
        Check.at_most("an inserted map changes nothing", method="interaction basis", metric="deviation", bound=1e-6),
        Check.at_least("it changes the principal components", method="PCA basis", metric="deviation", bound=1e-2),
        Check.at_least("it changes the units", method="neuron basis", metric="deviation", bound=1e-2),
        Check.at_most("eight dependent units: eight dropped", method="dependent units", metric="wrong", bound=0.0),
    ),
    sabotage={
        "PCA basis": "interaction basis",
        "neuron basis": "interaction basis",
        "random rotation": "interaction basis",
        "independent units": "dependent units",
    },
    seeds=3,
    minutes=1.0,
    data=("digits",),
)  # fmt: skip
def no_inserted_map_changes_it(ctx: Ctx) -> None:
    """The interaction basis stays the same when a map and its inverse are inserted, and drops what depends on others.

    MLP 64-32-64-10 after 200 steps on digits, in float64; after the first hidden layer a random map of condition number
    10, and its inverse in the weights of the second. The deviation is the largest relative one of |L| and of
    coordinates up to sign, of all three layers. Then five copies and three linear combinations of units are appended
    to the first hidden layer, the second reading all of them; wrong is how far the change of dropped directions is
    from eight. The controls are principal components, the units, a random rotation of them, and eight appended units
    that depend on the others through a ReLU.
    """
    data = ctx.data("digits").flat()
    model, draw = fitted(ctx, data), ctx.generator("maps")
    x, W = data.train_x.double(), model.get_parameter("second.weight").detach()
    units, batch = W.shape[1], (x, data.train_y)
    A, turn = conditioned(units, 10.0, draw), conditioned(units, 1.0, draw)
    here = interaction_rotations(model, batch).layers
    there = interaction_rotations(inserted(model, linear(A), W @ torch.linalg.inv(A)), batch, layers=tuple(here)).layers
    f, last = model[:2](x).detach(), model[:4](x).detach()
    reads = {"first": (x, x), "second": (f, f @ A.T), "head": (last, last)}
    found = [
        deviation(*((one.values, one.coordinates(u)) for one, u in zip((here[name], there[name]), pair, strict=True)))
        for name, pair in reads.items()
    ]
    ctx.measure("interaction basis", deviation=max(found), directions=float(here["second"].directions))
    ctx.measure("PCA basis", deviation=deviation(principal(f), principal(f @ A.T)))
    ctx.measure("neuron basis", deviation=deviation(plain(f), plain(f @ A.T)))
    ctx.measure("random rotation", deviation=deviation(plain(f @ turn), plain(f @ A.T @ turn)))
    wide, weight = dependent(W, draw)
    new = torch.randn(8, units, generator=draw, dtype=torch.float64) / units**0.5
    for arm, layer in (("dependent units", linear(wide)), ("independent units", Appended(new))):
        more = interaction_rotations(inserted(model, layer, weight), batch, layers=tuple(here)).layers["second"]
        ctx.measure(arm, wrong=float(abs(more.dropped - here["second"].dropped - 8)))
