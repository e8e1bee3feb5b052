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
import math
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from common.startup import explain_failed_imports

if __name__ == "__main__":
    explain_failed_imports()

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from common.cli import run_program
from common.cores import usable_cores
from common.errors import UserError
from numpygpt import GPTConfig, Params, check_batch, check_ids, param_shapes
from torchgpt import GPT, without_dropout
from training.batches import Batch, read_windows, step_rng
from training.config import Flags, TrainConfig
from training.flags import parse_flags
from training.loop import train
from training.memory import check_memory, memory_needed
from training.run import Run, open_run


@dataclass(frozen=True)
class DeviceFlags:
    """Where and how PyTorch computes. The defaults are those that suit the device; see `device_defaults`."""

    device: Literal["cpu", "cuda", "mps"]  # by default a CUDA GPU if there is one, else Apple's, else the CPU
    compile: bool  # torch.compile; elsewhere than on a CUDA GPU it may cost more than it gains
    graph: bool  # record a whole step as a CUDA graph and replay it: Python no longer holds up the GPU
    pad_vocab: bool  # compute the head in a multiple of 64 columns, a width that tensor cores like
    attention: Literal["sdpa", "explicit"] = "sdpa"  # PyTorch's fused kernel, or softmax(QK')V written out
    fused: bool = True  # AdamW as one kernel
    tf32: bool = True  # where a CUDA GPU multiplies float32 matrices, round their entries to TF32
    corpus_on_device: bool = True  # the training tokens move to the device once, 4 bytes each, and not batch by batch
    recompute: bool = False  # keep only the blocks' inputs for the backward pass: less memory, a third more time
    deterministic: bool = False  # a GPU adds in one order: a seed gives the same bits again, at a lower speed


@dataclass(frozen=True)
class TorchFlags(Flags):
    """All flags of train_torch.py."""

    device: DeviceFlags


@dataclass(frozen=True)
class Team:
    """The processes that train one model together, as torchrun starts them; usually just this one."""

    rank: int = 0
    size: int = 1


