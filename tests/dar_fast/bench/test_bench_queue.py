"""Arrivals, the queue that the plain path would serve, and percentiles."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.bench.ours import Served
from dar_fast.bench.throughput import one_by_one, percentiles, poisson_arrivals, queue_row


def test_arrivals_are_seeded_and_as_many_a_second_as_asked():
    at = poisson_arrivals(4.0, 4000)
    assert at == poisson_arrivals(4.0, 4000) != poisson_arrivals(4.0, 4000, seed=1)
    assert at == sorted(at) and at[0] > 0
    assert at[-1] == pytest.approx(1000, rel=0.05)
    gaps = [b - a for a, b in pairwise(at)]
    mean = sum(gaps) / len(gaps)
    spread = sum((g - mean) ** 2 for g in gaps) / len(gaps)
    assert spread**0.5 == pytest.approx(mean, rel=0.1)  # an exponential's


@pytest.mark.parametrize(
    ("arrivals", "latencies"),
    [
        ([0, 10, 20], [2, 2, 2]),  # nobody waits
        ([0, 0, 0], [2, 4, 6]),
        ([0, 1, 9], [2, 3, 2]),  # the queue empties in between
    ],
    ids=["idle", "at once", "empties"],
)
def test_one_by_one(arrivals, latencies):
    assert one_by_one(arrivals, 2) == latencies


@given(st.lists(st.floats(0, 100), max_size=30), st.floats(0.01, 5))
def test_a_queue_works_whenever_somebody_waits(arrivals, service):
    arrivals = sorted(arrivals)
    ends = [at + took for at, took in zip(arrivals, one_by_one(arrivals, service), strict=True)]
    for i, end in enumerate(ends):
        begun = max(arrivals[i], ends[i - 1] if i else 0.0)
        assert end == pytest.approx(begun + service)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (1, 1, 1)), (10, (5, 9, 10)), (100, (50, 90, 99)), (1000, (500, 900, 990))],
)
def test_percentiles_are_latencies_of_requests(count, expected):
    values = list(range(count, 0, -1))
    assert tuple(percentiles(values).values()) == expected
    assert list(percentiles(values)) == ["p50", "p90", "p99"]
    assert percentiles([]) == {}


def test_the_queue_states_its_load_and_the_plain_path_s():
    best = {"weights": "int8", "batch": 4, "pictures_a_second": 8.0}
    row = queue_row(best, 2.0, [0.0, 0.1], Served([0.5], 1), 1.0)
    assert row["load"] == 0.25 and row["plain_load"] == 2.0 and row["refused"] == 1
    assert row["latency_seconds"] == {"p50": 0.5, "p90": 0.5, "p99": 0.5}
    assert row["plain_latency_seconds_computed"]["p99"] == pytest.approx(1.9)
