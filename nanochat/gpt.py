"""nanochat's GPT (docs/design.md): rotary attention with windows, relu^2 MLP, value embeddings, scalars per layer.

`GPT(config)` is one model. `GPT(config, runs=R)` is R models of the same shape, trained side by side as one batched
program: every parameter has a leading axis R, and every matrix product is a batched one. Nothing else differs, so a run
in the batch and the same run alone agree up to rounding.

R runs (absent for one model), B batch, T time, C width, H heads, K kv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import attention as attn_kernels
from nanochat.common import UserError
from nanochat.cpu_kernels import mix, norm, rotary_norm
from nanochat.loss_head import head_loss, loss_kernel_for, softcapped_logits
from nanochat.loss_packages import PACKAGES
from nanochat.mlp_kernel import mlp, mlp_kernel_for
from nanochat.optim import MuonAdamW

VE_GATE_CHANNELS = 32  # the gate of the value embeddings reads this many channels of the block input


@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    @classmethod
    def from_depth(cls, depth: int, aspect_ratio: int = 64, head_dim: int = 128, **rest) -> GPTConfig:
        """Width = depth x aspect_ratio rounded up to a multiple of head_dim; heads = width / head_dim."""
        width = math.ceil(depth * aspect_ratio / head_dim) * head_dim
        return cls(n_layer=depth, n_head=width // head_dim, n_kv_head=width // head_dim, n_embd=width, **rest)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding tables and the head."""
        return math.ceil(self.vocab_size / 64) * 64


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Whether a layer has value embeddings: the last one, and every second one before it."""
    return layer % 2 == (n_layer - 1) % 2


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (B, T, in), weight (out, in) -> (B, T, out); with runs x (R, B, T, in), weight (R, out, in)."""
    return (x.flatten(-3, -2) @ weight.mT).unflatten(-2, x.shape[-3:-1])


class Linear(nn.Module):
    """`linear` as a module."""

    def __init__(self, lead: tuple[int, ...], n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, n_out, n_in))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


class Embedding(nn.Module):
    """idx (B, T) -> (B, T, C); with runs idx (R, B, T) and weight (R, V, C) -> (R, B, T, C).

    The table stays in fp32 and what is read is cast under autocast: in bf16 most updates at a rate of 1e-3 round away.
    """

    def __init__(self, lead: tuple[int, ...], n_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, n_rows, width))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        if self.weight.dim() == 2:
            rows = F.embedding(idx, self.weight)
        else:
            R, V, _ = self.weight.shape
            first = torch.arange(0, R * V, V, device=idx.device).view(R, 1, 1)
            rows = F.embedding(idx + first, self.weight.flatten(0, 1))
        device = idx.device.type
        return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, window: int, lead: tuple[int, ...]):
        super().__init__()
        self.layer, self.window, self.n_head, self.n_kv_head = layer, window, config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        width, kv_width = config.n_embd, config.n_kv_head * self.head_dim
        self.c_q = Linear(lead, width, width)
        self.c_k = Linear(lead, width, kv_width)
        self.c_v = Linear(lead, width, kv_width)
        self.c_proj = Linear(lead, width, width)
        if has_value_embedding(layer, config.n_layer):
            self.ve_gate = Linear(lead, VE_GATE_CHANNELS, config.n_kv_head)

    def forward(self, x, ve, cos, sin, backend, kv_cache):  # x (..., T, C), ve (..., T, K * D) or None
        weights = torch.cat([self.c_q.weight, self.c_k.weight, self.c_v.weight], dim=-2)  # one product, not three
        qkv = linear(x, weights).unflatten(-1, (-1, self.head_dim))  # (..., T, H + 2 K, D)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=-2)
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))  # (..., T, K)
            v = torch.addcmul(v, gate.unsqueeze(-1), ve.to(v.dtype).unflatten(-1, (-1, self.head_dim)))
        qk = rotary_norm(qk, cos, sin)
        lead = qk.shape[:-3]
        qk, v = qk.flatten(0, -4), v.flatten(0, -4)  # runs join the batch: attention has no weights
        q, k = qk.split([self.n_head, self.n_kv_head], dim=-2)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)
        y = attn_kernels.attention(q, k, v, self.window, backend)
        return self.c_proj(y.flatten(-2).unflatten(0, lead))


