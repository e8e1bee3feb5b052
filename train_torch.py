"""Train a GPT with PyTorch: by default the full 10.8M model on Tiny Shakespeare, on a GPU if there is one.

    python train_torch.py
    python train_torch.py --preset small --device cpu
    python train_torch.py --resume runs/numpy-small           # go on with a run that train_numpy.py began
    python train_torch.py --help

The model is torchgpt.py. What stands here is how it learns from one batch; when, from which one, at what rate, and what
is measured and kept, is training/loop.py, which train_numpy.py runs just the same.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data import UserError
from numpygpt import GPTConfig, Params
from torchgpt import GPT, without_dropout
from training.batches import Batch, step_rng
from training.command import parse_flags, run_program
from training.config import Flags, TrainConfig
from training.loop import train
from training.run import open_run


@dataclass(frozen=True)
class DeviceFlags:
    """Where and how PyTorch computes."""

    device: Literal["cpu", "cuda", "mps"] | None = None  # None: a CUDA GPU if there is one, else Apple's, else the CPU
    compile: bool | None = None  # torch.compile; None: on a CUDA GPU only, elsewhere it may cost more than it gains
    fused: bool = True  # AdamW as one kernel


@dataclass(frozen=True)
class TorchFlags(Flags):
    """All flags of train_torch.py."""

    device: DeviceFlags = field(default_factory=DeviceFlags)


class TorchEngine:
    """torchgpt.py's model and PyTorch's AdamW, as training.loop wants them.

    device: where the model lives; the batches come to it
    compiled: let the training steps go through torch.compile; if that fails, they do not
    fused: let AdamW be one kernel
    """

    def __init__(
        self, model: GPTConfig, training: TrainConfig, device: torch.device, *, compiled: bool, fused: bool
    ) -> None:
        dtype = torch.float64 if training.dtype == "float64" else torch.float32
        self.gpt = GPT(model, seed=training.seed, dtype=dtype).to(device)
        self.forward = torch.compile(self.gpt) if compiled else self.gpt
        self.device, self.bfloat16 = device, training.dtype == "bfloat16"
        self.seed, self.grad_clip = training.seed, training.grad_clip or math.inf

        named = dict(self.gpt.named_parameters())
        self.decayed = {name: param for name, param in named.items() if param.ndim >= 2}
        self.others = {name: param for name, param in named.items() if param.ndim < 2}
        groups = [
            {"params": list(self.decayed.values()), "weight_decay": training.weight_decay},
            {"params": list(self.others.values()), "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(training.beta1, training.beta2), eps=1e-8, fused=fused)

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        """Forward, backward, clip, update: see training.loop.Engine."""
        try:
            loss = self.backward(step, micro_batches)
        except Exception as error:
            if self.forward is self.gpt:
                raise
            reason = (str(error).splitlines() or [""])[0]
            print(f"torch.compile failed, so on without it: {type(error).__name__}: {reason}", file=sys.stderr)
            self.forward = self.gpt
            loss = self.backward(step, micro_batches)  # the same step once more: nothing was updated yet
        norm = torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), self.grad_clip)
        if not torch.isfinite(loss + norm):
            broken = [name for name, param in self.gpt.named_parameters() if not torch.isfinite(param.grad).all()]
            raise ValueError(f"not finite: {f'the gradient of {broken[0]}' if broken else 'the loss, or the norm'}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return loss.item(), norm.item()

    def backward(self, step: int, micro_batches: Sequence[Batch]) -> Tensor:
        """The mean loss of the whole batch; its gradients are left in the parameters."""
        count = sum(targets.size for _, targets in micro_batches)
        self.gpt.train()
        self.optimizer.zero_grad()
        torch.manual_seed(int(step_rng(self.seed, step, "dropout").integers(2**63)))
        losses = []
        for idx, targets in micro_batches:
            with self.autocast():
                _, loss = self.forward(self.to_device(idx), self.to_device(targets))
            loss = loss * (targets.size / count)  # so that the parts add up to the mean over all
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def loss(self, idx: np.ndarray, targets: np.ndarray) -> float:
        with torch.no_grad(), without_dropout(self.gpt), self.autocast():
            return self.gpt(self.to_device(idx), self.to_device(targets))[1].item()

    def to_device(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids).to(self.device)

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16, if that was chosen; the weights keep their dtype."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def num_params(self) -> int:
        return self.gpt.num_params()

    def save(self) -> tuple[Params, Params, Params, int]:
        m, v, t = {}, {}, 0
        for name, param in self.gpt.named_parameters():
            state = self.optimizer.state.get(param)  # nothing before the first step
            m[name] = to_numpy(state["exp_avg"] if state else torch.zeros_like(param))
            v[name] = to_numpy(state["exp_avg_sq"] if state else torch.zeros_like(param))
            t = int(state["step"]) if state else 0
        return {name: to_numpy(param) for name, param in self.gpt.named_parameters()}, m, v, t

    def load(self, weights: Params, m: Params, v: Params, t: int) -> None:
        self.gpt.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        state = {
            number: {
                "step": torch.tensor(float(t)),
                "exp_avg": torch.from_numpy(m[name]),
                "exp_avg_sq": torch.from_numpy(v[name]),
            }
            for number, name in enumerate([*self.decayed, *self.others])  # as the groups count them
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def choose(flags: TorchFlags) -> tuple[torch.device, TorchFlags]:
    """The device, and the flags with everything that was left open decided. Raises UserError for what is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = flags.device.device or next(kind for kind, there in available.items() if there)
    if not available[kind]:
        raise UserError(
            f"device {kind} is not available here: choose {' or '.join(k for k in available if available[k])}"
        )
    dtype = flags.training.dtype
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if dtype == "float64" and kind == "mps":
        raise UserError("device mps has no float64: choose --dtype float32 or --device cpu")
    compiled = kind == "cuda" if flags.device.compile is None else flags.device.compile
    return torch.device(kind), dataclasses.replace(
        flags,
        training=dataclasses.replace(flags.training, dtype=dtype),
        device=dataclasses.replace(flags.device, device=kind, compile=compiled),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    flags = parse_flags(argv, TorchFlags, "train_torch.py", preset="full", description=__doc__.split("\n")[0])
    device, flags = choose(flags)
    if flags.run.threads is not None:
        torch.set_num_threads(flags.run.threads)

    with open_run(flags, engine="torch") as run:
        compiled, fused = flags.device.compile, flags.device.fused
        engine = TorchEngine(run.model, run.training, device, compiled=compiled, fused=fused)
        modes = f"{'compiled' if compiled else 'eager'}, {'fused' if fused else 'plain'} AdamW"
        print(f"device {device.type}, {run.training.dtype}, {modes}")
        stopped_by = train(engine, run)
    if stopped_by is not None:
        return 128 + stopped_by

    from sample import show_sample  # here: it takes longer to load than --help may take

    show_sample(run.folder, "torch")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
