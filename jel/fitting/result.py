"""What `jel.fit` returns: the schedule, its card, a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jel.errors import JelError
from jel.files import json_bytes, write_files
from jel.fitting.compare import Verdict
from jel.fitting.plan import Plan


@dataclass(frozen=True)
class FitResult:
    """`schedule`: for `jel.Scheduler`, or any reader of its JSON (jel/schedule.py). `card`: how it came about.

    `card["kept"]` says whether what was learned is what `schedule` holds, or the untouched base.
    """

    schedule: dict[str, Any]
    card: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write schedule.json and card.json; raises `JelError` if that fails."""
        folder = Path(folder)
        write_files({folder / "schedule.json": json_bytes(self.schedule), folder / "card.json": json_bytes(self.card)})

    def plot(self, path: str | Path) -> None:
        """A picture (the suffix says which kind) of the multipliers as learned and of the returns they came from."""
        try:
            import matplotlib

            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            raise JelError("a picture needs the package matplotlib: pip install matplotlib") from None
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
        rows = self.card["learned"]
        progress = [row["progress"] for row in rows] + [1.0]
        for group, of in rows[0]["multipliers"].items():
            for key in of:
                values = [row["multipliers"][group][key] for row in rows]
                left.step(
                    progress, [*values, values[-1]], where="post", label=key if group == "*" else f"{group} {key}"
                )
        left.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        left.set(yscale="log", xlabel="progress", ylabel="multiplier", title="learned" + self._note())
        left.legend(fontsize=8)
        returns = [[r for r in update if r is not None] for update in self.card["returns"]]
        for i, update in enumerate(returns):
            right.plot([i + 1] * len(update), update, ".", color="tab:blue", markersize=3)
        means = [(i + 1, sum(update) / len(update)) for i, update in enumerate(returns) if update]
        right.plot(*zip(*means), color="tab:blue") if means else None
        right.set(xlabel="update", ylabel="fall of the probe loss", title="episodes")
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as e:
            raise JelError(f"cannot write the picture {path} ({e})") from None
        finally:
            plt.close(figure)

    def _note(self) -> str:
        return {"learned": "", "carried": " (handed out carried over to the longer run)"}.get(
            self.card["kept"], " (not handed out)"
        )


def progress_line(record: dict[str, Any], done: int, updates: int, left: float) -> str:
    """One line an update: the probe loss (median episode, best one), and the multipliers of the present mean action."""
    parts = []
    for group, of in record["multipliers"].items():
        for key, values in of.items():
            if group != "*" and key != "lr":
                continue
            shown = values[0], values[len(values) // 2], values[-1]
            same = max(shown) <= 1.005 * min(shown)
            text = f"{shown[0]:.3g}" if same else "/".join(f"{v:.3g}" for v in shown)
            parts.append(f"{key if group == '*' else group + ' ' + key} x{text}")
    first, returns = record["probe_first"], sorted(r for r in record["returns"] if r is not None)
    if "kept_update" in record:
        parts.append(f"comparing: of update {record['kept_update']:.0f}")
    ends = f"{first - returns[len(returns) // 2]:.4g}, best {first - returns[-1]:.4g}" if returns else "blown up"
    return (
        f"update {done:02d}/{updates:02d} | probe loss {first:.4g} -> {ends} | {', '.join(parts)} | "
        f"{record['seconds']:.1f} s, {left:.0f} s left"
    )


def in_words(verdict: Verdict, kept: str, plan: Plan) -> str:
    """One line: what the comparison with the base found, and what is handed out."""
    number = lambda of: f"{of[0]:.3g}, at least {of[1]:.3g}"
    longest = plan.check_lengths[-1]
    whole = longest == plan.run_steps
    over = f"on {plan.check_seeds} fresh seeds over {'all' if whole else longest} of {plan.run_steps} steps"
    if kept == "base":
        why = "by more than the noise"
        if verdict.chosen and verdict.gain[1] > 0:
            why = f"for long: a gain of {number(verdict.gain)}, projected to the run's end {number(verdict.at_end)}"
        return f"what was learned does not beat the untouched base {why}, {over}: the schedule is constant(1.0)"
    what = {"learned": "what was learned", "carried": "what was learned, carried over to the longer run,"}[kept]
    end = "" if whole else f"; projected to the run's end {number(verdict.at_end)}"
    return f"{what} beats the untouched base {over}: log loss lower by {number(verdict.gain)}{end}"
