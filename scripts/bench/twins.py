"""The straightforward form of a training step, as in the January 2026 nanochat: what `scripts.bench` compares with.

Every operation on its own; full logits in fp32; AdamW tensor by tensor; Muon's parameters and gradients stacked and
copied back in every step; attention by SDPA. That code base compiles the model and both updates: `compiled=True`, and
`torch.compile(straight_loss)`. It trains the parameters of a `GPT`, so one step of it is one step of ours.

B batch, T time, C width, H heads, K kv heads, D head dim, V vocabulary, M members of a Muon stack.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.gpt import GPT, VE_GATE_CHANNELS
from nanochat.optim import POLAR_EXPRESS


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q (B, T, H, D), k, v (B, T, K, D) -> (B, T, C)."""
    T = q.size(1)
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)[None, :]
    mask = (distance >= 0) & (distance <= window) if 0 <= window < T - 1 else None
    y = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2).flatten(2)


def straight_loss(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """The model's mean loss for idx and targets (B, T)."""
    D, (cos, sin) = model.config.n_embd // model.config.n_head, (t[: idx.size(1)] for t in (model.cos, model.sin))
    x = x0 = norm(F.embedding(idx, model.transformer.wte.weight))
    for i, block in enumerate(model.transformer.h):
        x = model.resid_lambdas[i] * x + model.x0_lambdas[i] * x0
        h, attn = norm(x), block.attn
        q, k, v = (F.linear(h, c.weight).unflatten(-1, (-1, D)) for c in (attn.c_q, attn.c_k, attn.c_v))
        if str(i) in model.value_embeds:
            ve = F.embedding(idx, model.value_embeds[str(i)].weight).unflatten(-1, (-1, D))
            v = v + 2 * torch.sigmoid(F.linear(h[..., :VE_GATE_CHANNELS], attn.ve_gate.weight)).unsqueeze(-1) * ve
        q, k = norm(rotary(q, cos, sin)), norm(rotary(k, cos, sin))
        x = x + F.linear(attend(q, k, v, model.windows[i]), attn.c_proj.weight)
        x = x + F.linear(F.relu(F.linear(norm(x), block.mlp.c_fc.weight)).square(), block.mlp.c_proj.weight)
    logits = F.linear(norm(x), model.lm_head.weight)[..., : model.config.vocab_size].to(
        torch.promote_types(x.dtype, torch.float32)
    )
    logits = 15 * torch.tanh(logits / 15)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def straight_adamw(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr, weight_decay, bias1, bias2, betas, eps) -> None:
    """One AdamW step in place; the first four hyperparameters are floats or 0-D tensors. `bias1 = 1 - beta1^step`."""
    beta1, beta2 = betas
    p.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.lerp_(grad.square(), 1 - beta2)
    p.sub_(m / bias1 / ((v / bias2).sqrt() + eps) * lr)


def straight_muon(
    stack: Tensor, g: Tensor, buf: Tensor, second: Tensor, lr, weight_decay, momentum, beta2, product_dtype
) -> Tensor:
    """One Muon step: stack, g and buf (M, rows, cols), second (M, rows, 1) or (M, 1, cols) -> the new stack.

    `buf` and `second` are updated in place; lr, weight_decay and momentum are floats or 0-D tensors.
    """
    rows, cols = stack.shape[1:]
    buf.lerp_(g, 1 - momentum)
    x = g.lerp(buf, momentum).to(product_dtype or g.dtype)
    x = x.mT if rows > cols else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    g = (x.mT if rows > cols else x).to(g.dtype)
    variance = g.square().mean(-1 if rows >= cols else -2, keepdim=True)
    second.lerp_(variance, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    before, after = variance.sum((1, 2), True).sqrt(), (variance * scale.square()).sum((1, 2), True).sqrt()
    g = g * scale * (before / after.clamp_min(1e-10))
    lr = lr * max(1.0, rows / cols) ** 0.5
    return stack - lr * g - lr * weight_decay * stack * (g * stack >= 0)


class StraightOptimizer:
    """AdamW and Muon on the param groups of a `MuonAdamW`; Muon's products in `product_dtype`.

    `compiled`: both updates under torch.compile, one program per shape; a hyperparameter that changes over the run
    enters them as a 0-D CPU tensor, so a change compiles nothing again.
    """

    def __init__(self, param_groups: list[dict], product_dtype: torch.dtype | None = None, compiled: bool = False):
        self.param_groups, self.product_dtype, self.compiled = param_groups, product_dtype, compiled
        self.steps, self.state = 0, {}
        wrap = partial(torch.compile, dynamic=False, fullgraph=True) if compiled else lambda update: update
        self._update_adamw, self._update_muon = wrap(straight_adamw), wrap(straight_muon)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for group in self.param_groups:
            if group["kind"] == "adamw":
                for p in group["params"]:
                    self._adamw(p, group)
            else:
                self._muon(group)

    def _values(self, like: Tensor, *values: float) -> list:
        return [torch.tensor(value, dtype=like.dtype) for value in values] if self.compiled else [*values]

    def _adamw(self, p: Tensor, group: dict) -> None:
        beta1, beta2 = betas = group["betas"]
        if p not in self.state:
            self.state[p] = torch.zeros_like(p), torch.zeros_like(p)
        corrections = 1 - beta1**self.steps, 1 - beta2**self.steps
        values = self._values(p, group["lr"], group["weight_decay"], *corrections)
        self._update_adamw(p, p.grad, *self.state[p], *values, betas, group["eps"])

    def _muon(self, group: dict) -> None:
        stack, g = torch.stack(group["params"]), torch.stack([p.grad for p in group["params"]])  # (M, rows, cols)
        rows, cols = stack.shape[1:]
        if group["name"] not in self.state:
            second = g.new_zeros(len(g), *((rows, 1) if rows >= cols else (1, cols)))
            self.state[group["name"]] = torch.zeros_like(g), second
        values = self._values(g, group["lr"], group["weight_decay"], group["momentum"])
        state = self.state[group["name"]]
        new = self._update_muon(stack, g, *state, *values, group["beta2"], self.product_dtype)
        for p, value in zip(group["params"], new.unbind(0)):
            p.copy_(value)
