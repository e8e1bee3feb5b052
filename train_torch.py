"""Train a GPT with PyTorch: by default the full 10.8M model on Tiny Shakespeare, on a GPU if there is one.

    python train_torch.py
    python train_torch.py --preset small --device cpu
    python train_torch.py --resume runs/numpy-small           # continue a run that train_numpy.py began
    torchrun --standalone --nproc_per_node=2 train_torch.py   # several GPUs, or with --device cpu several processes
    python train_torch.py --help

The model is torchgpt.py. What stands here is how it learns from one batch; when, from which one, at what rate, and what
is measured and kept, is training/loop.py, which train_numpy.py runs just the same. Devices, DDP and CUDA graphs are
training/torch_device.py, torch_ddp.py and torch_graph.py.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import cast

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import run_program
from common.errors import UserError
from numpygpt import GPTConfig, check_batch, check_ids, split_params
from sample import show_sample
from torchgpt import GPT, Muon, decay_groups
from training.batches import Batch, step_rng
from training.checkpoint import Snapshot
from training.config import TrainConfig, muon_learning_rate
from training.flags import parse_flags
from training.loop import Engine, train
from training.run import open_run
from training.torch_ddp import SINGLE_PROCESS, Ddp, check_gpus, init_ddp, is_lost_connection, open_on_all
from training.torch_device import (
    DeviceFlags,
    TorchFlags,
    configure_torch,
    device_defaults,
    first_line,
    full_precision,
    is_out_of_memory,
    memory_use,
    print_device,
    resolve_flags,
)
from training.torch_graph import RecordedStep, Step


class Loss(nn.Module):
    """The model as training sees it: a loss. If compiled code returned the logits too, the backward pass would have to
    read a gradient of their size, all of it zeros."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.gpt(idx, targets)[1]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards the mode that the model was in before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class TorchEngine(Engine):
    """torchgpt.py's model with PyTorch's AdamW, and torchgpt.py's Muon, as training.loop wants them.

    flags: how to compute; the attribute says how it does now, if torch.compile has failed
    ddp: this process among those that train the model together
    """

    def __init__(self, model: GPTConfig, training: TrainConfig, flags: DeviceFlags, ddp: Ddp = SINGLE_PROCESS) -> None:
        dtype = torch.float64 if training.dtype == "float64" else torch.float32
        self.flags, self.ddp, self.is_main = flags, ddp, ddp.is_main
        self.device, self.bfloat16 = torch.device(flags.device), training.dtype == "bfloat16"
        self.training, self.grad_clip = training, training.grad_clip or math.inf
        on_cpu = self.device.type == "cpu"
        self.gpt = GPT(
            model,
            seed=training.seed,
            dtype=dtype,
            attention=flags.attention,
            pad_vocab_to=64 if flags.pad_vocab else 1,
            recompute=flags.recompute,
            checked=on_cpu,
        ).to(self.device)
        # A GPU has room for more than a CPU's cache, up to a quarter of a billion logits (1 GB).
        self.eval_batch_size = None if on_cpu else max(1, min(65_536, 2**28 // model.vocab_size) // model.block_size)
        self.forward = self.make_forward(training.batch_size // training.grad_accum)

        self.make_optimizers()
        self.source: np.ndarray | None = None  # what self.tokens is a copy of

        # Reading a number on a GPU means waiting for it. So a step notes itself where it is not finite, and from then
        # on the fused kernel leaves weights and moments alone; `check` reads the note, now and then.
        self.lazy = self.device.type == "cuda"
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.broken = torch.full_like(self.step, -1)
        self.update = self.make_update()

    def make_optimizers(self) -> None:
        """AdamW, and Muon if it is to train the matrices inside blocks: then AdamW has all others."""
        training, params = self.training, dict(self.gpt.named_parameters())
        matrices, others = split_params(params) if training.optimizer == "muon" else ({}, params)
        self.optimizer = torch.optim.AdamW(
            decay_groups(others.values(), training.weight_decay),
            self.new_rate(),
            betas=(training.beta1, training.beta2),
            eps=1e-8,
            fused=True,
            capturable=self.flags.graph,
        )
        self.muon = None
        if matrices:
            dtype = torch.bfloat16 if self.bfloat16 else None
            self.muon = Muon(matrices, self.new_rate(), weight_decay=training.muon_weight_decay, dtype=dtype)
        self.optimizers = [self.optimizer] if self.muon is None else [self.optimizer, self.muon]

    def new_rate(self) -> float | Tensor:
        """A learning rate. It is a tensor where the step is recorded, or the recording would keep the first step's."""
        return torch.zeros((), device=self.device) if self.flags.graph else 0.0

    def set_rates(self, lr: float) -> None:
        """lr: AdamW's, which Muon's follows."""
        for optimizer in self.optimizers:
            rate = muon_learning_rate(lr, self.training) if optimizer is self.muon else lr
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].fill_(rate) if self.flags.graph else rate

    def make_update(self) -> Step:
        return RecordedStep(self.update_once, self.optimizers, [self.broken]) if self.flags.graph else self.update_once

    def make_forward(self, B: int) -> nn.Module:
        """idx, targets -> loss, compiled if the flags say so. B: sequences of a micro-batch, all processes together.

        A compilation that fails is given up, in all processes: they try it here, since in the midst of an update the
        others could not be told.
        """
        if not self.flags.compile:
            return self.ddp.wrap(Loss(self.gpt))
        # All batches have one shape. A second one, of another model say, must not make it a variable: the fused
        # attention would refuse that.
        forward = self.ddp.wrap(cast(nn.Module, torch.compile(Loss(self.gpt), dynamic=False)))
        fault = next(filter(None, self.ddp.gather(self.try_forward(forward, B))), None)
        if fault is None:
            return forward
        if self.is_main:
            print(f"torch.compile failed, continuing without it: {fault}", file=sys.stderr)
        self.flags = replace(self.flags, compile=False)
        return self.ddp.wrap(Loss(self.gpt))

    def try_forward(self, forward: nn.Module, B: int) -> str | None:
        """Forward and backward on this process's share of B sequences -> what went wrong."""
        ids = torch.zeros((B, self.gpt.config.block_size + 1), dtype=torch.int64, device=self.device)
        ids = self.ddp.share(ids)
        try:
            with self.ddp.no_sync(forward), self.autocast():
                loss = forward(ids[:, :-1], ids[:, 1:])  # with the strides of the windows that are to come
            torch.autograd.grad(loss, list(self.gpt.parameters()))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return first_line(error)
        return None

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        """Forward, backward, clip, update: see training.loop.Engine."""
        # Every process has dropout of its own; the generator takes 64 bits.
        torch.manual_seed(int(step_rng(self.training.seed, step, "dropout").integers(2**62)) + self.ddp.rank)
        self.step.fill_(step)
        self.set_rates(lr)
        self.count = sum(len(ids) * ids.shape[1] for ids, _ in micro_batches)
        return self.update(*(self.ddp.share(self.to_device(ids)) for pair in micro_batches for ids in pair))

    def update_once(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """One step, all of it on the device. batch: idx, targets (B, T) of each micro-batch in turn -> loss, norm.

        Raises ValueError if the step is not finite and reading that costs nothing; else `check` does.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses, last = [], len(batch) - 2
        for i in range(0, len(batch), 2):
            idx, targets = batch[i], batch[i + 1]
            with self.ddp.no_sync(self.forward) if i < last else nullcontext():
                with self.autocast():
                    loss = self.forward(idx, targets)
                loss = loss * (targets.numel() / self.count)  # so that the parts add up to the mean over all
                (loss * self.ddp.world_size).backward()  # DDP averages the gradients; we want their sum
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        self.ddp.sum(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), self.grad_clip)
        finite = torch.isfinite(loss + norm)
        if self.lazy:
            self.broken.copy_(torch.where((self.broken < 0) & ~finite, self.step, self.broken))
            for optimizer in self.optimizers:
                # The fused kernel's own way to skip an update, as torch.amp.GradScaler uses it.
                optimizer.found_inf = (self.broken >= 0).float()  # type: ignore[attr-defined]
                optimizer.grad_scale = None  # type: ignore[attr-defined]
        elif not finite:
            bad = [name for name, param in self.gpt.named_parameters() if not is_finite(param.grad)]
            raise ValueError(f"not finite: {f'the gradient of {bad[0]}' if bad else 'the loss, or the norm'}")
        for optimizer in self.optimizers:
            optimizer.step()
        return loss, norm

    def check(self) -> None:
        """Raises ValueError that names the first step that was not finite. Waits for the device."""
        if self.lazy and (step := int(self.broken)) >= 0:
            raise ValueError(f"not finite: the loss or a gradient at step {step}, and no weight has changed since")

    def sync_stop(self, signal: int | None) -> int | None:
        return self.ddp.sync_stop(signal)

    def gather(self, tokens: np.ndarray, starts: np.ndarray, T: int) -> Batch:
        """The tokens are checked and move to the device once, and the windows are gathered there."""
        if tokens is not self.source:
            check_ids("the training split", tokens[None], 0, self.gpt.config.vocab_size)
            self.source, self.tokens = tokens, torch.from_numpy(np.array(tokens, np.int32)).to(self.device)
        windows = self.tokens.unfold(0, T + 1, 1)[self.to_device(starts)].long()
        return windows[:, :-1], windows[:, 1:]

    def loss(self, idx: np.ndarray, targets: np.ndarray) -> Tensor:
        check_batch(self.gpt.config, idx, targets)
        with torch.no_grad(), without_dropout(self.gpt), full_precision():
            return self.gpt(self.to_device(idx), self.to_device(targets))[1]

    def to_device(self, ids: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(ids).to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16, if that was chosen; the weights keep their dtype."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def num_params(self) -> int:
        return self.gpt.num_params()

    def save(self) -> Snapshot:
        weights, m, v = {}, {}, {}
        for name, param in self.gpt.named_parameters():
            weights[name] = to_numpy(param)
            zeros = torch.zeros_like(param)  # before the first step there is no state yet
            if self.muon is not None and name in self.muon.params:
                m[name] = to_numpy(self.muon.state.get(param, {}).get("momentum_buffer", zeros))
            else:
                state = self.optimizer.state.get(param, {})
                m[name], v[name] = (to_numpy(state.get(kind, zeros)) for kind in ("exp_avg", "exp_avg_sq"))
        return Snapshot(weights, m, v)

    def load(self, snapshot: Snapshot, step: int) -> None:
        self.gpt.load_state_dict({name: torch.tensor(weight) for name, weight in snapshot.weights.items()})
        names = {param: name for name, param in self.gpt.named_parameters()}
        for optimizer in self.optimizers:
            state = {}
            for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
                m = torch.tensor(snapshot.m[names[param]])
                if optimizer is self.muon:
                    state[number] = {"momentum_buffer": m}
                else:
                    v = torch.tensor(snapshot.v[names[param]])
                    state[number] = {"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v}
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.update = self.make_update()  # a recording made before would continue with the moments of before


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def is_finite(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(torch.isfinite(tensor).all())


@contextmanager
def translate_errors(ddp: Ddp) -> Iterator[None]:
    """Turn PyTorch's known failures into what the user can do about them."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError(
                "the device is full: more --grad-accum, a lower --batch-size or --block-size, or --recompute"
            ) from error
        if is_lost_connection(error, ddp):
            raise UserError(
                f"process {ddp.rank} of {ddp.world_size} lost the others, and stops; what was saved stays "
                f"({first_line(error)})"
            ) from error
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    with init_ddp() as ddp:
        description = str(__doc__).split("\n")[0]
        groups = {"device": device_defaults(argv)}
        flags = parse_flags(argv, TorchFlags, "train_torch.py", preset="full", description=description, **groups)
        flags = resolve_flags(flags, ddp.world_size)
        if flags.device.device == "cuda" and ddp.world_size > 1:
            check_gpus(ddp)
        configure_torch(flags.device, flags.run.threads)
        opening = open_run(flags, "torch", memory_use(flags.device, ddp.world_size))
        with translate_errors(ddp), open_on_all(opening, ddp) as run:
            engine = TorchEngine(run.model, run.training, flags.device, ddp)
            if engine.is_main:
                print_device(run, engine.flags, ddp.world_size)
            stopped_by = train(engine, run)
    if stopped_by is not None:
        return 128 + stopped_by
    if engine.is_main:
        show_sample(run.folder, "torch")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
