"""The benchmark's arithmetic, its verdicts, its order, and how it tells them."""

from __future__ import annotations

import gzip
import io
import json
import statistics
import tarfile
from collections.abc import Mapping
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rundatsheesh.bench import report, samples, svg
from rundatsheesh.bench.measures import GOALS, MEASURES, Goal
from rundatsheesh.bench.results import Results
from rundatsheesh.bench.schedule import FEWEST_ROUNDS, Contender, in_turns
from rundatsheesh.bench.stats import median, percentile, summarize

NUMBERS = st.lists(st.floats(0, 1e6), min_size=1, max_size=200)


@given(NUMBERS)
def test_percentiles_are_ordered_and_within_the_samples(numbers: list[float]) -> None:
    summary = summarize(numbers)
    assert summary.count == len(numbers)
    assert min(numbers) == summary.least <= summary.median <= summary.p95 <= summary.p99 <= summary.most == max(numbers)


@given(NUMBERS)
def test_the_median_is_everybodys_median(numbers: list[float]) -> None:
    assert median(numbers) == pytest.approx(statistics.median(numbers))


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([10, 20], 0.25) == 12.5
    assert percentile(list(range(101)), 0.95) == 95
    assert percentile([7], 0.99) == 7


@pytest.mark.parametrize(("numbers", "share"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1)])
def test_no_percentile_of_nothing(numbers: list[float], share: float) -> None:
    with pytest.raises(ValueError, match=r"no samples|not a share"):
        percentile(numbers, share)


def test_every_name_is_that_of_a_measure() -> None:
    for measure in MEASURES.values():
        assert measure.beside is None or measure.beside in MEASURES
    for goal in GOALS:
        assert goal.key in MEASURES and (goal.beside is None or goal.beside in MEASURES)
        assert (goal.most is None) != (goal.least is None)


def test_a_measure_that_nobody_knows_is_refused() -> None:
    with pytest.raises(KeyError):
        Results().add({"nonsense": 1.0})


def test_goals_are_judged_by_medians_and_ratios() -> None:
    results = taken(exec=[4.0, 5.0, 90.0], bare_exec=[10.0, 8.0, 12.0], upload=[60.0], channel_upload=[100.0])
    verdicts = {(judged.goal.key, judged.goal.beside): (judged.value, judged.met) for judged in results.judgements()}
    assert verdicts == {
        ("exec", None): (5.0, True),
        ("exec", "bare_exec"): (0.5, True),
        ("upload", "channel_upload"): (0.6, False),
    }


def test_what_was_not_measured_is_not_judged() -> None:
    assert list(Results().judgements()) == []
    assert [judged.goal.beside for judged in taken(exec=[1.0]).judgements()] == [None]
    goal = Goal("query_after", most=1.0, beside="query_before")
    assert list(taken(query_after=[1.0], query_before=[0.0]).judgements([goal])) == []


def test_the_table_has_every_measure_and_says_what_was_missed() -> None:
    text = report.text(taken(exec=[7.0], bare_exec=[70.0], idle_cpu=[9.0]))
    lines = text.splitlines()
    assert any(line.split() == ["exec", "true", "1", "7", "7", "7", "ms", "0.10", report.TIMES] for line in lines)
    assert any("≤ 5 % of a core" in line and line.endswith("MISSED") for line in lines)
    assert lines[-1] == "1 of 3 goals met"
    assert "goal" not in report.text(taken(delete=[1.0]))


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=5))
def test_columns_line_up(rows: list[tuple[str, str]]) -> None:
    assert len(report.table(rows)) == len(rows)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.123, "0.12"), (12.34, "12.3"), (123.4, "123"), (0.0, "0"), (3.0, "3"), (-1.0, "-1")]
)
def test_numbers_have_the_digits_that_count(value: float, shown: str) -> None:
    assert report.number(value) == shown


def test_json_holds_every_sample() -> None:
    told = json.loads(report.as_json(taken(exec=[1.0, 2.0], bare_exec=[3.0]), {"engine": "gvisor"}))
    assert told["engine"] == "gvisor"
    assert told["measures"]["exec"] | {"samples": [1.0, 2.0], "median": 1.5, "ratio": 0.5} == told["measures"]["exec"]
    assert {"measure": "exec", "promised": "≤ 6 ms", "value": 1.5, "met": True} in told["goals"]


@given(st.dictionaries(st.sampled_from(sorted(MEASURES)), NUMBERS), st.text("<&>\"'abc", max_size=20))
def test_the_picture_is_xml_with_a_bar_for_each_measure(measured: dict[str, list[float]], title: str) -> None:
    root = ElementTree.fromstring(svg.picture(taken(**measured), title, title))
    space = "{http://www.w3.org/2000/svg}"
    bars = root.findall(f"{space}rect")
    assert len(bars) == len(measured)
    assert all(0 <= float(bar.get("width", "")) <= svg.WIDTH - svg.LABELS for bar in bars)
    assert root.findtext(f"{space}title") == title


async def test_turns_rotate_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    results = Results()
    await in_turns(results, [noted(order, "exec"), noted(order, "run_ts")], rounds=4, seconds=60)
    assert len(results.samples["exec"]) == len(results.samples["run_ts"]) == 4
    assert order[-4:] == ["exec", "run_ts", "run_ts", "exec"]


async def test_time_that_is_up_ends_the_rounds_but_for_a_few() -> None:
    results = Results()
    await in_turns(results, [noted([], "exec")], rounds=100, seconds=0)
    assert len(results.samples["exec"]) == FEWEST_ROUNDS


def test_samples_are_the_same_each_time_and_as_large_as_they_say() -> None:
    archive = samples.files_archive()
    assert archive == samples.files_archive()
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive))) as tar:
        members = tar.getmembers()
    assert len(members) == samples.SMALL_FILES and {member.size for member in members} == {samples.SMALL_BYTES}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rundatsheesh.bench.schedule.BREATH", 0.0)


def taken(**measured: list[float]) -> Results:
    results = Results()
    for key, values in measured.items():
        for value in values:
            results.add({key: value})
    return results


def noted(order: list[str], key: str) -> Contender:
    async def measure() -> Mapping[str, float]:
        order.append(key)
        return {key: 1.0}

    return measure
