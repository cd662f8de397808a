"""Pack small whole numbers into bytes, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from nervure._kit import UsageError


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Pack codes into bytes, the first one in the lowest bits.

    Args:
        codes: Whole numbers in [0, 2^bits), any shape.
        bits: 1, 2, 4 or 8.

    Returns:
        Bytes (uint8), ceil(numel * bits / 8) of them.

    Raises:
        UsageError: If a code or the number of bits is out of range.

    Examples:
        >>> pack(torch.tensor([1, 2, 0, 1, 2]), bits=2).tolist()
        [73, 2]
    """
    each = _each(bits)
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise UsageError("a code does not fit", expected=f"0 to {2**bits - 1}", found=f"{flat.min()} to {flat.max()}")
    short = -flat.numel() % each
    rows = torch.cat([flat, flat.new_zeros(short)]).to(torch.int32).view(-1, each)
    return (rows << torch.arange(0, 8, bits, dtype=torch.int32, device=flat.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, *, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Undo `pack`.

    Args:
        packed: Bytes.
        bits: 1, 2, 4 or 8.
        shape: Shape of the codes.

    Returns:
        The codes (uint8).

    Raises:
        UsageError: If there are too few bytes for the shape.
    """
    each, count = _each(bits), torch.Size(shape).numel()
    if packed.numel() * each < count:
        raise UsageError("there are too few bytes", expected=-(-count // each), found=packed.numel())
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device)
    rows = (packed.to(torch.int32)[:, None] >> shifts) & (2**bits - 1)
    return rows.reshape(-1)[:count].to(torch.uint8).reshape(shape)


def _each(bits: int) -> int:
    if bits not in (1, 2, 4, 8):
        raise UsageError("codes of so many bits are not packed", expected="1, 2, 4 or 8", found=bits)
    return 8 // bits
