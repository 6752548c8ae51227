"""The benchmark: the straightforward form is the same step, and the table says what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from scripts.bench import __main__ as bench
from scripts.bench import growth
from scripts.bench.first_look import episodes_row, graphs_row, looks, step_row
from scripts.bench.rows import compiled_straight_rows, controller_rows, data_rows, mfu_note
from scripts.bench.shapes import preset_shapes
from scripts.bench.table import compared
from scripts.bench.twins import StraightOptimizer, straight_loss
from scripts.bench.worker import Worker, interleaved, result_of, seconds_of
from scripts.presets import PRESETS

SMALL = GPTConfig(sequence_len=16, vocab_size=50, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")


def small_model(config: GPTConfig = SMALL) -> GPT:
    """Nothing is 0, so that every path carries a gradient."""
    model, generator = GPT(config).double(), torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    model.prepare()
    return model


# -----------------------------------------------------------------------------
# the straightforward form


def test_the_straightforward_loss_is_ours():
    model = small_model()
    idx, targets = torch.randint(SMALL.vocab_size, (2, 4, 16), generator=torch.Generator().manual_seed(1))
    targets[0, :5] = -1
    gradients = []
    for loss in (model(idx, targets), straight_loss(model, idx, targets)):
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(loss, straight_loss(model, idx, targets), rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert all(g.any() for g in gradients[0])


def test_the_straightforward_optimizer_takes_our_steps():
    ours, straight = small_model(), small_model()
    mine = ours.setup_optimizer(weight_decay=0.3)
    twin = StraightOptimizer(straight.setup_optimizer(weight_decay=0.3).param_groups)
    for step in range(3):
        for seed, (a, b) in enumerate(zip(ours.parameters(), straight.parameters())):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(10 * step + seed), dtype=a.dtype)
            b.grad = a.grad.clone()
        mine.step()
        twin.step()
    torch.testing.assert_close(dict(ours.named_parameters()), dict(straight.named_parameters()), rtol=1e-9, atol=1e-11)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces and guards as ever, but runs PyTorch's own kernels: no C++ compiler, no wait."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def test_the_compiled_twin_takes_the_same_steps_and_compiles_nothing_again(traced):
    eager, compiled = small_model(), small_model()
    loss = torch.compile(partial(straight_loss, compiled), dynamic=False, fullgraph=True)
    sides = [
        (eager, partial(straight_loss, eager), StraightOptimizer(eager.setup_optimizer(weight_decay=0.3).param_groups)),
        (compiled, loss, StraightOptimizer(compiled.setup_optimizer(weight_decay=0.3).param_groups, compiled=True)),
    ]
    graphs = []
    for step in range(4):
        idx, targets = torch.randint(SMALL.vocab_size, (2, 4, 16), generator=torch.Generator().manual_seed(step))
        for _, forward, optimizer in sides:
            optimizer.zero_grad()
            forward(idx, targets).backward()
            for group in optimizer.param_groups:  # a schedule and a controller change these in every step
                group["lr"] = group["initial_lr"] / (1 + step)
                if group["kind"] == "muon":
                    group["momentum"] = 0.85 + 0.01 * step
            optimizer.step()
        graphs.append(traced["unique_graphs"])
    torch.testing.assert_close(dict(eager.named_parameters()), dict(compiled.named_parameters()), rtol=1e-9, atol=1e-11)
    assert graphs[0] > 1 and graphs == graphs[:1] * 4


# -----------------------------------------------------------------------------
# numbers


def test_a_ratio_is_the_median_over_rounds_and_a_rate_the_median_of_times():
    ours, other = iter([9.0, 1.0, 2.0, 4.0]), iter([9.0, 4.0, 4.0, 4.0])  # the first round warms up
    row = compared("a", "things/s", 8, lambda: next(ours), "b", lambda: next(other), 0.0)
    assert (row.ours, row.other, row.ratio, row.rounds) == (4.0, 2.0, 2.0, 3)
    assert row.quartiles[0] < 2.0 < row.quartiles[1]
    printed = str(replace(row, target=">= 1.3x", note="as measured"))
    assert (
        "4 things/s" in printed
        and "2x" in printed
        and "3 rounds" in printed
        and "target >= 1.3x; as measured" in printed
    )


def test_sides_are_timed_in_turn():
    order = []
    values = interleaved({name: lambda name=name: order.append(name) or 1.0 for name in "AB"}, 0.0, min_rounds=2)
    assert order == ["A", "B"] * 3 and values == {"A": [1.0, 1.0], "B": [1.0, 1.0]}


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 2.0])
def test_an_exponent_is_the_power_of_a_power_law(power):
    sizes = [1, 2, 4, 8, 16]
    found = growth.curve({n: 3.0 * n**power for n in sizes}, "ms a step")
    assert found["exponent"] == pytest.approx(power) and found["factor"] == pytest.approx(3.0)
    assert found["error"] == pytest.approx(0.0, abs=1e-12)
    assert np.allclose(found["costs"], [3.0 * n**power for n in sizes])


def test_a_curve_says_how_far_its_points_lie_from_the_fit():
    found = growth.curve({1: 1.0, 2: 2.2, 4: 4.0}, "MB")  # slope 1, factor 1.1^(1/3): the second point is farthest
    assert found["exponent"] == pytest.approx(1.0) and found["error"] == pytest.approx(1.1 ** (2 / 3) - 1)
    assert "growth with memory" in growth.describe("memory", found) and "within 7%" in growth.describe("", found)
    assert "two points" in growth.describe("ranks", growth.curve({1: 3.0, 2: 2.0}, "ms a step"))


def test_utilisation_goes_by_the_first_name_that_is_known():
    assert mfu_note("NVIDIA H200", 0.5 * 989e12) == "MFU 50.0% of 989 TFLOP/s"
    assert mfu_note("NVIDIA H100 PCIe", 0.5 * 756e12).startswith("MFU 50.0%")
    assert "unknown" in mfu_note("a card of tomorrow", 1e12)


def test_the_growth_figure_has_a_panel_for_each_axis():
    curves = {axis: growth.curve({1: 2.0, 2: 3.0, 4: 7.0}, "ms a step") for axis in ("depth", "batch", "memory")}
    shown = [
        axes.get_title(loc="left").partition(":")[0]
        for axes in growth.growth_figure(curves, "a step").axes
        if axes.axison
    ]
    assert shown == ["depth", "batch", "memory"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("axis", ["depth", "batch", "sequence", "episodes"])
def test_the_points_of_an_axis_differ_in_that_alone(axis, preset):
    step, _, _, _ = preset_shapes(preset)
    points = growth.points_of({"case": "step", "form": "ours", **step})[axis]
    assert len(points) == 4 and len({json.dumps(spec, sort_keys=True) for spec in points.values()}) == 4
    first = next(iter(points.values()))
    for size, spec in points.items():
        flat, flat_first = ({**spec, **spec["model"]} for spec in (spec, first))
        name = {"depth": "n_layer", "batch": "rows", "sequence": "sequence_len", "episodes": "runs"}[axis]
        assert flat[name] == size > 0
        assert all(flat[key] == flat_first[key] for key in flat if key not in (name, "model"))


# -----------------------------------------------------------------------------
# workers


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with Worker("cpu", NANOCHAT_BASE_DIR=str(tmp_path_factory.mktemp("bench")), OMP_NUM_THREADS="1") as worker:
        yield worker


SPEC = {"model": {**vars(SMALL), "n_kv_head": 2}, "rows": 2}


@pytest.mark.parametrize(
    "spec", [{"form": "ours"}, {"form": "straight"}, {"form": "ours", "runs": 3}, {"form": "ours", "accumulation": 2}]
)
def test_a_worker_times_steps(worker, spec):
    assert seconds_of(worker, {"case": "step", "turns": 2, "threads": 1, **SPEC, **spec}) > 0


def test_a_worker_measures_data_episodes_and_the_controller(worker):
    found = result_of(worker, {"case": "data", "files": 30, "vocab_size": 300, "seconds": 0.05})
    assert found["cache_mb_per_s"] > 0 and all(rate > 0 for rate in found["loader"].values())
    rows = data_rows({**found, "loader": {128: 300.0}}, fastest=10.0)
    assert rows[1].ratio == 30.0
    episodes = {
        "case": "episodes",
        "episodes": 2,
        "steps": 3,
        "rows": 2,
        "model": {**SPEC["model"], "vocab_size": 300, "sequence_len": 16},
    }
    assert all(
        seconds_of(worker, {**episodes, "together": n, "workers": workers}) > 0
        for n, workers in ((1, 1), (2, 1), (2, 2))
    )
    milliseconds, percent = controller_rows({"model": SPEC["model"]}, 50, worker, step_seconds=0.1)
    assert 0 < milliseconds.ours < 50 and percent.ours == pytest.approx(milliseconds.ours / 1e3 / (50 * 0.1) * 100)


def test_a_vocabulary_larger_than_the_text_allows_is_cut_to_what_it_allows(worker):
    """The paper preset asks for 32,768 tokens of a corpus that is small on purpose."""
    found = result_of(worker, {"case": "data", "files": 20, "vocab_size": 32768, "seconds": 0.05})
    assert 300 < found["vocab_size"] < 32768 and found["cache_mb_per_s"] > 0
    assert f"vocabulary of {found['vocab_size']}" in str(data_rows(found, fastest=10.0)[0])


@pytest.mark.parametrize("vocab_size", [512, 32768])
def test_episodes_need_no_text_and_fit_any_vocabulary(worker, vocab_size):
    """At the paper's size the tokens of its vocabulary once went into a model of 512."""
    sizes = {**SPEC["model"], "vocab_size": vocab_size, "sequence_len": 16}
    spec = {"case": "episodes", "episodes": 2, "together": 2, "steps": 1, "rows": 2, "model": sizes}
    assert seconds_of(worker, spec) > 0