class Loss(nn.Module):
    """The model as training sees it: a loss. If compiled code returned the logits too, the backward pass would have to
    read a gradient of their size, all of it zeros."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.gpt(idx, targets)[1]


class TorchEngine:
    """torchgpt.py's model and PyTorch's AdamW, as training.loop wants them.

    flags: how to compute; the attribute says how it does now, if something has failed
    team: each of its processes learns from its share of every micro-batch; PyTorch's DistributedDataParallel averages
        the gradients, so all hold the same weights at every step
    """

    def __init__(self, model: GPTConfig, training: TrainConfig, flags: DeviceFlags, team: Team = Team()) -> None:
        dtype = torch.float64 if training.dtype == "float64" else torch.float32
        self.flags, self.device, self.bfloat16 = flags, torch.device(flags.device), training.dtype == "bfloat16"
        self.seed, self.grad_clip, self.ema = training.seed, training.grad_clip or math.inf, training.ema
        self.team, self.leader = team, team.rank == 0
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
        self.forward = Loss(self.gpt)
        if flags.compile:
            # All batches have one shape. A second one, of another model say, must not make it a variable: the fused
            # attention would refuse that.
            self.forward = torch.compile(self.forward, dynamic=False)
        if team.size > 1:
            self.forward = DistributedDataParallel(self.forward)
            if flags.compile:
                self.compile_together(training.batch_size // training.grad_accum)
        # A GPU has room for more than a CPU's cache, up to a quarter of a billion logits (1 GB).
        at_once = min(65_536, 2**28 // model.vocab_size) // model.block_size
        self.eval_batch_size = None if on_cpu else max(1, at_once)

        named = dict(self.gpt.named_parameters())
        self.average = {name: param.detach().clone() for name, param in named.items()} if self.ema else {}
        self.decayed = {name: param for name, param in named.items() if param.ndim >= 2}
        self.others = {name: param for name, param in named.items() if param.ndim < 2}
        groups = [
            {"params": list(self.decayed.values()), "weight_decay": training.weight_decay},
            {"params": list(self.others.values()), "weight_decay": 0.0},
        ]
        # The rate is a tensor where the step is recorded, or the recording would keep the first step's.
        self.lr = torch.tensor(training.learning_rate, device=self.device) if flags.graph else None
        self.optimizer = torch.optim.AdamW(
            groups,
            training.learning_rate if self.lr is None else self.lr,
            betas=(training.beta1, training.beta2),
            eps=1e-8,
            fused=flags.fused,
            capturable=flags.graph,
        )
        self.update = Recorded(self) if flags.graph else self.update_once
        self.source: np.ndarray | None = None  # what self.corpus is a copy of

        # To look at a number on a GPU means to wait for it. So the step notes itself where it is not finite, and from
        # then on the fused kernel leaves weights and moments alone; `check` looks, now and then.
        self.lazy = flags.fused and self.device.type == "cuda"
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.broken = torch.full_like(self.step, -1)

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        """Forward, backward, clip, update: see training.loop.Engine."""
        # Every process drops its own; the generator takes 64 bits.
        self.dropout_seed = int(step_rng(self.seed, step, "dropout").integers(2**62)) + self.team.rank
        self.step.fill_(step)
        rate = lr if self.lr is None else self.lr.fill_(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.count = sum(len(ids) * ids.shape[1] for ids, _ in micro_batches)
        batch = [
            self.to_device(ids).tensor_split(self.team.size)[self.team.rank] for pair in micro_batches for ids in pair
        ]
        while True:
            torch.manual_seed(self.dropout_seed)
            try:
                return self.update(*batch)
            except (UserError, ValueError):  # a number that is not finite, and what only the user can mend
                raise
            except Exception as error:
                if is_full(error) or self.team.size > 1 or not (self.flags.graph or self.flags.compile):
                    raise
                self.fall_back(error)

    def fall_back(self, error: Exception) -> None:
        """After a step that failed, and so updated nothing: give up torch.compile, or else the CUDA graph.

        Whatever is not the fault of either fails again without them.
        """
        if self.flags.compile and not isinstance(error, NotRecordedError):
            what, self.flags, self.forward = "torch.compile", replace(self.flags, compile=False), Loss(self.gpt)
        else:
            what, self.flags, self.update = "the CUDA graph", replace(self.flags, graph=False), self.update_once
        print(f"{what} failed, so on without it: {first_line(error)}", file=sys.stderr)

    def compile_together(self, B: int) -> None:
        """Try the compiled model with this process's share of B sequences, forward and backward. If it fails in one
        process, all give it up: later, in the midst of an update, the others could not be told."""
        shape = len(torch.empty(B).tensor_split(self.team.size)[self.team.rank]), self.gpt.config.block_size + 1
        ids, fault = torch.zeros(shape, dtype=torch.int64, device=self.device), None
        try:
            with self.forward.no_sync(), self.autocast():
                loss = self.forward(ids[:, :-1], ids[:, 1:])  # strided as the windows that are to come
            torch.autograd.grad(loss, list(self.gpt.parameters()))
        except Exception as error:
            if is_full(error):
                raise
            fault = first_line(error)
        faults: list[str | None] = [None] * self.team.size
        dist.all_gather_object(faults, fault)
        if any(faults):
            self.flags, self.forward = replace(self.flags, compile=False), DistributedDataParallel(Loss(self.gpt))
            if self.leader:
                print(f"torch.compile failed, so on without it: {next(filter(None, faults))}", file=sys.stderr)

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
                    loss = self.forward(idx, targets)
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
        if self.ema:
            self.follow()
        return loss, norm

    def follow(self) -> None:
        """Move the average of the weights towards them, see training.loop.Engine.loss."""
        weights = [param.detach() for param in self.gpt.parameters()]
        t = self.optimizer.state[self.gpt.wte.weight]["step"].to(weights[0])
        rate = (9 / (10 + t)).clamp(min=1 - self.ema)  # 1 - d
        if self.lazy:
            rate = rate * (self.broken < 0)
        averages = list(self.average.values())
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, rate)
        torch._foreach_add_(averages, change)

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
        """The tokens are checked and move to the device once, and the windows are gathered there."""
        if tokens is not self.source:
            check_ids("the training split", tokens[None], 0, self.gpt.config.vocab_size)
            self.source = tokens
            if self.flags.corpus_on_device:
                self.corpus = torch.from_numpy(np.array(tokens, np.int32)).to(self.device)
        if not self.flags.corpus_on_device:
            return read_windows(tokens, starts, T)
        windows = self.corpus.unfold(0, T + 1, 1)[self.to_device(starts)].long()
        return windows[:, :-1], windows[:, 1:]

    def loss(self, idx: np.ndarray, targets: np.ndarray) -> Tensor:
        check_batch(self.gpt.config, idx, targets)
        batch = self.to_device(idx), self.to_device(targets)
        with torch.no_grad(), without_dropout(self.gpt), full_precision():
            return functional_call(self.gpt, self.average, batch)[1]

    def to_device(self, ids: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(ids).to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16, if that was chosen; the weights keep their dtype."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def num_params(self) -> int:
        return self.gpt.num_params()

    def save(self) -> tuple[Params, Params, Params, int, Params | None]:
        m, v, t = {}, {}, 0
        for name, param in self.gpt.named_parameters():
            state = self.optimizer.state.get(param)  # nothing before the first step
            m[name] = to_numpy(state["exp_avg"] if state else torch.zeros_like(param))
            v[name] = to_numpy(state["exp_avg_sq"] if state else torch.zeros_like(param))
            t = int(state["step"]) if state else 0
        weights = {name: to_numpy(param) for name, param in self.gpt.named_parameters()}
        average = {name: to_numpy(tensor) for name, tensor in self.average.items()}
        return weights, m, v, t, average or None

    def load(self, weights: Params, m: Params, v: Params, t: int, average: Params | None = None) -> None:
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
        for name, tensor in self.average.items():
            tensor.copy_(torch.from_numpy((average or weights)[name]))
        if self.flags.graph:
            self.update = Recorded(self)  # a recording made before would go on with the moments of before


class NotRecordedError(RuntimeError):
    """A step that runs, but cannot be recorded as a CUDA graph."""


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
        moments = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
        tensors = [*engine.gpt.parameters(), *engine.average.values(), engine.broken, *moments]
        before = [tensor.detach().clone() for tensor in tensors]
        self.batch = [ids.clone() for ids in batch]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            # Leaving this stream is left to us: a recording that fails does not.
            with torch.cuda.stream(side), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                for _ in range(3):
                    engine.update_once(*self.batch)
                self.graph = self.captured(side)
        finally:
            torch.cuda.synchronize()
            with torch.no_grad():
                if not moments:  # there were none yet: zeros
                    for state in engine.optimizer.state.values():
                        for tensor in state.values():
                            tensor.zero_()
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
        torch.manual_seed(engine.dropout_seed)  # the dropout above was drawn from it

    def captured(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """The graph of one step, which is recorded and not run.

        Raises NotRecordedError if it cannot be; UserError if there is no dropout after that.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.outputs = self.engine.update_once(*self.batch)
        except Exception as error:
            if is_full(error):
                raise
            if self.engine.gpt.config.dropout > 0 and torch.__version__ < (2, 13):
                # The generator still believes that it is being recorded, and refuses to draw.
                raise UserError(
                    "the CUDA graph failed, and before PyTorch 2.13 there is no dropout after that: choose --no-graph "
                    f"({first_line(error)})"
                ) from error
            raise NotRecordedError(first_line(error)) from error
        return graph


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products without TF32 inside, so that the loss reported is the one that any engine finds."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


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


