"""The contract of searchers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nervure.spec import Searcher
from nervure.testing.checks import require, same, untouched
from nervure.testing.contracts.base import Contract
from nervure.testing.contracts.training import through_a_file


class SearcherContract(Contract):
    """Check a searcher over the numbers a and b.

    Attributes:
        rounds: How many configurations are asked for.
    """

    rounds = 30

    def make(self, *, seed: int) -> Searcher:
        """Return the searcher, over ``a`` and ``b`` in [0.1, 1].

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a contract's subclass defines make(seed=...)")

    def score(self, config: Mapping[str, float]) -> float:
        """Return how good a configuration is; higher is better."""
        return 1 - (config["a"] - 0.7) ** 2 - (config["b"] - 0.2) ** 2

    def _drive(self, searcher: Searcher, rounds: int) -> list[dict[str, float]]:
        asked = []
        for _ in range(rounds):
            config = dict(searcher.ask())
            searcher.tell(config, self.score(config))
            asked.append(config)
        return asked

    def test_proposals_are_configurations(self) -> None:
        """Every proposal has both numbers, finite and above zero."""
        for config in self._drive(self.make(seed=0), self.rounds):
            require({"a", "b"} <= set(config), f"a proposal without a or b: {sorted(config)}")
            require(all(0 < config[name] < 1e6 for name in ("a", "b")), f"a proposal out of range: {config}")

    def test_proposals_vary(self) -> None:
        """A searcher does not propose one configuration for ever."""
        asked = self._drive(self.make(seed=0), self.rounds)
        require(len({(one["a"], one["b"]) for one in asked}) > 2, "there are at most two different proposals")

    def test_same_seed_same_proposals(self) -> None:
        """Proposals depend on the seed and the scores alone, and the global generators are left as they were."""
        with untouched():
            one = self._drive(self.make(seed=4), self.rounds)
        two, other = self._drive(self.make(seed=4), self.rounds), self._drive(self.make(seed=5), self.rounds)
        same(one, two, "two searches of one seed")
        require(one != other, "the seed does not matter")

    def test_resumes_exactly(self) -> None:
        """A searcher filled from a saved state goes on with the same proposals."""
        whole: Any = self.make(seed=0)
        begun: Any = self.make(seed=0)
        wanted = self._drive(whole, self.rounds)[self.rounds // 2 :]
        self._drive(begun, self.rounds // 2)
        resumed: Any = self.make(seed=9)
        resumed.load_state_dict(through_a_file(begun.state_dict()))
        same(wanted, self._drive(resumed, self.rounds - self.rounds // 2), "a resumed search")

    def test_it_learns_from_scores(self) -> None:
        """Scores change the later proposals: with the signs turned they are others."""
        one, two = self.make(seed=0), self.make(seed=0)
        first = self._drive(one, self.rounds)
        for config in first:
            asked = dict(two.ask())
            two.tell(asked, -self.score(config))
        after = [dict(one.ask()), dict(two.ask())]
        require(after[0] != after[1], "scores do not matter")
