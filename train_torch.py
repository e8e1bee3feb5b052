"""Train a GPT with PyTorch: by default the full 10.8M model on Tiny Shakespeare, on a GPU if there is one.

    python train_torch.py
    python train_torch.py --preset small --device cpu
    python train_torch.py --resume runs/numpy-small           # go on with a run that train_numpy.py began
    torchrun --standalone --nproc_per_node=2 train_torch.py   # several GPUs, or with --device cpu several processes
    python train_torch.py --help

The model is torchgpt.py. What stands here is how it learns from one batch; when, from which one, at what rate, and what
is measured and kept, is training/loop.py, which train_numpy.py runs just the same.
"""

import argparse
import dataclasses
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data import UserError
from numpygpt import GPTConfig, Params, param_shapes
from torchgpt import GPT, without_dropout
from training.batches import Batch, step_rng
from training.command import parse_flags, run_program
from training.config import Flags, TrainConfig
from training.loop import train
from training.run import Run, open_run


@dataclass(frozen=True)
class DeviceFlags:
    """Where and how PyTorch computes. The defaults are those that suit the device; see `device_defaults`."""

    device: Literal["cpu", "cuda", "mps"]  # by default a CUDA GPU if there is one, else Apple's, else the CPU
    compile: bool  # torch.compile; elsewhere than on a CUDA GPU it may cost more than it gains
    graph: bool  # record a whole step as a CUDA graph and replay it: Python no longer holds up the GPU
    pad_vocab: bool  # compute the head in a multiple of 64 columns, a width that tensor cores like
    fused: bool = True  # AdamW as one kernel
    tf32: bool = True  # where a CUDA GPU multiplies float32 matrices, round their entries to TF32
    recompute: bool = False  # keep only the blocks' inputs for the backward pass: less memory, a third more time


@dataclass(frozen=True)
class TorchFlags(Flags):
    """All flags of train_torch.py."""

    device: DeviceFlags


@dataclass(frozen=True)
class Team:
    """The processes that train one model together, as torchrun starts them; usually just this one."""

    rank: int = 0
    size: int = 1