def settle(flags: TorchFlags, team: Team) -> TorchFlags:
    """The flags with what depends on several of them decided. Raises UserError for combinations that cannot be."""
    device, dtype = flags.device, flags.training.dtype
    cuda = device.device == "cuda"
    if dtype == "auto":  # bfloat16 can be emulated, but that is slow
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float32"
    if dtype == "float64" and device.device == "mps":
        raise UserError("device mps has no float64: choose --dtype float32 or --device cpu")
    if device.graph and not cuda:
        raise UserError("--graph records the work of a CUDA GPU: choose --no-graph")
    if device.graph and team.size > 1:
        raise UserError(f"--graph records the work of one process, not of {team.size}: choose --no-graph")
    unrecorded = {
        "float64": dtype == "float64",
        "a plain AdamW": not device.fused,
        "recomputed dropout": device.recompute and flags.model.dropout > 0,  # sets the generator back
    }
    if device.graph and any(unrecorded.values()):
        device = replace(device, graph=False)
        if team.rank == 0:
            print(f"{next(filter(unrecorded.get, unrecorded))} goes without a CUDA graph", file=sys.stderr)
    return replace(flags, device=device, training=replace(flags.training, dtype=dtype))


def describe(run: Run, flags: DeviceFlags, team: Team) -> None:
    """Say what was chosen; and where there is no GPU, what that means."""
    modes = ["compiled" if flags.compile else "eager", f"{'fused' if flags.fused else 'plain'} AdamW"]
    modes += ["CUDA graph"] * flags.graph + ["padded head"] * flags.pad_vocab + ["recomputed blocks"] * flags.recompute
    modes += [f"{team.size} processes"] * (team.size > 1)
    print(f"device {flags.device}, {run.training.dtype}, {', '.join(modes)}")
    made = run.checkpoint.state.step if run.checkpoint else 0
    steps, tokens = run.training.max_steps - made, run.training.batch_size * run.model.block_size
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


