"""Where parameters lie while they hold a sample, and which of their gradients are used up."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version


class Held(NamedTuple):
    """A parameter inside a sample.

    Attributes:
        parameter: The parameter.
        mean: A tensor over the memory that keeps its mean.
        lent: The memory of the sample that it points at, or None where it was changed in place.
    """

    parameter: Tensor
    mean: Tensor
    lent: Tensor | None


def _holders(storage: torch.UntypedStorage) -> int | None:
    """Count the tensors over some memory and the Python names for it, or return None where torch does not count."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else int(count(storage._cdata)) + sys.getrefcount(storage)


@functools.cache
def _holders_of_one() -> int | None:
    tensor = torch.empty(1)
    storage = tensor.untyped_storage()  # by name, as in `_alone`, for names are counted
    return _holders(storage)


def _alone(parameter: Tensor, like: Tensor, holders: int) -> bool:
    """Return whether nobody could tell that a parameter points elsewhere for a while: nobody else holds its memory.

    Not on a GPU, where captured graphs know addresses, nor over memory of another library or process.
    """
    if type(parameter) not in (Tensor, nn.Parameter) or not parameter.is_cpu or parameter.is_inference():
        return False
    if parameter.dtype is not like.dtype or parameter.stride() != like.stride():
        return False
    storage = parameter.untyped_storage()
    return storage.resizable() and not storage.is_shared() and _holders(storage) == holders


def where(flags: Sequence[bool], function: Callable[..., None], *lists: Sequence[Tensor]) -> None:
    """Call a function of lists with their flagged members."""
    if any(flags):
        function(*([one for one, flag in zip(each, flags, strict=True) if flag] for each in lists))


class Sample:
    """Let parameters hold a sample of the weights, and give them their mean back.

    A parameter that alone sees its memory points at the sample, and its mean stays where it is: two passes over the
    weights less. Any other one is overwritten and written back, so that its views, parameters over the same memory
    and other processes see the sample too. Either way is a change in place to autograd, which then refuses a backward
    pass through weights that are gone.

    The mean that decays is the sample less its shift. Where the sample was changed in place, the parameter's own is
    taken instead; a change through `.data`, of which nobody is told, is undone as well but decays once.

    Args:
        params: The parameters.
        shift: What a sample adds to the mean.
        views: Cuts a row into tensors of the parameters' shapes.
        row: Called for memory of the parameters' type, as long as the shift and zero.
        point: Whether parameters may point at the sample.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        shift: Tensor,
        views: Callable[[Tensor], list[Tensor]],
        row: Callable[[], Tensor],
        *,
        point: bool,
    ) -> None:
        self.params, self.shift, self.shift_views, self._may_point = list(params), shift, views(shift), point
        self._views, self._new = views, row
        self._held: list[Held] = []
        self._viewers: int | None = None
        self._versions: list[int] = []
        self._renew()

    def _renew(self) -> None:
        with torch.inference_mode(False), torch.no_grad():  # training follows a prediction in that mode
            self.row = self._new()
            self._row_views = self._views(self.row)
        self._known, self._shifted = False, [False] * len(self.params)

    @property
    def whole(self) -> bool:
        """Return whether the row holds mean plus shift, of all parameters."""
        return self._known and all(self._shifted)

    def mean(self) -> Tensor:
        """Return the mean that the last sample was drawn around, as a row; it then no longer holds the sample."""
        if not self._known:
            torch._foreach_copy_(self._row_views, self.params)
        elif self.whole:
            self.row.sub_(self.shift)
        else:
            where(self._shifted, torch._foreach_sub_, self._row_views, self.shift_views)
        self._known, self._shifted = True, [False] * len(self.params)
        return self.row

    def forget(self) -> None:
        """Let the shift change: what the row holds then says nothing of the mean."""
        self._known = False

    def enter(self) -> None:
        """Let the parameters hold mean plus shift."""
        self._known = False
        one = _holders_of_one() if self._may_point else None
        pairs = zip(self.params, self._row_views, strict=True)
        alone = [one is not None and _alone(p, view, one) for p, view in pairs]
        torch._foreach_copy_(self._row_views, self.params)
        if all(alone):
            self.row.add_(self.shift)  # the room between the parameters too, so that `mean` finds zeros there
        else:
            where(alone, torch._foreach_add_, self._row_views, self.shift_views)
        self._held = [
            Held(p, p.data, view) if lent else Held(p, view, None)
            for p, view, lent in zip(self.params, self._row_views, alone, strict=True)
        ]
        where([not lent for lent in alone], torch._foreach_add_, self.params, self.shift_views)
        pointed = [held for held in self._held if held.lent is not None]
        for p, _, lent in pointed:
            p.data = lent  # type: ignore[assignment]
        increment_version([held.parameter for held in pointed])
        storage = self.row.untyped_storage()
        self._known, self._shifted, self._viewers = True, alone, _holders(storage)
        self._versions = [held.parameter._version for held in pointed]

    @torch.no_grad()
    def leave(self) -> None:
        """Give the parameters their mean back, however far `enter` came."""
        held, self._held = self._held, []
        pointed = [one for one in held if one.lent is not None]
        self._known = self._known and self._versions == [one.parameter._version for one in pointed]
        disturbed = bool(pointed) and not self._undisturbed(pointed)
        copied = held if disturbed else [one for one in held if one.lent is None]
        if copied:
            torch._foreach_copy_([one.parameter for one in copied], [one.mean for one in copied])
        if disturbed:  # somebody took views of the sample, whose memory becomes the parameters' own
            self._renew()
            return
        for p, mean, _ in pointed:
            p.data = mean
        increment_version([one.parameter for one in pointed])

    def _undisturbed(self, pointed: Sequence[Held]) -> bool:
        same = all(p.data_ptr() == lent.data_ptr() for p, _, lent in pointed if lent is not None)
        storage = self.row.untyped_storage()
        return same and not storage.is_shared() and _holders(storage) == self._viewers


class Spent:
    """Know the gradients that the last step used up."""

    def __init__(self) -> None:
        self._grads: dict[int, tuple[Tensor, int]] = {}

    def note(self, params: Sequence[Tensor]) -> None:
        """Note the gradients as they now are, and forget those noted before."""
        self._grads = {id(p): (p.grad, p.grad._version) for p in params if p.grad is not None}

    def rest(self, parameter: Tensor) -> Tensor | None:
        """Return a parameter's gradient, or None if it is used up."""
        grad, spent = parameter.grad, self._grads.get(id(parameter))
        return None if spent is not None and spent[0] is grad and spent[1] == spent[0]._version else grad
