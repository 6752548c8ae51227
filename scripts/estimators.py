"""How noisy each estimate of the policy gradient is: many groups of episodes under frozen policies.

    python -m scripts.estimators --preset tiny                          the policy at its start
    python -m scripts.estimators --preset tiny --policy tiny/meta-s42   and one that has learned

A policy is frozen; G groups of episodes are drawn from it with each kind of exploration noise, the same starts for all
kinds. Each estimator turns a group into a gradient of the return by the mean actions, (A,), summed over decisions. The
table gives the noise of one group: the summed variance of the gradient over groups as a multiple of its squared mean.
The squared mean is estimated without bias, by products of different groups. Writes
runs/<preset>/evidence/estimators.json.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from jel.errors import JelError
from jel.learn.advantages import RETURNS, group_advantages
from jel.learn.critic import Critic
from jel.learn.exploration import Exploration
from jel.learn.rollout import Rollout, collect
from jel.policy import GaussianPolicy, load_policy
from nanochat.common import base_dir, derive_seed, init_compute, print0, run_main, seed_everything
from nanochat.dataset import resolve_data
from nanochat.files import write_json
from nanochat.gpt import GPTConfig
from nanochat.run_log import Stopwatch, format_seconds
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer, tokenizer_folder
from scripts.meta_flags import check_flags, flags
from scripts.meta_train import make_episodes, make_recipe
from scripts.presets import parse_with_preset
from scripts.runs import run_folder

NOISES = {
    "independent": Exploration(),
    "correlated 0.98": Exploration(0.98),
    "correlated 0.98, pairs": Exploration(0.98, True),
}


def score_gradient(rollout: Rollout, policy: GaussianPolicy, returns: str) -> Tensor:
    """Mean over the group of advantage times d log-density / d mean, summed over decisions: (A,)."""
    values = RETURNS[returns](rollout.rewards, rollout.alive, 0.99)
    advantages = group_advantages(values, rollout.alive)  # (E, K)
    with torch.no_grad():
        mean, log_std = policy(rollout.states)
    score = (rollout.actions - mean) / log_std.exp().square()  # (E, K, A)
    return (advantages[..., None] * score).sum(1).mean(0)


def critic_gradient(rollout: Rollout, policy: GaussianPolicy) -> Tensor:
    """The gradient at the mean actions of a critic that has seen this group alone, summed over decisions: (A,)."""
    critic = Critic(policy.n_actions)
    returns = RETURNS["total"](rollout.rewards, rollout.alive, 1.0)[:, 0].clamp_min(0.0)
    critic.fit(rollout.actions, torch.zeros(len(returns)), returns)
    with torch.no_grad():
        mean = policy(rollout.states[:1])[0]
    mean.requires_grad_()
    critic.returns(mean).sum().backward()
    return mean.grad[0].sum(0)


def noise_of(gradients: Tensor) -> float:
    """Summed variance over groups, divided by the squared mean: (G, A) -> a number; infinite if no mean is seen."""
    G = len(gradients)
    variance = gradients.var(0).sum()
    squared_mean = (gradients.sum(0).square().sum() - gradients.square().sum()) / (G * (G - 1))
    return float(variance / squared_mean) if squared_mean > 0 else float("inf")


def main() -> None:
    parser = flags(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policy", help="tag of a meta-training whose policy is measured too")
    parser.add_argument("--groups", type=int, default=12, help="groups a policy and kind of noise")
    args = parse_with_preset(parser, "meta_train")
    check_flags(args)
    compute = init_compute(args.device_type)
    seed_everything(derive_seed(args.seed, "estimators"))
    tokenizer = Tokenizer.load(tokenizer_folder(args.tokenizer))
    cache = TokenCache.build(resolve_data(args.data), tokenizer, compute)
    shape = args.depth, args.aspect_ratio, args.head_dim
    config = GPTConfig.from_depth(
        *shape, sequence_len=args.episode_seq_len, vocab_size=tokenizer.vocab_size, window_pattern=args.window_pattern
    )
    task, chunk, _ = make_episodes(args, config, cache, compute)
    recipe = make_recipe(args)
    policies = {"at the start": recipe.policy(derive_seed(args.seed, "policy"))}
    if args.policy:
        policies[f"learned, {args.policy}"] = load_policy(run_folder(args.policy) / "policy")[0]

    rows, watch = [], Stopwatch(len(policies) * len(NOISES))
    for name, policy in policies.items():
        for noise, exploration in NOISES.items():
            env, gradients = recipe.env(task, policy), {}
            for group in range(args.groups):
                generator = torch.Generator().manual_seed(derive_seed(args.seed, "noise", group) % 2**63)
                shape = args.episodes, len(env.decisions(group)), policy.n_actions
                rollout = collect(env, policy, group, exploration.noise(shape, generator), chunk, recipe.reward)
                for returns in RETURNS:
                    gradients.setdefault(returns, []).append(score_gradient(rollout, policy, returns))
                gradients.setdefault("critic of one group", []).append(critic_gradient(rollout, policy))
            for estimator, found in gradients.items():
                rows.append(
                    {"policy": name, "noise": noise, "estimator": estimator, "value": noise_of(torch.stack(found))}
                )
                print0(f"{name} | {noise} | {estimator}: {rows[-1]['value']:.3g}")
            print0(f"  left {format_seconds(watch.tick(len(rows) // len(gradients)))}")
    task.close()
    path = base_dir() / "runs" / args.preset / "evidence" / "estimators.json"
    write_json(path, rows)
    print0(f"written to {path}")


if __name__ == "__main__":
    run_main(main, JelError)
