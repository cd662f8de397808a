"""Spread a population over a Ray cluster: actors train its members, and copies travel between them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nervure._kit import CouldNotRun, UsageError, require
from nervure.run.node import code_version
from nervure.run.ray import MOST_RETRIES, NODE_SECONDS, connect, error_lines, import_paths, leave, reached
from nervure.run.resources import GIB, Resources

if TYPE_CHECKING:
    from nervure.search import PBT

_LOOK_SECONDS = 1.0


class Worker:
    """Hold the trainables of some members on a node.

    Args:
        factory: ``path.py:factory`` of a function that takes a member's index and returns a trainable.
        folder: Where the driver stands, for paths in the factory.
        paths: Where the driver imports from.
        version: The driver's code.

    Raises:
        RuntimeError: If this node runs other code.
    """

    def __init__(self, factory: str, folder: str, paths: list[str], version: str) -> None:
        sys.path.extend(path for path in paths if path not in sys.path)
        if os.path.isdir(folder):
            os.chdir(folder)
        if code_version() != version:
            raise RuntimeError(f"this node runs {code_version()}, the driver {version}")
        # Imported here, on the node: it brings torch.
        from nervure.core.factory import load_factory

        self._make = load_factory(factory)
        self._trainables: dict[int, Any] = {}

    def interval(self, member: int, config: Mapping[str, float], state: Any) -> tuple[float, Any]:
        """Train one interval and return the score and the state after it.

        Args:
            member: The member.
            config: The hyper-parameters.
            state: What to start from; None goes on.

        Returns:
            Score and state.
        """
        if member not in self._trainables:
            self._trainables[member] = self._make(member)
        trainable = self._trainables[member]
        if state is not None:
            trainable.load_state_dict(state)
        trainable.step(config)
        return float(trainable.eval()), trainable.state_dict()


@dataclass(eq=False)
class _Bench:
    """Know what a worker holds and does."""

    worker: Any
    held: set[int] = field(default_factory=set)
    busy: int = 0
    answered: bool = False
    given_up: bool = False


def run_crowd(
    search: PBT,
    factory: str,
    *,
    intervals: int,
    address: str | None = None,
    resources: Resources | None = None,
    told: Callable[[Mapping[str, float], float], None] = lambda config, score: None,
) -> list[Any]:
    """Drive a population-based search with every member on a Ray cluster.

    A synchronous search comes out as with `nervure.search.drive.run_trainables`, however long each member takes. A
    member whose node is lost begins its interval again elsewhere, from the state it started with, at most twice.

    Args:
        search: The search.
        factory: ``path.py:factory`` of a function that takes a member's index and returns a
            `nervure.search.drive.Trainable`; the path must be visible to the nodes.
        intervals: Intervals each member trains; in a resumed search, more than the one that is furthest has.
        address: As in `nervure.run.Ray`.
        resources: What each worker gets; where there is room for fewer than there are members, they take turns.
        told: Called with what was asked and the score, as intervals end.

    Returns:
        The last state of each member.

    Raises:
        UsageError: If there is no interval to train.
    """
    if intervals < 1:
        raise UsageError("there is nothing to train", expected="an interval or more", found=intervals)
    ray = require("ray", extra="ray")
    ours = not ray.is_initialized()
    if ours:
        connect(ray, address)
    crowd = _Crowd(ray, search, factory, resources or Resources())
    try:
        with reached(ray):
            return crowd.run(intervals, told)
    finally:
        crowd.close()
        if ours:
            leave(ray)


class _Crowd:
    """Know who is at work on what, and the states that may be copied."""

    def __init__(self, ray: Any, search: PBT, factory: str, resources: Resources) -> None:
        self._ray, self._search, self._resources = ray, search, resources
        memory = None if resources.memory is None else int(resources.memory * GIB)
        options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "memory": memory}
        kind, version = ray.remote(Worker).options(**options), code_version()
        self._hire = lambda: _Bench(kind.remote(factory, os.getcwd(), import_paths(), version))
        self._benches: list[_Bench] = []
        self._saved: dict[int | None, Any] = {None: None}  # by trained interval
        self._lost: dict[int, int] = {}

    def run(self, intervals: int, told: Callable[[Mapping[str, float], float], None]) -> list[Any]:
        """Train, and return the last state of each member."""
        search = self._search
        goal = max(search.ages) + intervals
        working: dict[Any, tuple[dict[str, float], _Bench]] = {}
        order: list[dict[str, float]] = []  # as they were asked for
        ended: dict[int, tuple[float, Any]] = {}
        while True:
            # The faster members of an asynchronous search wait at the goal for the others.
            while (age := search.next_age) is not None and age < goal:
                order.append(search.ask())
                self._begin(order[-1], working)
            if not order:
                return [self._saved[at] for at in search.last]
            done, _ = self._ray.wait(list(working), num_returns=1, timeout=_LOOK_SECONDS)
            if not done:
                self._give_up()
                continue
            asked, bench = working.pop(done[0])
            bench.busy -= 1
            found = self._result(done[0], int(asked["member"]), bench)
            if found is None:
                self._begin(asked, working)
                continue
            ended[int(asked["member"])] = found
            for ready in self._ready(order, ended):
                score, state = ended.pop(int(ready["member"]))
                self._saved[len(search.trained)] = state
                search.tell(ready, score)
                told(ready, score)
                needed = {None, *search.origin, *search.last}
                self._saved = {at: kept for at, kept in self._saved.items() if at in needed}

    def close(self) -> None:
        """End the workers."""
        for bench in self._benches:
            self._ray.kill(bench.worker)
        self._benches = []

    def _ready(self, order: list[dict[str, float]], ended: Mapping[int, Any]) -> Iterator[dict[str, float]]:
        """Take what may be told: at once in an asynchronous search, else in the order it was asked for.

        That order costs nothing, for a synchronous search waits for all.

        Yields:
            What was asked for.
        """
        for asked in list(order):
            if int(asked["member"]) in ended:
                order.remove(asked)
                yield asked
            elif not self._search.asynchronous:
                return

    def _begin(self, asked: dict[str, float], working: dict[Any, tuple[dict[str, float], _Bench]]) -> None:
        """Begin an interval; a member whose worker is new, or whose weights are another's, is handed its state."""
        member = int(asked["member"])
        bench = self._place(member)
        copied = asked["parent"] != member or member not in bench.held
        state = self._saved[self._search.origin[member]] if copied else None
        bench.held.add(member)
        bench.busy += 1
        config = {name: asked[name] for name in self._search.space}
        working[bench.worker.interval.remote(member, config, state)] = asked, bench

    def _place(self, member: int) -> _Bench:
        """Return the worker that holds a member, else a new one where there is room, else the least busy.

        Raises:
            CouldNotRun: If no node has had room for a while.
        """
        for bench in self._benches:
            if member in bench.held:
                return bench
        end = time.monotonic() + NODE_SECONDS
        while True:
            if len(self._benches) < self._room():
                self._benches.append(self._hire())
                return self._benches[-1]
            if self._benches:
                return min(self._benches, key=lambda bench: (bench.busy, len(bench.held)))
            if time.monotonic() > end:
                raise CouldNotRun("no node of the cluster holds a member", expected=f"{self._resources} on one")
            time.sleep(_LOOK_SECONDS)

    def _room(self) -> int:
        return sum(self._resources.fit(node["Resources"]) for node in self._ray.nodes() if node["Alive"])

    def _give_up(self) -> None:
        """Let go of workers that wait for a node that has gone: it may take a while until a lost one is known."""
        silent = [bench for bench in self._benches if not bench.answered]
        for bench in silent[: max(0, len(self._benches) - self._room())]:
            bench.given_up = True
            self._benches.remove(bench)
            self._ray.kill(bench.worker)

    def _result(self, task: Any, member: int, bench: _Bench) -> tuple[float, Any] | None:
        """Return score and state, or None where the member was lost and may try again.

        Raises:
            CouldNotRun: If it failed by itself, or was lost too often.
        """
        known = self._ray.exceptions
        try:
            score, state = self._ray.get(task)
        except (known.RayActorError, known.ObjectLostError, known.NodeDiedError) as error:
            if isinstance(error, known.ActorDiedError) and "creation task" in str(error):
                raise CouldNotRun("a worker cannot begin on a node", found=error_lines(error)[-1]) from error
            if bench in self._benches:
                self._benches.remove(bench)  # with all it held: they begin elsewhere from their saved states
            self._lost[member] = self._lost.get(member, 0) + (not bench.given_up)
            if self._lost[member] > MOST_RETRIES:
                raise CouldNotRun(
                    f"member {member} was lost {self._lost[member]} times", found=error_lines(error)[-1]
                ) from error
            return None
        except known.RayTaskError as error:
            raise CouldNotRun(f"member {member} failed", found=error_lines(error)[-1]) from error
        self._lost.pop(member, None)
        bench.answered = True
        return float(score), state
