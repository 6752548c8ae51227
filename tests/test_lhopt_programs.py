"""LHOPT's programs: training that is stopped and resumed, rows computed once, tables, rivals, schedule transfer."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch

from jel.errors import JelError
from jel.lhopt import LhoptController
from jel.policy_lstm import default_lhopt_path, load_lhopt_policy
from jel.registry import load_controller
from jel.tasks.small.bank import SEEDS, SETTINGS, BankTask
from jel.tasks.small.kinds import draw
from nanochat.common import UserError
from nanochat.preemption import REQUEUE_EXIT_CODE
from scripts.lhopt import ablate, evaluate, pretrain, replay, rivals, tables, train

LOSSES = torch.linspace(1, 0.5, len(SETTINGS))[:, None].expand(-1, len(SEEDS))


def tiny_tasks():
    return [BankTask({**draw(kind, 0), "steps": 16}, LOSSES) for kind in ("quadratic", "tabular")]


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(train, "training_tasks", lambda args, compute: tiny_tasks())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_training_stopped_and_resumed_ends_with_the_same_policy(base):
    command = ["--preset", "smoke", "--hidden", "8", "--seed", "3"]
    assert train.main([*command, "--model-tag", "lhopt/whole"]) == 0
    assert train.main([*command, "--model-tag", "lhopt/parts", "--stop-after", "1"]) == REQUEUE_EXIT_CODE
    early = (base / "runs/lhopt/parts/policy.safetensors").read_bytes()
    assert train.main([*command, "--model-tag", "lhopt/parts"]) == 0
    files = [(base / "runs/lhopt" / tag / "policy.safetensors").read_bytes() for tag in ("whole", "parts")]
    assert files[0] == files[1] != early
    _, card = load_lhopt_policy(base / "runs/lhopt/parts/policy")
    assert card["training"]["updates_done"] == 3 and card["training"]["episodes"] == 3 * 2 * 4
    assert card["decisions"] == 10
    assert train.main([*command, "--model-tag", "lhopt/parts"]) == 0  # already finished
    with pytest.raises(UserError, match="hidden"):
        train.main(["--preset", "smoke", "--hidden", "9", "--seed", "3", "--model-tag", "lhopt/parts"])


def test_bad_flags_are_one_clear_line():
    for flags in (["--updates", "0"], ["--episodes", "1"], ["--registers", "9"], ["--policy-lr", "nan"]):
        with pytest.raises(UserError, match=flags[0].strip("-")):
            train.parse(flags)
    assert train.asked_for(["--recipe", "lhopt"]) and train.asked_for(["--recipe=lhopt", "--seed", "1"])
    assert not train.asked_for(["--recipe", "jel"]) and not train.asked_for([])


def test_a_row_is_computed_once_and_a_blown_up_run_stays_infinite(tmp_path):
    results, task = evaluate.Results(tmp_path), tiny_tasks()[0]
    first = results.row("x", task, lambda: torch.tensor([1.0, math.nan]))
    again = results.row("x", task, lambda: pytest.fail("computed again"))
    assert torch.equal(first, again) and first.tolist() == [1.0, math.inf]


def test_scores_are_paired_and_ranks_share_ties():
    task = BankTask(draw("quadratic", 0), LOSSES + torch.arange(8.0))  # seeds that differ far more than settings
    default = task.losses[evaluate.DEFAULT]
    assert (task.paired_score(default) == 0).all()
    torch.testing.assert_close(task.paired_score(task.losses[task.best_setting]), torch.ones(8), atol=1e-4, rtol=0)
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert tables.mean_ranks([[one], [two]]).tolist() == [1.25, 1.75]


def test_the_bootstrap_interval_covers_the_mean_and_knows_certainty():
    assert tables.bootstrap_interval(torch.ones(3, 4)) == (1.0, 1.0)
    low, high = tables.bootstrap_interval(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    assert -1 < low < 0.2 and low < high < 1


@pytest.mark.parametrize("name", ["no control, random start", "AdamW cosine 1e-3", "GreedyLR", "ASHA, 8 settings"])
def test_rivals_train(name):
    function, _ = rivals.RIVALS[name]
    losses = function(tiny_tasks()[1], SEEDS[:2])
    assert losses.shape == (2,) and losses.isfinite().all()


def test_a_torch_optimizer_on_the_flat_parameters_is_the_episode():
    task = tiny_tasks()[1]
    make = lambda params: torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    theirs = rivals.run_optimizer(task.task, 1000, make, "cosine")
    ours = rivals.fixed((1e-3, "cosine", 1e-2))(task, [1000])
    assert math.isclose(theirs, ours.item(), rel_tol=1e-4)


def test_speedup_is_read_off_the_curve():
    curve = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5])
    assert replay.speedup(curve, 2.0) == 2.0 and replay.speedup(curve, 0.5) == 1.0
    assert math.isclose(replay.speedup(curve, 2.5), 4 / 1.5) and replay.speedup(curve, 0.1) == 0.0


def test_a_replayed_schedule_is_live_control_when_alone():
    from jel.recipes.lhopt import LhoptRecipe

    task, policy = tiny_tasks()[1], LhoptRecipe(hidden=8).policy(0)
    curve, final, schedule = replay.live(policy, task, [5], 4)
    followed, last = replay.follow(task, [5], schedule)
    torch.testing.assert_close(followed, curve, atol=1e-4, rtol=1e-3)
    assert final.shape == last.shape == (1,)


def test_a_missing_policy_is_one_clear_line(base):
    with pytest.raises((UserError, JelError), match="no policy"):
        evaluate.policy_path("lhopt/none")


def test_a_fixed_setting_with_the_guard_is_never_worse_on_validation():
    """With a rate that blows up, what is kept is a start; with one that does not, the mean of the last looks."""
    task = tiny_tasks()[1]
    wild = rivals.fixed((1e3, "constant", 1e-2), guard=True)(task, SEEDS[:2])
    plain = rivals.fixed((1e3, "constant", 1e-2))(task, SEEDS[:2])
    assert wild.isfinite().all() and (plain.nan_to_num(math.inf) > wild).all()
    calm = [rivals.fixed((1e-3, "constant", 1e-2), guard)(task, SEEDS[:2]) for guard in (True, False)]
    torch.testing.assert_close(*calm, atol=0, rtol=1e-2)


def test_the_table_of_pretraining_compares_seed_by_seed():
    ours, theirs = {s: 2.0 + s for s in range(5)}, {s: 2.5 + s for s in range(5)}
    text = pretrain.table({"LHOPT": ours, pretrain.AGAINST: theirs})
    assert "| LHOPT | 4.0000" in text and "-0.5000 (-0.5000, -0.5000)" in text


def test_a_probe_loss_is_a_validation_loss():
    model = torch.nn.Linear(3, 1)
    decided = []
    for controller, told in (
        (load_controller("lhopt"), {}),
        (LhoptController(), {"val_loss": 2.0}),
        (LhoptController(), {}),
    ):
        controller.attach(torch.optim.AdamW(model.parameters()))
        controller.observe(**told)
        decided.append(controller.decide({"progress": 0.0, "probe_loss": 2.0}))
    assert load_controller("lhopt").observes == {"progress", "probe_loss"}
    assert decided[0] == decided[1] != decided[2]


def test_a_policy_turns_every_group_of_nanochat(base):
    from jel.knobs import apply_multipliers
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.lr_schedule import base_hparams

    model = GPT(GPTConfig.from_depth(2, 16, 16, sequence_len=16, vocab_size=64))
    model.init_weights()
    optimizer = model.setup_optimizer()
    for group in optimizer.param_groups:
        group["initial_lr"], group["initial_wd"] = 1e-3, 1e-2
    controller = LhoptController(load_lhopt_policy()[0])
    controller.attach(optimizer)
    multipliers = controller.decide({"progress": 0.0})
    bases = base_hparams(optimizer.param_groups, 0, 10, 0.0, 0.0, 0.0, 0.0)
    apply_multipliers(optimizer.param_groups, bases, multipliers)
    for group, base_values in zip(optimizer.param_groups, bases):
        momentum, beta2 = (group["momentum"], group["beta2"]) if group["kind"] == "muon" else group["betas"]
        assert (
            group["lr"] != base_values["lr"] and momentum != base_values["momentum"] and beta2 != base_values["beta2"]
        )


def test_every_row_of_the_ablation_is_a_recipe():
    for row in ablate.ROWS.values():
        train.make_recipe(train.parse(list(row.flags))).policy(0)


@pytest.mark.slow
def test_two_ranks_end_with_the_policy_of_one(tmp_path):
    """Under torchrun with gloo: the same bytes."""
    import os
    import subprocess
    import sys

    command = ["-m", "scripts.meta_train", "--recipe", "lhopt", "--preset", "smoke", "--hidden", "8"]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for start, tag in (([sys.executable], "lhopt/one"), (launch, "lhopt/two")):
        subprocess.run([*start, *command, "--model-tag", tag], check=True, env=environment)
    one, two = ((tmp_path / "runs/lhopt" / tag / "policy.safetensors").read_bytes() for tag in ("one", "two"))
    assert one == two


def test_the_guard_and_a_hidden_validation_loss_are_two_things(monkeypatch):
    """Each is passed on by itself, and results of different conditions have different names."""
    asked = []
    monkeypatch.setattr(evaluate, "run", lambda *given, **how: asked.append(how) or SimpleNamespace(final=None))
    keys, cases = set(), [(keep, hide_val) for keep in (5, 0) for hide_val in (True, False)]
    for keep, hide_val in cases:
        key, compute = evaluate.controlled(default_lhopt_path(), "mean", "default", keep, hide_val)
        compute(None)
        keys.add(key)
    assert [(how["keep"], how["hide_val"]) for how in asked] == cases and len(keys) == 4