class MLP(nn.Module):
    def __init__(self, width: int, lead: tuple[int, ...]):
        super().__init__()
        self.c_fc = Linear(lead, width, 4 * width)
        self.c_proj = Linear(lead, 4 * width, width)
        self.kernel = "plain"  # set by `GPT.prepare`

    def forward(self, x):
        return mlp(x.flatten(-3, -2), self.c_fc.weight, self.c_proj.weight, self.kernel).view_as(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, window: int, lead: tuple[int, ...]):
        super().__init__()
        self.attn = Attention(config, layer, window, lead)
        self.mlp = MLP(config.n_embd, lead)

    def forward(self, x, ve, cos, sin, backend, kv_cache):
        x = x + self.attn(norm(x), ve, cos, sin, backend, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """One model, or R runs of it. Built on the meta device, it needs `to_empty(device=...)`, then `init_weights()`.

    Raises ValueError for a window pattern with other letters than S and L, or a width below 32, which the gate of the
    value embeddings reads.
    """

    def __init__(self, config: GPTConfig, runs: int | None = None):
        super().__init__()
        if not config.window_pattern or set(config.window_pattern) - {"S", "L"}:
            raise ValueError(f"window pattern {config.window_pattern!r} may hold only S (half context) and L (full)")
        if config.n_embd < VE_GATE_CHANNELS:
            raise ValueError(f"width {config.n_embd} is below {VE_GATE_CHANNELS}, which the value-embedding gate reads")
        self.config, self.runs = config, runs
        self.backend, self.loss_kernel = "sdpa", "plain"  # set by `prepare`
        lead = () if runs is None else (runs,)
        head_dim = config.n_embd // config.n_head
        self.windows = window_sizes(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(lead, config.padded_vocab, config.n_embd),
                "h": nn.ModuleList([Block(config, i, w, lead) for i, w in enumerate(self.windows)]),
            }
        )
        self.lm_head = Linear(lead, config.n_embd, config.padded_vocab)
        self.resid_lambdas = nn.Parameter(torch.empty(*lead, config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(*lead, config.n_layer))
        self.value_embeds = nn.ModuleDict(
            {
                str(i): Embedding(lead, config.padded_vocab, config.n_kv_head * head_dim)
                for i in range(config.n_layer)
                if has_value_embedding(i, config.n_layer)
            }
        )
        for name in ("cos", "sin"):  # filled by `fill_rotary`: the meta device holds no values
            self.register_buffer(name, torch.empty(config.sequence_len, 1, head_dim // 2), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def prepare(
        self,
        compiled: bool | None = None,
        rows: int = 8,
        attention: str = "auto",
        loss: str = "auto",
        mlp: str = "auto",
        cuda_graphs: bool = False,
    ) -> Callable:
        """Choose the kernels for the device that holds the weights; returns what to call in training.

        On CUDA that is the compiled model, in one graph. On a CPU it is the model itself: compilation takes half a
        minute, more than most runs on a CPU would gain (`scripts.bench` measures it). "auto" takes the kernel that is
        fastest here for micro-batches of `rows` rows; `attention`, `loss` and `mlp` may name another of `ATTENTIONS`,
        `LOSSES` and `MLPS`. `cuda_graphs`: see `replayed`. Raises `UserError` for a kernel that is not there.
        """
        device, c, R = self.device.type, self.config, self.runs
        compiled = device != "cpu" if compiled is None else compiled
        head_dim, tokens = c.n_embd // c.n_head, rows * c.sequence_len
        attended = attn_kernels.Shape(
            rows * (R or 1), c.sequence_len, c.n_head, c.n_kv_head, head_dim, tuple(self.windows)
        )
        self.backend = attn_kernels.backend_for(device, compiled, attended, attention)
        if self.backend == "flex":
            attn_kernels.prepare_block_masks(c.sequence_len, self.windows, self.device)
        head = R, tokens, c.n_embd, c.padded_vocab, c.vocab_size
        self.loss_kernel = loss_kernel_for(device, compiled, head, loss)
        mlp = mlp_kernel_for(device, compiled, (R, tokens, c.n_embd, 4 * c.n_embd), mlp)
        for block in self.transformer.h:
            block.mlp.kernel = mlp
        self.kernels = (
            f"attention: {self.backend}; loss: {'full logits' if self.loss_kernel == 'plain' else self.loss_kernel}; "
            f"MLP: {mlp}; torch.compile: " + ("on" if compiled else "off, on a CPU its start costs more than it gains")
        )
        if not compiled:
            return self
        if self.loss_kernel in PACKAGES:  # the head stays outside the graph
            if cuda_graphs:
                raise UserError(
                    f"CUDA graphs hold the whole step, but the loss kernel {self.loss_kernel} is outside it"
                )
            return partly_compiled(self)
        if cuda_graphs:
            return replayed(torch.compile(self, dynamic=False, fullgraph=True, mode="reduce-overhead"))
        return torch.compile(self, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all runs with the same weights, from `generator` (default: torch's global one).

        wte: normal, std 1. lm_head: normal, std 0.001. q, k, v, c_fc and value embeddings: uniform, std 1 / sqrt(C).
        Both c_proj and the gates: 0. resid_lambdas: 1. x0_lambdas: 0.1.
        """

        def fill(p: torch.Tensor, std: float, draw) -> None:
            one = torch.empty(p.shape if self.runs is None else p.shape[1:], device=p.device, dtype=torch.float32)
            p.copy_(draw(one, std))

        def normal(t, std):
            return t.normal_(0.0, std, generator=generator)

        def uniform(t, std):  # U(-a, a) has standard deviation a / sqrt(3)
            return t.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)

        std = self.config.n_embd**-0.5
        fill(self.transformer.wte.weight, 1.0, normal)
        fill(self.lm_head.weight, 0.001, normal)
        for block in self.transformer.h:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                fill(matrix.weight, std, uniform)
            for matrix in (block.attn.c_proj, block.mlp.c_proj):
                matrix.weight.zero_()
            if hasattr(block.attn, "ve_gate"):
                block.attn.ve_gate.weight.zero_()
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(0.1)
        for embed in self.value_embeds.values():
            fill(embed.weight, std, uniform)
        self.fill_rotary()

    def fill_rotary(self) -> None:
        """Fill the rotary tables (fp32, base 10000), which no state dict holds; `init_weights` calls this."""
        D = self.config.n_embd // self.config.n_head
        frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float32, device=self.device) / D)
        angle = torch.arange(self.config.sequence_len, dtype=torch.float32, device=self.device)[:, None] * frequency
        self.cos.copy_(angle.cos()[:, None, :])
        self.sin.copy_(angle.sin()[:, None, :])

    def forward(self, idx, targets=None, loss_reduction="mean", kv_cache=None):
        """idx (B, T) -> logits (B, T, V) fp32; with `targets` (B, T) the mean loss, or `"none"`: (B*T,) losses.

        With runs: idx (R, B, T), or (B, T) shared by all; logits (R, B, T, V), loss (R,), or (R, B*T). Targets of -1
        are left out. `kv_cache` (one model only) holds the tokens before idx and grows by T. Raises ValueError for more
        tokens than the sequence length.
        """
        return self.read_out(self.hidden(idx, kv_cache), targets, loss_reduction)

    def hidden(self, idx, kv_cache=None):
        """idx (B, T) -> the normed output of the last block (B, T, C); with runs (R, B, T, C)."""
        if self.runs is not None:
            idx = idx.expand(self.runs, *idx.shape[-2:])
        start = 0 if kv_cache is None else kv_cache.length
        T = idx.size(-1)
        if start + T > self.config.sequence_len:
            raise ValueError(f"{start + T} tokens do not fit the model's sequence length {self.config.sequence_len}")
        heads = self.config.n_head + self.config.n_kv_head
        cos, sin = (table[start : start + T].expand(-1, heads, -1).contiguous() for table in (self.cos, self.sin))

        x = x0 = norm(self.transformer.wte(idx))
        scalars = (1, 1, 1) if self.runs is None else (-1, 1, 1, 1)
        per_layer = [p.unbind(-1) for p in (self.resid_lambdas, self.x0_lambdas)]
        for i, block in enumerate(self.transformer.h):
            x = mix(x, x0, *(lambdas[i].view(scalars) for lambdas in per_layer))
            ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(x, ve, cos, sin, self.backend, kv_cache)
        return norm(x)

    def read_out(self, x, targets=None, loss_reduction="mean"):
        """The head on x (B, T, C), or with runs (R, B, T, C): what `forward` returns."""
        head, shape, V = self.lm_head.weight, x.shape[-3:-1], self.config.vocab_size
        if targets is None:
            head = head[..., :V, :] if head.size(-2) > V else head
            return softcapped_logits(x.flatten(-3, -2), head).unflatten(-2, shape)
        targets = targets.expand(x.shape[:-1]).flatten(-2)
        return head_loss(x.flatten(-3, -2), head, targets, V, self.loss_kernel, loss_reduction)

    def num_params(self) -> int:
        """Parameters of one model."""
        return sum(p.numel() for p in self.parameters()) // (self.runs or 1)

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward: 6 per weight in a product, 12 D H per visible key."""
        c = self.config
        lookups = sum(e.weight.numel() for e in (self.transformer.wte, *self.value_embeds.values()))
        scalars = self.resid_lambdas.numel() + self.x0_lambdas.numel()
        products = self.num_params() - (lookups + scalars) // (self.runs or 1)
        keys = sum(c.sequence_len if w < 0 else min(w, c.sequence_len) for w in self.windows)
        return 6 * products + 12 * c.n_embd * keys

    def setup_optimizer(
        self,
        unembedding_lr: float = 0.004,
        embedding_lr: float = 0.3,
        matrix_lr: float = 0.02,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.8, 0.95),
        scalar_lr: float = 0.5,
        rank: int = 0,
        world_size: int = 1,
    ) -> MuonAdamW:
        """AdamW for embeddings, head and scalars, Muon for the matrices of the blocks, one group per shape.

        The rates of the embeddings and the head are scaled by (width / 768)^-0.5; `weight_decay` is Muon's. Each group
        has a `name`, a `kind` ("adamw" or "muon"), and its lr, weight decay, momentum (AdamW's beta1) and beta2 again
        as `initial_lr`, `initial_wd`, `initial_momentum` and `initial_beta2`.
        """
        scale = (self.config.n_embd / 768) ** -0.5
        adamw = {"kind": "adamw", "betas": adam_betas, "eps": 1e-10, "weight_decay": 0.0}
        groups = [
            {"name": "lm_head", "params": [self.lm_head.weight], "lr": unembedding_lr * scale, **adamw},
            {"name": "wte", "params": [self.transformer.wte.weight], "lr": embedding_lr * scale, **adamw},
            {
                "name": "value_embeds",
                "params": [e.weight for e in self.value_embeds.values()],
                "lr": embedding_lr * scale,
                **adamw,
            },
            {"name": "resid_lambdas", "params": [self.resid_lambdas], "lr": scalar_lr * 0.01, **adamw},
            {"name": "x0_lambdas", "params": [self.x0_lambdas], "lr": scalar_lr, **adamw, "betas": (0.96, 0.95)},
        ]
        matrices: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in self.transformer.h.parameters():
            matrices.setdefault(tuple(p.shape[-2:]), []).append(p)
        for (rows, cols), params in sorted(matrices.items()):
            groups.append(
                {
                    "name": f"muon_{rows}x{cols}",
                    "kind": "muon",
                    "params": params,
                    "lr": matrix_lr,
                    "momentum": 0.95,
                    "beta2": 0.95,
                    "weight_decay": weight_decay,
                }
            )
        for group in groups:
            group["initial_lr"], group["initial_wd"] = group["lr"], group["weight_decay"]
            of_muon = group["kind"] == "muon"
            group["initial_momentum"] = group["momentum"] if of_muon else group["betas"][0]
            group["initial_beta2"] = group["beta2"] if of_muon else group["betas"][1]
        covered, total = sum(p.numel() for g in groups for p in g["params"]), sum(p.numel() for p in self.parameters())
        assert covered == total, f"the groups hold {covered} of {total} parameters"
        return MuonAdamW(groups, rank=rank, world_size=world_size)


def partly_compiled(model: GPT) -> Callable:
    """A model's call in training whose loss is computed outside the compiled graph."""
    hidden = torch.compile(model.hidden, dynamic=False, fullgraph=True)

    def forward(idx, targets, loss_reduction="mean"):
        return model.read_out(hidden(idx), targets, loss_reduction)

    forward.runs = model.runs  # what `nanochat.loss_eval` asks of a model
    return forward


def replayed(compiled: Callable) -> Callable:
    """A forward pass under CUDA graphs (`mode="reduce-overhead"`): launches cost nothing, for models of short steps.

    A replay overwrites what the last one returned, gradients too. So a step may have one micro-batch only, and its
    gradients must be used before the next forward pass, one of an evaluation included; the loss is copied here.
    """

    def forward(*args, **kwargs):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **kwargs).clone()

    return forward


def window_sizes(config: GPTConfig) -> list[int]:
    """Per layer: half the context for S, `FULL` for L. The pattern is tiled over the layers; the last is always L."""
    pattern = config.window_pattern * config.n_layer
    sizes = [config.sequence_len // 2 if c == "S" else attn_kernels.FULL for c in pattern[: config.n_layer]]
    sizes[-1] = attn_kernels.FULL
    return sizes
