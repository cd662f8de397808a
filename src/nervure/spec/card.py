"""The card: a paper's metadata as a literal that is read without importing the method."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

FAMILIES = ("adapt", "compress", "inspect", "kernels", "layers", "sequence", "train")
PROTOCOLS = (
    "pruner",
    "channel-pruner",
    "initialiser",
    "optimizer",
    "loss",
    "layer",
    "diagnostic",
    "kernel",
    "continual-learner",
    "training-rule",
    "searcher",
)
# The arena owns these: a card that declared its own range for one of them would buy itself an unfair search.
SHARED_HYPER_PARAMETERS = frozenset(
    {"lr", "learning_rate", "batch_size", "steps", "epochs", "weight_decay", "momentum"}
)
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\Z")


@dataclass(frozen=True, kw_only=True)
class Card:
    """Describe one paper and the method nervure makes of it. Every value must be a literal.

    Args:
        id: Short name, lower case, words joined by hyphens; the id used on the command line.
        n: Number of the paper in nervure's list, or None for a plugin's card.
        title: Title of the paper.
        year: Year of first publication, or None where it is not known.
        link: Address of the paper, or None where it is not known.
        family: One of `FAMILIES`.
        summary: What the paper does, in our own words.
        tags: Further words to be found by.
        provides: Public names defined in the card's file, the method itself first.
        protocol: The family protocol the method meets, one of `PROTOCOLS`, or None.
        claims: Names of the claim functions in the file.
        needs: What the method needs from its user, such as ``"data"``, ``"labels"``, ``"grad"``.
        deviations: How nervure's method differs from the paper, one sentence each.
        verified: What the method was tested against, one sentence each.
        entrants: Names in ``compare`` -> the public name that enters under it.
        tunes: Ranges of the method's own hyper-parameters, (low, high); never a shared one.

    Raises:
        ValueError: If a field is outside its range.
    """

    id: str
    title: str
    family: str
    summary: str
    n: int | None = None
    year: int | None = None
    link: str | None = None
    tags: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    protocol: str | None = None
    claims: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    entrants: dict[str, str] = dataclasses.field(default_factory=dict)
    tunes: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _ID.match(self.id):
            raise ValueError(f"card id {self.id!r}: expected lower-case words joined by hyphens")
        if self.family not in FAMILIES:
            raise ValueError(f"card {self.id}: family {self.family!r} is not one of {', '.join(FAMILIES)}")
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise ValueError(f"card {self.id}: protocol {self.protocol!r} is not one of {', '.join(PROTOCOLS)}")
        shared = sorted(SHARED_HYPER_PARAMETERS.intersection(self.tunes))
        if shared:
            raise ValueError(
                f"card {self.id}: the arena owns {', '.join(shared)}; a card declares only its method's own"
            )

    def to_json(self) -> dict[str, object]:
        """Return the card as JSON-ready values."""
        return dataclasses.asdict(self)
