"""Small tasks: batched models against plain ones, AdamW with changing betas, episodes that are their own."""

import importlib.util

import pytest
import torch

import jel
from jel.errors import JelError
from jel.fitting import FitConfig
from jel.tasks.small import bank, models
from jel.tasks.small.episodes import DEFAULTS, Episodes, SmallTask, Split
from jel.tasks.small.kinds import HELD_OUT, TRAINING, build, draw
from jel.tasks.small.task import small_task

SKLEARN = importlib.util.find_spec("sklearn") is not None
NEEDS_SKLEARN = {"digits", "autoencoder", "cnn", "breast_cancer", "wine"}


def kinds(names):
    skip = pytest.mark.skipif(not SKLEARN, reason="scikit-learn is optional")
    return [pytest.param(kind, marks=skip) if kind in NEEDS_SKLEARN else kind for kind in names]


def values(e, **changes):
    rows = torch.tensor(DEFAULTS).repeat(e, 1)
    for column, name in enumerate(("lr", "weight_decay", "ombeta1", "ombeta2")):
        rows[:, column] = torch.as_tensor(changes.get(name, rows[:, column]))
    return rows


@pytest.mark.parametrize("kind", kinds([*TRAINING, *HELD_OUT]))
def test_a_task_of_each_kind_learns_and_its_episodes_are_their_own(kind):
    task = build(draw(kind, 1 if kind == "uneven" else 2))  # uneven-2 is made of digits
    together, alone = Episodes(task, [5, 6, 7]), Episodes(task, [6])
    rate = 0.01 / float(torch.as_tensor(task.scale).max().clamp_min(1))
    for run in (together, alone):
        run.train(12, values(len(run.flat), lr=rate))
    torch.testing.assert_close(together.flat[1], alone.flat[0], atol=2e-4, rtol=2e-3)
    torch.testing.assert_close(together.inner[1], alone.inner[0], atol=0.05, rtol=0.05)
    assert together.inner.isfinite().all() and not torch.equal(together.flat[0], together.flat[2])
    before = Episodes(task, [5, 6, 7]).evaluate("train").mean()
    together.train(28, values(3, lr=rate))
    assert together.evaluate("train").mean() < before


def test_every_tensor_of_an_uneven_task_has_one_scale():
    spec = draw("uneven", 1)
    task = build(spec)
    scales = [t.unique() for t in task.model.tensors(task.scale[None])]
    assert all(len(t) == 1 for t in scales) and len({float(t) for t in scales}) > 2
    assert all(spec["scale"] <= float(t) <= spec["scale"] * spec["spread"] * 1.0001 for t in scales)
    twin, plain = Episodes(task, [3]), Episodes(build(spec["base"]), [3])  # the same network, told in other units
    torch.testing.assert_close(twin.flat * task.scale, plain.flat * build(spec["base"]).scale)
    torch.testing.assert_close(twin.evaluate("val"), plain.evaluate("val"))


def test_held_out_kinds_are_not_trained_on():
    assert not set(TRAINING) & set(HELD_OUT) and {"cnn", "gru", "transformer", "breast_cancer", "wine"} == set(HELD_OUT)


def test_a_spec_builds_the_same_task_again():
    a, b = draw("tabular", 3), draw("tabular", 3)
    build.__globals__["_built"].cache_clear()
    first = build(a).train.inputs
    build.__globals__["_built"].cache_clear()
    assert a == b and torch.equal(first, build(b).train.inputs) and draw("tabular", 4) != a


