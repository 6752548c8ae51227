"""The rows of the tables of ablations, of controls at the same price, and of transfer: what each changes."""

from __future__ import annotations

from dataclasses import dataclass

UNIFORM = ("--hparams", "uniform", "--controller", "jel")
HELD = ("--hparams", "uniform", "--controller", "schedule")  # under a policy's mean decision, held
GRPO = [*"--learner grpo --returns total --policy-lr-schedule linear --policy-lr 6e-3 --compare 0".split()]
# a closed loop: how the loss falls, and how gradient, momentum and step go together, in numbers within [-1, 1]
WATCHES = ["progress", "train_drop", "train_fall", "log_train_loss_cdf_5", "cos_grad_momentum", "cos_grad_update"]
WATCHES += ["log_noise_scale_cdf_5", "log_straightness_cdf_5"]
SEES = [*GRPO, "--noise-correlation", "0.9"]  # a critic of given actions cannot use what is observed


@dataclass(frozen=True)
class Row:
    """One row of a table, run with every seed.

    `learn`: what to change in meta-training; None: no learning, and the policies are those of the row `policy_of`, or
    JEL's own. `deploy`: what to change in the run; `control`: what controls it. `best_of`: a method of Table 1 whose
    best flags are used, in the run and, if it learns, as the base that it learns on. `sweep`: choose those flags by the
    method's sweep of this name with `deploy`, in place of Table 1's. `against`: the row, or the method of Table 1, that
    the verdict compares with; None for no verdict.
    """

    what: str
    learn: list[str] | None = None
    deploy: tuple[str, ...] = ()
    control: tuple[str, ...] = UNIFORM
    policy_of: str | None = None
    best_of: str | None = None
    sweep: str | None = None
    against: str | None = "jel"