def test_a_case_that_cannot_run_here_is_named_and_the_next_one_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rustbpe'] = None\n")
    with Worker("cpu", NANOCHAT_BASE_DIR=str(tmp_path), PYTHONPATH=str(tmp_path)) as bare:
        with pytest.raises(UserError, match="needs the package rustbpe"):
            result_of(bare, {"case": "data", "files": 20, "vocab_size": 300, "seconds": 0.05})
        assert seconds_of(bare, {"case": "step", "form": "ours", **SPEC}) > 0


def test_a_first_look_begins_with_the_step_and_ends_with_what_takes_longest():
    step, episode, train, meta = preset_shapes("paper")
    names = [name for name, _ in looks(step, episode, 561, 50, None, True, 60.0)]
    assert names[:4] == ["step, 32 rows", "step, 64 rows", "step, 128 rows", "decision"]
    graphs = [f"{E} episodes, CUDA graphs" for E in (1, 8)]
    assert [n for n in names if "episodes" in n] == [f"{E} episodes" for E in (1, 8, 16, 32)] + graphs
    assert {"loss triton", "loss liger", "loss cce", "attention fa3"} < set(names)
    assert names[-6:] == ["recompilations", *graphs, "mlp plain", "mlp triton", "twin"]
    on_a_cpu = [name for name, _ in looks(step, episode, 561, 50, None, False, 60.0)]
    assert set(names) ^ set(on_a_cpu) == {"twin", "loss chunked", *graphs}


