import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadData, BadModel, UsageError
from nervure.core import factory, forward, rng, state


def test_every_way_in_and_out():
    class Output:
        logits = torch.ones(2)

    assert forward.logits({"loss": torch.zeros(1), "logits": torch.ones(3)}).shape == (3,)
    assert forward.logits((torch.ones(4), None)).shape == (4,)
    assert forward.logits(Output()).shape == (2,)
    with pytest.raises(BadModel, match="no tensor"):
        forward.logits("text")
    assert forward.call(lambda a, b: a + b, {"a": 1, "b": 2}) == 3
    assert forward.call(lambda a, b: a - b, (5, 2)) == 3
    assert forward.batch_size({"k": torch.ones(7, 2)}) == 7
    with pytest.raises(BadData, match="first axis"):
        forward.batch_size({"k": 3})


def test_modes_come_back_module_by_module_after_an_exception():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    net[1].eval()
    with pytest.raises(ValueError, match="x"), forward.mode(net, train=False):
        raise ValueError("x")
    assert [net.training, net[0].training, net[1].training] == [True, True, False]


@pytest.mark.parametrize("name", zoo.names())
def test_predictions_in_chunks_equal_predictions_at_once(name):
    entry = zoo.case(name)
    model, (inputs, _) = entry.model(), entry.batch(7)
    assert torch.allclose(forward.predict(model, inputs, batch=3), forward.predict(model, inputs), atol=1e-6)


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()


def test_scopes_seed_and_give_back_all_generators_after_an_exception():
    before = states()
    draws = []

    def fail():
        with rng.scope("a", 1):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
            raise ValueError("x")

    for _ in range(2):
        with pytest.raises(ValueError, match="x"):
            fail()
    after = states()
    assert draws[0] == draws[1]
    assert before[0] == after[0]
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])


def test_seeds_depend_on_their_tags_alone():
    assert len({rng.seed_for("a", i) for i in range(1000)}) == 1000
    assert rng.seed_for("a", 1) != rng.seed_for("a1")


def test_seeds_are_the_same_in_another_process():
    import subprocess
    import sys

    code = "from nervure.core import rng; print(rng.seed_for('order', 3, (1, 'x')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == rng.seed_for("order", 3, (1, "x"))


def write(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_factories_are_imported_from_files(tmp_path):
    path = write(
        tmp_path, "import torch\nfrom torch import nn\ndef net(scale=1.0):\n    return nn.Linear(3, int(4 * scale))\n"
    )
    assert factory.build_model(f"{path}:net").out_features == 4
    assert factory.build_model(f"{path}:net", scale=0.5).out_features == 2
    first = factory.fingerprint(f"{path}:net")
    path.write_text(path.read_text() + "\n# edited\n")
    assert factory.fingerprint(f"{path}:net") != first


@pytest.mark.parametrize(
    ("text", "name", "error", "match"),
    [
        ("def net(:\n", "net", BadModel, "cannot be imported.*SyntaxError"),
        ("raise RuntimeError('boom')\n", "net", BadModel, "cannot be imported.*boom"),
        ("def other(): pass\n", "net", BadModel, "has no 'net'.*one of other"),
        ("def net():\n    raise ValueError('no weights')\n", "net", BadModel, "raised.*no weights"),
        ("def net():\n    return 3\n", "net", BadModel, "returned no model.*int"),
    ],
)
def test_broken_factories_say_what_is_wrong(tmp_path, text, name, error, match):
    path = write(tmp_path, text)
    with pytest.raises(error, match=match):
        factory.build_model(f"{path}:{name}")


def test_wrong_factory_names_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="not named right"):
        factory.load_factory("nothing")
    with pytest.raises(UsageError, match="no such file"):
        factory.load_factory(f"{tmp_path}/absent.py:net")


def test_files_of_other_kinds_are_refused(tmp_path):
    bad = tmp_path / "net.safetensors"
    bad.write_bytes(b"not a file")
    with pytest.raises(BadData, match="cannot be read"):
        state.load(bad, model=nn.Linear(1, 1))
    with pytest.raises(UsageError, match="wrong ending"):
        state.save(nn.Linear(1, 1), tmp_path / "net.pt")
    good = state.save(nn.Linear(3, 1), tmp_path / "good.safetensors")
    with pytest.raises(UsageError, match="names no factory"):
        state.load(good)
    with pytest.raises(BadModel, match="does not fit"):
        state.load(good, model=nn.Sequential(nn.Linear(3, 1)))
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(BadData, match="not written by this nervure"):
        state.load(tmp_path / "foreign.safetensors", model=nn.Linear(1, 1))


def test_a_saved_network_is_rebuilt_from_its_factory_in_a_new_process(tmp_path):
    import subprocess
    import sys

    from nervure.core import masks

    path = write(tmp_path, "from torch import nn\ndef net():\n    return nn.Linear(3, 2)\n")
    model = factory.build_model(f"{path}:net")
    masks.attach(model, {"weight": torch.tensor([[True, False, True], [False, True, True]])})
    file = state.save(model, tmp_path / "net.safetensors", factory=f"{path}:net")
    code = f"import torch; from nervure.core import state\nprint(state.load({str(file)!r})(torch.ones(1, 3)).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == model(torch.ones(1, 3)).tolist()
