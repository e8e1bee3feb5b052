"""Several processes that train one model together (DistributedDataParallel), as torchrun starts them.

Each learns from its share of every micro-batch, and all hold the same weights at every step. The main one, of rank 0,
measures, reports and saves.
"""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError, shorten
from training.run import Run
from training.torch_device import first_line


@dataclass(frozen=True)
class Ddp:
    """This process among those that train together; usually it is the only one."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients that are averaged over all processes."""
        return DistributedDataParallel(module) if self.world_size > 1 else module

    def share(self, ids: Tensor) -> Tensor:
        """This process's rows of a micro-batch (B, T)."""
        return ids.tensor_split(self.world_size)[self.rank]

    def no_sync(self, module: nn.Module) -> AbstractContextManager:
        """While micro-batches add up, the processes need not exchange gradients."""
        return module.no_sync() if self.world_size > 1 else nullcontext()  # type: ignore[operator]

    def sum(self, number: Tensor) -> None:
        """Add up a number over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(number)

    def sync_stop(self, signal: int | None) -> int | None:
        """The signal that asks any of the processes to stop."""
        if self.world_size == 1:
            return signal
        signals = torch.tensor(signal or 0)
        dist.all_reduce(signals, dist.ReduceOp.MAX)
        return int(signals) or None

    def gather(self, mine: object) -> list:
        """What each of the processes has."""
        if self.world_size == 1:
            return [mine]
        everyones: list = [None] * self.world_size
        dist.all_gather_object(everyones, mine)
        return everyones


SINGLE_PROCESS = Ddp()


@contextmanager
def init_ddp() -> Iterator[Ddp]:
    """The processes that torchrun started, connected with each other while this is open; or just this one.

    Raises UserError if the environment is not torchrun's, or if the others cannot be reached.
    """
    world_size = environment_number("WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ else 1
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    rank, local_rank = environment_number("RANK", 0), environment_number("LOCAL_RANK", 0)
    environment_number("LOCAL_WORLD_SIZE", 1)
    environment_number("MASTER_PORT", 1)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(environment_fault("MASTER_ADDR"))
    if rank >= world_size:
        raise UserError(f"the environment variable RANK is {rank}, and WORLD_SIZE {world_size}: unset both")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    # The small messages between the processes go from CPU to CPU, so that no GPU waits for them.
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {rank} did not find the others ({first_line(error)})") from error
    try:
        yield Ddp(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def environment_number(name: str, at_least: int) -> int:
    """An environment variable that torchrun sets. Raises UserError."""
    value = os.environ.get(name, "")
    if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) >= at_least):
        raise UserError(environment_fault(name))
    return int(value)


def environment_fault(name: str) -> str:
    came = f"is {shorten(os.environ[name])}" if name in os.environ else "is missing"
    return f"the environment variable {name} {came}: start several processes by torchrun; for one, unset WORLD_SIZE"


def check_gpus(ddp: Ddp) -> None:
    """Raises UserError if two of the processes would work on one GPU."""
    mine = platform.node(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    if (gpus := len(set(ddp.gather(mine)))) < ddp.world_size:
        raise UserError(
            f"{ddp.world_size} processes, and {gpus} GPU{'s' * (gpus > 1)}: start one for each, or --device cpu"
        )


@contextmanager
def open_on_all(opening: AbstractContextManager[Run], ddp: Ddp) -> Iterator[Run]:
    """The run in every process. The main one alone opens it, and sends the others what it holds, except the lock."""
    if not ddp.is_main:
        message: list[Run | None] = [None]
        dist.broadcast_object_list(message)
        if message[0] is None:
            raise SystemExit(1)  # the main process says why
        yield message[0]
        return
    opened = False
    try:
        with opening as run:
            opened = True
            if ddp.world_size > 1:
                dist.broadcast_object_list([replace(run, lock=None)])
            yield run
    except Exception:
        if ddp.world_size > 1 and not opened:
            dist.broadcast_object_list([None])
        raise


def is_lost_connection(error: Exception, ddp: Ddp) -> bool:
    """Is it that another process has gone?"""
    about_others = isinstance(error, dist.DistError) or re.search("gloo|nccl|connection", str(error), re.IGNORECASE)
    return ddp.world_size > 1 and bool(about_others)