def test_rates_of_a_first_look(monkeypatch):
    monkeypatch.setattr("scripts.bench.first_look.timed", lambda worker, spec, seconds: [0.5])
    times, rates = {}, {}
    (row,) = step_row({**SPEC, "accumulation": 4}, None, 1.0, False, times)
    assert row.ours == 2 * 16 * 4 / 0.5 and times == {2: 0.5} and "500.0 ms" in str(row)
    for E in (1, 8):
        (row,) = episodes_row(E, SPEC, 30, None, 1.0, rates)
    assert rates == {1: 3 / 30 / 0.5, 8: 8 * 3 / 30 / 0.5} and row.ratio == pytest.approx(8.0)
    monkeypatch.setattr("scripts.bench.first_look.timed", lambda worker, spec, seconds: [0.25])
    (row,) = graphs_row(8, SPEC, 30, None, 1.0, rates)
    assert row.ratio == pytest.approx(2.0) and row.other == rates[8] and row.what.endswith("CUDA graphs")
    (row,) = graphs_row(16, SPEC, 30, None, 1.0, rates)
    assert row.ratio is None


def test_every_look_runs_at_a_small_size(worker):
    """All that `--preset paper --quick` measures on a GPU, as far as a CPU has it; the rest is refused."""
    step = {**SPEC, "accumulation": 4}
    refused, measured = {}, {}
    for name, look in looks(step, {**SPEC, "cuda_graphs": True}, 30, 50, worker, False, 0.0):
        try:
            (measured[name], *_) = look()
        except UserError as e:
            refused[name] = str(e)
    assert all("not available here" in reason for reason in refused.values()), refused
    assert set(refused) == {
        *(f"loss {k}" for k in ("triton", "triton-fp8", "liger", "cce")),
        *(f"attention {k}" for k in ("fa3", "varlen", "flex")),
        "mlp triton",
    }
    assert all(row.ours > 0 for name, row in measured.items() if name != "recompilations")
    assert measured["recompilations"].ours == 0


def test_a_failed_worker_is_an_error_of_one_line():
    with Worker("cpu") as worker, pytest.raises(UserError, match="failed; the reason stands above"):
        seconds_of(worker, {"case": "nothing of the kind"})


def test_the_compiled_rows_name_what_they_compare_and_leave_out_the_compilation(monkeypatch):
    specs, clock = [], iter([30.0, *[1.0] * 100])

    def seconds(worker, spec):
        specs.append((worker, spec.get("form"), spec.get("compiled", False)))
        return next(clock)

    monkeypatch.setattr("scripts.bench.rows.seconds_of", seconds)
    (row,) = compiled_straight_rows([("tiny", SPEC, 4)], "ours", "straight", 0.0)
    assert row.against == "straightforward, compiled" and row.ratio == 1.0 and "30 s, not counted" in row.note
    assert set(specs) == {("ours", "ours", False), ("straight", "straight", True)} and specs[0][2]


def test_seconds_are_checked(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--seconds", "0"])
    with pytest.raises(UserError, match="--seconds is 0"):
        bench.main()
