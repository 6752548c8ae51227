"""Every row of scripts.ablate asks for flags that exist, and for rows and methods that exist."""

from __future__ import annotations

import math

import pytest

from jel import export_schedule, load_schedule, save_policy
from scripts import base_train
from scripts.ablate.__main__ import held_mean, policy_path
from scripts.ablate.rows import CARRIED, TABLES, Row
from scripts.meta_flags import check_flags, flags
from scripts.meta_train import make_recipe
from scripts.presets import parse_with_preset
from scripts.sweep.settings import METHODS
from tests.jel_parts import lively_policy

ROWS = {name: row for rows in TABLES.values() for name, row in rows.items()}


def test_a_name_stands_once_and_what_a_row_names_is_there():
    assert len(ROWS) == sum(map(len, TABLES.values())) and len({row.what for row in ROWS.values()}) == len(ROWS)
    for row in ROWS.values():
        assert row.against in (None, *METHODS, *ROWS) and row.best_of in (None, *METHODS)
        assert row.policy_of is None or ROWS[row.policy_of].learn is not None
    assert set(CARRIED.values()) < set(METHODS)


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
        if "--recipe" not in row.learn and name not in ("short-episodes", "half-batch", "6-groups"):  # on purpose
            other = ROWS[row.against].learn if row.against in ROWS else []
            ours = parse_with_preset(flags(), "meta_train", [*start, *other])
            price = lambda a: a.updates * a.episodes * a.num_iterations * a.episode_batch_size * a.episode_seq_len
            assert price(args) == price(ours)


def test_the_held_mean_is_the_geometric_mean_over_progress(tmp_path):
    policy = lively_policy()
    save_policy(policy, tmp_path / "policy", {})
    held = load_schedule(held_mean(tmp_path / "policy", tmp_path / "mean.json"))["decisions"]
    rows = export_schedule(policy, [i / 50 for i in range(50)])["decisions"]
    logs = [math.log(row["multipliers"]["*"]["lr"]) for row in rows]
    assert len(held) == 1 and max(logs) - min(logs) > 0.1
    assert held[0]["multipliers"]["*"]["lr"] == pytest.approx(math.exp(sum(logs) / 50), rel=1e-5)


def test_where_a_row_finds_its_policy(tmp_path):
    assert policy_path(tmp_path, Row("x"), 3) == tmp_path / "meta-s3" / "policy"
    assert policy_path(tmp_path, Row("x", policy_of="other"), 3) == tmp_path / "ablate" / "other" / "meta-s3" / "policy"
