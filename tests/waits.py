"""Counts how often Python waits for a device: values read back, and copies that are not queued."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Within it, `count` is how many operations made the calling thread, or the backward pass, wait for the device.

    Args:
        device_type: "cuda", or what is like it.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self._type, self.count = device_type, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.count += args[0].device.type == self._type
        elif name == "_to_copy" and kwargs.get("device") is not None:
            self._copied(args[0], torch.device(kwargs["device"]), None, bool(kwargs.get("non_blocking")))
        elif name == "copy_" and isinstance(args[1], Tensor):
            queued = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            self._copied(args[1], args[0].device, args[0], queued)
        return func(*args, **kwargs)

    def _copied(self, source: Tensor, to: torch.device, target: Tensor | None, queued: bool) -> None:
        kinds = {source.device.type, to.type}
        if kinds != {"cpu", self._type}:
            return
        on_cpu = source if source.device.type == "cpu" else target
        self.count += not (queued and on_cpu is not None and on_cpu.is_pinned())
