"""The flags of scripts.meta_train, and what is checked of them before anything starts."""

from __future__ import annotations

import argparse

from jel.features import FEATURES, WATCHED
from jel.learn.advantages import RETURNS
from jel.learn.search import SEARCHES
from jel.recipes.jel import ADVANTAGES, JelRecipe
from nanochat.common import UserError, print0
from scripts.hparams import HPARAM_NAMES, add_hparam_flags, add_model_flags
from scripts.presets import RECIPES, add_preset_flag
from scripts.runs import LARGEST, check_model, check_numbers

CRITIC = {  # flags of `--learner critic`, whose defaults are the recipe's
    "final_log_std": "exploration narrows to this from --initial-log-std",
    "policy_steps": "Adam's steps an update",
    "trust_region": "nats that an update moves the policy's mean, at most",
    "pessimism": "standard deviations that count against the unknown",
    "variation_cost": "what a schedule must earn over a constant",
    "departure_cost": "what a multiplier must earn over 1",
}

# -----------------------------------------------------------------------------
# flags (a default here is the paper's; presets list what they change)


def flags(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    add_preset_flag(parser)
    flag(
        "--recipe",
        choices=list(RECIPES),
        default="jel",
        help="paper: Table 2; jel: per-group control, see docs/design.md; lhopt: a program of its own, docs/lhopt.md",
    )
    flag("--method", choices=["jel", *SEARCHES], default="jel", help="jel: learn; others: search for constants instead")
    what = "file in which several searches, each with a --seed of its own, share what they find (needs optuna)"
    flag("--shared-search", metavar="FILE", help=what)
    add_model_flags(parser)
    # an episode
    flag("--num-iterations", type=int, default=561, help="steps of an episode")
    flag("--episode-seq-len", type=int, default=128)
    flag("--episode-batch-size", type=int, default=32, help="rows per step and episode")
    flag("--decision-interval", type=int, default=50, help="steps")
    # the base that multipliers act on: that of the run they are for
    add_hparam_flags(parser, "uniform")
    flag(
        "--episode-starts",
        choices=["shared", "own"],
        default="shared",
        help="initialisation and data: one per group, or one per episode",
    )
    # reward
    flag("--probe-batches", type=int, default=4, help="fixed batches whose mean loss is the reward's")
    flag("--gradient-penalty", type=float, default=0.0, help="lambda_g")
    flag("--smoothness-penalty", type=float, default=0.0, help="lambda_s")
    flag("--nan-penalty", type=float, help="what an episode that blows up loses; default: its starting loss")
    # policy and its update
    what = "what the policy observes, see jel/features.py"
    flag("--features", nargs="+", choices=[*FEATURES, *WATCHED], default=["progress"], metavar="NAME", help=what)
    flag("--policy-hidden", type=int, default=64)
    flag("--initial-log-std", type=float, default=-0.5)
    what = "multipliers of the learning rate lie in [1 / this, this]"
    flag("--action-range", type=float, default=100.0, help=what)
    what = "those of the weight decay; 1 = it stays as it is, see base_train --decay-carry"
    flag("--decay-range", type=float, default=100.0, help=what)
    flag("--corrections", choices=["none", "groups"], default="none", help="groups: corrections of the learning rate")
    flag("--correction-range", type=float, default=10.0, help="corrections lie in [1 / this, this]")
    what = "1 - momentum (AdamW: beta1) is multiplied by a number in [1 / this, this]; 1 = momentum stays as it is"
    flag("--momentum-range", type=float, default=1.0, help=what)
    flag("--noise-correlation", type=float, default=0.0, help="of the exploration noise from decision to decision")
    flag("--antithetic", type=int, choices=[0, 1], default=0, help="1: episodes in pairs of opposite noise")
    flag("--updates", type=int, default=50)
    what = "updates, the last ones, that only compare the policies of those before, of which the best stays"
    flag("--compare", type=int, default=JelRecipe.compare, help=what)
    what = "policies learned one after another, from as many updates each"
    flag("--learnings", type=int, default=JelRecipe.learnings, help=what)
    what = "end a learning when two updates in a row move the policy by less, nats a decision"
    flag("--still", type=float, default=JelRecipe.still, help=what)
    flag("--episodes", type=int, default=8, help="per update, over all ranks")
    flag("--episode-chunk", type=int, default=-1, help="episodes side by side on a device; -1 = as many as fit")
    flag(
        "--episode-workers",
        type=int,
        default=-1,
        help="processes that share them on a CPU, a thread each; 1 = this one, with all threads; -1 = one a core",
    )
    what = (
        "grpo: the paper's update; critic: a Gaussian process over all episodes so far, see jel/learn/actor_critic.py"
    )
    flag("--learner", choices=["grpo", "critic"], default="grpo", help=what)
    for name, what in CRITIC.items():
        default = getattr(JelRecipe, name)
        flag(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"critic: {what}")
    what = "on a GPU, replay an episode's step from a CUDA graph; off until a GPU has shown a gain (scripts.bench)"
    flag("--cuda-graphs", action="store_true", help=what)
    flag("--policy-lr", type=float, default=3e-4)
    flag("--policy-lr-schedule", choices=["constant", "linear"], default="constant", help="linear: to 0 at the end")
    flag(
        "--returns",
        choices=list(RETURNS),
        default="reward-to-go",
        help="grpo: total is one for all decisions of an episode",
    )
    flag("--gamma", type=float, default=0.99)
    flag("--clip", type=float, default=0.2)
    flag("--ppo-epochs", type=int, default=4)
    flag("--minibatch-size", type=int, default=64)
    flag("--entropy-coef", type=float, default=0.0)
    flag(
        "--advantages",
        choices=list(ADVANTAGES),
        default="group",
        help="standard: with GRPO's length and variance normalisation (paper 4.4)",
    )
    # saving, logging
    flag("--save-every", type=int, default=1, help="updates between checkpoints")
    flag(
        "--resume",
        choices=["none", "auto"],
        default="none",
        help="auto: go on from the newest whole checkpoint of this run, if any",
    )
    flag("--run", default="dummy", help="wandb run name; dummy = off")
    flag("--model-tag", default="meta", help="name of the run's folder")
    flag("--device-type", default="", help="cuda or cpu; default: cuda if present")
    flag("--seed", type=int, default=42)
    return parser


AT_LEAST_ONE = (
    "num_iterations episode_seq_len episode_batch_size decision_interval probe_batches updates episodes ppo_epochs "
    "minibatch_size policy_hidden learnings policy_steps save_every"
).split()
NOT_NEGATIVE = [
    *HPARAM_NAMES,
    *"final_lr_frac gradient_penalty smoothness_penalty nan_penalty policy_lr clip entropy_coef".split(),
    *"still trust_region pessimism variation_cost departure_cost compare".split(),
]


def check_flags(args: argparse.Namespace) -> None:
    """Raise `UserError` for a number with which nothing can be learned."""
    check_model(args)
    check_numbers(
        args,
        {
            (1, LARGEST): AT_LEAST_ONE,
            (0, LARGEST): NOT_NEGATIVE,
            (0, 1): ["warmup_ratio", "warmdown_ratio", "gamma", "noise_correlation"],
        },
    )
    if args.shared_search and args.method == "jel":
        raise UserError("--shared-search is for the searches: give --method halving, or another of them")
    if args.decision_interval > args.num_iterations:
        print0(
            f"warning: a decision every {args.decision_interval} steps is more than the episode's "
            f"{args.num_iterations}: one decision an episode"
        )
