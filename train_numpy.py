"""Train a GPT with nothing but NumPy: by default the small one, on Tiny Shakespeare, on a CPU, in minutes.

    python train_numpy.py
    python train_numpy.py --preset tiny
    python train_numpy.py --data my.txt --n-layer 3 --learning-rate 1e-3
    python train_numpy.py --resume runs/numpy-small
    python train_numpy.py --help

The model is numpygpt.py. What stands here is how it learns from one batch; when, from which one, at what rate, and what
is measured and kept, is training/loop.py, which train_torch.py runs just the same.
"""
# ruff: noqa: E402  two things must be done before NumPy loads

import os
import sys

for blas in ("OPENBLAS", "MKL", "VECLIB"):  # training.parallel has threads of its own, which pay better
    os.environ.setdefault(f"{blas}_NUM_THREADS", "1")

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np

from common.cli import run_program
from common.cores import usable_cores
from common.errors import UserError
from numpygpt import GPT, AdamW, GPTConfig, Params, clip_grad_norm, split_params
from sample import show_sample
from training.batches import Batch, step_rng
from training.checkpoint import Snapshot
from training.config import Flags, TrainConfig, muon_learning_rate
from training.flags import parse_flags
from training.loop import Engine, train
from training.memory import MemoryUse
from training.parallel import MuonInParts, add_grads, loss_and_grads_in_parts, loss_in_parts, tune_process
from training.run import open_run

MEMORY = MemoryUse(scores_kept=True)


class NumpyEngine(Engine):
    """numpygpt.py's model and optimizers, as training.loop wants them.

    threads: into how many parts a micro-batch and Muon's matrices are cut, to compute them side by side
    """

    def __init__(self, model: GPTConfig, training: TrainConfig, threads: int) -> None:
        dtype = np.float64 if training.dtype == "float64" else np.float32
        self.threads = threads
        tune_process(threads)
        self.gpt = GPT(model, seed=training.seed, dtype=dtype)
        self.training, self.grad_clip = training, training.grad_clip or math.inf
        matrices, others = split_params(self.gpt.params) if training.optimizer == "muon" else ({}, self.gpt.params)
        betas = (training.beta1, training.beta2)
        self.optimizer = AdamW(others, betas=betas, weight_decay=training.weight_decay)
        self.muon = None
        if matrices:
            self.muon = MuonInParts(matrices, weight_decay=training.muon_weight_decay, threads=threads)

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        """Forward, backward, clip, update: see training.loop.Engine."""
        loss, grads = self.loss_and_grads(step, micro_batches)
        norm = clip_grad_norm(grads, self.grad_clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            broken = [name for name, grad in grads.items() if not np.isfinite(grad).all()]
            raise ValueError(f"not finite: {f'the gradient of {broken[0]}' if broken else 'the loss, or the norm'}")
        self.update(grads, lr)
        return loss, norm

    def loss_and_grads(self, step: int, micro_batches: Sequence[Batch]) -> tuple[float, Params]:
        """Of the whole batch, by its parts."""
        count = sum(targets.size for _, targets in micro_batches)
        rng = step_rng(self.training.seed, step, "dropout")
        total_loss, total_grads = 0.0, dict[str, np.ndarray]()
        for idx, targets in micro_batches:
            loss, grads = loss_and_grads_in_parts(self.gpt, idx, targets, rng=rng, count=count, threads=self.threads)
            total_loss += loss
            total_grads = add_grads(total_grads, grads) if total_grads else grads
        return total_loss, total_grads

    def update(self, grads: Params, lr: float) -> None:
        """One step of the optimizers; lr is AdamW's rate."""
        self.optimizer.step({name: grads[name] for name in self.optimizer.params}, lr)
        if self.muon is not None:
            self.muon.step(grads, muon_learning_rate(lr, self.training))

    def loss(self, idx: np.ndarray, targets: np.ndarray) -> float:
        return loss_in_parts(self.gpt, idx, targets, threads=self.threads)

    def num_params(self) -> int:
        return self.gpt.num_params()

    def save(self) -> Snapshot:
        m = self.optimizer.m | (self.muon.m if self.muon else {})
        return Snapshot(self.gpt.params, {name: m[name] for name in self.gpt.params}, self.optimizer.v)

    def load(self, snapshot: Snapshot, step: int) -> None:
        mine = self.save()
        for arrays, saved in ((mine.weights, snapshot.weights), (mine.m, snapshot.m), (mine.v, snapshot.v)):
            for name, array in arrays.items():
                array[...] = saved[name]
        self.optimizer.t = step


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    flags = parse_flags(argv, Flags, "train_numpy.py", preset="small", description=str(__doc__).split("\n")[0])
    if flags.training.dtype == "bfloat16" and flags.run.resume is None:
        raise UserError("dtype bfloat16 is for train_torch.py: choose float32 or float64")
    if flags.training.dtype == "bfloat16":
        print("a run of bfloat16 has weights of float32, and continues in float32 here", file=sys.stderr)
    if flags.training.dtype in ("auto", "bfloat16"):
        flags = dataclasses.replace(flags, training=dataclasses.replace(flags.training, dtype="float32"))

    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's of NaN and infinity, at which the engine stops anyway
    with open_run(flags, "numpy", MEMORY) as run:
        threads = flags.run.threads or usable_cores()
        print(f"computing in {threads} thread{'s' * (threads > 1)}")
        engine = NumpyEngine(run.model, run.training, threads)
        stopped_by = train(engine, run)
    if stopped_by is not None:
        return 128 + stopped_by
    show_sample(run.folder, "numpy")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
