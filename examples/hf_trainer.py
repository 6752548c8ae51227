"""Training a small Hugging Face model, built from a config, with the Trainer: which module is a line of code from?

python -m examples.hf_trainer        needs transformers and accelerate
"""

from __future__ import annotations

import argparse
import inspect
import tarfile
import tempfile

import torch
import transformers
from torch import Tensor, nn

import jel
from jel.integrations.huggingface import JelCallback
from jel.tasks.loop import LoopTask

STEPS, BATCH, LENGTH, BUDGET = 200, 16, 32, 8.0  # the budget of jel.fit is in runs


def data(seed: int) -> tuple[list, list, list]:
    """Lines as bytes with their module's number: to train on, to choose by, and to test with."""
    rows = []
    for label, module in enumerate((argparse, tarfile, inspect)):
        for line in [line.strip() for line in inspect.getsource(module).splitlines() if len(line.strip()) > 15][:1500]:
            codes = torch.tensor([1 + min(ord(c), 126) for c in line[:LENGTH].ljust(LENGTH, "\0")])
            rows.append({"input_ids": codes, "attention_mask": (codes > 1).long(), "labels": torch.tensor(label)})
    rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return rows[:-768], rows[-768:-384], rows[-384:]


def make_model() -> nn.Module:
    sizes = {"vocab_size": 128, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    config = transformers.DistilBertConfig(**sizes, max_position_embeddings=LENGTH, num_labels=3)
    return transformers.DistilBertForSequenceClassification(config)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)  # what the Trainer would take


def default_schedule(optimizer: torch.optim.Optimizer, steps: int):  # and what it would do with it
    return transformers.get_scheduler("linear", optimizer, 0, steps)


def loss(model: nn.Module, batch: dict) -> Tensor:
    return model(**batch).loss


def make_task(seed: int = 0) -> LoopTask:
    together = transformers.default_data_collator
    batched = lambda rows, size: [together(rows[i : i + size]) for i in range(0, len(rows), size)]
    rows = data(seed)
    train, probe = batched(rows[0], BATCH), batched(rows[1], 64)
    return LoopTask(make_model, make_optimizer, train, loss, probe, steps=STEPS, clip_norm=1.0, seed=seed)


def run(make_optimizer, make_scheduler, seed: int, split: int = 2) -> float:
    """Train from scratch; the loss on the test data (split 2) or on the probe data (split 1)."""
    torch.manual_seed(seed)
    model, rows = make_model(), data(seed)
    optimizer = make_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 64, "max_steps": STEPS}
        quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
        args = transformers.TrainingArguments(folder, **sizes, **quiet, max_grad_norm=1.0, seed=seed, use_cpu=True)
        pair = optimizer, make_scheduler(optimizer, STEPS)
        trainer = transformers.Trainer(model, args, train_dataset=rows[0], optimizers=pair, callbacks=[JelCallback()])
        trainer.train()
        return trainer.evaluate(rows[split])["eval_loss"]


if __name__ == "__main__":
    learned = jel.fit(make_task(), budget=BUDGET, base="rough")
    print(f"the Trainer as it is: test loss {run(make_optimizer, default_schedule, 0):.4f}")
    print(f"with JEL: test loss {run(make_optimizer, lambda o, n: jel.Scheduler(o, n, learned.schedule), 0):.4f}")