NO_WARMDOWN = ("--warmdown-ratio", "0")
ABLATIONS = {
    "paper": Row("the paper's recipe", ["--recipe", "paper"]),
    "paper-grpo": Row("the paper's recipe, standard GRPO", ["--recipe", "paper", "--advantages", "standard"]),
    "paper-corrections": Row("the paper's recipe with corrections", ["--recipe", "paper", "--corrections", "groups"]),
    "paper-entropy": Row(
        "the paper's recipe, entropy coefficient 0.01", ["--recipe", "paper", "--entropy-coef", "0.01"]
    ),
    "paper-sees-loss": Row(
        "the paper's recipe, observes the probe loss too",
        ["--recipe", "paper", "--features", "progress", "log_probe_loss"],
    ),
    "paper-sees-gradient": Row(
        "the paper's recipe, observes the gradient norm too",
        ["--recipe", "paper", "--features", "progress", "log_grad_norm"],
    ),
    "no-corrections": Row("no corrections for groups", ["--corrections", "none"]),
    "decay-knob": Row("weight decay controlled too", ["--decay-range", "100"]),
    "no-carry": Row("the base's weight decay as it is", None, ("--decay-carry", "0")),
    "no-momentum": Row("momentum stays as it is", ["--momentum-range", "1"]),
    "no-critic": Row("clipped policy gradients instead of the critic", GRPO),
    "no-comparison": Row("the last policy, no comparison", ["--compare", "0"]),
    "two-learnings": Row("two learnings of half as many groups, compared", ["--learnings", "2"]),
    "stops": Row("stops when the policy stands still", ["--still", "0.6"]),
    "free-schedule": Row("variation within a run costs nothing", ["--variation-cost", "0"]),
    "independent-noise": Row("independent noise", ["--noise-correlation", "0"]),
    "free-departure": Row("staying at the base earns nothing", ["--departure-cost", "0"]),
    "no-pessimism": Row("the unknown counts as the known", ["--pessimism", "0"]),
    "narrow": Row("exploration narrows to a standard deviation of 0.25", ["--final-log-std", "-1.4"]),
    "pairs": Row("antithetic pairs", ["--antithetic", "1"]),
    "range-10": Row("multipliers within 10", ["--action-range", "10"]),
    "short-episodes": Row("episodes of half the steps", ["--num-iterations", "50", "--decision-interval", "10"]),
    "more-decisions": Row("twice the decisions an episode", ["--decision-interval", "10"]),
    "4-episodes": Row("4 episodes a group, twice as many groups", ["--episodes", "4", "--updates", "18"]),
    "long-rows": Row(
        "rows of twice the length, half as many", ["--episode-seq-len", "128", "--episode-batch-size", "4"]
    ),
    "half-batch": Row("episodes with half the batch", ["--episode-batch-size", "4"]),
    "quarter-batch": Row("episodes with a quarter of the batch", ["--episode-batch-size", "2"]),
    "own-starts": Row("starts of their own", ["--episode-starts", "own"]),
    "smooth": Row("smoothness penalty 0.1", ["--smoothness-penalty", "0.1"]),
    "gradient": Row("gradient penalty 0.1", ["--gradient-penalty", "0.1"]),
    "sees-loss": Row("policy gradients that see the probe loss", [*SEES, "--features", "progress", "log_probe_loss"]),
    "watches": Row(
        "policy gradients that watch the optimizer: statistics without units", [*SEES, "--features", *WATCHES]
    ),
    "sees-nothing": Row("policy gradients at the same noise", SEES),
    "no-warmdown": Row("base without warm-down", ["--warmdown-ratio", "0"], NO_WARMDOWN),
    "no-warmdown-mean": Row(
        "its own mean decision, held", None, NO_WARMDOWN, HELD, "no-warmdown", against="no-warmdown"
    ),
    "tuned-base": Row(
        "JEL on the hand-tuned base",
        ["--hparams", "hand-tuned", "--action-range", "5", "--correction-range", "5", "--momentum-range", "5"],
        control=("--hparams", "hand-tuned", "--controller", "jel"),
        best_of="hand_tuned",
        against="hand_tuned",
    ),
}
EQUAL_BUDGET = {
    "random": Row("random search over the same constants", ["--method", "random"]),
    "cma": Row("CMA-ES over the same constants", ["--method", "cma"]),
    "halving": Row("successive halving over the same constants", ["--method", "halving"]),
    "own-mean": Row("JEL's own mean decision, held", control=HELD),
}

# Where a policy goes unchanged, and what stands there beside it: the settings that were best at home, and rates tuned
# in that place.
PLACES = {
    "depth-x2": ("twice the depth", ("--depth", "4", "--aspect-ratio", "16")),
    "width-x2": ("twice the width", ("--aspect-ratio", "64")),
    "steps-x4": ("4x the steps", ("--num-iterations", "1000", "--decision-interval", "200")),
    "batch-half": ("half the batch", ("--total-batch-size", "1024", "--device-batch-size", "8")),
    "batch-x2": ("twice the batch", ("--total-batch-size", "4096")),
    "batch-x4": ("4x the batch", ("--total-batch-size", "8192")),
}
NEEDS_POLICIES = "carried"  # the row that needs --policies
CARRIED = {"constant": "best_constant", "tuned": "hand_tuned", "untouched": "suboptimal"}


def transfer_rows() -> dict[str, Row]:
    rows = {NEEDS_POLICIES: Row("JEL, policies learned elsewhere", None)}
    for place, (what, deploy) in PLACES.items():
        rows[place] = Row(f"JEL, {what}", None, deploy, against=None)
        for name, method in CARRIED.items():
            rows[f"{place}-{name}"] = Row(
                f"{method.replace('_', ' ')}, {what}", None, deploy, (), best_of=method, against=place
            )
        rows[f"{place}-there"] = Row(
            f"hand tuned there, {what}", None, deploy, (), best_of="hand_tuned", sweep="hand-tuned", against=place
        )
    return rows


TABLES = {"ablations": ABLATIONS, "equal_budget": EQUAL_BUDGET, "transfer": transfer_rows()}
