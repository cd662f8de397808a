"""Packing against Python's own integers."""

import pytest
import torch

from nervure._kit import UsageError
from nervure.core.bitpack import pack, unpack


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4), (0,)])
def test_bytes_are_the_binary_numbers_and_unpack_gives_the_codes(bits, shape):
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits=bits)
    whole = sum(code << (bits * place) for place, code in enumerate(codes.flatten().tolist()))
    expected = list(whole.to_bytes(-(-codes.numel() * bits // 8), "little"))
    assert packed.dtype is torch.uint8
    assert packed.tolist() == expected
    assert torch.equal(unpack(packed, bits=bits, shape=codes.shape), codes.to(torch.uint8))


def test_bad_input():
    with pytest.raises(UsageError, match="does not fit"):
        pack(torch.tensor([4]), bits=2)
    with pytest.raises(UsageError, match="1, 2, 4 or 8"):
        pack(torch.tensor([1]), bits=3)
    with pytest.raises(UsageError, match="too few bytes"):
        unpack(torch.zeros(1, dtype=torch.uint8), bits=2, shape=(5,))
