"""What the device can do and has left: peak rate, memory, and how many rows of a batch fit."""

from __future__ import annotations

import os
import resource
import sys

import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_packages import LOGITS_HELD

PEAK_FLOPS = {  # dense bf16, by the makers' data sheets; the first name found in the device's counts
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A10": 125e12,
    "L4": 121e12,
}
MEMORY_SHARE = 0.8  # of the free memory that rows may fill: the rest is for fragmentation and what is not counted


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in bf16 of a device by its name, or None if it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: the GPU's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: by tensors on a GPU, else by the process. Does not wait for the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, else kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def step_bytes(config: GPTConfig, rows: int, on_cuda: bool, loss_kernel: str = "plain") -> int:
    """Memory of a training step with so many rows, roughly (assumption: not measured on a GPU).

    Weights, gradients, two moments and work space in fp32. Per token the activations that backward needs, about 40 a
    layer and channel, in bf16 on CUDA. There, of the logits: with "plain" all of them, in bf16, capped in fp32, and
    their gradient; with a kernel no more of them in bf16 than the kernel holds at a time, none with "cce", and the
    gradients that its forward pass makes, of the head in fp32 and of its input. A CPU holds a chunk of the logits only.
    """
    with torch.device("meta"):
        parameters = GPT(config).num_params()
    tokens = rows * config.sequence_len
    activations = 40 * config.n_embd * config.n_layer * (2 if on_cuda else 4)
    logits = 0
    if on_cuda and loss_kernel == "plain":
        logits = tokens * config.vocab_size * (2 + 4 + 4)
    elif on_cuda:
        held = 0 if loss_kernel == "cce" else min(LOGITS_HELD, tokens * config.padded_vocab)
        logits = 2 * held + config.n_embd * (2 * tokens + 4 * config.padded_vocab)
    return 4 * 6 * parameters + tokens * activations + logits


def fitting_rows(
    config: GPTConfig, rows_per_step: int, world_size: int, free: int, on_cuda: bool, loss_kernel: str = "plain"
) -> int:
    """The most rows of a micro-batch that divide a rank's share of a step and fit `free` bytes; at least 1.

    0 if the step's rows do not divide by the ranks.
    """
    if rows_per_step % world_size:
        return 0
    share = rows_per_step // world_size
    fitting = (
        n
        for n in range(share, 1, -1)
        if share % n == 0 and step_bytes(config, n, on_cuda, loss_kernel) <= MEMORY_SHARE * free
    )
    return next(fitting, 1)
