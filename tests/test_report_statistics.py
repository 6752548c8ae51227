"""The report's arithmetic against slow twins, its verdicts' properties, its tables and what its figures draw."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.report.figures import ablation_figure, meta_training_figure, multiplier_figure, validation_figure
from scripts.report.price_figure import Point, price_figure, spread
from scripts.report.render import markdown, plain
from scripts.report.statistics import (
    compare,
    mean,
    mean_curve,
    quartiles,
    ratio,
    summarize,
    t_quantile,
    t_two_sided,
    total,
    verdict,
)
from scripts.report.tables import ABSENT, PAPER_TABLE_1, PAPER_TABLE_3, number

values = st.floats(0.5, 5)
by_seed = st.dictionaries(st.integers(0, 6), values, min_size=2, max_size=7)


@given(st.lists(values, min_size=2, max_size=8))
def test_summary_is_that_of_the_statistics_module(x):
    s = summarize(x)
    assert s.n == len(x)
    assert s.mean == pytest.approx(statistics.mean(x)) and s.std == pytest.approx(statistics.stdev(x), abs=1e-12)


@given(by_seed, by_seed)
def test_comparison_against_its_slow_twin(ours, theirs):
    c = compare(ours, theirs)
    pairs = [(ours[s], theirs[s]) for s in range(7) if s in ours and s in theirs]
    assert c.n == len(pairs)
    if len(pairs) >= 2:
        differences = [a - b for a, b in pairs]
        assert c.difference == pytest.approx(statistics.mean(differences), abs=1e-12)
        assert c.std == pytest.approx(statistics.stdev(differences), abs=1e-12)
        half = t_quantile(len(pairs) - 1) * statistics.stdev(differences) / len(pairs) ** 0.5
        assert c.interval == pytest.approx((c.difference - half, c.difference + half), abs=1e-12)
        assert c.relative == pytest.approx(sum(a for a, _ in pairs) / sum(b for _, b in pairs) - 1)


@given(by_seed, by_seed)
def test_swapping_the_methods_swaps_the_verdict(ours, theirs):
    swapped = {"better": "worse", "worse": "better"}
    a, b = compare(ours, theirs), compare(theirs, ours)
    assert b.verdict == swapped.get(a.verdict, a.verdict)
    assert a.n == 0 or b.difference == -a.difference


@given(by_seed)
def test_a_method_does_not_differ_from_itself(x):
    assert compare(x, x).verdict == ("no difference shown" if len(x) >= 5 else f"undecided, n = {len(x)}")


def test_verdict_needs_five_seeds_and_an_interval_without_zero():
    assert verdict(-0.2, (-0.4, 0.0), 5) == "no difference shown" and verdict(-0.2, (-0.4, -1e-9), 5) == "better"
    assert verdict(0.2, (1e-9, 0.4), 5) == "worse" and verdict(-9.0, (-9.1, -8.9), 4) == "undecided, n = 4"
    assert verdict(None, None, 0) == ABSENT and verdict(math.nan, None, 5) == "diverged"
    assert compare({1: 2.0}, {1: 1.0}).interval is None and compare({1: 2.0}, {1: 1.0}).verdict == "undecided, n = 1"


@pytest.mark.parametrize(
    "df, t", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (1000, 1.962)]
)
def test_t_quantiles_are_those_of_the_tables(df, t):
    assert t_quantile(df) == pytest.approx(t, abs=5e-4)
    assert t_two_sided(t_quantile(df), df) == pytest.approx(0.95, abs=1e-9)


def test_t_quantile_refuses_what_has_none():
    for df, confidence in ((0, 0.95), (4, 0.0), (4, 1.0)):
        with pytest.raises(ValueError):
            t_quantile(df, confidence)


def test_the_verdict_is_calibrated():
    """Two equal methods, 5 seeds: the verdict calls them different in 5% of 20,000 experiments."""
    draws = np.random.default_rng(0).normal(size=(20_000, 2, 5))
    verdicts = [compare(dict(enumerate(a)), dict(enumerate(b))).verdict for a, b in draws.tolist()]
    differs = sum(v in ("better", "worse") for v in verdicts) / len(verdicts)
    assert 0.045 < differs < 0.055
    assert abs(verdicts.count("better") - verdicts.count("worse")) < 150  # and it has no side


def test_pairing_removes_what_the_seeds_share():
    base = {s: 1.0 + s for s in range(5)}  # seeds differ by far more than the methods do
    assert compare({s: v - 0.01 - 0.001 * (s % 2) for s, v in base.items()}, base).verdict == "better"


def test_paper_figures_give_the_papers_percentages():
    jel = PAPER_TABLE_1["jel"][0]
    relative = {m: round(100 * (jel / bpb - 1), 1) for m, (bpb, _) in PAPER_TABLE_1.items()}
    assert relative == {"schedule_free": -2.5, "jel": 0, "hand_tuned": 8.4, "suboptimal": -19.3}
    assert min(row[3] for row in PAPER_TABLE_3) == PAPER_TABLE_1["schedule_free"][0]


def test_bands():
    steps, mean, low, high = mean_curve([{0: 3.0, 5: 2.0, 9: 1.0}, {0: 5.0, 9: 3.0}])
    assert (steps, mean.tolist(), low.tolist(), high.tolist()) == ([0, 9], [4.0, 2.0], [3.0, 1.0], [5.0, 3.0])
    x = np.random.default_rng(0).random((9, 2))
    want = [[statistics.quantiles(column, n=4, method="inclusive")[i] for column in x.T] for i in range(3)]
    np.testing.assert_allclose(quartiles(x), want)


def test_costs_of_what_was_not_measured():
    assert ratio(None, 2.0) is ratio(2.0, None) is ratio(2.0, 0) is total([]) is total([1.0, None]) is None
    assert ratio(3.0, 2.0) == 1.5 and total([1, 2]) == 3 and mean([1, 2]) == 1.5 and mean([]) is mean([None]) is None


@settings(max_examples=30)
@given(st.lists(st.lists(st.text("ab|\n", max_size=4), min_size=3, max_size=3), max_size=4))
def test_tables_keep_their_shape(rows):
    lines = markdown((["one", "two", "three"], rows)).splitlines()
    assert len(lines) == 2 + len(rows)
    assert all(line.replace(r"\|", "").count("|") == 4 for line in lines)


def test_plain_table():
    table = ["what", "n"], [["a", "10"], ["bcdef", "-3"]]
    assert plain(table).splitlines() == ["what    n", "-----  --", "a      10", "bcdef  -3"]


def test_numbers():
    assert [number(x) for x in (None, math.nan, math.inf, 1.23456)] == [ABSENT, "diverged", "diverged", "1.2346"]


# -----------------------------------------------------------------------------
# figures show the numbers


def test_figures_draw_what_they_are_given():
    whole, _ = validation_figure({"jel": [{0: 4.0, 10: 2.0}, {0: 4.0, 10: 3.0}]}, {"jel": "JEL"}, "").axes
    assert whole.lines[0].get_xydata().tolist() == [[0, 4.0], [10, 2.5]]
    band = whole.collections[0].get_paths()[0].vertices
    assert {2.0, 3.0} == {y for x, y in band if x == 10}
    validation_figure({"a": [{0: 4.0, 5: 1.0}], "b": [{0: 4.0, 90: 3.0}]}, {"a": "A", "b": "B"}, "")  # of other lengths
    lr, wd = multiplier_figure(
        [0.0, 0.5],
        {"lr": {"head": [[1, 2], [2, 8], [9, 9]], "rest": [[5, 5]] * 3}, "weight_decay": {"all": [[1, 1]] * 3}},
        {"lr": 40.0, "weight_decay": 1.0},
        "",
    ).axes
    assert lr.get_yscale() == "log"
    drawn = [list(line.get_ydata()) for line in lr.lines]
    assert drawn[:4] == [[1, 2], [2, 8], [9, 9], [2, 8]]  # three policies, their median
    assert drawn[4:8] == [[5, 5]] * 4
    assert drawn[8] == [40.0, 40.0] and list(wd.lines[4].get_ydata()) == [1.0, 1.0]  # the best constant
    multiplier_figure([0.0, 0.5], {"lr": {"all": [[1, 2]]}}, {}, "")  # one seed, no constant


def test_the_figure_of_ablations_fills_what_the_rule_shows():
    row = lambda name, n, difference, interval: {
        "name": name,
        "test_bpb": [2.0] * n,
        "difference": difference,
        "interval": interval,
    }
    rows = [
        row("worse", 5, -0.2, (-0.3, -0.1)),
        row("few seeds", 3, -0.1, (-0.12, -0.08)),
        row("one", 1, 0.05, None),
        row("level", 5, 0.0, (-9.0, 9.0)),
    ]
    (axes,) = ablation_figure(rows, "").axes
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["one (1)", "level (5)", "few seeds (3)", "worse (5)"]  # upwards, by what the change costs
    lines = [line for line in axes.lines[1:] if len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in lines][2:] == [[0.08, 0.12], [0.1, 0.3]]
    filled = [p.get_markerfacecolor() != "white" for p in axes.lines if p.get_marker() == "o"]
    assert filled == [False, False, False, True]
    low, high = axes.get_xlim()
    assert -0.2 < low < -0.05 and 0.2 < high < 0.4  # every mean is inside, the interval of +-9 is not
    entropy, returns = meta_training_figure([[0.9, 0.8], [0.7, 0.6]], [[1.0, 2.0]], [[3.0, 4.0]], "").axes
    np.testing.assert_allclose(entropy.lines[0].get_xydata(), [[1, 0.8], [2, 0.7]])
    assert [list(line.get_ydata()) for line in returns.lines] == [[3.0, 4.0], [1.0, 2.0]]


def test_the_price_figure_shows_means_deviations_and_prices():
    points = [
        Point("JEL", [2.0, 2.2], 12.0, 400),
        Point("held", [2.1, 2.1], 12.0, control=True),
        Point("Suboptimal", [2.9], 0.0),
    ]
    figure = price_figure(points, "measured")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    marks = {
        (line.get_marker(), *np.round(line.get_xydata()[0], 3)) for line in axes.lines if len(line.get_xdata()) == 1
    }
    prices = {mark: x for mark, x, _ in marks}
    assert {("o", 2.1), ("D", 2.1)} <= {(m, y) for m, _, y in marks}
    assert 11 < min(prices["D"], prices["o"]) and prices["D"] < 14  # side by side, not on top of each other
    assert prices["^"] < 12 and max(y for m, _, y in marks if m == "^") < axes.get_ylim()[1]  # no price, out of scale
    bars = [c.get_segments()[0][:, 1] for c in axes.collections if c.get_segments()]
    np.testing.assert_allclose(bars[0], [2.1 - 0.02**0.5, 2.1 + 0.02**0.5])
    texts = [t.get_text() for t in axes.texts]
    assert {"JEL 2.100 (+ 400 by hand)", "held 2.100", "Suboptimal 2.900"} <= set(texts)
    price_figure(points[:1], "alone")
    price_figure(points[2:], "free")


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0.01, 0.8))
def test_labels_do_not_overlap_and_stay_inside(wanted, height):
    wanted = sorted(wanted)
    middles = spread(wanted, [height] * len(wanted), 0, 10)
    assert all(b - a >= height - 1e-9 for a, b in zip(middles, middles[1:]))
    assert middles[0] >= height / 2 - 1e-9 and middles[-1] <= 10 - height / 2 + 1e-9
    if (
        all(b - a >= height for a, b in zip(wanted, wanted[1:]))
        and height / 2 <= wanted[0]
        and wanted[-1] <= 10 - height / 2
    ):
        np.testing.assert_allclose(middles, wanted)  # what is apart already stays
