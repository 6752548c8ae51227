"""The two files of a policy: every damage is one clear line."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
import safetensors.torch
import torch

from jel import GaussianPolicy, JelError, Knob, load_policy, save_policy
from jel.policy import policy_digest, policy_files
from tests.jel_parts import FEEDBACK, knobs, lively_policy, same


def refused(path, message: str = ".") -> None:
    with pytest.raises(JelError, match=message) as e:
        load_policy(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".json"])
def test_save_and_load(tmp_path, suffix):
    policy = lively_policy(hidden=16, knobs=knobs(30.0))
    save_policy(policy, tmp_path / f"run.v1{suffix}", {"updates": 50})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.v1.json", "run.v1.safetensors"]
    loaded, card = load_policy(f"{tmp_path}/run.v1{suffix}")
    assert same(policy, loaded) and card["training"] == {"updates": 50}
    assert loaded.knobs == policy.knobs == knobs(30.0) and loaded.observes == {"progress"}
    assert card["sha256"] == policy_digest(policy) == policy_digest(loaded)
    assert [row["progress"] for row in card["multipliers"]] == [i / 10 for i in range(10)]
    assert card["multipliers"][5]["multipliers"] == policy.mean_multipliers({"progress": 0.5})


def test_loading_leaves_the_global_generator_alone(tmp_path):
    save_policy(lively_policy(), tmp_path / "p", {})
    before = torch.get_rng_state()
    load_policy(tmp_path / "p")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_richer_policy_is_saved_without_a_table(tmp_path):
    policy = lively_policy(features=FEEDBACK, knobs=(*knobs(), Knob("head", "lr", ("lm_head",), bounds=(0.5, 2.0))))
    save_policy(policy, tmp_path / "p", {})
    loaded, card = load_policy(tmp_path / "p")
    assert same(policy, loaded) and "multipliers" not in card
    assert loaded.features == FEEDBACK and loaded.knobs == policy.knobs and loaded.observes == policy.observes


def test_saving_that_fails_leaves_the_old_policy(tmp_path):
    good, bad = lively_policy(), GaussianPolicy()
    save_policy(good, tmp_path / "p", {})
    with torch.no_grad():
        bad.net[2].bias[3] = float("nan")
    with pytest.raises(JelError, match="not finite"):
        save_policy(bad, tmp_path / "p", {})
    assert same(load_policy(tmp_path / "p")[0], good)
    with pytest.raises(JelError, match="cannot write"):
        save_policy(good, tmp_path / "p.json" / "below", {})


def test_missing_files(tmp_path):
    refused(tmp_path / "p", "does not exist")
    save_policy(lively_policy(), tmp_path / "p", {})
    (tmp_path / "p.json").unlink()
    refused(tmp_path / "p", "card .* does not exist")
    (tmp_path / "q.safetensors").mkdir()
    refused(tmp_path / "q", "cannot be read")


def test_truncations_and_bit_flips_are_refused_or_harmless(tmp_path):
    policy = lively_policy(hidden=3)
    save_policy(policy, tmp_path / "p", {"note": "x"})
    weights_path, card_path = policy_files(tmp_path / "p")
    weights, card = weights_path.read_bytes(), card_path.read_bytes()
    for n in range(0, len(weights), 17):
        weights_path.write_bytes(weights[:n])
        refused(tmp_path / "p")
    for i in range(0, len(weights), 7):
        weights_path.write_bytes(weights[:i] + bytes([weights[i] ^ 1 << i % 8]) + weights[i + 1 :])
        refused(tmp_path / "p", "does not match the sha256")
    weights_path.write_bytes(weights)
    for n in range(0, len(card) - 1, 17):
        card_path.write_bytes(card[:n])
        refused(tmp_path / "p")
    refusals = 0
    for i in range(0, len(card), 7):
        card_path.write_bytes(card[:i] + bytes([card[i] ^ 1 << i % 8]) + card[i + 1 :])
        try:
            assert same(load_policy(tmp_path / "p")[0], policy)  # white space, a late digit, the training note
        except JelError:
            refusals += 1
    assert refusals > len(card) / 7 / 2


def test_what_a_policy_reads_and_turns_is_part_of_its_name():
    policies = [
        lively_policy(),
        lively_policy(seed=2),
        lively_policy(knobs=knobs(30.0)),
        lively_policy(knobs=(Knob("lr", "lr", ("wte",)), Knob("weight_decay", "weight_decay"))),
        lively_policy(features=("log_probe_loss",)),
    ]
    assert len({policy_digest(policy) for policy in policies}) == len(policies)
    assert policy_digest(lively_policy()) == policy_digest(policies[0])


@pytest.fixture
def put(tmp_path):
    """Writes a policy's files with other weights or another card, under a hash that vouches for both."""
    save_policy(lively_policy(), tmp_path / "p", {})
    weights_path, card_path = policy_files(tmp_path / "p")
    card = json.loads(card_path.read_text())

    def write(data: bytes | None = None, **changes):
        whole = {**card, **changes}
        architecture = {key: whole[key] for key in ("features", "hidden", "knobs")}
        if data is not None:
            weights_path.write_bytes(data)
        vouching = hashlib.sha256(weights_path.read_bytes() + json.dumps(architecture, sort_keys=True).encode())
        card_path.write_text(json.dumps({**whole, "sha256": vouching.hexdigest()}))
        return tmp_path / "p"

    return write


