"""What watching costs: the time of a training step with and without an observer, on this machine.

    python -m scripts.observer_cost
    python -m scripts.observer_cost --device cuda --sizes 1e6 1e7 1e8

A step is forward, backward and AdamW of a transformer without attention (its multiplications are those of any other)
on `--tokens` tokens. On a CPU time is the process's own, so that other programs do not count; a measurement is made
at one step in four, and the medians are over windows of four steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from jel.errors import JelError
from jel.lhopt import UNMEASURED
from jel.observer import Observer
from jel.unitless import MEASURE_EVERY
from nanochat.common import print0, run_main

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3),
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
}


def make_model(parameters: float, layers: int = 6) -> nn.Module:
    """Residual-free blocks of two matrices and a norm, about so many parameters in all."""
    width = max(8, round((parameters / (8 * layers)) ** 0.5))
    blocks = [
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for _ in range(layers)
    ]
    return nn.Sequential(*blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7], help="parameters")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of a step")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=["adamw"])
    parser.add_argument("--windows", type=int, default=20, help="windows of four steps")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print0(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}, {args.tokens} tokens a step")
    for size in args.sizes:
        for name in args.optimizers:
            plain, watching, n = measure(make_model(size).to(device), OPTIMIZERS[name], args.tokens, args.windows)
            share = f"{100 * watching / plain:.2f}%"
            print0(
                f"{n:>12,} parameters {name:>9}: {1e3 * plain:.3f} ms a step, watching {1e3 * watching:.3f} ms, {share}"
            )
    return 0


def measure(model: nn.Module, make_optimizer, tokens: int, windows: int) -> tuple[float, float, int]:
    """(seconds of a step without the observer, seconds of the observer a step, parameters)."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model.parameters())
    x = torch.randn(tokens, next(model.parameters()).numel(), device=device)
    observer = Observer(optimizer, attach=False, constants=UNMEASURED)  # as under "lhopt"

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def window() -> tuple[float, float]:
        watching, start = 0.0, now()
        for _ in range(MEASURE_EVERY):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            a = now()
            observer.before_step()
            b = now()
            optimizer.step()
            c = now()
            observer.after_step()
            observer.observe(loss)
            watching += b - a + now() - c
        return (now() - start - watching) / MEASURE_EVERY, watching / MEASURE_EVERY

    window(), window()
    plain, watching = (statistics.median(times) for times in zip(*[window() for _ in range(windows)]))
    return plain, watching, sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    run_main(main, JelError)
