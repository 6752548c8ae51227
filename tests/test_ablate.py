"""Every row of scripts.ablate asks for flags that exist, and for rows and methods that exist."""

from __future__ import annotations

import argparse
import math

import pytest

from jel import export_schedule, load_schedule, save_policy
from nanochat.common import UserError
from nanochat.files import read_json
from scripts import base_train
from scripts.ablate.__main__ import held_mean, main, policy_path, record
from scripts.ablate.rows import CARRIED, TABLES, Row
from scripts.meta_flags import check_flags, flags
from scripts.meta_train import make_recipe
from scripts.presets import parse_with_preset
from scripts.report.costs import EXPLORATORY_RUNS, tuning_cost
from scripts.report.evidence import read_evidence
from scripts.sweep.settings import METHODS, SWEEPS
from tests.jel_parts import lively_policy
from tests.report_runs import SEEDS, add_everything, write

ROWS = {name: row for rows in TABLES.values() for name, row in rows.items()}


def test_a_name_stands_once_and_what_a_row_names_is_there():
    assert len(ROWS) == sum(map(len, TABLES.values())) and len({row.what for row in ROWS.values()}) == len(ROWS)
    for row in ROWS.values():
        assert row.against in (None, *METHODS, *ROWS) and row.best_of in (None, *METHODS)
        assert row.sweep in (None, *SWEEPS.get(row.best_of, ()))
        assert row.policy_of is None or ROWS[row.policy_of].learn is not None
    assert set(CARRIED.values()) < set(METHODS)


OTHER_PRICE = ("short-episodes", "half-batch", "quarter-batch")  # on purpose


@pytest.mark.parametrize("name", ROWS)
def test_a_row_changes_what_it_says(name):
    row, start = ROWS[name], ["--preset", "tiny"]
    run = parse_with_preset(base_train.flags(), "base_train", [*start, *row.control, *row.deploy])
    plain = parse_with_preset(base_train.flags(), "base_train", [*start, *row.control])
    assert (run != plain) == bool(row.deploy)
    if row.learn is not None:
        args = parse_with_preset(flags(), "meta_train", [*start, *row.learn])
        check_flags(args)
        assert args != parse_with_preset(flags(), "meta_train", start)
        assert make_recipe(args).knobs()
        if "--recipe" not in row.learn and name not in OTHER_PRICE:
            other = ROWS[row.against].learn if row.against in ROWS else []
            ours = parse_with_preset(flags(), "meta_train", [*start, *other])
            price = lambda a: a.updates * a.episodes * a.num_iterations * a.episode_batch_size * a.episode_seq_len
            assert price(args) == price(ours)


def test_the_held_mean_is_the_geometric_mean_over_progress(tmp_path):
    policy = lively_policy()
    save_policy(policy, tmp_path / "policy", {"decay_carry": 99})
    schedule = load_schedule(held_mean(tmp_path / "policy", tmp_path / "mean.json"))
    held = schedule["decisions"]
    assert schedule["decay_carry"] == 99
    rows = export_schedule(policy, [i / 50 for i in range(50)])["decisions"]
    logs = [math.log(row["multipliers"]["*"]["lr"]) for row in rows]
    assert len(held) == 1 and max(logs) - min(logs) > 0.1
    assert held[0]["multipliers"]["*"]["lr"] == pytest.approx(math.exp(sum(logs) / 50), rel=1e-5)


def test_where_a_row_finds_its_policy(tmp_path):
    args, other = argparse.Namespace(policies=None), tmp_path / "ablate" / "other" / "meta-s3" / "policy"
    assert policy_path(args, tmp_path, Row("x"), 3) == tmp_path / "meta-s3" / "policy"
    assert policy_path(args, tmp_path, Row("x", policy_of="other"), 3) == other
    args.policies = str(tmp_path / "elsewhere")
    assert policy_path(args, tmp_path, Row("x"), 3) == tmp_path / "elsewhere" / "meta-s3" / "policy"
    assert policy_path(args, tmp_path, Row("x", policy_of="other"), 3) == other


def test_policies_from_elsewhere_must_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["ablate", "--preset", "tiny", "carried"])
    with pytest.raises(UserError, match="--policies$"):
        main()


def test_a_row_is_recorded_with_its_own_price_and_jels_difference(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "runs" / "tiny"
    add_everything(folder)
    meta = lambda seed: read_json(folder / f"meta-s{seed}" / "result.json", "result")
    jel = {s: read_json(folder / f"jel-s{s}" / "result.json", "result")["test_bpb"] for s in SEEDS}
    names = "no-momentum", "own-mean", "depth-x2-tuned", "depth-x2-untouched", "depth-x2-there"
    for name, worse in zip(names, (0.1, 0.0, 1.0, 2.0, 0.5)):
        for s in SEEDS:
            own = folder / "ablate" / name
            write(own / f"s{s}" / "result.json", {"test_bpb": jel[s] + worse * (1 + s / 100)})
            write(own / f"meta-s{s}" / "result.json", {"flops": 2 * meta(s)["flops"]})
    write(
        folder / "evidence" / "ablations.json",
        [{"name": "a former row", "test_bpb": [2.0], "run_equivalents": 1.0, "verdict": "-"}],
    )
    args = argparse.Namespace(preset="tiny", seeds=list(SEEDS), policies=None)
    for table, name in (("ablations", "no-momentum"), ("equal_budget", "own-mean"), ("transfer", "depth-x2-tuned")):
        record(args, folder, table, name)
    record(args, folder, "transfer", "depth-x2-untouched")
    sweep = {"rows": [{"val_bpb": 2.0, "flops": 3 * meta(s)["flops"]} for s in SEEDS], "best": 0}
    write(folder / "ablate" / "depth-x2-there" / "sweep_hand_tuned.json", sweep)
    record(args, folder, "transfer", "depth-x2-there")
    rows = {r["name"]: r for t in TABLES for r in read_json(folder / "evidence" / f"{t}.json", "table")}
    found = [rows[ROWS[name].what] for name in names]
    once = found[1]["run_equivalents"]
    assert found[0]["run_equivalents"] == pytest.approx(2 * once) and found[3]["run_equivalents"] == 0.0
    assert found[2]["run_equivalents"] == tuning_cost(read_evidence(tmp_path / "runs", "tiny"), "hand_tuned") != once
    assert found[4]["run_equivalents"] == pytest.approx(3 * len(SEEDS) * once + EXPLORATORY_RUNS["hand_tuned"])
    assert found[0]["difference"] == pytest.approx(-0.1 * (1 + sum(SEEDS) / len(SEEDS) / 100)) and found[0]["interval"]
    assert found[1]["difference"] == 0.0 and found[2]["difference"] is None
    assert "a former row" in rows
