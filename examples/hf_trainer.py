"""Training a small Hugging Face model, built from a config, with the Trainer: which module is a line of code from?

python -m examples.hf_trainer        needs transformers and accelerate
"""

from __future__ import annotations

import argparse
import inspect
import tarfile
import tempfile

import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

import jel
from jel.integrations.huggingface import JelCallback
from jel.tasks.loop import LoopTask

STEPS, BATCH, LENGTH, BUDGET = 120, 16, 32, 8.0  # the budget of jel.fit is in runs


def data(seed: int) -> tuple[list, list, list]:
    """Lines as bytes with their module's number: to train on, to choose by, and to test with."""
    rows = []
    for label, module in enumerate((argparse, tarfile, inspect)):
        lines = [line.strip() for line in inspect.getsource(module).splitlines() if len(line.strip()) > 15]
        for line in lines[:1500]:
            codes = torch.tensor([1 + min(ord(c), 126) for c in line[:LENGTH]])
            padded = nn.functional.pad(codes, (0, LENGTH - len(codes)))
            rows.append({"input_ids": padded, "labels": torch.tensor(label)})
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [{**rows[i], "attention_mask": (rows[i]["input_ids"] > 0).long()} for i in order]
    return rows[:-768], rows[-768:-384], rows[-384:]


def make_model() -> nn.Module:
    sizes = {"vocab_size": 128, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    return DistilBertForSequenceClassification(
        DistilBertConfig(**sizes, max_position_embeddings=LENGTH, num_labels=3, pad_token_id=0)
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)  # what the Trainer would take


def default_schedule(optimizer: torch.optim.Optimizer, steps: int):  # and what it would do with it
    return get_scheduler("linear", optimizer, 0, steps)


def loss(model: nn.Module, batch: dict) -> Tensor:
    return model(**batch).loss


def batched(rows: list, size: int) -> list[dict[str, Tensor]]:
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


def make_task(seed: int = 0) -> LoopTask:
    train, probe, _ = (batched(rows, BATCH if i == 0 else 64) for i, rows in enumerate(data(seed)))
    return LoopTask(make_model, make_optimizer, train, loss, probe, steps=STEPS, clip_norm=1.0, seed=seed)


def run(make_optimizer, make_scheduler, seed: int, split: int = 2) -> float:
    """Train from scratch; the loss on the test data (split 2) or on the probe data (split 1)."""
    torch.manual_seed(seed)
    model, rows = make_model(), data(seed)
    optimizer = make_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 64, "max_steps": STEPS}
        quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
        args = TrainingArguments(folder, **sizes, **quiet, max_grad_norm=1.0, seed=seed, use_cpu=True)
        pair = optimizer, make_scheduler(optimizer, STEPS)
        trainer = Trainer(model, args, train_dataset=rows[0], optimizers=pair, callbacks=[JelCallback()])
        trainer.train()
        return trainer.evaluate(rows[split])["eval_loss"]


if __name__ == "__main__":
    learned = jel.fit(make_task(), budget=BUDGET, base="rough")
    print(f"the Trainer as it is: test loss {run(make_optimizer, default_schedule, 0):.4f}")
    print(f"with JEL: test loss {run(make_optimizer, lambda o, n: jel.Scheduler(o, n, learned.schedule), 0):.4f}")
