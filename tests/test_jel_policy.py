"""The policy against slow twins, what a decision costs, and its files: every damage is one clear line."""

from __future__ import annotations

import hashlib
import json
import pickle
import time

import pytest
import safetensors.torch
import torch

from jel import GaussianPolicy, JelError, PolicyController, load_policy, save_policy
from jel.actions import multipliers
from jel.policy import numpy_multipliers, policy_files, progress_weights

E, K, A = 6, 12, 2  # episodes, decisions, actions


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively_policy(**architecture) -> GaussianPolicy:
    """A fresh policy's outputs hardly depend on the state; these do."""
    policy = GaussianPolicy(seed=1, **architecture)
    with torch.no_grad():
        policy.net[4].weight *= 50
    return policy


# -----------------------------------------------------------------------------
# network


def test_a_fresh_policy_is_near_the_identity_and_as_wide_as_the_paper_says():
    policy, states = GaussianPolicy(), torch.linspace(0, 1, 21)[:, None]
    mean, log_std = policy(states)
    assert mean.shape == log_std.shape == (21, A)
    assert (policy.mean_scales(states).log().abs() < 0.1).all()
    torch.testing.assert_close(log_std, torch.full_like(log_std, -0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(policy.entropy(states), torch.full((21,), 0.919), atol=0.02, rtol=0)
    assert sum(p.numel() for p in policy.parameters()) == 2 * 64 + 65 * 64 + 65 * 4


@pytest.mark.parametrize(
    "bad",
    [
        *({"action_range": r} for r in (1.0, 0.5, -100.0, 1e6 + 1, float("inf"), float("nan"), "100", None, True)),
        *({"initial_log_std": s} for s in (-5.1, 2.1, float("nan"))),
        *({name: n} for name in ("n_state", "hidden", "n_actions") for n in (0, -1, 4097, 64.0, "64", True)),
    ],
)
def test_hyperparameters_that_make_no_sense_are_refused(bad):
    with pytest.raises(JelError, match=next(iter(bad))) as e:
        GaussianPolicy(**bad)
    assert "\n" not in str(e.value)


def test_hyperparameters_are_taken():
    policy = GaussianPolicy(hidden=8, initial_log_std=-2.0, action_range=10)
    mean, log_std = policy(torch.zeros(1))
    torch.testing.assert_close(log_std, torch.full((A,), -2.0), atol=0.02, rtol=0)
    assert policy.net[2].weight.shape == (8, 8)
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            policy.net[4].bias[:A] = 30.0 * sign
        torch.testing.assert_close(policy.mean_scales(torch.zeros(1)), torch.full((A,), 10.0**sign))


def test_policy_comes_from_its_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = GaussianPolicy(seed=1), GaussianPolicy(seed=1), GaussianPolicy(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.net[0].weight, b.net[0].weight) and not torch.equal(a.net[0].weight, c.net[0].weight)


def test_log_std_is_clamped():
    policy = GaussianPolicy()
    with torch.no_grad():
        policy.net[4].bias[2:] = torch.tensor([-50.0, 50.0])
    assert policy(torch.zeros(1))[1].tolist() == [-5.0, 2.0]


def test_densities_against_torch_distributions():
    policy, states = lively_policy(n_state=3), torch.rand(E, K, 3, generator=generator())
    actions, log_probs = policy.sample(states, generator(5))
    mean, log_std = policy(states)
    normal = torch.distributions.Normal(mean, log_std.exp())
    assert actions.shape == (E, K, A) and not actions.requires_grad
    torch.testing.assert_close(log_probs, normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(policy.log_prob(states, actions), normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(policy.entropy(states), normal.entropy().mean(-1))
    again, _ = policy.sample(states, generator(5))
    assert torch.equal(again, actions)
    many, _ = policy.sample(states[:1, :1].expand(5000, 1, 3), generator())
    torch.testing.assert_close(many.mean(0), mean[0, :1], atol=0.05, rtol=0)
    torch.testing.assert_close(many.std(0), log_std[0, :1].exp(), atol=0.05, rtol=0)


@pytest.mark.parametrize("n_state", [1, 3])
def test_actions_do_not_depend_on_how_episodes_are_split(n_state):
    policy, g = lively_policy(n_state=n_state), generator(2)
    states, noise = torch.rand(40, K, n_state, generator=g), torch.randn(40, K, A, generator=g)
    actions, log_probs = policy.act(states, noise)
    mean, log_std = policy(states)
    torch.testing.assert_close(actions, mean + log_std.exp() * noise)
    torch.testing.assert_close(log_probs, policy.log_prob(states, actions))
    for size in (1, 3, 8):
        parts = [policy.act(s, n) for s, n in zip(states.split(size), noise.split(size))]
        assert all(torch.equal(whole, torch.cat(p)) for whole, p in zip((actions, log_probs), zip(*parts)))
    alone = policy.act(states[7, 5], noise[7, 5])
    assert torch.equal(alone[0], actions[7, 5]) and torch.equal(alone[1], log_probs[7, 5])
    assert policy.act(states[:0], noise[:0])[0].shape == (0, K, A)


@pytest.mark.parametrize("action_range", [100.0, 3.0])
def test_numpy_twin_equals_torch(action_range):
    policy = lively_policy(action_range=action_range)
    weights = progress_weights(policy)
    for progress in torch.linspace(0, 1, 101).tolist():
        want = multipliers(policy.mean_scales(torch.tensor([progress])).detach())
        assert numpy_multipliers(weights, progress) == pytest.approx(want, rel=5e-6)


def test_a_decision_costs_less_than_a_tenth_of_a_millisecond():
    controller, best = PolicyController(lively_policy()), float("inf")
    for _ in range(20):  # the best of several: other processes may hold the core
        start = time.perf_counter()
        for i in range(100):
            controller.decide({"progress": i / 100})
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 1e-4


# -----------------------------------------------------------------------------
# files


def same(a: GaussianPolicy, b: GaussianPolicy) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def refused(path, message: str = ".") -> None:
    with pytest.raises(JelError, match=message) as e:
        load_policy(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".json"])
def test_save_and_load(tmp_path, suffix):
    policy = lively_policy(hidden=16, action_range=30.0)
    save_policy(policy, tmp_path / f"run.v1{suffix}", {"updates": 50})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.v1.json", "run.v1.safetensors"]
    loaded, card = load_policy(f"{tmp_path}/run.v1{suffix}")
    assert same(policy, loaded) and card["training"] == {"updates": 50}
    assert loaded.action_range == card["action_range"] == 30.0
    assert [row["progress"] for row in card["multipliers"]] == [i / 20 for i in range(21)]
    want = PolicyController(policy).decide({"progress": 0.5})["*"]
    assert {k: card["multipliers"][10][k] for k in want} == want


def test_loading_leaves_the_global_generator_alone(tmp_path):
    save_policy(lively_policy(), tmp_path / "p", {})
    before = torch.get_rng_state()
    load_policy(tmp_path / "p")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_richer_policy_is_saved_without_a_table(tmp_path):
    policy = lively_policy(n_state=3, n_actions=4)
    save_policy(policy, tmp_path / "p", {})
    loaded, card = load_policy(tmp_path / "p")
    assert same(policy, loaded) and card["multipliers"] == []


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


def test_well_formed_files_with_the_wrong_contents(tmp_path):
    save_policy(lively_policy(), tmp_path / "p", {})
    weights_path, card_path = policy_files(tmp_path / "p")
    good, card = safetensors.torch.load(weights_path.read_bytes()), json.loads(card_path.read_text())

    def put(data: bytes, **changes):
        weights_path.write_bytes(data)
        digest = hashlib.sha256(data + b"100.0").hexdigest()  # of the weights and the action range
        card_path.write_text(json.dumps({**card, "sha256": digest, **changes}))

    def tensors(**changes):
        return safetensors.torch.save({k: v for k, v in {**good, **changes}.items() if v is not None})

    bias = good["net.0.bias"]
    for changes in (
        {"net.0.bias": None},
        {"extra": bias.clone()},
        {"net.0.bias": bias[:5].clone()},
        {"net.0.bias": bias.double()},
        {"net.0.bias": bias.bfloat16()},
    ):
        put(tensors(**changes))
        refused(tmp_path / "p", "other tensors")
    put(tensors(**{"net.0.bias": bias.clone().fill_(float("inf"))}))
    refused(tmp_path / "p", "not finite")
    put(tensors(**{"net.4.bias": good["net.4.bias"] + 0.1}))
    refused(tmp_path / "p", "table of multipliers")
    put(pickle.dumps({"net.0.bias": [1.0]}))
    refused(tmp_path / "p", "not a safetensors file")
    for changes in ({"format": "other"}, {"version": 2}):
        put(tensors(), **changes)
        refused(tmp_path / "p", "is not a jel-policy card")
    for hidden in ("64", True, 0, -1, 10**9, None, 64.0):
        put(tensors(), hidden=hidden)
        refused(tmp_path / "p", "must be integers")
    for action_range in (1, -2.0, 0.01, 1e7, 10**400, float("inf"), float("nan"), "100", None, True, [100.0]):
        put(tensors(), action_range=action_range)
        refused(tmp_path / "p", "action_range is")
    put(tensors(), action_range=100.1)
    refused(tmp_path / "p", "does not match the sha256")
    put(tensors(), hidden=32)
    refused(tmp_path / "p", "other tensors")
    for table in (
        None,
        3,
        [],
        [3] * 21,
        card["multipliers"][1:],
        [{"progress": 0.0}] * 21,
        [{"progress": 10**400, "lr": 1, "weight_decay": 1}] * 21,
    ):
        put(tensors(), multipliers=table)
        refused(tmp_path / "p", "table of multipliers")
    card_path.write_text("[" * 100000)
    refused(tmp_path / "p", "not JSON")
    put(tensors())
    assert same(load_policy(tmp_path / "p")[0], lively_policy())
