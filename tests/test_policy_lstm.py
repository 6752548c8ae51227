"""Relative steps, the LSTM policy, and its files."""

import json

import pytest
import torch

from jel.actions import RelativeSteps, Restart, StepKnob
from jel.errors import JelError
from jel.knobs import Knob
from jel.policy_lstm import LstmPolicy, load_lhopt_policy, save_lhopt_policy

LR = StepKnob(Knob("lr", "lr", bounds=(1e-6, 0.1)), (0.5, 1.0, 2.0))
CLIP = StepKnob(Knob("clip", "clip", scale="logit", bounds=(0.1, 0.9)), (-1.0, 0.0, 1.0))


def policy(**changes):
    made = LstmPolicy([LR, CLIP], **{"hidden": 16, "seed": 3, **changes})
    with torch.no_grad():
        made.heads.weight.mul_(100)  # as after training: its choices depend on what it sees
    return made


def test_steps_multiply_or_shift_and_stay_within_bounds():
    steps = RelativeSteps([LR, CLIP])
    values = torch.tensor([[1e-3, 0.5], [0.09, 0.89], [1e-3, 0.5]])
    after = steps.apply(values, steps.moves(torch.tensor([[2, 0], [2, 2], [1, 1]])))
    torch.testing.assert_close(after[0], torch.tensor([2e-3, torch.tensor(-1.0).sigmoid()]))
    torch.testing.assert_close(after[1], torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(after[2], values[2])
    torch.testing.assert_close(
        steps.relative(after, values)[0], torch.tensor([2.0, torch.e]).log() * torch.tensor([1, -1])
    )


def test_the_expected_move_lies_between_the_steps():
    steps = RelativeSteps([LR])
    move = steps.expected_moves([torch.tensor([0.25, 0.5, 0.25])])
    torch.testing.assert_close(move, torch.tensor([0.0]))
    torch.testing.assert_close(steps.expected_moves([torch.tensor([0.0, 0.0, 1.0])]), torch.tensor([2.0]).log())


@pytest.mark.parametrize("steps", [(1.0,), (2.0, 1.0), (0.0, 1.0), (1.0, float("nan")), (1.0, 1.0)])
def test_bad_steps_are_refused(steps):
    with pytest.raises(JelError):
        StepKnob(Knob("lr", "lr"), steps)


def test_a_sequence_is_its_decisions_one_by_one():
    made, x = policy(), torch.randn(6, 4, policy().n_features, generator=torch.Generator().manual_seed(0))
    choices = torch.randint(3, (6, 4, 2), generator=torch.Generator().manual_seed(1))
    whole, _ = made.evaluate(x, choices)
    state = made.initial_state((4,))
    for k in range(6):
        heads, state = made.log_probs(x[k : k + 1], state)
        alone = sum(h[0].gather(-1, choices[k, :, i, None])[:, 0] for i, h in enumerate(heads))
        torch.testing.assert_close(alone, whole[k], atol=1e-5, rtol=1e-5)


def test_an_act_alone_is_an_act_in_a_batch():
    made, x = policy(), torch.randn(5, policy().n_features)
    together, alone = made.act(x, made.initial_state((5,))), made.act(x[2], made.initial_state())
    torch.testing.assert_close(together.moves[2], alone.moves, atol=1e-6, rtol=1e-5)
    assert alone.register.item() == 0 and together.moves.std(0).max() > 1e-3


def test_memory_matters_only_to_a_recurrent_policy():
    for recurrent in (True, False):
        made = policy(recurrent=recurrent)
        x, y = torch.randn(2, made.n_features)
        fresh = made.act(y, made.initial_state()).moves
        after = made.act(y, made.act(x, made.initial_state()).state).moves
        assert torch.equal(fresh, after) == (not recurrent)


def test_making_a_policy_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    policy()
    assert torch.equal(torch.rand(1), expected)


def test_files_bring_back_the_policy(tmp_path):
    made = policy(registers=2)
    made.trunk.norm.update(torch.randn(50, made.n_features))
    save_lhopt_policy(made, tmp_path / "p", {"why": "a test"}, decisions=20)
    loaded, card = load_lhopt_policy(tmp_path / "p.json")
    x = torch.randn(made.n_features)
    assert torch.equal(loaded.act(x, loaded.initial_state()).moves, made.act(x, made.initial_state()).moves)
    assert card["decisions"] == 20 and card["training"] == {"why": "a test"}


def test_a_damaged_policy_is_one_clear_line(tmp_path):
    save_lhopt_policy(policy(), tmp_path / "p", {})
    card = json.loads((tmp_path / "p.json").read_text())
    for change in ({"format": "x"}, {"hidden": 17}, {"hidden": "x"}, {"knobs": 3}, {"knobs": [{}]}, {"registers": -1}):
        (tmp_path / "q.json").write_text(json.dumps({**card, **change}))
        (tmp_path / "q.safetensors").write_bytes((tmp_path / "p.safetensors").read_bytes())
        with pytest.raises(JelError) as e:
            load_lhopt_policy(tmp_path / "q")
        assert "\n" not in str(e.value)
    (tmp_path / "p.safetensors").write_bytes((tmp_path / "p.safetensors").read_bytes()[:-4] + b"abcd")
    with pytest.raises(JelError, match="sha256"):
        load_lhopt_policy(tmp_path / "p")
    with torch.no_grad():
        broken = policy()
        broken.heads.bias[0] = float("nan")
    with pytest.raises(JelError, match="not finite"):
        save_lhopt_policy(broken, tmp_path / "r", {})
    assert not (tmp_path / "r.json").exists()


def test_restart_choices():
    restart = Restart(2)
    choices = torch.arange(restart.size)
    assert restart.size == 5 and Restart(0).size == 0
    assert [restart.saves(choices, r).nonzero().item() for r in range(2)] == [1, 3]
    assert [restart.loads(choices, r).nonzero().item() for r in range(2)] == [2, 4]


def test_the_shipped_policy_tells_a_low_start_from_a_high_one():
    """Under the same losses, steps a thousand times smaller than the parameters' usual call for a higher rate."""
    shipped, card = load_lhopt_policy()
    names, moves = shipped.features, []
    assert card["decisions"] == 20 and set(card["held_out"]) == {"default", "random"}
    for ratio in (-11.0, -2.0):
        x = shipped.trunk.norm.mean.clone()
        x[names.index("progress")] = 0.15
        x[names.index("log_update_ratio")] = ratio
        moves.append(shipped.act(x, shipped.initial_state()).moves[shipped.actions.names.index("lr")].item())
    assert moves[0] > moves[1]
