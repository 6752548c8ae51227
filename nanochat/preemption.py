"""Stopping a run in order: SIGTERM, SIGUSR1 and Ctrl-C ask for a stop after the step, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from nanochat.common import Compute

REQUEUE_EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: saved and resumable, run the same command again
ECHO = 5.0  # seconds
EXCHANGE = 10  # steps between two exchanges of the request among GPUs: each one waits for the device


class StopRequest:
    """Installs the handlers; `requested()` says, the same on all ranks, whether to save and leave after this step.

    A scheduler may signal every process of a job, and torchrun passes its own signal on to the ranks. So under torchrun
    a signal that comes within `ECHO` of the first one is taken for the same request, not for a second one.
    """

    def __init__(self, compute: Compute):
        self.compute, self.signal_number, self._insist_from = compute, 0, 0.0
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, self._handle)

    def _handle(self, number, frame) -> None:
        now = time.monotonic()
        if not self.signal_number:
            self.signal_number = number
            self._insist_from = now + (ECHO if "TORCHELASTIC_RUN_ID" in os.environ else 0.0)
            if self.compute.is_main:
                line = f"{signal.Signals(number).name}: finishing the step, then saving (again: exit at once)"
                os.write(2, f"\n{line}\n".encode())  # printing is not safe in a signal handler
        elif now >= self._insist_from:
            os._exit(128 + number)

    def requested(self, step: int = 0) -> bool:
        """Whether to stop after this step. Ranks on GPUs agree on it at every `EXCHANGE`th step only."""
        if self.compute.world_size == 1:
            return self.signal_number != 0
        if self.compute.is_cuda and step % EXCHANGE:
            return False
        flag = torch.tensor(float(self.signal_number != 0), device=self.compute.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag.item() > 0
