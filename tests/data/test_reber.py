"""The Reber grammar against a regular expression of it."""

import re

import pytest
import torch

from nervure._kit import UsageError
from nervure.data import reber

# 0 -T-> 1 -S*-> 1 -X-> 3; 0 -P-> 2 -T*-> 2 -V-> 4; 3 -S-> 5, 3 -X-> 2; 4 -V-> 5, 4 -P-> 3.
PLAIN = r"B(?:TS*X(?:XT*VP)*(?:S|XT*VV)|PT*V(?:PXT*V)*(?:V|PS))E"
LANGUAGE = re.compile(rf"B(?:T{PLAIN}T|P{PLAIN}P)E\Z")


def draws(count, longest=30):
    generator = torch.Generator().manual_seed(0)
    return [reber.draw(generator, longest=longest) for _ in range(count)]


def test_strings_belong_to_the_language_and_perturbed_ones_do_not():
    generator = torch.Generator().manual_seed(1)
    for text in draws(1000):
        assert LANGUAGE.match(text)
        assert len(text) <= 30
        changed = reber.perturb(text, generator)
        assert not LANGUAGE.match(changed)
        assert sum(a != b for a, b in zip(text, changed, strict=True)) == 1


def test_valid_is_the_regular_expression_on_random_and_mutated_strings():
    generator = torch.Generator().manual_seed(2)
    seen = set()
    for text in draws(500):
        for _ in range(4):
            place = int(torch.randint(len(text), (), generator=generator))
            symbol = reber.SYMBOLS[int(torch.randint(7, (), generator=generator))]
            changed = text[:place] + symbol + text[place + int(torch.randint(2, (), generator=generator)) :]
            seen.add(bool(LANGUAGE.match(changed)))
            assert reber.valid(changed) == bool(LANGUAGE.match(changed))
    assert seen == {True, False}
    assert not any(reber.valid(text) for text in ("", "B", "BE", "BTTE", "BTBETE"))


def test_each_way_is_taken_half_the_time():
    inner = [text[2:-2] for text in draws(4000)]
    first = sum(text[1] == "T" for text in inner) / 4000
    assert abs(first - 0.5) < 0.03
    loops = [text[2] == "S" for text in inner if text[1] == "T"]
    assert abs(sum(loops) / len(loops) - 0.5) < 0.05


def test_data_set():
    data = reber.embedded_reber(400, test=100, seed=3)
    again = reber.embedded_reber(400, test=100, seed=3)
    assert torch.equal(data.train_x, again.train_x)
    every, labels = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
    assert labels.sum() == 200
    texts = ["".join(reber.SYMBOLS[int(s)] for s in row[row.sum(1) > 0].argmax(1)) for row in every]
    assert len(set(texts)) == 400
    assert [reber.valid(text) for text in texts] == labels.bool().tolist()
    assert torch.equal(reber.encode(texts), every)
    shuffled = reber.embedded_reber(400, test=100, seed=3, shuffled=True)
    assert torch.equal(shuffled.train_x, data.train_x)
    assert 0.35 < float((shuffled.train_y == data.train_y).double().mean()) < 0.65


def test_bad_arguments():
    with pytest.raises(UsageError, match="no such parts"):
        reber.embedded_reber(5)
    with pytest.raises(UsageError, match="so short"):
        reber.draw(torch.Generator(), longest=8)
    with pytest.raises(UsageError, match="not so many"):
        reber.embedded_reber(100, test=10, longest=9)