class TorchEngine:
    """torchgpt.py's model and PyTorch's AdamW, as training.loop wants them.

    flags: how to compute
    team: each of its processes learns from its share of every micro-batch; PyTorch's DistributedDataParallel averages
        the gradients, so all hold the same weights at every step
    """

    def __init__(self, model: GPTConfig, training: TrainConfig, flags: DeviceFlags, team: Team = Team()) -> None:
        dtype = torch.float64 if training.dtype == "float64" else torch.float32
        self.device, self.bfloat16 = torch.device(flags.device), training.dtype == "bfloat16"
        self.seed, self.grad_clip = training.seed, training.grad_clip or math.inf
        self.team, self.leader = team, team.rank == 0
        self.gpt = GPT(
            model, seed=training.seed, dtype=dtype, pad_vocab_to=64 if flags.pad_vocab else 1, recompute=flags.recompute
        ).to(self.device)
        self.forward = torch.compile(self.gpt) if flags.compile else self.gpt
        if team.size > 1:
            self.forward = DistributedDataParallel(self.forward)

        named = dict(self.gpt.named_parameters())
        self.decayed = {name: param for name, param in named.items() if param.ndim >= 2}
        self.others = {name: param for name, param in named.items() if param.ndim < 2}
        groups = [
            {"params": list(self.decayed.values()), "weight_decay": training.weight_decay},
            {"params": list(self.others.values()), "weight_decay": 0.0},
        ]
        # The rate is a tensor where the step is recorded, or the recording would keep the first step's.
        lr = torch.tensor(training.learning_rate, device=self.device) if flags.graph else training.learning_rate
        betas = (training.beta1, training.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr, betas=betas, eps=1e-8, fused=flags.fused, capturable=flags.graph)
        self.update = Recorded(self) if flags.graph else self.update_once
        self.corpus: Tensor | None = None

        # To look at a number on a GPU means to wait for it. So the step notes itself where it is not finite, and from
        # then on the fused kernel leaves weights and moments alone; `check` looks, now and then.
        self.lazy = flags.fused and self.device.type != "cpu"
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.broken = torch.full_like(self.step, -1)

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        """Forward, backward, clip, update: see training.loop.Engine."""
        self.gpt.train()
        # Every process drops its own; the generator takes 64 bits.
        torch.manual_seed(int(step_rng(self.seed, step, "dropout").integers(2**62)) + self.team.rank)
        self.step.fill_(step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.count = sum(len(ids) * ids.shape[1] for ids, _ in micro_batches)
        batch = [
            self.to_device(ids).tensor_split(self.team.size)[self.team.rank] for pair in micro_batches for ids in pair
        ]
        try:
            return self.update(*batch)
        except Exception as error:
            if self.team.size > 1 or (self.forward is self.gpt and self.update == self.update_once):
                raise
            # Whatever is not the fault of the compiler or the recorder fails again without them; nothing was updated.
            reason = (str(error).splitlines() or [""])[0]
            what = "torch.compile" if self.update == self.update_once else "the CUDA graph"
            print(f"{what} failed, so on without it: {type(error).__name__}: {reason}", file=sys.stderr)
            self.forward, self.update = self.gpt, self.update_once
            return self.update(*batch)

    def update_once(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """One step, all of it on the device. batch: idx, targets (B, T) of each micro-batch in turn -> loss, norm.

        Raises ValueError if the step is not finite and looking costs nothing; else `check` does.
        """
        self.optimizer.zero_grad()
        pairs = list(zip(batch[::2], batch[1::2], strict=True))
        losses = []
        for number, (idx, targets) in enumerate(pairs, start=1):
            with self.gradients_stay_here() if number < len(pairs) else nullcontext():
                with self.autocast():
                    _, loss = self.forward(idx, targets)
                loss = loss * (targets.numel() / self.count)  # so that the parts add up to the mean over all
                (loss * self.team.size).backward()  # the processes' gradients are averaged, and shall be added
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        if self.team.size > 1:
            dist.all_reduce(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), self.grad_clip)
        finite = torch.isfinite(loss + norm)
        if self.lazy:
            self.broken.copy_(torch.where((self.broken < 0) & ~finite, self.step, self.broken))
            self.optimizer.found_inf, self.optimizer.grad_scale = (self.broken >= 0).float(), None
        elif not finite:
            bad = [name for name, param in self.gpt.named_parameters() if not torch.isfinite(param.grad).all()]
            raise ValueError(f"not finite: {f'the gradient of {bad[0]}' if bad else 'the loss, or the norm'}")
        self.optimizer.step()
        return loss, norm

    def check(self) -> None:
        """Raises ValueError that names the first step that was not finite. Waits for the device."""
        if self.lazy and (step := int(self.broken)) >= 0:
            raise ValueError(f"not finite: the loss or a gradient at step {step}, and no weight has changed since")

    def agree(self, stop: int | None) -> int | None:
        if self.team.size == 1:
            return stop
        signals = torch.tensor(stop or 0)
        dist.all_reduce(signals, dist.ReduceOp.MAX)
        return int(signals) or None

    def gradients_stay_here(self) -> AbstractContextManager:
        """While micro-batches add up, processes need not exchange gradients."""
        return self.forward.no_sync() if self.team.size > 1 else nullcontext()

    def windows(self, tokens: np.ndarray, starts: np.ndarray, T: int) -> Batch:
        """The tokens move to the device once, and the windows are gathered there."""
        if self.corpus is None:
            self.corpus = torch.from_numpy(np.array(tokens)).to(self.device)
            self.offsets = torch.arange(T + 1, device=self.device)
        windows = self.corpus[self.to_device(starts)[:, None] + self.offsets].long()
        return windows[:, :-1], windows[:, 1:]

    def loss(self, idx: np.ndarray, targets: np.ndarray) -> float:
        with torch.no_grad(), without_dropout(self.gpt), self.autocast():
            return self.gpt(self.to_device(idx), self.to_device(targets))[1].item()

    def to_device(self, ids: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(ids).to(self.device, non_blocking=True)

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


class Recorded:
    """A step that is recorded as a CUDA graph when it is first called, and replayed from then on with new batches.

    A replay is one launch, whatever the number of kernels: the GPU never waits for Python. What the step reads must
    therefore stay where it is in memory; its batch is copied to where it was when it was recorded.
    """

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.graph = engine, None

    def __call__(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            self.record(batch)
        for mine, new in zip(self.batch, batch, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.outputs

    def record(self, batch: Sequence[Tensor]) -> None:
        """Run the step a few times on the side, so that all is compiled and allocated; record it; undo it all."""
        engine = self.engine
        tensors = [*engine.gpt.parameters(), engine.broken]
        tensors += [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
        before = [tensor.detach().clone() for tensor in tensors]
        self.batch = [ids.clone() for ids in batch]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(3):
                    engine.update_once(*self.batch)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outputs = engine.update_once(*self.batch)
            self.graph = graph
        finally:
            with torch.no_grad():
                if len(before) == 1 + len(list(engine.gpt.parameters())):  # there were no moments yet: zeros
                    for state in engine.optimizer.state.values():
                        for tensor in state.values():
                            tensor.zero_()
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def device_defaults(argv: Sequence[str] | None, team: Team) -> DeviceFlags:
    """What suits the device that the command line names, or else the best there is. Raises UserError."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--device", nargs="?")
    asked = first_look.parse_known_args(argv)[0].device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind in available if available[kind]]
    if asked in available and asked not in there:
        raise UserError(f"device {asked} is not available here: choose {' or '.join(there)}")
    kind = asked if asked in available else there[0]
    cuda = kind == "cuda"
    # Triton, which torch.compile needs on a GPU, is not made for Windows.
    return DeviceFlags(kind, cuda and platform.system() != "Windows", cuda and team.size == 1, pad_vocab=cuda)


def choose_dtype(flags: TorchFlags) -> TorchFlags:
    """The flags with dtype decided. Raises UserError for combinations that cannot be."""
    cuda, dtype = flags.device.device == "cuda", flags.training.dtype
    if dtype == "auto":
        dtype = "bfloat16" if cuda and torch.cuda.is_bf16_supported() else "float32"
    if dtype == "float64" and flags.device.device == "mps":
        raise UserError("device mps has no float64: choose --dtype float32 or --device cpu")
    if flags.device.graph and not (cuda and flags.device.fused):
        raise UserError("--graph records the work of a CUDA GPU with a fused AdamW: choose --no-graph")
    return dataclasses.replace(flags, training=dataclasses.replace(flags.training, dtype=dtype))


def describe(run: Run, flags: DeviceFlags, team: Team) -> None:
    """Say what was chosen; and where there is no GPU, what that means."""
    modes = ["compiled" if flags.compile else "eager", f"{'fused' if flags.fused else 'plain'} AdamW"]
    modes += ["CUDA graph"] * flags.graph + ["padded head"] * flags.pad_vocab + ["recomputed blocks"] * flags.recompute
    modes += [f"{team.size} processes"] * (team.size > 1)
    print(f"device {flags.device}, {run.training.dtype}, {', '.join(modes)}")
    steps, tokens = run.training.max_steps, run.training.batch_size * run.model.block_size
    hours = steps * tokens * flops_per_token(run.model) / 1e11 / 3600
    if flags.device == "cpu" and hours > 0.5:
        print(
            f"no GPU: {steps:,} steps of {tokens:,} tokens would take about {hours:,.0f} hours at 100 GFLOP/s, a rate "
            "that two CPU cores may reach; --preset small takes minutes"
        )


def flops_per_token(model: GPTConfig) -> int:
    """Floating-point operations to learn from one token: 6 for each weight of a matrix product, and attention's.

    Chowdhery et al. 2022 (PaLM), appendix B; position embeddings multiply nothing and are left out.
    """
    weights = sum(math.prod(shape) for name, shape in param_shapes(model).items() if name != "wpe.weight")
    return 6 * weights + 12 * model.n_layer * model.n_embd * model.block_size


def check_memory(run: Run, flags: DeviceFlags, team: Team) -> None:
    """Raises UserError, before anything is allocated, if the model cannot fit into the CPU's memory."""
    if flags.device != "cpu" or not hasattr(os, "sysconf"):
        return
    model, size = run.model, 8 if run.training.dtype == "float64" else 4
    state = 4 * sum(math.prod(shape) for shape in param_shapes(model).values())  # weights, gradients, both moments
    rows = -(-run.training.batch_size // run.training.grad_accum) * model.block_size
    # What the backward pass needs of each block: some 16 arrays of C channels; and three of the logits' size.
    kept = 1 if flags.recompute else 16 * model.n_layer
    needed = size * (state + rows * (kept * model.n_embd + 3 * model.vocab_size))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // team.size
    if needed > there:
        raise UserError(
            f"this needs about {needed / 2**30:.0f} GB of memory, and a process here has {there / 2**30:.0f}: choose a "
            "smaller --preset, more --grad-accum, a lower --batch-size or --block-size, or --recompute"
        )


@contextmanager
def join_team() -> Iterator[Team]:
    """The processes that torchrun started, connected with each other while this is open; or just this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # The small messages between the processes go from CPU to CPU, so that no GPU waits for them.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def open_together(flags: TorchFlags, team: Team) -> Iterator[Run]:
    """The run, in every process of the team. The leader alone opens it, and tells the others what it holds."""
    if team.rank > 0:
        message: list[Run | None] = [None]
        dist.broadcast_object_list(message)
        if message[0] is None:
            raise SystemExit(1)  # the leader says why
        yield message[0]
        return
    opened = False
    try:
        with open_run(flags, engine="torch") as run:
            opened = True
            if team.size > 1:
                dist.broadcast_object_list([run])
            yield run
    except Exception:
        if team.size > 1 and not opened:
            dist.broadcast_object_list([None])
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    with join_team() as team:
        groups = {"device": device_defaults(argv, team)}
        flags = parse_flags(
            argv, TorchFlags, "train_torch.py", preset="full", description=__doc__.split("\n")[0], **groups
        )
        flags = choose_dtype(flags)
        if flags.training.batch_size // flags.training.grad_accum < team.size:
            raise UserError(
                f"each of the {team.size} processes needs a sequence of every micro-batch: batch_size "
                f"{flags.training.batch_size} in {flags.training.grad_accum} parts has too few"
            )
        if flags.run.threads is not None:
            torch.set_num_threads(flags.run.threads)
        torch.set_float32_matmul_precision("high" if flags.device.tf32 else "highest")
        with open_together(flags, team) as run:
            try:
                check_memory(run, flags.device, team)
                engine = TorchEngine(run.model, run.training, flags.device, team)
                if engine.leader:
                    describe(run, flags.device, team)
                stopped_by = train(engine, run)
            except RuntimeError as error:
                raise explained(error, team) from error
    if stopped_by is not None:
        return 128 + stopped_by
    if engine.leader:
        from sample import show_sample  # here: it takes longer to load than --help may take

        show_sample(run.folder, "torch")
    return 0


def explained(error: RuntimeError, team: Team) -> Exception:
    """The error as the user can mend it, if it is of that kind."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return MemoryError(
            "the device is full: more --grad-accum, a lower --batch-size or --block-size, or --recompute"
        )
    if team.size > 1:
        reason = (str(error).splitlines() or [""])[0]
        return UserError(
            f"process {team.rank} of {team.size} lost the others, and stops; what was saved stays ({reason})"
        )
    return error


if __name__ == "__main__":
    sys.exit(run_program(main))
