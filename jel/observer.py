"""Measures the statistics that a watching policy reads, inside any training loop (jel/unitless.py defines them).

The observer looks at an optimizer just before and just after its step, through the hooks that every torch optimizer
has. It reads the optimizer's own averages where it keeps some (jel/momenta.py); else it keeps one of its own. A
measurement is a few reductions at one step out of `every`; nothing waits for the device before `look`, at a decision.

It holds, beside the optimizer: the weights of the previous decision, another copy during a measured step, and one
average of gradients where the optimizer has none (plain SGD).

Shapes: E episodes side by side (`runs`: every parameter has a leading axis E), else none, and 1 inside; M measurements.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jel.errors import JelError
from jel.hooks import weak_hook
from jel.momenta import averages_of, denominators_of, gains_of, kind_of_state, param_states
from jel.pieces import Pieces, inner, total
from jel.unitless import END_WEIGHTS, INNER, MEASURE_EVERY, SUMS, feature_names, inner_statistics, new_memory, observe

OWN, OWN_KEEP = "own", 0.9  # the observer's own average of gradients
CLIPPED = 0.999  # a gradient whose norm is below this times its norm before clipping was clipped
NAN = float("nan")


class Observer:
    """Watches `optimizer`; `look` gives the features of a decision and begins the next window of steps.

    `constants`: inner statistics that are taken to be these values instead of being measured. With `attach` its hooks
    are on the optimizer as long as somebody holds the observer; without, the loop calls `before_step` and `after_step`.
    Where several ranks train one model, each with the averaged gradient, `look` averages over them and is collective.
    Raises `JelError`, at the step, for gradients that are sparse or sharded.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        every: int = MEASURE_EVERY,
        end_weights: Sequence[float] = END_WEIGHTS,
        runs: int | None = None,
        attach: bool = True,
        constants: Mapping[str, float] | None = None,
    ):
        if type(every) is not int or every < 1:
            raise JelError(f"every is {every!r}; it must be a number of steps, 1 or more")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise JelError(f"an observer watches a torch optimizer, not {type(optimizer).__name__}")
        self.optimizer, self.every, self.end_weights, self.runs = optimizer, every, tuple(end_weights), runs
        self.constants = dict(constants or {})
        self.memory = new_memory(() if runs is None else (runs,), self.end_weights)
        groups = len(optimizer.param_groups)
        self._kinds: list[str | None] = [None] * groups  # None: not known yet
        self._gathered: list[tuple[Any, Any]] = [(0.0, 0.0)] * groups  # weight of the averages and of the denominators
        self._own: dict[tuple[int, int], Tensor] = {}  # averages for optimizers that keep none
        self._cut: dict[int, tuple[list[int], Pieces]] = {}
        self._held: dict[int, list[Tensor]] = {}  # a group's weights before a measured step, in pieces
        self._anchor: list[list[Tensor]] = [[] for _ in range(groups)]  # its weights at the previous decision
        self._anchored: list[list[int]] = [[] for _ in range(groups)]  # of which of its parameters they are
        self._val_loss: Any = NAN
        self._grad_norm: Any = None
        self._handles: list[RemovableHandle] = []
        self._begin_window()
        if attach:
            self._handles.append(optimizer.register_step_pre_hook(weak_hook(self._before)))
            self._handles.append(optimizer.register_step_post_hook(weak_hook(self._after)))
            weakref.finalize(self, _remove, self._handles).atexit = False

    def close(self) -> None:
        """Take the hooks off the optimizer, as the end of the observer does too."""
        _remove(self._handles)

    def _begin_window(self) -> None:
        self.steps, self.losses = 0, 0  # in this window
        self._loss_sum: Any = 0.0
        self._rows: list[Tensor] = []  # (len(SUMS), E) a measurement
        self._row: dict[str, Any] | None = None  # the one that is being made, at a measured step

    # -------------------------------------------------------------------------
    # what the loop tells

    def observe(self, loss: Any = None, val_loss: Any = None, grad_norm: Any = None) -> None:
        """Losses, and the norm of the gradient before it was clipped: floats, or tensors, which are not read here.

        `loss` counts in the mean of the window; `val_loss` holds until the next one; `grad_norm` is given before the
        optimizer's step.
        """
        kept = lambda x: x.detach().to(torch.promote_types(x.dtype, torch.float32)) if isinstance(x, Tensor) else x
        if loss is not None:
            self._loss_sum = self._loss_sum + kept(loss)
            self.losses += 1
        if val_loss is not None:
            self._val_loss = kept(val_loss)
        if grad_norm is not None:
            self._grad_norm = kept(grad_norm)

    # -------------------------------------------------------------------------
    # around a step

    def _before(self, _: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The optimizer's pre-hook. Under `step(closure)` there are gradients after the closure's first call only."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self.before_step()
            return None
        called = False

        def then_measure() -> Any:
            nonlocal called
            loss = closure()
            if not called:
                called = True
                self.before_step()
            return loss

        if len(args) > 1:
            return (args[0], then_measure, *args[2:]), kwargs
        return args, {**kwargs, "closure": then_measure}

    def _after(self, *_: Any) -> None:
        self.after_step()

    @torch.no_grad()
    def before_step(self) -> None:
        """At a measured step, measure gradient, momentum and weights; keep averages for an optimizer that does not."""
        self._row = {} if self.steps % self.every == 0 else None
        # a fused step under GradScaler unscales inside: its gradients come scaled
        self._scale = getattr(self.optimizer, "grad_scale", None)
        for i, group in enumerate(self.optimizer.param_groups):
            if indices := _with_gradients(group):
                if self._row is not None:
                    self._measure_before(i, group, indices)
                if self._kinds[i] == OWN:
                    self._keep_own(i, group, indices)

    @torch.no_grad()
    def after_step(self) -> None:
        """Measure the step itself; follow what the optimizer's averages have gathered."""
        self.steps += 1
        for i, group in enumerate(self.optimizer.param_groups):
            if not (indices := _with_gradients(group)):
                continue
            first_step = self._kinds[i] is None
            if first_step:
                p = group["params"][indices[0]]
                self._kinds[i] = kind_of_state(param_states(self.optimizer, group, [p])[0], group, p) or OWN
            if self._kinds[i] == OWN:
                if first_step:
                    self._keep_own(i, group, indices)
            else:
                self._follow(i, group)
            if self._row is not None:
                self._measure_after(i, group, indices)
        if self._row:
            self._rows.append(self._finished(self._row))
        self._row = self._grad_norm = None

    def _follow(self, i: int, group: dict) -> None:
        gains, (first, second) = gains_of(str(self._kinds[i]), group), self._gathered[i]
        begun = isinstance(first, Tensor) or first != 0
        first = gains.keep * first + (gains.gain if begun else gains.first_gain)
        self._gathered[i] = first, gains.second * second + (1 - gains.second)

    def _keep_own(self, i: int, group: dict, indices: list[int]) -> None:
        params = [group["params"][k] for k in indices]
        for k, p in zip(indices, params):
            if (i, k) not in self._own:
                self._own[i, k] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        own = [self._own[i, k] for k in indices]
        torch._foreach_mul_(own, OWN_KEEP)
        torch._foreach_add_(own, [p.grad for p in params], alpha=1 - OWN_KEEP)
        first, _ = self._gathered[i]
        self._gathered[i] = OWN_KEEP * first + (1 - OWN_KEEP), 0.0

    def _measure_before(self, i: int, group: dict, indices: list[int]) -> None:
        params = [group["params"][k] for k in indices]
        states = param_states(self.optimizer, group, params)
        if self._kinds[i] is None and (kind := kind_of_state(states[0], group, params[0])):
            self._kinds[i] = kind
            if bool(averages_of(kind, states[:1], params[:1])[0].any()):  # waits, once: has it trained before?
                gains = gains_of(kind, group)  # then what it has gathered has settled
                self._gathered[i] = gains.gain / (1 - gains.keep), 1.0
        kind, pieces = self._kinds[i], self._pieces(i, indices, params)
        grads, weights = pieces.rows([p.grad for p in params]), pieces.rows(params)
        averages = None
        if kind is not None:
            own = [self._own.get((i, k), torch.zeros_like(p)) for k, p in zip(indices, params)] if kind == OWN else None
            averages = pieces.rows(own or averages_of(kind, states, params))
        sums: dict[str, list[Tensor]] = {name: [] for name in ("gg", "pp", "gp", "mm", "gm")}
        held = self._held.setdefault(i, [])
        for j, piece in enumerate(pieces):
            g, p = pieces.take(grads, piece), pieces.take(weights, piece)
            held[j].copy_(p) if j < len(held) else held.append(p if len(piece) > 1 else p.clone())
            sums["gg"].append(inner(g, g))
            sums["pp"].append(inner(p, p))
            sums["gp"].append(inner(g, p))
            if averages is not None:
                m = pieces.take(averages, piece)
                sums["mm"].append(inner(m, m))
                sums["gm"].append(inner(g, m))
        gathered = self._gathered[i][0]
        gathered = 1.0 if not isinstance(gathered, Tensor) and gathered == 0 else gathered  # of zeros
        for name, weight in (("gg", 1.0), ("pp", 1.0), ("gp", 1.0), ("mm", gathered * gathered), ("gm", gathered)):
            if sums[name]:
                self._add(name, total(sums[name]) / weight)
        self._add("n", float(pieces.elements))

    def _measure_after(self, i: int, group: dict, indices: list[int]) -> None:
        params = [group["params"][k] for k in indices]
        pieces, kind = self._pieces(i, indices, params), str(self._kinds[i])
        grads, weights = pieces.rows([p.grad for p in params]), pieces.rows(params)
        states = param_states(self.optimizer, group, params)
        known = None if "above_epsilon" in self.constants else denominators_of(kind, states, group)
        denominators, squares = known or (None, False)
        rows = None if denominators is None else pieces.rows(denominators)
        least = group["eps"] ** 2 * self._gathered[i][1] if squares else group.get("eps", 0.0)
        sums: dict[str, list[Tensor]] = {name: [] for name in ("dd", "gd", "abs_d", "above_epsilon")}
        for j, piece in enumerate(pieces):
            d = self._held[i][j].sub_(pieces.take(weights, piece))
            sums["dd"].append(inner(d, d))
            sums["gd"].append(inner(pieces.take(grads, piece), d))
            sums["abs_d"].append(d.abs_().sum(1))  # several times as fast as an L1 norm, and as the sum of a mask
            if rows is not None:
                sums["above_epsilon"].append(torch.gt(pieces.take(rows, piece), least, out=d).sum(1))
        if not pieces.reuse:
            del self._held[i]
        for name, values in sums.items():
            self._add(name, total(values) if values else float(pieces.elements))
        clipped = param_states(self.optimizer, group, group["params"][:1])[0].get("clipped")
        self._add("clipped", 0.0 if clipped is None else clipped * float(pieces.elements))

    def _pieces(self, i: int, indices: list[int], params: list[Any]) -> Pieces:
        """How these parameters of group i are cut; a change of which have gradients cuts them anew."""
        if i not in self._cut or self._cut[i][0] != indices:
            for p in params:
                if p.layout != torch.strided or p.grad.layout != torch.strided or type(p).__name__ == "DTensor":
                    raise JelError("an observer cannot read sparse or sharded gradients (FSDP, DTensor) yet")
            self._cut[i] = indices, Pieces(params, self.runs)
            self._held.pop(i, None)
        return self._cut[i][1]

    def _add(self, name: str, value: Any) -> None:
        assert self._row is not None
        known = self._row.get(name)
        if isinstance(known, Tensor) and isinstance(value, Tensor):
            value = value.to(known.device)
        self._row[name] = value if known is None else known + value

    def _finished(self, row: dict[str, Any]) -> Tensor:
        """One measurement as (len(SUMS), E)."""
        gg = row["gg"]
        if self._grad_norm is not None:
            row["clipped"] = (gg.sqrt() < CLIPPED * self._grad_norm) * 1.0
        else:
            row["clipped"] = row["clipped"] / row["n"]
        if self._scale is not None:
            powers = {"gg": 2, "gm": 1, "gp": 1, "gd": 1}
            row |= {name: row[name] / self._scale**power for name, power in powers.items() if name in row}
        whole = lambda x: x.to(gg) if isinstance(x, Tensor) else torch.full_like(gg, x)
        return torch.stack([whole(row.get(name, 0.0)).expand_as(gg) for name in SUMS])

    # -------------------------------------------------------------------------
    # at a decision

    @torch.no_grad()
    def look(self, progress: float, relative: Tensor, last_move: Tensor) -> Tensor:
        """Features (F,) or (E, F) of a decision, on the CPU: `jel.unitless.observe`, whose arguments these are.

        `relative`, `last_move`: (A,) or (E, A). This waits for the device, and begins a new window.
        """
        shape = () if self.runs is None else (self.runs,)
        shaped = lambda t: self._over_ranks(t).float().cpu().expand(self.runs or 1).reshape(shape)
        known = lambda x: torch.as_tensor(x, dtype=torch.float32)
        norm, moved = self._norms()
        statistics = path = None
        if self._rows:
            home = self._rows[-1].device
            rows = self._over_ranks(torch.stack([row.to(home) for row in self._rows])).cpu()  # (M, len(SUMS), E)
            sums = {name: rows[:, k].reshape(-1, *shape) for k, name in enumerate(SUMS)}
            statistics = inner_statistics(sums).mean(0)
            for name, value in self.constants.items():
                statistics[..., list(INNER).index(name)] = value
            path = sums["dd"].clamp_min(0).sqrt().sum(0) * (self.steps / len(self._rows))
        features, self.memory = observe(
            self.memory,
            progress=torch.tensor(progress),
            inner=statistics,
            train_loss=shaped(self.mean_loss),
            val_loss=shaped(known(self._val_loss)),
            param_norm=shaped(norm),
            outer_update=shaped(moved),
            path=torch.zeros(shape) if path is None else path,
            relative=relative,
            last_move=last_move,
            end_weights=self.end_weights,
        )
        self._begin_window()
        return features

    def statistics(self, progress: float) -> dict[str, Any]:
        """`look` for a policy whose knobs are none of relative steps: by name, floats or tensors (E,)."""
        none = torch.zeros(*(() if self.runs is None else (self.runs,)), 0)
        found = self.look(progress, none, none)
        names = feature_names((), self.end_weights)
        return dict(zip(names, found.tolist() if self.runs is None else found.unbind(-1), strict=True))

    @property
    def mean_loss(self) -> Tensor:
        """The training loss of this window, a number or (E,), where it was told; NaN if no loss was."""
        total = torch.as_tensor(self._loss_sum, dtype=torch.float32)
        return total / self.losses if self.losses else torch.tensor(NAN)

    def _norms(self) -> tuple[Tensor, Tensor]:
        """|p| and |p - p at the previous decision|, each (E,); the present p is kept for the next decision."""
        squares, moved = [], []
        for i, group in enumerate(self.optimizer.param_groups):
            trained = _trained(group)
            params = [group["params"][k] for k in trained]
            pieces = Pieces(params, self.runs)
            rows, anchor = pieces.rows(params), self._anchor[i]
            if trained != self._anchored[i]:  # some were frozen or thawed: this group's way begins anew
                anchor, self._anchored[i] = [], trained
            for j, piece in enumerate(pieces):
                p = pieces.take(rows, piece)
                squares.append(inner(p, p))
                if j < len(anchor):
                    d = anchor[j].sub_(p)
                    moved.append(inner(d, d))
            self._anchor[i] = pieces.copies(params, anchor)
        norm = total(squares).sqrt()
        return norm, total(moved).sqrt() if moved else torch.full_like(norm, NAN)

    def _over_ranks(self, t: Tensor) -> Tensor:
        """The mean over ranks, of those that know it: a validation loss may be known on one rank alone."""
        if self.runs is not None or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return t
        t = t.to(self.optimizer.param_groups[0]["params"][0].device)
        both = torch.stack([t.nan_to_num(0.0), (~t.isnan()).to(t.dtype)])
        dist.all_reduce(both)
        return both[0] / both[1]  # 0 / 0 is NaN: nobody knows it

    # -------------------------------------------------------------------------
    # resuming

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; with it a resumed run looks as the run would have that was never cut."""
        loss, val = (torch.as_tensor(x, dtype=torch.float32).cpu() for x in (self._loss_sum, self._val_loss))
        return {
            "memory": {name: t.clone() for name, t in self.memory.items()},
            "kinds": list(self._kinds),
            "gathered": [[float(x) for x in pair] for pair in self._gathered],
            "own": {f"{i}.{k}": t.clone() for (i, k), t in self._own.items()},
            "anchor": [[t.clone() for t in pieces] for pieces in self._anchor],
            "anchored": [list(trained) for trained in self._anchored],
            "window": {"steps": self.steps, "losses": self.losses, "loss_sum": loss, "val_loss": val},
            "rows": [t.cpu() for t in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the observer that gave the state. Raises `JelError` if it watched another model."""
        groups = self.optimizer.param_groups
        if len(state["kinds"]) != len(groups):
            raise JelError(f"the saved observer watched {len(state['kinds'])} param groups, this one {len(groups)}")
        anchors, anchored = [], [list(trained) for trained in state["anchored"]]
        for group, saved, trained in zip(groups, state["anchor"], anchored):
            if trained and trained[-1] >= len(group["params"]):
                raise JelError("the saved observer watched parameters of other sizes")
            params = [group["params"][k] for k in trained]
            pieces = Pieces(params, self.runs)
            if saved and sum(t.shape[1] for t in saved) != pieces.elements:
                raise JelError("the saved observer watched parameters of other sizes")
            anchors.append([t.to(params[piece[0][0]].device, copy=True) for t, piece in zip(saved, pieces)])
        self._anchor, self._anchored = anchors, anchored
        self.memory = {name: t.clone() for name, t in state["memory"].items()}
        self._kinds = list(state["kinds"])
        self._gathered = [(first, second) for first, second in state["gathered"]]
        self._own = {}
        for key, t in state["own"].items():
            i, k = map(int, key.split("."))
            self._own[i, k] = t.to(groups[i]["params"][k].device, copy=True)
        self._begin_window()
        window = state["window"]
        self.steps, self.losses = window["steps"], window["losses"]
        self._loss_sum, self._val_loss = window["loss_sum"].clone(), window["val_loss"].clone()
        self._rows = [t.clone() for t in state["rows"]]


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _trained(group: dict) -> list[int]:
    return [k for k, p in enumerate(group["params"]) if p.requires_grad]


def _with_gradients(group: dict) -> list[int]:
    return [k for k, p in enumerate(group["params"]) if p.grad is not None]
