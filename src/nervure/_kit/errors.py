"""The error types. Each message says what was expected, what was found and what to do next."""

from __future__ import annotations

USAGE, COULD_NOT_RUN = 2, 3


class NervureError(Exception):
    """Report a problem in one paragraph: what went wrong, expected, found, next step.

    Args:
        what: What went wrong, one sentence without the final stop.
        expected: What would have been right.
        found: What was there instead.
        try_: What to do next.

    Examples:
        >>> str(NervureError("the batch has the wrong shape", expected="(N, 784)", found="(N, 10)", try_="flatten it"))
        'the batch has the wrong shape. Expected (N, 784); found (N, 10). Try: flatten it.'
    """

    exit_code = COULD_NOT_RUN

    def __init__(self, what: str, *, expected: object = None, found: object = None, try_: str | None = None) -> None:
        self.what, self.expected, self.found, self.try_ = what, expected, found, try_
        text = what.rstrip(".") + "."
        if expected is not None and found is not None:
            text += f" Expected {expected}; found {found}."
        elif expected is not None:
            text += f" Expected {expected}."
        elif found is not None:
            text += f" Found {found}."
        if try_:
            text += f" Try: {try_.rstrip('.')}."
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip from a worker process: the message alone is rebuilt."""
        return _rebuild, (type(self), self.args[0])


def _rebuild(kind: type[NervureError], text: str) -> NervureError:
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


class UsageError(NervureError):
    """Report a wrong argument or option."""

    exit_code = USAGE


class UnknownId(UsageError):
    """Report an id that no card, model, data set or entrant has."""


class BadBudget(UsageError):
    """Report a budget that is not a budget (a density of 0, a negative step count)."""


class CouldNotRun(NervureError):
    """Report work that could not be started or finished."""


class BadModel(CouldNotRun):
    """Report a user's model that cannot be imported, built or called."""


class BadData(CouldNotRun):
    """Report data of the wrong shape, type or range, or data that is missing."""


class StoreError(CouldNotRun):
    """Report a store that is corrupt, of a newer version, or on a full disk."""


class NotDeterministic(CouldNotRun):
    """Report a model or loss that gives two answers to one question."""


class NoEffect(CouldNotRun):
    """Report surgery that matched nothing or a mask that removed nothing."""


class Diverged(CouldNotRun):
    """Report a loss that became NaN or infinite."""

    def __init__(self, step: int, value: float, *, try_: str = "a lower learning rate or gradient clipping") -> None:
        self.step, self.value = step, value
        super().__init__(
            f"the loss became {value} at step {step}", expected="a finite loss", found=str(value), try_=try_
        )


class OverBudget(CouldNotRun):
    """Report a job that used up its seconds."""


class MissingExtra(CouldNotRun):
    """Report an optional dependency that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r}, which is not installed", try_=f"pip install 'nervure[{extra}]'"
        )


class Unsupported(NervureError):
    """Refuse a model a method cannot treat, loudly and with a reason.

    Args:
        method: The method's name.
        module: The module at fault: a qualified name, or the module itself.
        why: The reason.
        try_: What to do instead.
    """

    def __init__(self, method: str, module: object, *, why: str, try_: str | None = None) -> None:
        self.method, self.module, self.why = method, module if isinstance(module, str) else type(module).__name__, why
        super().__init__(f"{method} does not support {self.module}: {why}", try_=try_)
