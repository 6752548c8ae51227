"""The CUDA branches of model, loss and optimizer on fake tensors: `python -m tests.fake_cuda LIBRARY CASE...`.

A fake tensor has a shape, a dtype and a device but no data, so no GPU is needed; what a product or a kernel would
refuse to mix is refused here too. torch.compile traces what it would compile on a GPU; the compiler behind it is left
out. A CPU build of PyTorch knows no CUDA device to guard; LIBRARY, made by `build`, gives it one that does nothing.
A backward pass on fake CUDA tensors is more than such a build can do. Prints JSON: what was seen, by case.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat import attention, gpt
from nanochat.gpt import GPT, GPTConfig

B, T, V = 2, 512, 1000
SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


def build(folder: Path) -> Path:
    """Compile LIBRARY with g++ against the headers that PyTorch brings."""
    source, library, torch_folder = folder / "guard.cpp", folder / "guard.so", Path(torch.__file__).parent
    source.write_text(SOURCE)
    command = [
        "g++",
        "-shared",
        "-fPIC",
        "-std=c++20",
        f"-I{torch_folder / 'include'}",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run([*command, f"-L{torch_folder / 'lib'}", "-lc10"], check=True, capture_output=True)
    return library


def make(runs: int | None, backend: str, loss: str) -> GPT:
    with torch.device("cuda"):
        model = GPT(GPTConfig(sequence_len=T, vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=256), runs)
    model.backend, model.loss_kernel = backend, loss
    for block in model.transformer.h:
        block.mlp.kernel = "plain" if loss == "plain" else "triton"
    if backend == "flex":
        attention.prepare_block_masks(T, model.windows, model.device)
    return model


def compiler(graph, _):
    """Compiles nothing: runs what was traced."""
    return graph.forward


@contextlib.contextmanager
def autocast():
    """bf16 on CUDA, which `torch.autocast` refuses without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


def describe(t: torch.Tensor) -> list:
    return [list(t.shape), str(t.dtype).removeprefix("torch."), t.device.type]


def forward_case(runs: int | None, backend: str, loss: str, training: bool) -> dict:
    """Graphs, breaks and outputs of the compiled model, and what reaches the kernels of attention and head."""
    model, inputs, seen = make(runs, backend, loss), torch.zeros(B, T, dtype=torch.long, device="cuda"), {}

    def spy(module, name, label):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            seen[label] = [describe(t) for t in args if isinstance(t, torch.Tensor)]
            return original(*args, **kwargs)

        setattr(module, name, wrapped)
        return lambda: setattr(module, name, original)

    with autocast(), torch.set_grad_enabled(training):
        compiled = torch.compile(model, backend=compiler, dynamic=False, fullgraph=True)
        outputs = [compiled(inputs, inputs), compiled(inputs, inputs)]
        graphs = counters["stats"]["unique_graphs"]
        undo = [spy(attention, "attention", "attention"), spy(gpt, "head_loss", "head")]
        outputs.append(model(inputs, inputs))
        for f in undo:
            f()
    with autocast(), torch.no_grad():
        outputs += [model(inputs, inputs, "none"), model(inputs)]
    return {
        "graphs": graphs,
        "breaks": sum(counters["graph_break"].values()),
        "outputs": [describe(t) for t in outputs],
        **seen,
    }


def missing_mask_case() -> dict:
    model, inputs = make(None, "flex", "plain"), torch.zeros(B, T, dtype=torch.long, device="cuda")
    attention._block_masks.clear()
    try:
        with torch.no_grad(), autocast():
            torch.compile(model, backend=compiler, dynamic=False, fullgraph=True)(inputs)
    except Exception as error:
        return {"error": str(error)}
    return {"error": ""}


def loss_backward_case() -> dict:
    """The backward pass of the fused loss, called by hand."""
    from nanochat.gpu_kernels import FusedMeanLoss

    class Context:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    context, weight = Context(), torch.empty(2, 1024, 64, device="cuda")
    x, targets = torch.empty(2, 8, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(2, 8, device="cuda").long()
    loss = FusedMeanLoss.forward(context, x, weight, targets, V, False)
    grads = FusedMeanLoss.backward(context, torch.ones_like(loss))
    return {"loss": describe(loss), "grads": [describe(g) for g in grads[:2]]}


def head_products_case() -> dict:
    """The products around the kernel, which is left out: one run and two, in chunks, and in float8."""
    from nanochat import gpu_kernels

    gpu_kernels._launch, gpu_kernels.CHUNK_ELEMENTS, found = lambda *_: None, 2 * 1024 * 256, []
    for R, float8 in ((1, False), (2, False), (1, True)):
        x, weight = (
            torch.empty(R, 600, 64, device="cuda", dtype=torch.bfloat16),
            torch.empty(R, 1024, 64, device="cuda"),
        )
        targets, factors = torch.zeros(R, 600, device="cuda").long(), torch.empty(R, 600, device="cuda")
        losses, *grads = gpu_kernels.head_gradients._init_fn(x, weight, targets, factors, V, float8)
        found.append([describe(t) for t in (losses, *grads)])
    return {"found": found}


def optimizer_case(runs: int | None) -> dict:
    """Programs that the optimizer's updates compile in the first two steps and over ten more decisions."""
    model, compile_ = make(runs, "sdpa", "plain"), torch.compile
    torch.compile = lambda f, **kwargs: compile_(f, backend=compiler, **kwargs)
    optimizer, programs = model.setup_optimizer(weight_decay=0.2), []
    torch.compile = compile_
    for step in range(12):
        for group in optimizer.param_groups:
            factor = 1 + step if runs is None else torch.arange(1.0, 1 + runs, device="cuda") * (1 + step)
            group.update(lr=0.01 * factor, weight_decay=0.1 * factor)
            group.update({"momentum": 0.8 + 0.01 * step} if "momentum" in group else {})
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        programs.append(counters["stats"]["unique_graphs"])
    return {
        "programs": [programs[1], programs[-1]],
        "breaks": sum(counters["graph_break"].values()),
        "weights": sorted({str(describe(p)[1:]) for p in model.parameters()}),
        "state": sorted({str(describe(t)[1:]) for shard in optimizer._shards for t in shard.state.values()}),
    }


CASES = {"missing mask": missing_mask_case, "loss backward": loss_backward_case, "head products": head_products_case}
CASES |= {f"optimizer {runs}": partial(optimizer_case, None if runs == "one" else runs) for runs in ("one", 2)}


def main(library: str, *names: str) -> None:
    ctypes.CDLL(library)
    torch._dynamo.config.recompile_limit = 64
    found = {}
    for name in names:
        torch._dynamo.reset()
        counters.clear()
        with FakeTensorMode():
            if name in CASES:
                found[name] = CASES[name]()
            else:
                runs, backend, loss, training = name.split()
                found[name] = forward_case(None if runs == "one" else int(runs), backend, loss, training == "training")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