def test_the_layer_norm_lstm_step_is_torchs():
    """The recurrent models against torch.nn, one episode."""
    x = torch.randint(7, (1, 3, 5))
    for cell, twin in (("rnn", torch.nn.RNN), ("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)):
        model = models.recurrent(cell, 7, 4, 6, 2)
        flat = model.start(torch.Generator().manual_seed(0))[None]
        table, w, u, b, out, out_b = (t[0] for t in model.tensors(flat))
        theirs = twin(4, 6, batch_first=True)
        order = {"rnn": [0], "lstm": [1, 0, 3, 2], "gru": [1, 0, 2]}[cell]  # torch: i f g o, and r z n
        pick = lambda t, order=order: torch.cat([t.chunk(len(order), -1)[i] for i in order], -1)
        bias = pick(b).clone()
        if cell == "lstm":
            bias[6:12] += 1  # the forget gate's bias, which the model adds
        with torch.no_grad():
            theirs.weight_ih_l0.copy_(pick(w).T)
            theirs.weight_hh_l0.copy_(pick(u).T)
            theirs.bias_ih_l0.copy_(bias)
            theirs.bias_hh_l0.zero_()
            expected = theirs(table[x[0]])[0] @ out + out_b
        torch.testing.assert_close(model.forward(model.tensors(flat), x)[0], expected, atol=1e-5, rtol=1e-4)


def test_adamw_is_torchs_while_betas_stand_still():
    task = build(draw("regression", 1))
    ours = Episodes(task, [3])
    p = torch.nn.Parameter(ours.flat.clone())
    theirs = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.3)
    for t in range(10):
        at = ours.rows[t]
        theirs.zero_grad()
        task.losses(p, task.train.inputs[at], task.train.targets[at]).sum().backward()
        theirs.step()
    ours.train(10, values(1, lr=1e-2, weight_decay=0.3))
    torch.testing.assert_close(ours.flat, p.detach(), atol=1e-5, rtol=1e-4)


def test_bias_corrections_stay_right_when_betas_change():
    """After the first step under any betas, Adam's step has size lr; constant gradients keep it so."""
    model = models.Model((((2,), 0.0, 0.0),), lambda t, x: t[0][:, None] * x)
    data = Split(torch.ones(4, 2), torch.zeros(4, 2))
    linear = lambda outputs, targets: outputs.flatten(1).sum(1)
    models.LOSSES["linear"] = linear
    try:
        run = Episodes(SmallTask(model, "linear", 3, 1, data, data, data), [0])
        for ombeta1, ombeta2 in ((0.1, 0.01), (0.5, 0.3), (0.02, 0.001)):
            before = run.flat.clone()
            run.train(1, values(1, lr=0.1, weight_decay=0.0, ombeta1=ombeta1, ombeta2=ombeta2))
            torch.testing.assert_close(before - run.flat, torch.full((1, 2), 0.1), atol=1e-4, rtol=1e-3)
    finally:
        del models.LOSSES["linear"]


def test_save_and_load_reach_the_episodes_asked_for_only():
    task = build(draw("quadratic", 0))
    run = Episodes(task, [1, 2])
    run.train(3, values(2, lr=0.01))
    saved = run.flat.clone()
    run.save(0, torch.tensor([True, True]))
    run.train(3, values(2, lr=0.01))
    later = run.flat.clone()
    run.load(0, torch.tensor([False, True]))
    assert torch.equal(run.flat[0], later[0]) and torch.equal(run.flat[1], saved[1]) and run.step == 6
    run.train(3, values(2, lr=0.01))  # the register is a copy: training on does not change it
    run.load(0, torch.tensor([True, True]))
    assert torch.equal(run.flat, saved)


def test_the_bank_is_computed_once_and_read_after(tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "SEEDS", (1, 2))
    spec = {**draw("quadratic", 0), "steps": 20}
    first = bank.bank_task(spec, tmp_path)
    monkeypatch.setattr(bank, "baselines", lambda *_: pytest.fail("computed again"))
    again = bank.bank_task(spec, tmp_path)
    assert torch.equal(first.losses, again.losses) and first.losses.shape == (len(bank.SETTINGS), 2)
    assert first.score(torch.tensor(first.default)) == 0 and first.score(torch.tensor(first.oracle)) == 1
    assert first.score(torch.tensor([float("nan"), float("inf")])).tolist() == [-3, -3]


def test_settings_side_by_side_are_as_one_by_one(monkeypatch):
    task = build(draw("tabular", 0))
    settings, seeds = bank.SETTINGS[20:23], (1, 2)
    whole = bank.baselines(task, settings, seeds)
    monkeypatch.setattr(bank, "MOST_NUMBERS", 1)
    torch.testing.assert_close(whole, bank.baselines(task, settings, seeds), atol=1e-4, rtol=1e-3)


def test_a_bank_that_one_setting_solves_is_refused():
    losses = torch.ones(len(bank.SETTINGS), 2)
    losses[5] = 0.0
    with pytest.raises(JelError, match="too alike"):
        bank.check_bank([bank.BankTask(draw("quadratic", 0), losses)])
    noise = bank.BankTask(draw("quadratic", 0), torch.randn(len(bank.SETTINGS), 8, generator=torch.Generator()))
    assert noise not in bank.worth_learning([noise])


# -----------------------------------------------------------------------------
# as tasks of jel.fit


def test_a_small_task_multiplies_the_base_values_of_its_episodes():
    task = small_task("tabular", 3, lr=2e-3, weight_decay=0.1)
    task.reset(7, range(2))
    task.train(0, 6, {"*": {"lr": torch.tensor([1.0, 5.0])}})
    task.train(6, 4, {"*": {"weight_decay": 3.0}})
    alike = Episodes(build(draw("tabular", 3)), [7, 7])
    alike.train(6, values(2, lr=torch.tensor([2e-3, 1e-2]), weight_decay=0.1))
    alike.train(4, values(2, lr=2e-3, weight_decay=0.3))
    torch.testing.assert_close(task.observe(["probe_loss"])["probe_loss"], alike.evaluate("val"))
    assert task.with_steps(20).num_steps(0) == 20 and task.num_steps(0) != 20


def test_jel_fit_mends_the_rate_of_a_small_task_and_the_test_split_agrees():
    task, lines = small_task("regression", 1, lr=1e-5), []
    quick = FitConfig(updates=4, fewest=4)
    result = jel.fit(task, budget=8.0, base="unknown", method="random", config=quick, say=lines.append)
    assert result.card["kept"] != "base" and any("side by side" in line for line in lines)
    rates = torch.tensor([row["multipliers"]["*"]["lr"] for row in result.schedule["decisions"]]).mean() * 1e-5
    ends = Episodes(task.task, [1, 1], measure=False)
    ends.train(task.task.steps, values(2, lr=torch.tensor([1e-5, rates])))
    base, mended = ends.evaluate("test").tolist()
    assert mended < 0.9 * base
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-5, betas=(0.9, 0.99), weight_decay=1e-2)
    jel.Scheduler(optimizer, task.num_steps(0), result.schedule)  # its contract is that of torch's AdamW
    with pytest.raises(JelError, match="learned at lr 1e-05"):
        jel.Scheduler(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]), task.num_steps(0), result.schedule)


def test_bad_input_of_a_small_task_is_one_clear_line():
    for make, message in (
        (lambda: small_task("tables"), "unknown kind of small task 'tables'"),
        (lambda: small_task("quadratic", lr=0.0), "lr is 0.0"),
        (lambda: small_task("quadratic").train(0, 1, {}), "call reset first"),
    ):
        with pytest.raises(JelError, match=message):
            make()
    task = small_task("quadratic")
    task.reset(0, range(1))
    with pytest.raises(JelError, match="multiplier for 1-momentum"):
        task.train(0, 1, {"*": {"1-momentum": 2.0}})
    with pytest.raises(JelError, match="does not observe grad_norm"):
        task.observe(["grad_norm"])
