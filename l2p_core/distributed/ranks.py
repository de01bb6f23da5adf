"""Several processes that train one run together, started by torchrun on one machine or several.

The processes share a step's micro-batches, so their number changes neither the content of a step nor what is saved: a
run may resume with another number of processes. Torch's own wrappers average the gradients (see `sharding`); this
module holds the process group and the few messages that the processes exchange besides.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..device import accelerator
from .launch import launched

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others within a step or a save before it treats them as lost."""

_SECONDS_BETWEEN_LOOKS = 0.1

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Another process of the run has ended or no longer answers."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among those of the run. By default it is the only one.

    Attributes:
        rank: this process's number over all machines, from 0.
        count: number of processes.
        device: that this process computes on.
        on_machine: number of processes that share this machine's memory.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=accelerator.default_device)
    on_machine: int = 1
    _store: Store | None = field(default=None, repr=False)
    _turns: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def micro_batches(self, accumulate: int) -> range:
        """This process's share of the micro-batches 0 to accumulate - 1 of every step.

        If there are more processes than micro-batches, or the numbers do not divide, several processes have the same
        micro-batch and split its samples, see `part`.
        """
        together = math.gcd(accumulate, self.count)
        return range(self.rank // (self.count // together), accumulate, together)

    def part(self, accumulate: int, batch_size: int) -> tuple[int, int]:
        """(which, of how many) equal parts of its micro-batches this process trains on.

        Raises:
            ValueError: if the samples of a step cannot be divided evenly.
        """
        parts = self.count // math.gcd(accumulate, self.count)
        if batch_size % parts:
            raise ValueError(
                f"{self.count} processes cannot share a step of {accumulate} x {batch_size} samples (accumulate x "
                f"batch_size) evenly: make accumulate or batch_size a multiple of {self.count}, or start another "
                "number of processes."
            )
        return self.rank % parts, parts

    def gather(self, mine: T) -> list[T]:
        """The values of all processes, in their order; all call this at the same point."""
        if self.count == 1:
            return [mine]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, mine)
        return values

    def gather_on_first(self, mine: T) -> list[T]:
        """The values of all processes, in the first one only, for large values; empty in the others."""
        if self.count == 1:
            return [mine]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(mine, values)
        return values or []

    def any(self, mine: bool) -> bool:
        """Whether it holds for at least one of them."""
        return any(self.gather(mine))

    def first_only(self, work: Callable[[], object]) -> None:
        """Let the first process do something that may fail while the others wait.

        Raises:
            Exception: raised by the work, in the first process.
            SystemExit: in the others if it failed: the first has printed the reason.
        """
        error: BaseException | None = None
        if self.first:
            try:
                work()
            except Exception as raised:
                error = raised
        failed = self.any(error is not None)
        if error:
            raise error
        if failed:
            raise SystemExit(1)

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Let the first process create files, then let the others run the same work, which finds them.

        Without a time limit; errors as for `first_only`.
        """
        if self.count == 1:
            return work()
        assert self._store is not None
        turn = f"turn {next(self._turns)}"
        if self.first:
            try:
                result = work()
            except BaseException:
                self._store.set(turn, "failed")
                raise
            self._store.set(turn, "done")
            return result
        while not self._store.check([turn]):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if self._store.get(turn) == b"failed":
            raise SystemExit(1)
        return work()


@contextmanager
def process_group(timeout: timedelta = TIMEOUT, device: torch.device | None = None) -> Iterator[Ranks]:
    """The processes of this run, connected within the block; only this one if it was not `launched`.

    Args:
        timeout: see `TIMEOUT`.
        device: to compute on, without an index if there are several processes; None selects a GPU if there is one.

    Raises:
        ValueError: if there are more processes on this machine than GPUs, or torch cannot connect processes.
        ProcessLost: out of the block, if another process ends or stops answering.
    """
    if not launched():
        device = device or accelerator.default_device()
        accelerator.choose(device)
        yield Ranks(device=device)
        return
    import torch.distributed as dist

    if not dist.is_available():
        raise ValueError("This build of torch cannot train in several processes: install one that can.")
    from torch.distributed import distributed_c10d as c10d
    from torch.distributed.rendezvous import rendezvous

    device = _device(int(os.environ["LOCAL_RANK"]), device or accelerator.default_device())
    accelerator.choose(device)
    try:
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        # Messages go through gloo on the CPU, whose waits end with an error when a process is gone: on Linux at once,
        # on Windows and macOS, where it is built on libuv, after `timeout`.
        own = dist.Backend.default_device_backend_map.get(device.type, "gloo")  # NCCL for CUDA
        backend = f"cpu:gloo,{device.type}:{own}" if own != "gloo" and dist.is_backend_available(own) else "gloo"
        dist.init_process_group(
            backend, store=c10d.PrefixStore("l2p", store), rank=rank, world_size=count, timeout=timeout
        )
        on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        yield Ranks(rank, count, device, on_machine, c10d.PrefixStore("l2p turns", store))
        dist.destroy_process_group()
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        raise ProcessLost(
            f"Process {os.environ['RANK']} of this run lost another process, which ended or did not answer for "
            f"{timeout.total_seconds() / 60:g} minutes: see its output. The last save is kept; start again to resume "
            "from it."
        ) from error
    finally:
        _leave_group()


def _leave_group() -> None:
    """Leave the process group if it still exists: an error has ended this process's part early."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    if not dist.is_initialized():
        return
    # The others may be in the middle of an exchange, which a normal exit waits for; torch 2.6 and newer can abort.
    abort = getattr(c10d, "_abort_process_group", dist.destroy_process_group)
    for end in (abort, dist.destroy_process_group):
        try:
            end()
            return
        except RuntimeError as error:
            # The exception that ended the block is on its way to the user and says what matters.
            logging.getLogger(__name__).debug("The process group ended with: %s", error)


def is_connection_error(error: RuntimeError) -> bool:
    """Whether torch raised this because processes could not communicate."""
    import torch.distributed as dist

    if accelerator.is_out_of_memory(error):
        return False  # NCCL and gloo report that too, as one of their own errors
    named = tuple(kind for kind in (getattr(dist, name, None) for name in ("DistError", "DistBackendError")) if kind)
    # Gloo raises a plain RuntimeError whose text names its source file; older versions raise nothing else.
    return isinstance(error, named) or any(word in str(error) for word in ("gloo", "NCCL", "Connection reset"))


def _device(local_rank: int, device: torch.device) -> torch.device:
    if not accelerator.has_own_memory(device.type):
        return device
    if device.index is not None:
        raise ValueError(
            f"Each of several processes trains on its own GPU: give only their kind, {device.type!r}, not {device}."
        )
    count = accelerator.module(device).device_count()
    if local_rank >= count:
        raise ValueError(
            f"This machine has fewer GPUs than processes were started: give torchrun --nproc-per-node {count}."
        )
    return torch.device(device.type, local_rank)
