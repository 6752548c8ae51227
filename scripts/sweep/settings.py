"""What each sweep runs: the settings, as rows to report and as flags of base_train.

Settings are compared by validation loss with the first seed and never read the test split. A method's run has every
seed, draws a validation curve, and reads the test split once.
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.sweep.progress import Job

METHODS = ("hand_tuned", "jel", "best_constant", "schedule_free", "suboptimal")  # the order in which they run
SWEEPS = {  # the sweeps that choose a method's setting, by the names of --what
    "schedule_free": ("schedule-free", "schedule-free-fair"),
    "hand_tuned": ("hand-tuned",),
    "best_constant": ("best-constant",),
}

# A setting is judged by its end, on `val`. A run that recovers goes on at lower rates, which would be another setting:
# with no recoveries allowed, a setting that diverges is recorded as diverged.
SETTING_FLAGS = ["--eval-every", "0", "--sample-tokens", "0", "--test-tokens", "0", "--max-recoveries", "0"]

# -----------------------------------------------------------------------------
# schedule-free

# Table 3 of the paper, in its order: schedule-free rate, weight decay, warm-up in steps of a run of PAPER_STEPS.
PAPER_STEPS = 561
SCHEDULE_FREE = [
    (0.5, 0.00, 0),
    (0.5, 0.01, 0),
    (1.0, 0.00, 0),
    (1.0, 0.01, 0),
    (2.0, 0.00, 0),
    (2.0, 0.01, 0),
    (1.0, 0.01, 100),
    (1.0, 0.01, 300),
]

# The paper's 8 leave Muon at a constant 0.02 and the betas at the package's (0.9, 0.999). These 8 start from the best
# of them and give schedule-free what the other methods have: Muon's warm-down, other rates of Muon, betas of
# (0.8, 0.95), and smaller rates of its own. They were written down before any of them was run.
PACKAGE_BETAS, OTHER_BETAS = (0.9, 0.999), (0.8, 0.95)
SCHEDULE_FREE_FAIR = [  # Muon's schedule, Muon's rate, betas, multiple of the best schedule-free rate
    ("warmdown", 0.02, PACKAGE_BETAS, 1.0),
    ("constant", 0.02, OTHER_BETAS, 1.0),
    ("warmdown", 0.02, OTHER_BETAS, 1.0),
    ("warmdown", 0.06, PACKAGE_BETAS, 1.0),
    ("warmdown", 0.06, OTHER_BETAS, 1.0),
    ("warmdown", 0.06, PACKAGE_BETAS, 0.3),
    ("warmdown", 0.06, OTHER_BETAS, 0.3),
    ("warmdown", 0.06, PACKAGE_BETAS, 0.1),
]

# -----------------------------------------------------------------------------
# hand-tuned

# The upper bound at tiny: these rates x a scale, and the weight decay (base_train multiplies it by (12 / depth)^2).
# 37 exploratory runs (seed 42) found them, which belong to this baseline's price beside the 12: 23 with 4 layers
# of width 64, 14 with tiny's 2; on longer documents than today's, so these bpb compare with one another only:
#   matrix  embedding  unembedding  scalar  decay  4 layers  2 layers
#     0.02        0.3        0.004     0.5    0.2     2.065            the paper's; x 0.25 to x 4: no better
#     0.04        0.6        0.008     1.0   0.02     2.063
#     0.05       0.05         0.05    0.05            2.030            --hparams uniform, decay 0.01 for all
#     0.04       0.03        0.016     0.1    0.2     2.089
#     0.04       0.03        0.016     0.1   0.02     2.025
#     0.04       0.03        0.016     0.1      0     2.018
#     0.06       0.06        0.016     0.1  0.005     2.010     2.095  x 0.5, 0.7, 1.4, 2: 2.111, 2.093, 2.114, 2.151
#     0.06       0.06        0.016     0.1      0               2.085  x 0.7, 1.4: 2.087, 2.103
#     0.06       0.06        0.008     0.1      0               2.070
#     0.06       0.06        0.004     0.1      0               2.069
#     0.06       0.15        0.008     0.1      0               2.066
HAND_TUNED_RATES = {"--matrix-lr": 0.06, "--embedding-lr": 0.1, "--unembedding-lr": 0.008, "--scalar-lr": 0.1}
SCALES = (0.7, 1.0, 1.4, 2.0)
HAND_TUNED = [(scale, decay) for scale in SCALES for decay in (0.0, 0.005)]  # scale of the rates, weight decay
HAND_TUNED += [(scale, 0.01) for scale in SCALES]  # longer runs want it

# -----------------------------------------------------------------------------
# the best constant

LR_RANGE = (10.0, 100.0)  # multipliers of the learning rate that are tried
WD_MULTIPLIERS = (10.0, 0.1)  # of the weight decay, tried with the best of the former
FEWEST_CONSTANTS = 4


def lr_multipliers(n: int) -> list[float]:
    """n multipliers spaced geometrically over `LR_RANGE`, ends included; for n = 1 its geometric mean.

    >>> lr_multipliers(3)
    [10.0, 31.6, 100.0]
    """
    low, high = LR_RANGE
    return [float(f"{low * (high / low) ** (i / (n - 1) if n > 1 else 0.5):.3g}") for i in range(n)]


# -----------------------------------------------------------------------------
# the runs


class Plan:
    """Makes the runs of one preset: `seeds`, `steps` of a run, and the flags `common` to all of them.

    Their folders lie in runs/<preset>/<folder>.
    """

    def __init__(self, preset: str, seeds: Sequence[int], steps: int, common: Sequence[str] = (), folder: str = ""):
        self.preset, self.seeds, self.steps, self.common = preset, list(seeds), steps, list(common)
        self.folder = f"{preset}/{folder}".rstrip("/")

    def job(self, name: str, seed: int, row: dict, flags: Sequence, *others: str) -> Job:
        common = ["--preset", self.preset, "--seed", str(seed), *self.common, *others]
        return Job(f"{self.folder}/{name}", row, [str(word) for word in flags], common)

    def setting(self, name: str, row: dict, flags: Sequence) -> Job:
        return self.job(name, self.seeds[0], row, flags, *SETTING_FLAGS)

    def schedule_free(self) -> list[Job]:
        """The settings of Table 3, their warm-ups scaled to this run's length."""
        rows = [
            {"lr": lr, "wd": wd, "warmup": round(warmup * self.steps / PAPER_STEPS)} for lr, wd, warmup in SCHEDULE_FREE
        ]
        return [self.setting(f"sf-{i}", row, schedule_free_flags(row)) for i, row in enumerate(rows)]

    def schedule_free_fair(self, best: dict) -> list[Job]:
        """Settings around `best`, the best row of Table 3's sweep."""
        jobs = []
        for i, (schedule, matrix_lr, betas, scale) in enumerate(SCHEDULE_FREE_FAIR):
            row = {
                "lr": float(f"{best['lr'] * scale:g}"),
                "wd": best["wd"],
                "warmup": best["warmup"],
                "muon_schedule": schedule,
                "matrix_lr": matrix_lr,
                "beta1": betas[0],
                "beta2": betas[1],
            }
            jobs.append(self.setting(f"sf-fair-{i}", row, schedule_free_flags(row)))
        return jobs

    def hand_tuned(self) -> list[Job]:
        jobs = []
        for i, (scale, decay) in enumerate(HAND_TUNED):
            rates = [word for flag, rate in HAND_TUNED_RATES.items() for word in (flag, f"{rate * scale:g}")]
            row = {"lr_scale": scale, "weight_decay": decay}
            jobs.append(self.setting(f"ht-{i}", row, [*rates, "--weight-decay", decay]))
        return jobs

    def constant(self, i: int, lr: float, wd: float, base_lr: float, base_wd: float) -> Job:
        """Multipliers of the uniform base held for the whole run: a uniform base of other values is the same run."""
        flags = ["--hparams", "uniform", "--base-lr", f"{base_lr * lr:g}", "--base-wd", f"{base_wd * wd:g}"]
        return self.setting(f"bc-{i}", {"lr_multiplier": lr, "wd_multiplier": wd}, flags)

    def methods(self, policies: dict[int, str | None], best: dict[str, list[str]]) -> list[Job]:
        """Every method with every seed.

        `policies`: the policy of each seed, None for the shipped one. `best`: the flags that won the sweeps of
        `hand_tuned`, `best_constant` and `schedule_free`.
        """
        jobs = []
        for seed, policy in policies.items():
            jel = ["--hparams", "uniform", "--controller", "jel", *(["--policy", policy] if policy else [])]
            flags = {**best, "jel": jel, "suboptimal": ["--hparams", "uniform"]}
            jobs += [self.job(f"{method}-s{seed}", seed, {}, flags[method]) for method in METHODS]
        return jobs


def schedule_free_flags(row: dict) -> list:
    """A row of either schedule-free sweep as flags."""
    names = {"lr": "--sf-lr", "wd": "--sf-wd", "warmup": "--sf-warmup", "matrix_lr": "--matrix-lr"}
    names |= {"beta1": "--sf-beta1", "beta2": "--sf-beta2", "muon_schedule": "--sf-muon-schedule"}
    return ["--optimizer", "schedule-free", *(word for key, value in row.items() for word in (names[key], value))]


# -----------------------------------------------------------------------------
# prices


def run_price(rows: Sequence[dict], key: str = "flops") -> float | None:
    """The price of one run, the unit of "run equivalents": the median over a sweep's finished settings, or None.

    A setting's run is a training run with one validation at its end.
    """
    values = sorted(row[key] for row in rows if row.get("val_bpb") is not None and row.get(key) is not None)
    return values[len(values) // 2] if values else None
