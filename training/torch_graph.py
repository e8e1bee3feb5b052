"""A training step as a CUDA graph: recorded once, then replayed as a single launch, so the GPU never waits for Python.

Off by default (--graph), until a GPU has measured that it pays. What a recorded step reads must stay where it is in
memory: its batch is copied to where it was when it was recorded, and the learning rate is a tensor on the device.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.errors import UserError
from training.torch_device import first_line, is_out_of_memory

Step = Callable[..., tuple[Tensor, Tensor]]  # idx, targets (B, T) of each micro-batch in turn -> loss, norm


class RecordedStep:
    """A step that is recorded when it is first called, and replayed from then on with new batches.

    step: runs one update, all of it on the device
    optimizers: of the step; AdamW with capturable=True
    others: the tensors that the step changes, besides the optimizers' and their parameters

    A call raises UserError if the step cannot be recorded.
    """

    def __init__(self, step: Step, optimizers: Sequence[torch.optim.Optimizer], others: Sequence[Tensor]) -> None:
        self.step, self.optimizers, self.others = step, optimizers, others
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            self.batch = [ids.clone() for ids in batch]
            self.graph = self.record()
        for mine, new in zip(self.batch, batch, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.outputs

    def moments(self) -> list[Tensor]:
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return [tensor for state in states for tensor in state.values()]

    def record(self) -> torch.cuda.CUDAGraph:
        """Run the step a few times on the side, so that all is compiled and allocated; record it; undo it all."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        params = [param for group in groups for param in group["params"]]
        moments = self.moments()
        tensors = [*params, *self.others, *moments]
        before = [tensor.detach().clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                for _ in range(3):
                    self.step(*self.batch)
                return self.capture(side)
        finally:
            torch.cuda.synchronize()
            with torch.no_grad():
                if not moments:  # there were none yet: zeros
                    for tensor in self.moments():
                        tensor.zero_()
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
            torch.manual_seed(torch.initial_seed())  # the dropout above was drawn from it

    def capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """The graph of one step, which is recorded and not run."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.outputs = self.step(*self.batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"the CUDA graph failed: leave out --graph ({first_line(error)})") from error
        return graph
