"""Every check on a network that was broken to be found, and on one that was not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nervure import catalogue, zoo
from nervure._kit import UsageError
from nervure.audit import CHECKS, Audit, audit
from nervure.audit.finding import Finding, share, spread
from nervure.cli.main import app, run
from nervure.learn.loop import cross_entropy


def _images(n, seed):
    """Ten classes of 8 x 8 images: a bright column or row at one of five places, and noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (n,), generator=draw)
    x = 0.3 * torch.randn(n, 1, 8, 8, generator=draw)
    for i, c in enumerate(y.tolist()):
        if c < 5:
            x[i, 0, c + 1, :] += 2
        else:
            x[i, 0, :, c - 4] += 2
    return x, y


TRAIN, TEST = _images(600, 0), _images(400, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.hidden, self.head = nn.Conv2d(16, 16, 3, stride=2), nn.Linear(144, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.inner(self.norm(self.conv(x)).relu()).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


@pytest.fixture(scope="module")
def healthy():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=2e-3)
        for _ in range(120):
            index = torch.randint(600, (64,))
            optimizer.zero_grad()
            F.cross_entropy(net(TRAIN[0][index]), TRAIN[1][index]).backward()
            optimizer.step()
    return net.eval()


def look(net, check, *, loss=cross_entropy, train=TRAIN, test=TEST, **options):
    found = audit(net, loss=loss, train=train, test=test, name="my.py:net", data="d.npz", only=(check,), **options)
    return found.findings[0] if found.findings else None


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
def test_a_healthy_network_has_no_problem(healthy, check):
    found = look(healthy, check)
    assert found.level in ("ok", "note", *(["warning"] if check in ("filters", "one-pixel shifts") else []))
    assert found.measured
    assert found.meaning


def test_random_answers_are_a_problem():
    class Noisy(Net):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.1))

    class Mixing(Net):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    assert "two answers" in look(Noisy().eval(), "determinism").meaning
    found = look(Mixing().eval(), "determinism")
    assert found.level == "problem"
    assert "others of its batch" in found.meaning


def test_stale_statistics_and_train_mode(healthy):
    stale = copy.deepcopy(healthy)
    stale.norm.running_mean += 50
    assert look(stale, "modes").level == "problem"
    assert look(copy.deepcopy(healthy).train(), "modes").level == "note"
    assert look(healthy, "modes").level == "ok"


def test_unused_and_frozen_parameters(healthy):
    odd = copy.deepcopy(healthy)
    odd.spare = nn.Linear(3, 3)
    found = look(odd, "parameters")
    assert found.level == "warning"
    assert found.values["unused"] == 2
    odd.spare = nn.Identity()
    odd.conv.requires_grad_(False)
    found = look(odd, "parameters")
    assert (found.level, found.values["frozen"]) == ("note", 2)


def test_weights_that_are_not_finite_or_enormous(healthy):
    broken = copy.deepcopy(healthy)
    broken.head.weight.data[0, 0] = float("nan")
    only = audit(broken, loss=cross_entropy).findings
    assert (only[0].check, only[0].level) == ("weights", "problem")
    broken.head.weight.data[0, 0] = 1.0
    broken.hidden.weight.data[0, 0] = 1e3
    found = audit(broken, loss=cross_entropy).findings[0]
    assert (found.level, list(found.layers)) == ("warning", ["hidden.weight"])


def test_dead_and_redundant_units(healthy):
    dead = copy.deepcopy(healthy)
    dead.inner.bias.data[:12] = -1e3
    found = look(dead, "dead units")
    assert found.level == "problem"
    assert found.layers["hidden"] == pytest.approx(12 / 16)
    assert "nervure prune my.py:net --data d.npz" in found.remedy.command
    twin = copy.deepcopy(healthy)
    for value in (twin.hidden.weight, twin.hidden.bias):
        value.data[1:9] = value.data[:1]
    found = look(twin, "redundant units")
    assert found.level in ("note", "warning")
    assert found.values["redundant"] == look(healthy, "redundant units").values["redundant"] + 8


def test_signals_that_fade(healthy):
    fading = copy.deepcopy(healthy)
    fading.inner.weight.data *= 1e-6
    fading.inner.bias.data.zero_()
    fading.hidden.weight.data *= 1e-3
    fading.hidden.bias.data.zero_()
    assert look(fading, "signals").level == "problem"


