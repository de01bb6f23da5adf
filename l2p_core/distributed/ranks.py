"""Several processes that train one run together, as torchrun starts them, on one machine or several.

A step's micro-batches are shared out among the processes, so that how many there are changes neither what a step is
made of nor what is saved: a run may go on with another number of them. Gradients are averaged by torch's own wrappers
(see `sharding`); what is here are the process group, and the few words that the processes have to exchange besides.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..device import accelerator

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others within a step or a save before it gives them up."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_BETWEEN_LOOKS = 0.1

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Another process of the run has ended or no longer answers."""


@dataclass(frozen=True)
class Ranks:
    """Which of the processes of a run this one is. By default the only one, with nobody to talk to.

    Attributes:
        rank: this process's number over all machines, from 0.
        count: how many there are.
        device: what this process computes on.
        on_machine: how many of them share this machine's memory.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=accelerator.default_device)
    on_machine: int = 1
    _store: Store | None = field(default=None, repr=False)
    _turns: Iterator[int] = field(default_factory=lambda: iter(range(sys.maxsize)), repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def micro_batches(self, accumulate: int) -> range:
        """This process's share of the micro-batches 0 to accumulate - 1 of every step.

        Where there are more processes than micro-batches, or their number does not divide, several processes have the
        same one and split its samples, see `part`.
        """
        together = math.gcd(accumulate, self.count)
        return range(self.rank // (self.count // together), accumulate, together)

    def part(self, accumulate: int, batch_size: int) -> tuple[int, int]:
        """(which, of how many) equal parts of its micro-batches this process trains on.

        Raises:
            ValueError: if the samples of a step cannot be shared out evenly.
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
        """Everyone's value, in the order of the processes; they all call this at the same point."""
        if self.count == 1:
            return [mine]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, mine)
        return values

    def gather_on_first(self, mine: T) -> list[T]:
        """Everyone's value in the first process, for what is large; nothing in the others."""
        if self.count == 1:
            return [mine]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(mine, values)
        return values or []

    def any(self, mine: bool) -> bool:
        """Whether it is so for one of them at least."""
        return any(self.gather(mine))

    def first_only(self, work: Callable[[], object]) -> None:
        """Let the first process do something that may fail, while the others wait.

        Raises:
            Exception: what the work raised, in the first process.
            SystemExit: in the others, when it failed: the first has said why.
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
        """Let the first process do something that makes files, then the others the same, which find them made.

        However long it takes; errors as for `first_only`.
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


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, has started this as one of several processes."""
    return all(name in os.environ for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def speaks() -> bool:
    """Whether this process shows what goes on: the only one, or the first."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def process_group(timeout: timedelta = TIMEOUT, device: torch.device | None = None) -> Iterator[Ranks]:
    """The processes of this run, connected for the length of the block; just this one if it was not `launched`.

    Args:
        timeout: see `TIMEOUT`.
        device: to compute on, without an index where there are several processes; None is a GPU if there is one.

    Raises:
        ValueError: if there are more processes on this machine than it has GPUs, or torch cannot connect processes.
        ProcessLost: out of the block, when another process ends or stops answering.
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
        # Words go through gloo on the CPU, whose waits end with an error when a process is gone: on Linux at once, on
        # Windows and macOS, where it is built on libuv, when `timeout` is over.
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
            f"Process {os.environ['RANK']} of this run has lost another one, which has ended or did not answer for "
            f"{timeout.total_seconds() / 60:g} minutes: see what that one says. What was saved last is kept; start "
            "again to resume from it."
        ) from error
    finally:
        _leave_group()


def _leave_group() -> None:
    """Let go of the process group, if it is there still: something has ended this process's part before its time."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    if not dist.is_initialized():
        return
    # The others may be in the middle of an exchange, which a usual end waits for; since torch 2.6 there is another.
    abort = getattr(c10d, "_abort_process_group", dist.destroy_process_group)
    for end in (abort, dist.destroy_process_group):
        try:
            end()
            return
        except RuntimeError as error:
            # What has ended the block is on its way to the user, and is what there is to say.
            logging.getLogger(__name__).debug("The process group ended with: %s", error)


def is_connection_error(error: RuntimeError) -> bool:
    """Whether torch raised this because processes could not talk to each other."""
    import torch.distributed as dist

    if accelerator.is_out_of_memory(error):
        return False  # NCCL and gloo report that too, as one of their own errors
    named = tuple(kind for kind in (getattr(dist, name, None) for name in ("DistError", "DistBackendError")) if kind)
    # Gloo raises a plain RuntimeError whose text names its source file, and of older versions only that.
    return isinstance(error, named) or any(word in str(error) for word in ("gloo", "NCCL", "Connection reset"))


def _device(local_rank: int, device: torch.device) -> torch.device:
    if not accelerator.has_own_memory(device.type):
        return device
    if device.index is not None:
        raise ValueError(
            f"Several processes train on a GPU each: name their kind alone, {device.type!r} rather than {device}."
        )
    count = accelerator.module(device).device_count()
    if local_rank >= count:
        raise ValueError(
            f"More processes were started on this machine than it has GPUs: give torchrun --nproc-per-node {count}."
        )
    return torch.device(device.type, local_rank)
