"""The committed results are full runs of the claims as they stand in the code, and rerunning one gives it again."""

import datetime
import json
import math
from pathlib import Path

import pytest

from nervure.arena import find_claim
from nervure.arena.context import Context
from nervure.catalogue import entries
from nervure.spec import Record
from nervure.stats import verdict

FOLDER = Path(__file__).parent.parent.parent / "results"
EVERY = [f"{entry.id}/{claim['name']}" for entry in entries().values() for claim in entry.claims]
# Claims that nobody has measured in full yet; the tables say so. Strict: a line goes when its result comes.
UNMEASURED = json.loads((FOLDER / "unmeasured.json").read_text(encoding="utf-8"))
CLAIMS = [claim for claim in EVERY if claim not in UNMEASURED]
# A few seconds each and free of clocks: one of them is measured again on every day's run, in turn.
CHEAP = ("masks-signs-lrr/single-neuron", "robust-prune-init/layer-scores", "robust-prune-init/forward-variance")


def stored(claim_id):
    path = FOLDER / f"{claim_id.replace('/', '.')}.json"
    assert path.exists(), f"{claim_id} was never measured: python scripts/results.py {claim_id}"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("claim_id", CLAIMS)
def test_thresholds_seeds_and_verdict_are_those_of_the_code(claim_id):
    data, claim = stored(claim_id), find_claim(claim_id)
    names = ("name", "method", "control", "metric", "margin", "better", "rule")
    kept = [{name: check[name] for name in names} for check in data["verdict"]["checks"]]
    assert kept == [{name: getattr(check, name) for name in names} for check in claim.checks]
    assert len(data["verdict"]["seeds"]) == claim.seeds
    assert set(data["verdict"]["sabotage"]) == set(claim.sabotage)
    records = [Record.from_json(record) for record in data["records"]]
    assert not any(record.job.params.get("quick") for record in records)
    assert str(verdict(claim, records).outcome) == data["verdict"]["outcome"]


def test_no_result_is_left_of_a_claim_that_is_gone():
    assert {path.stem for path in FOLDER.glob("*.*.json")} == {claim.replace("/", ".") for claim in CLAIMS}


def test_the_list_of_what_is_not_measured_is_true():
    assert set(UNMEASURED) <= set(EVERY)
    assert not [claim for claim in UNMEASURED if (FOLDER / f"{claim.replace('/', '.')}.json").exists()]


def test_a_rerun_gives_the_committed_numbers():
    claim_id = CHEAP[datetime.date.today().toordinal() % len(CHEAP)]
    record = Record.from_json(stored(claim_id)["records"][0])
    context = Context(claim_id, record.job.seed)
    find_claim(claim_id).measure(context)
    found = {(point.arm, point.metric): point.value for point in context.measurements if point.step is None}
    for arm, metrics in record.values().items():
        for metric, value in metrics.items():
            assert math.isclose(found[arm, metric], value, rel_tol=1e-3, abs_tol=1e-6), (arm, metric)