def test_filters(healthy):
    repeated = copy.deepcopy(healthy)
    repeated.inner.weight.data[:] = repeated.inner.weight.data[:1, :1]
    found = look(repeated, "filters")
    assert found.level == "warning"
    assert "few patterns" in found.measured
    random = look(Net(), "filters")
    assert "random" in random.measured
    assert look(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "filters") is None


def test_curvature_against_the_rate(healthy):
    low, high = look(healthy, "curvature", rate=1e-4), look(healthy, "curvature", rate=1e4)
    assert (low.level, high.level) == ("ok", "warning")
    assert low.values["eigenvalue"] == pytest.approx(high.values["eigenvalue"])
    assert low.values["low"] <= low.values["high"]


def test_random_labels_have_no_coherence():
    draw = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    y = torch.arange(10).repeat(60)[torch.randperm(600, generator=draw)]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(net(TRAIN[0]), y).backward()
        optimizer.step()
    honest = copy.deepcopy(net)
    found = look(net, "coherence", train=(TRAIN[0], y))
    assert found.level in ("note", "cannot tell")
    assert found.values["shared"] < 0.02
    assert look(honest, "coherence").values["shared"] > 5 * abs(found.values["shared"])


def test_accuracy_and_calibration(healthy):
    assert look(Net().eval(), "accuracy").level == "problem"
    assert look(healthy, "accuracy").level == "ok"
    sure = copy.deepcopy(healthy)
    noisy = (TEST[0] + 3 * torch.randn(TEST[0].shape, generator=torch.Generator().manual_seed(0)), TEST[1])
    sure.head.weight.data *= 20
    found = look(sure, "calibration", test=noisy)
    assert found.level == "warning"
    assert found.values["low"] > 0.05
    assert found.remedy.card == "ivon"


def test_shifts_and_images(healthy):
    assert look(healthy, "one-pixel shifts").values["changed"] > 0.05  # the classes are places
    flat = nn.Linear(64, 10)
    assert look(flat, "one-pixel shifts", train=(TRAIN[0].flatten(1), TRAIN[1]), test=None) is None

    class Anywhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 10)

        def forward(self, x):
            return self.head(x[:, :, 2:-2, 2:-2].mean((2, 3))) * 0 + self.head.bias

    assert look(Anywhere(), "one-pixel shifts").values["changed"] == 0


def test_functional_dimension_and_prunability(healthy):
    dead = copy.deepcopy(healthy)
    dead.hidden.bias.data[:16] = -1e3
    found = look(dead, "functional dimension")
    assert found.level == "warning"
    assert found.values["silent"] >= 16 * 145
    sparse = copy.deepcopy(healthy)
    weight = sparse.hidden.weight.data
    weight[weight.abs() < weight.abs().flatten().quantile(0.9)] = 0
    assert look(sparse, "prunability").values["accuracy_at_0.5"] == look(sparse, "prunability").values["accuracy"]


