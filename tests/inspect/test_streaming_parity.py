"""Steps of recurrent layers against the layers themselves, and networks built by hand from an automaton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure import zoo
from nervure._kit import Unsupported
from nervure.inspect._delayed import class_loss
from nervure.inspect.automata import Automaton
from nervure.inspect.streaming_parity import (
    Reader,
    answered,
    bits,
    last_only,
    majority,
    parity,
    read_automaton,
    stepper,
    stream_task,
    words_up_to,
)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize(("depth", "first"), [(1, True), (3, False)])
def test_steps_equal_the_layer(kind, depth, first):
    torch.manual_seed(0)
    layer = kind(4, 5, num_layers=depth, batch_first=first)
    embed = nn.Embedding(3, 4)
    words = torch.randint(3, (6, 7))
    step, state = stepper(layer, embed)
    state = state.expand(6, -1)
    with torch.no_grad():
        x = embed(words)
        whole = layer(x if first else x.transpose(0, 1))[0]
        for place in range(7):
            state = step(state, words[:, place])
            h = state.view(6, -1, depth, 5)[:, 0, -1]
            torch.testing.assert_close(h, whole[:, place] if first else whole[place])


@pytest.mark.parametrize(("cell", "layer"), [(nn.RNNCell, nn.RNN), (nn.GRUCell, nn.GRU), (nn.LSTMCell, nn.LSTM)])
def test_cells_step_as_layers(cell, layer):
    one, many = cell(4, 5), layer(4, 5)
    many.load_state_dict({f"{name}_l0": value for name, value in one.state_dict().items()})
    embed, words = nn.Embedding(3, 4), torch.randint(3, (6, 4))
    with torch.no_grad():
        states = []
        for module in (one, many):
            step, state = stepper(module, embed)
            state = state.expand(6, -1)
            for place in range(4):
                state = step(state, words[:, place])
            states.append(state)
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_layers_of_the_zoo_can_be_read_and_are_left_alone(name):
    model = zoo.case(name).model()
    layer = next(module for module in model.modules() if isinstance(module, nn.RNNBase))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    source = torch.randn(3, layer.input_size, generator=torch.Generator().manual_seed(0))
    words = torch.randint(3, (20, 6))
    found = read_automaton(layer, lambda s: source[s], lambda h: h[:, :2], words, symbols=3)
    assert 1 <= len(found.minimal) <= len(found.machine) <= found.prefixes
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_parity_network_built_by_hand_is_read_as_two_states():
    # h = (even, odd, scratch): relu units add up state and bit, the exclusive or of two numbers in 0, 1.
    net = nn.RNN(2, 4, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        for value in net.parameters():
            value.zero_()
        # units: [p and not b], [b and not p], both computed from p = u0 + u1 of the step before.
        net.weight_hh_l0[0, :2], net.weight_ih_l0[0] = 1, torch.tensor([0.0, -1.0])
        net.weight_hh_l0[1, :2], net.weight_ih_l0[1] = -1, torch.tensor([0.0, 1.0])

    def read(h):
        p = h[:, 0] + h[:, 1]
        return torch.stack([0.5 - p, p - 0.5], 1)

    words = words_up_to(6)
    found = read_automaton(net, bits, read, words, symbols=2)
    assert found.verdict == "ok"
    assert len(found.minimal) == 2
    assert found.minimal.same_as(Automaton(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1])))
    long = torch.randint(2, (50, 200))
    assert torch.equal(found.minimal.run(long), parity(long))


def test_a_fresh_network_is_no_automaton_of_two_states():
    torch.manual_seed(0)
    model = Reader(width=20, gain=2.5)
    found = read_automaton(model.cell, bits, model.head, words_up_to(6), symbols=2)
    assert len(found.machine) > 50


def test_what_cannot_be_read_is_refused():
    with pytest.raises(Unsupported, match="no recurrent layer"):
        stepper(nn.Linear(2, 2), bits)
    with pytest.raises(Unsupported, match="backwards"):
        stepper(nn.GRU(2, 3, bidirectional=True), bits)


def test_the_task_asks_for_whole_words_only():
    words = words_up_to(3)
    assert len(words) == 14
    assert len({tuple(word) for word in words.tolist()}) == 14
    answers = last_only(words, parity(words.clamp_min(0)))
    for word, answer in zip(words.tolist(), answers.tolist(), strict=True):
        bare = [bit for bit in word if bit >= 0]
        assert answer[len(bare) - 1] == sum(bare) % 2
        assert [value for place, value in enumerate(answer) if place != len(bare) - 1] == [-100] * 2
    assert majority(torch.tensor([[1, 0, 0, 1, 1]])).tolist() == [[1, 0, 0, 0, 1]]
    task = stream_task(0, share=0.1, length=6, test_length=20)
    assert task.train[0].shape == (13, 6)
    model = task.build()
    x, y = task.train
    by_hand = [
        F.cross_entropy(model(word[word >= 0][None])[0, -1:], answer[answer >= 0])
        for word, answer in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(class_loss(model(x), y), torch.stack(by_hand).mean())
    right = [float(model(word[word >= 0][None])[0, -1].argmax() == a[a >= 0]) for word, a in zip(x, y, strict=True)]
    assert float(answered(model(x), y)) == pytest.approx(sum(right) / 13)
