"""What this machine has, and what that means for a run: ten lines, and the same as JSON.

python -m scripts.doctor
python -m scripts.doctor --json OUT.json
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import sys
from pathlib import Path

import torch

from nanochat import attention
from nanochat.common import base_dir, run_main
from nanochat.files import write_json
from nanochat.hardware import free_bytes, peak_flops
from nanochat.loss_packages import PACKAGES as LOSS_PACKAGES
from scripts.presets import gpu_evidence

# What stops working without each package. None of them is imported before it is needed.
PACKAGES = {
    "safetensors": "nothing can be saved or loaded",
    "pyarrow": "no text can be read: carry tokens (scripts.tok_train --carry)",
    "tiktoken": "no text can be tokenized: carry tokens (scripts.tok_train --carry)",
    "rustbpe": "no tokenizer can be trained: carry one, with tokens or alone",
    "requests": "nothing can be downloaded",
    "tqdm": "no download, no tokenizing",
    "matplotlib": "a report without figures",
    "cmaes": "no CMA-ES row in scripts.ablate",
    "pytest": "no tests",
    "wandb": "no --run NAME",
}


def examine() -> dict[str, tuple[str, str]]:
    """`{topic: (what was found, what that means)}`, in the order to print."""
    cuda, found = torch.cuda.is_available(), {}
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if cuda:
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        many, peak = torch.cuda.device_count(), peak_flops(name)
        rate = f"{peak / 1e12:.0f} TFLOP/s in bf16" if peak else "peak not in nanochat/hardware.py: no MFU"
        bf16 = "preset paper" if major >= 8 else "no fast bf16 below sm_80: the paper preset will be slow"
        found["device"] = f"{many} x {name}, sm_{major}{minor}, {rate}", bf16
    elif evidence := gpu_evidence():
        found["device"] = f"a GPU ({evidence}) that torch does not see", "install a CUDA build of torch"
    else:
        found["device"] = f"no GPU; {platform.machine()} CPU", "preset tiny; `paper` would take days"
    version = f"Python {platform.python_version()}, torch {torch.__version__}"
    old = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 9)
    found["torch"] = f"{version}, CUDA {torch.version.cuda or 'none'}", "too old, 2.9 is needed" if old else "good"
    backend = attention.backend_for(device.type, compiled=cuda)
    found["attention"] = (
        backend,
        {
            "fa3": "FlashAttention-3",
            "flex": "FlexAttention, compiled: slower than FlashAttention-3 on a Hopper GPU",
        }.get(
            backend, "PyTorch's own kernels" if not cuda else "PyTorch's own kernels: a dense mask for windows, slow"
        ),
    )
    triton = importlib.util.find_spec("triton") is not None
    found["Triton"] = (
        ("there" if triton else "missing"),
        ("torch.compile works on a GPU" if triton else "no torch.compile on a GPU" if cuda else "not needed on a CPU"),
    )
    losses = [
        "plain",
        *(["triton"] if triton else []),
        *(n for n, p in LOSS_PACKAGES.items() if importlib.util.find_spec(p)),
    ]
    found["losses"] = ", ".join(losses), "the fastest is measured as a run starts" if cuda else "measured on a GPU only"
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    found["NCCL"] = (
        ".".join(map(str, torch.cuda.nccl.version())) if cuda and nccl else "there" if nccl else "missing",
        ("several GPUs can train one run" if nccl else "one GPU a run" if cuda else "ranks on a CPU use gloo"),
    )
    memory, disk = free_bytes(device), shutil.disk_usage(base_dir()).free
    found["memory"] = (
        f"{memory / 1e9:.1f} GB free on the {device.type}",
        (
            "--device-batch-size -1 takes what fits"
            if memory > 24e9
            else "lower --device-batch-size than 32 at paper size"
        ),
    )
    checkpoints = 7 * 0.9e9  # at the paper's size a checkpoint has 0.9 GB, and a run keeps 2 and writes one
    found["disk"] = (
        f"{disk / 1e9:.1f} GB free in {base_dir()}",
        ("room for checkpoints" if disk > checkpoints else f"the paper preset needs {checkpoints / 1e9:.0f} GB"),
    )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    found["missing"] = (
        ", ".join(missing) or "no package",
        ("; ".join(f"{name}: {PACKAGES[name]}" for name in missing) or "every stage can run"),
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write it there")
    args = parser.parse_args()
    found = examine()
    for topic, (what, meaning) in found.items():
        print(f"{topic:<10} {what} -> {meaning}")
    unusable = importlib.util.find_spec("safetensors") is None or "too old" in found["torch"][1]
    verdict = "cannot run here: see above" if unusable else "ready"
    print(f"{'verdict':<10} {verdict} (interpreter {sys.executable})")
    if args.json:
        record = {topic: {"found": what, "means": meaning} for topic, (what, meaning) in found.items()}
        write_json(args.json, {**record, "verdict": verdict})
    return 1 if unusable else 0


if __name__ == "__main__":
    run_main(main)
