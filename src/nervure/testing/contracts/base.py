"""What all contracts have in common: cases, the strict table of refusals, and results in a new process."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from nervure import zoo
from nervure._kit import NervureError, Unsupported
from nervure.core import rng
from nervure.testing import fresh
from nervure.testing.checks import Poison, digest, require, same, untouched
from nervure.testing.toy import ToyTask


class Contract:
    """Hold named checks as methods that begin with ``test_``; pytest runs them in any subclass ``Test...``.

    A check that takes ``case`` runs once for each of `cases`.
    """

    def supported(self) -> list[str]:
        """Return the cases every check with ``case`` runs on."""
        return []

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Give a check that takes ``case`` its cases."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.supported())

    def failures(self, *, only: str = "test_") -> dict[str, Exception]:
        """Run all checks without pytest; whatever a check raises is its failure.

        Args:
            only: Beginning of the checks' names.

        Returns:
            Check (and case) -> the failure; empty where the contract is kept.
        """
        found: dict[str, Exception] = {}
        grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        for name in sorted(name for name in dir(self) if name.startswith("test_") and name.startswith(only)):
            check: Callable[..., None] = getattr(self, name)
            cases = self.supported() if "case" in inspect.signature(check).parameters else [None]
            for case in cases:
                try:
                    check(case) if case is not None else check()
                except Exception as error:
                    found[name if case is None else f"{name}[{case}]"] = error
                finally:  # what one check finds broken must not break the next
                    torch.set_grad_enabled(grad)
                    torch.set_default_dtype(dtype)
        return found


class ZooContract(Contract):
    """Check a method that takes any model, on the models of `nervure.zoo`.

    A subclass defines `run`. Models it refuses stand in `unsupported` with a part of the reason; a model that is
    listed and works, or is refused for another reason, breaks the contract.

    Attributes:
        cases: Names of zoo models.
        unsupported: Zoo model -> part of the reason it is refused with.
        draws: Whether the method draws random numbers and so must depend on its seed.
    """

    cases: ClassVar[Sequence[str]] = tuple(zoo.names())
    unsupported: ClassVar[Mapping[str, str]] = {}

    def run(self, model: nn.Module, task: ToyTask, *, seed: int) -> Any:
        """Apply the method to a user's model and return its result.

        Args:
            model: The model, in train mode.
            task: Its data and loss.
            seed: The seed.

        Raises:
            NotImplementedError: Where a subclass does not say how.
        """
        raise NotImplementedError("a contract's subclass defines run(model, task, seed=...)")

    def user_models(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return the models that must stay untouched; none for a method that changes its model in place."""
        return (model,)

    def supported(self) -> list[str]:
        """Return the zoo models that are not refused."""
        return [case for case in self.cases if case not in self.unsupported]

    def problem(self, case: str) -> tuple[nn.Module, ToyTask]:
        """Return a zoo model, with gradients, a frozen bias and mixed modes, and data for it.

        Args:
            case: Name of the zoo model.

        Returns:
            The model and its task.
        """
        entry = zoo.case(case)
        model, batch = entry.model(), entry.batch(8)
        first = next(iter(model.parameters()))
        first.grad = torch.full_like(first, 0.5)
        return model, ToyTask(*batch)

    def test_what_is_the_users_is_untouched(self, case: str) -> None:
        """The model, the global generators and the settings of the process are left as they were."""
        model, task = self.problem(case)
        # The scope moves the generators away from the seeds a method may set.
        with rng.scope("contract"), untouched(*self.user_models(model)):
            self.run(model, task, seed=0)

    def test_untouched_after_an_exception(self) -> None:
        """The same where the user's model raises in the middle."""
        case = self.supported()[0]
        for after in (0, 1, 3):
            model, task = self.problem(case)
            poisoned = Poison(model, after=after)
            with rng.scope("contract"), untouched(*self.user_models(poisoned)):
                try:
                    self.run(poisoned, task, seed=0)
                except (Poison.Raised, NervureError):
                    continue

    def test_same_seed_same_result(self, case: str) -> None:
        """The result depends on the seed and on nothing global."""
        results = []
        for elsewhere in (1, 2):
            model, task = self.problem(case)
            torch.manual_seed(elsewhere)
            results.append(self.run(model, task, seed=0))
        same(results[0], results[1], f"two runs with one seed on {case}")

    def test_refusals(self) -> None:
        """Every model of the table is refused, for the reason of the table, and left as it was."""
        for case, reason in self.unsupported.items():
            model, task = self.problem(case)
            with untouched(model):
                try:
                    self.run(model, task, seed=0)
                except Unsupported as error:
                    require(reason in str(error), f"{case} is refused for another reason: {error}")
                    continue
            require(False, f"{case} stands in the table of refusals but works: delete the line")

    def source(self) -> str:
        """Return the file this contract's class is in."""
        return inspect.getfile(type(self))

    def fresh_cases(self) -> list[str]:
        """Return the cases that are repeated in a new process: every third, for what differs there is not the model."""
        return self.supported()[::3]

    def prepare(self, case: str, folder: Path) -> dict[str, Any]:
        """Return results by what they are, and save in the folder what the other process is to load.

        Args:
            case: Name of the case.
            folder: Shared with the other process.

        Returns:
            What -> result.
        """
        model, task = self.problem(case)
        return {"result": self.run(model, task, seed=0)}

    def fresh(self, case: str, folder: Path) -> dict[str, Any]:
        """Return, in the new process, what must equal `prepare`."""
        return self.prepare(case, folder)

    def test_new_process_same_results(self) -> None:
        """A new process gets the same results bit for bit, and the same outputs from what was saved."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            here = {
                case: {what: digest(value) for what, value in self.prepare(case, folder).items()}
                for case in self.fresh_cases()
            }
            there = fresh.answers(self, folder)
        for case, values in here.items():
            for what, text in values.items():
                require(there[case].get(what) == text, f"{what} of {case} differs in a new process")