def test_lost_classes_and_features_that_decide_alone(healthy):
    assert look(healthy, "collapse").level in ("ok", "note")

    class Merges(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(10, 10)

        def forward(self, x):
            rows = F.one_hot(x[:, 0].long(), 10).float()
            return self.head(rows + rows[:, [0, 1, 2, 7, 4, 5, 6, 3, 8, 9]])

    y = torch.arange(10).repeat(40)
    tables = (torch.stack([y.float(), torch.zeros(400)], 1), y)
    found = look(Merges(), "collapse", train=tables, test=tables)
    assert found.level == "problem"
    assert "3" in found.measured.rpartition("lost:")[2]
    first = nn.Sequential(nn.Linear(6, 2))
    first[0].weight.data = torch.tensor([[4.0, 0, 0, 0, 0, 0], [-4, 0, 0, 0, 0, 0]])
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    table = (x, (x[:, 0] < 0).long())
    found = look(first, "feature groups", train=table, test=table)
    assert found.level == "warning"
    assert "column 0" in found.meaning
    assert look(healthy, "feature groups").level == "ok"


def test_classes_that_overlap_are_named(healthy):
    assert look(healthy, "separability").values["mean"] > 0
    noise = (torch.randn(TEST[0].shape, generator=torch.Generator().manual_seed(0)), TEST[1])
    assert look(healthy, "separability", test=noise).level in ("note", "cannot tell")
    assert look(healthy, "separability", test=noise).values["mean"] > look(healthy, "separability").values["mean"]


def test_price_counts_every_layer(healthy):
    found = look(healthy, "price")
    assert set(found.layers) == {"conv", "norm", "inner", "hidden", "head"}
    assert 0 < sum(found.layers.values()) <= 1.05 * found.values["ms"]


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_is_examined_and_left_alone(name):
    case = zoo.case(name)
    model = case.model(seed=0)
    inputs, targets = case.batch(40, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train, state = model.training, torch.get_rng_state()
    found = audit(model, loss=cross_entropy, train=(inputs, targets), seconds=30)
    assert model.training == train
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    lost = {one.check: one.measured for one in found.findings if one.level == "cannot tell"}
    assert set(lost) <= {
        "coherence",
        "curvature",
        "filters",
        "dead units",
        "redundant units",
        "collapse",
        "separability",
        "feature groups",
    }, lost
    assert not any("bug" in text for text in lost.values())


def test_a_forward_that_fails_in_one_check_does_not_lose_the_others():
    class Fails(Net):
        def forward(self, x):
            if self.training:
                raise ValueError("no training here")
            return super().forward(x)

    found = audit(Fails().eval(), loss=cross_entropy, train=TRAIN, test=TEST, only=("modes", "accuracy"))
    told = {one.check: one for one in found.findings}
    assert (told["modes"].level, told["modes"].measured) == ("cannot tell", "ValueError: no training here")
    assert told["accuracy"].level == "problem"


def test_a_network_too_large_for_the_budget_is_told_what_it_would_take():
    layers = (nn.Linear(64, 6000), nn.ReLU(), nn.Linear(6000, 2000), nn.ReLU(), nn.Linear(2000, 10))
    wide = nn.Sequential(nn.Flatten(), *layers)
    found = look(wide, "curvature", seconds=1.0)
    assert found.level == "cannot tell"
    assert "longer than the budget" in found.measured


def test_commands_and_cards_of_remedies_exist(healthy):
    broken = copy.deepcopy(healthy)
    broken.inner.bias.data[:12] = -1e3
    given = {"loss": cross_entropy, "train": TRAIN, "test": TEST, "name": "m.py:n", "data": "digits"}
    found = [*audit(healthy, rate=9.0, **given).findings, *audit(broken, **given).findings]
    remedies = [one.remedy for one in found if one.remedy is not None]
    cards = {remedy.card for remedy in remedies if remedy.card}
    assert len(cards) >= 4
    assert all(catalogue.entries()[card].card for card in cards)
    for remedy in remedies:
        if remedy.command:
            app.parse_args(remedy.command.split()[1:], exit_on_error=False, print_error=False)


def test_intervals():
    from scipy.stats import beta

    assert share(8, 10)[1:] == pytest.approx((beta.ppf(0.025, 8, 3), beta.ppf(0.975, 9, 2)))
    mean, low, high = spread([0.0, 1.0] * 200)
    assert mean == 0.5
    assert (high - low) == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)


def test_bad_questions_are_refused(healthy):
    with pytest.raises(UsageError, match="cannot be made so"):
        look(healthy, "everything")
    with pytest.raises(UsageError, match="cannot be made so"):
        look(healthy, "weights", seconds=0)


def test_levels_are_ordered():
    names = ("ok", "note", "warning", "problem", "cannot tell")
    made = [Finding(check=level, level=level, measured="", meaning="") for level in names]
    found = Audit("m", "", tuple(made), (), {})
    assert [one.level for one in found.at_least("warning")] == ["warning", "problem"]
    assert len(found.at_least("note")) == 3


def test_the_command_writes_a_page_and_answers_with_its_code(tmp_path, monkeypatch, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    call = ["audit", "net.py:net", "--data", "digits", "--budget", "20"]
    assert run([*call, "--only", "accuracy"]) == 1
    told = capsys.readouterr().out
    assert "problem  accuracy" in told
    page = tmp_path / told.strip().splitlines()[-1]
    assert page.name == "audit-net.py-net.html"
    assert "commonest class" in page.read_text()
    assert {path.suffix for path in page.parent.iterdir()} == {".html", ".json", ".csv"}
    assert run([*call, "--only", "accuracy", "--train", "200"]) == 0
    capsys.readouterr()
    assert run([*call[:2], "--json"]) == 0
    assert "--data" in capsys.readouterr().out
    assert run([*call, "--only", "nothing"]) == 2
    assert "cannot be made so" in capsys.readouterr().err