def test_the_digest_is_made_of_the_weights_and_the_architecture(put):
    assert same(load_policy(put())[0], lively_policy())


def test_weights_that_are_others_than_the_card_says(put):
    good = lively_policy().state_dict()
    bias = good["net.0.bias"]

    def tensors(**changes):
        return safetensors.torch.save({k: v for k, v in {**good, **changes}.items() if v is not None})

    for changes in (
        {"net.0.bias": None},
        {"extra": bias.clone()},
        {"net.0.bias": bias[:5].clone()},
        {"net.0.bias": bias.double()},
        {"net.0.bias": bias.bfloat16()},
    ):
        refused(put(tensors(**changes)), "other tensors")
    refused(put(tensors(**{"net.0.bias": bias.clone().fill_(float("inf"))})), "not finite")
    refused(put(pickle.dumps({"net.0.bias": [1.0]})), "not a safetensors file")


@pytest.mark.parametrize("changes", [{"format": "other"}, {"version": 1}, {"version": None}])
def test_cards_of_another_kind(put, changes):
    refused(put(**changes), "is not a jel-policy card of version 2")


@pytest.mark.parametrize("hidden", ["64", True, 0, -1, 10**9, None, 64.0, [64]])
def test_cards_with_a_bad_size(put, hidden):
    refused(put(hidden=hidden), "hidden is")


@pytest.mark.parametrize(
    "features", [None, 3, "progress", [], ["loss"], [3], [None], [[]], [{}], {"progress": 1}, ["a\nb"]]
)
def test_cards_with_bad_features(put, features):
    refused(put(features=features), "feature")


KNOB = Knob("lr", "lr").to_json()


@pytest.mark.parametrize(
    "bad",
    [
        *(None, 3, "lr", [], [3], [None], [[]], [{}], [KNOB, KNOB]),
        *(
            [{**KNOB, "bounds": b}]
            for b in (None, 3, [], [1], [2, 1], [0, 1], [1, 10**400], [1, float("inf")], ["a", 1])
        ),
        *([{**KNOB, "groups": g}] for g in (None, [], "wte", [3], ["a", "a"])),
        *([{**KNOB, "scale": s}] for s in (None, "linear", "logit")),
        [{**KNOB, "surplus": 1}],
    ],
)
def test_cards_with_bad_knobs(put, bad):
    refused(put(knobs=bad), "knob")


def test_cards_whose_sizes_are_not_the_weights(put):
    two = [KNOB, {**KNOB, "name": "other"}, {**KNOB, "name": "third"}]
    for changes in ({"hidden": 32}, {"features": ["progress", "log_probe_loss"]}, {"knobs": two}):
        refused(put(**changes), "other tensors")


def test_cards_that_are_no_card(tmp_path, put):
    path = put()
    for text in ("[" * 100000, "[]", "3", '{"format":'):
        path.with_suffix(".json").write_text(text)
        refused(path, "not JSON|is not a jel-policy card")
    wide = {**KNOB, "bounds": [0.01, 100.1]}
    card = json.loads(put().with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**card, "knobs": [wide, card["knobs"][1]]}))
    refused(path, "does not match the sha256")