def check_gpus(team: Team) -> None:
    """Raises UserError if two of the processes would work on one GPU."""
    mine = platform.node(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    everyones: list[tuple[str, str] | None] = [None] * team.size
    dist.all_gather_object(everyones, mine)
    if (gpus := len(set(everyones))) < team.size:
        raise UserError(f"{team.size} processes, and {gpus} GPU{'s' * (gpus > 1)}: start one for each, or --device cpu")


@contextmanager
def join_team() -> Iterator[Team]:
    """The processes that torchrun started, connected with each other while this is open; or just this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # The small messages between the processes go from CPU to CPU, so that no GPU waits for them.
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except RuntimeError as error:
        raise UserError(f"process {os.environ['RANK']} did not find the others ({first_line(error)})") from error
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
        with open_run(flags, "torch", partial(check, flags=flags.device, team=team)) as run:
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
        flags = settle(flags, team)
        if flags.training.batch_size // flags.training.grad_accum < team.size:
            raise UserError(
                f"each of the {team.size} processes needs a sequence of every micro-batch: batch_size "
                f"{flags.training.batch_size} in {flags.training.grad_accum} parts has too few"
            )
        if flags.device.device == "cuda" and team.size > 1:
            check_gpus(team)
        # PyTorch's own number respects taskset and OMP_NUM_THREADS, but not the quota of a container.
        torch.set_num_threads(flags.run.threads or min(torch.get_num_threads(), usable_cores()))
        torch.set_float32_matmul_precision("high" if flags.device.tf32 else "highest")
        be_deterministic(flags.device.deterministic)
        try:
            with open_together(flags, team) as run:
                engine = TorchEngine(run.model, run.training, flags.device, team)
                if engine.leader:
                    describe(run, engine.flags, team)
                stopped_by = train(engine, run)
        except RuntimeError as error:
            raise explained(error, team) from error
    if stopped_by is not None:
        return 128 + stopped_by
    if engine.leader:
        from sample import show_sample  # here: it takes longer to load than --help may take

        show_sample(run.folder, "torch")
    return 0


def check(model: GPTConfig, training: TrainConfig, flags: DeviceFlags, team: Team) -> None:
    """Raises UserError, before anything is allocated or written, if the model cannot fit into the CPU's memory."""
    if flags.device == "cpu":
        explicit = flags.attention == "explicit"
        needed = memory_needed(model, training, scores_kept=explicit, recompute=flags.recompute, processes=team.size)
        check_memory(needed, "more --grad-accum, or --recompute", int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def be_deterministic(wanted: bool) -> None:
    """Let PyTorch's operations add in one order, or in whichever is fastest. Before anything runs on a GPU."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS refuses
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory


def explained(error: RuntimeError, team: Team) -> Exception:
    """The error as the user can mend it, if it is of that kind."""
    if is_full(error):
        return MemoryError(
            "the device is full: more --grad-accum, a lower --batch-size or --block-size, or --recompute"
        )
    if team.size > 1 and (isinstance(error, dist.DistError) or re.search("gloo|nccl|connection", str(error), re.I)):
        return UserError(
            f"process {team.rank} of {team.size} lost the others, and stops; what was saved stays ({first_line(error)})"
        )
    return error


def is_full(error: Exception) -> bool:
    """Is the device out of memory? On a CPU that is a RuntimeError like any other."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """What kind of error it is, and the beginning of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


if __name__ == "__main__":
    sys.exit(run_program(main))
