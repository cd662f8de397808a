import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nervure._kit import NervureError, Unsupported, bytes_text, seconds_text
from nervure.spec import Card, Check, Job, Measurement, Record, Status, claim

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(params=st.dictionaries(st.text(), JSON), seed=st.integers())
def test_a_job_is_its_own_description(params, seed):
    job = Job(target="claim:a/b", arm="*", case="default", seed=seed, params=params)
    again = Job.from_json(json.loads(json.dumps(job.to_json())))
    assert again.id == job.id
    shuffled = Job(target="claim:a/b", arm="*", case="default", seed=seed, params=dict(reversed(params.items())))
    assert shuffled.id == job.id


def test_every_field_of_a_job_changes_its_id():
    base = {"target": "claim:a/b", "arm": "*", "case": "c", "seed": 0}
    changes = [{"target": "t"}, {"arm": "x"}, {"case": "d"}, {"seed": 1}, {"params": {"a": 1}}, {"budget": {"s": 1}}]
    ids = {Job(**{**base, **change}).id for change in [{}, *changes]}
    assert len(ids) == 7


def test_records_survive_json_with_numbers_json_lacks():
    job = Job(target="t", arm="a", case="c", seed=0)
    points = tuple(
        Measurement(arm="a", metric=str(value), value=value) for value in (1.5, math.nan, math.inf, -math.inf)
    )
    record = Record(job=job, status=Status.DIVERGED, measurements=points, error="e", warnings=("w",))
    again = Record.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    assert again.job == job
    assert again.status is Status.DIVERGED
    assert [point.value for point in again.measurements][0::2] == [1.5, math.inf]
    assert math.isnan(again.measurements[1].value)


def test_curves_are_no_final_values():
    job = Job(target="t", arm="a", case="c", seed=0)
    points = (Measurement(arm="a", metric="m", value=1.0, step=1), Measurement(arm="a", metric="m", value=2.0))
    assert Record(job=job, status=Status.DONE, measurements=points).values() == {"a": {"m": 2.0}}


CARD = Card(id="x", title="X", family="train", summary="s")


def test_claims_need_a_statement_and_a_check():
    with pytest.raises(ValueError, match="a docstring and at least one check"):
        claim(CARD, checks=(Check(name="n", method="m", metric="a"),))(lambda ctx: None)

    def measured(ctx):
        """State something.

        In detail.
        """

    with pytest.raises(ValueError, match="at least one check"):
        claim(CARD, checks=())(measured)
    made = claim(CARD, checks=(Check(name="n", method="m", metric="a"),))(measured)
    assert (made.id, made.statement) == ("x/measured", "State something.")


def test_bounds_are_checks_without_a_control():
    upper = Check.at_most("n", method="m", metric="e", bound=0.1)
    assert (upper.margin, upper.better, upper.control) == (-0.1, "lower", None)


def test_errors_say_expected_found_and_next_and_survive_pickling():
    import pickle

    error = Unsupported("Snip", "net.fc", why="it is frozen", try_="unfreezing it")
    assert str(error) == "Snip does not support net.fc: it is frozen. Try: unfreezing it."
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is Unsupported
    assert str(again) == str(error)
    assert str(NervureError("w", expected=1)) == "w. Expected 1."
    assert str(NervureError("w.", found=0)) == "w. Found 0."


def test_text_for_people():
    assert [seconds_text(s) for s in (0.31, 42, 185, 7260)] == ["0.3 s", "42 s", "3 min 05 s", "2 h 01 min"]
    assert [bytes_text(b) for b in (0, 999, 1500, 2.5e6, 3e9, 5e12)] == [
        "0 B", "999 B", "1.5 kB", "2.5 MB", "3.0 GB", "5000.0 GB",
    ]  # fmt: skip
