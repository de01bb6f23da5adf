"""The training loop: takes batches, yields metrics (arXiv 2605.12013 sections 3.2 and 4.1).

It knows no files but its own saves, and no display. Randomness depends on the step alone (`sample_randomness`), so the
step counter is the whole random state and the whole position in the data. A killed run resumes from its last save as if
it had not been interrupted: bit for bit on a CPU, and on a GPU with `deterministic`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import flow, head_fit
from ..backbone import Caption
from ..config import HEAD
from ..deltas import low_rank as lora
from ..detailer import DetailerHead
from ..distributed import sharding
from ..distributed.ranks import Ranks
from ..distributed.sharding import whole
from ..distributed.together import check_together
from ..freeze import freeze_all_but
from ..head_fit import HeadFit
from ..memory import block_store, compiled, placement
from ..memory.checkpointing import kept_blocks
from ..model import L2PModel
from ..training_config import TrainingConfig
from . import adamw, head_start, prepared
from . import state as training_state
from .batch import BatchSource
from .in_backward import InBackward
from .offload import InRam
from .on_device import OnDevice
from .prepared import Preparation, Prepared
from .step_metrics import StepMetrics, step_metrics
from .stepping import AtEnd, SummedInRam
from .weights import TrainedWeights

COSINE_FLOOR = 0.1

Working = Callable[[str, int, int], None]
"""Called with a description of the work, how much of it is done, and the total."""


class TrainingDiverged(RuntimeError):
    """The loss, a gradient or a weight is not finite.

    The weights are those before that step, unless they are stepped during the backward pass (see `in_backward`) and a
    gradient stops being finite during it.
    """


def check_possible(config: TrainingConfig, ranks: Ranks) -> None:
    """Refuse incompatible settings before anything is loaded.

    Raises:
        ValueError: as for `check_together`, and if a library or a compiler is missing.
    """
    adamw.check_installed(config)
    if config.compile:
        compiled.check_compiler(ranks.device)
    check_together(config, ranks.count, ranks.device)


class Trainer:
    """Shallow-layer training of one L2PModel, in place.

    Args:
        model: on the device to train on, or as `training.loading.load` loads it. Trained weights become float32; the
            others bfloat16 with precision "bf16", or what `frozen` says.
        config: the settings.
        empty_caption: features of the empty text, required for caption dropout.
        ranks: the processes that train together; all make every call of this class at the same points. If there are
            several, each has the model on its device, or on the device "meta" with its `read_part`.

    Raises:
        ValueError: if captions are to be dropped without an empty caption, or as for `check_possible`.
    """

    def __init__(
        self,
        model: L2PModel,
        config: TrainingConfig,
        empty_caption: Caption | None = None,
        ranks: Ranks | None = None,
    ):
        if config.caption_dropout and empty_caption is None:
            raise ValueError("Caption dropout needs the features of the empty caption.")
        check_possible(config, ranks or Ranks())
        self.model = model
        self.config = config
        self.step = 0
        self.ranks = ranks or Ranks(device=model.embedder_weight.device)
        self.device = self.ranks.device
        self._empty_caption = empty_caption
        self._last: Prepared | None = None
        self._sigmas = flow.training_sigmas(config.shift)
        self.parameters = self._prepare_parameters()
        self._network: nn.Module = model
        if self.ranks.count > 1:
            self._network = sharding.distributed(model, self.parameters, self.ranks, config)
            self.parameters = {name: p for name, p in model.named_parameters() if name in self.parameters}
        self._weights, self._stepping = self._place_weights()
        if config.compile:
            compiled.compile_blocks(model)

    def run(self, batches: BatchSource) -> Iterator[StepMetrics]:
        """Train from the current step to the last, yielding after each.

        To stop, leave the loop; `save` then stores everything needed to resume.

        Raises:
            TrainingDiverged: when the loss or the gradient stops being finite.
        """
        self.model.train()
        self.model.gradient_checkpointing = self.config.gradient_checkpointing
        self.model.kept_blocks = kept_blocks(self.model.config, self.config)
        prepare = Preparation(batches, self.config, self._sigmas, self._empty_caption, self.device)
        with prepared.ahead(prepare, self._numbers(), self.device) as ready:
            while self.step < self.config.steps:
                yield self._train_step(ready)

    def fit_head(self, batches: BatchSource, working: Working) -> HeadFit | None:
        """Before the first step: fit the Detailer Head by least squares, see `head_fit`.

        Args:
            batches: of the run, from its first micro-batch.
            working: called with a description, how much is done and the total; may raise to stop.

        Returns:
            What the fit did, which is kept if it is better; None if this run has several processes, or a head that
            cannot be fitted.

        Raises:
            ValueError: if the images are too small, or something computed from them is not finite.
        """
        config = self.model.config
        if self.ranks.count > 1 or not head_fit.can_fit(config):
            return None
        prepare = Preparation(batches, self.config, self._sigmas, self._empty_caption, self.device)
        noised = partial(working, "noising images for the head's fit")
        windows = head_start.collect(self.model, prepare, self._autocast, self.device, noised)
        head = DetailerHead(config.head, config.dim)
        prefix = f"{HEAD}."
        own = {name: master for name, master in self._weights.masters.items() if name.startswith(prefix)}
        head.load_state_dict({name.removeprefix(prefix): master.detach() for name, master in own.items()})
        done = head_fit.fit(head.to(self.device), windows, partial(working, "fitting the head"))
        if done.better:
            self._weights.begin_at({prefix + name: weight for name, weight in head.state_dict().items()})
        return done

    def save(self, path: Path | str) -> None:
        """Write weights, averages, optimiser state and step to a safetensors file, atomically."""

        def write(state: Mapping[str, Tensor]) -> None:
            training_state.save(path, state, step=self.step, config=self.config)

        sharding.write_from_first(self.ranks, self._weights.state(), write)

    def resume(self, path: Path | str) -> None:
        """Resume from a file written by `save`, which holds the complete state.

        Raises:
            ValueError: if the file is not a saved run, or belongs to another model or other settings.
        """
        self.step = training_state.load(path, self._weights.state(), config=self.config)
        self._weights.resumed(self.step)

    def trained(self, averaged: bool = True) -> dict[str, Tensor]:
        """The trained weights by name: the averages if there are any and `averaged` is set.

        For `delta.save`; with FSDP2 sharded among the processes, see `sharding.write_from_first`.
        """
        weights = self._weights.averages if averaged else {}
        weights = weights or {name: master.detach() for name, master in self._weights.masters.items()}
        return lora.with_alphas(weights, self.config.lora_alpha)

    @property
    def bytes_in_ram(self) -> int:
        """Bytes of RAM that offloading and streaming use."""
        states = self._weights.state().values() if self.config.offload else ()
        return sum(tensor.nbytes for tensor in states) + block_store.bytes_in_ram(self.model)

    @contextmanager
    def averaged(self) -> Iterator[L2PModel]:
        """The model with the averaged weights in place, in evaluation mode and the run's precision; the training
        weights are restored afterwards."""
        self.model.eval()
        sharding.let_go_of_gathered(self.model)
        try:
            # With "bf16", frozen and trained weights differ in dtype, which only autocast reconciles.
            with self._weights.place.averages_in_place(self._weights.averages), self._autocast():
                yield self.model
        finally:
            sharding.let_go_of_gathered(self.model)
            self.model.train()

    def _prepare_parameters(self) -> dict[str, Tensor]:
        """Freeze the weights that do not train, add the policy's adapters; trained weights become float32."""
        config = self.config
        weights = placement.of_run(self.model.config, config)
        names = {name for name, weight in weights.items() if weight.trains}
        block_store.store_loaded(self.model, weights, self.device)
        if config.policy == "lora":
            lora.attach(
                self.model,
                lora.layers_of(filter(lora.is_adapter, weights)),
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                seed=config.seed,
                device=self.device if self.model.read_part else self.model.embedder_weight.device,
            )
        freeze_all_but(self.model, names)
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(weights[name].loaded_as)
        return {name: parameter for name, parameter in self.model.named_parameters() if name in names}

    def _place_weights(self) -> tuple[TrainedWeights, AtEnd | SummedInRam | InBackward]:
        """The trained weights where they are optimised, and when they are stepped."""
        config, in_ram = self.config, None
        if config.offload:
            streamed = block_store.trained_linears(self.model)
            in_ram = InRam(self.parameters, self.device, config.compute_dtype, streamed)
        weights = TrainedWeights(in_ram or OnDevice(self.parameters), config, self.model.source)
        if config.steps_in_backward:
            return weights, InBackward(weights)
        return weights, SummedInRam(weights, in_ram) if in_ram else AtEnd(weights)

    def _numbers(self) -> Iterator[int]:
        """The numbers in the run of this process's micro-batches, from the current step to the last."""
        accumulate = self.config.accumulate
        for step in range(self.step, self.config.steps):
            yield from (step * accumulate + micro for micro in self.ranks.micro_batches(accumulate))

    def _train_step(self, ready: Iterator[Prepared]) -> StepMetrics:
        started = time.perf_counter()
        errors: list[Tensor] = []
        levels: list[float] = []
        own = self.ranks.micro_batches(self.config.accumulate)
        lr = self._learning_rate()
        self._weights.begin(self.step, lr)
        self._stepping.begin()
        for micro in own:
            batch = next(ready)
            with sharding.averaging(self._network, last=micro == own[-1]):
                errors.append(self._backward(batch, len(own)))
            levels += batch.sigma.tolist()
        clipped, needed = self._stepping.clip(), self._needed()
        used = torch.stack(list(needed.values())) if needed else torch.empty(0)
        # The step's only wait for the device.
        *own_errors, (norm,), tokens = _read([*errors, clipped, used])
        error, sigma = self._of_all([value for values in own_errors for value in values]), self._of_all(levels)
        if not math.isfinite(norm) or not bool(error.isfinite().all()):
            self._weights.drop_gradients()
            raise TrainingDiverged(
                f"Training diverged at step {self.step + 1}: the loss or its gradient is no longer a finite number."
            )
        for name, token in zip(needed, tokens, strict=True):
            if not token:  # excluded from the step, including its weight decay
                self.parameters[name].grad = None
        self._stepping.step()
        self.step += 1
        return step_metrics(self.step, error, sigma, lr, norm, time.perf_counter() - started)

    def _backward(self, batch: Prepared, micro_batches: int) -> Tensor:
        """Add the gradients of one of a step's micro-batches; returns its samples' errors (B,), on the device."""
        self._last = batch
        errors = self._errors(batch, self._network)
        self._stepping.losses(errors)
        (errors.mean() / micro_batches).backward()
        return errors.detach()

    def _needed(self) -> dict[str, Tensor]:
        """Whether any sample needed each of the pad tokens, which always have a gradient if processes average it."""
        pads = self.model.source.pads if self.ranks.count > 1 else ()
        gradients = {name: self.parameters[name].grad for name in pads if name in self.parameters}
        return {name: whole(gradient).any() for name, gradient in gradients.items() if gradient is not None}

    def loss_now(self) -> float:
        """The mean loss, over all processes, of the last micro-batch, with the noise it had then and the current
        weights; all processes call this after a step."""
        assert self._last is not None, "there has been no step"
        self.model.eval()
        try:
            with torch.no_grad():
                errors = self._errors(self._last, self.model)
        finally:
            self.model.train()
        return float(self._of_all(errors.tolist()).mean())

    def state(self) -> dict[str, Tensor]:
        """The tensors of a save, by name: weights, averages and moments; with FSDP2 sharded among the processes."""
        return self._weights.state()

    def _errors(self, batch: Prepared, network: nn.Module) -> Tensor:
        """Each sample's error, (B,) on the device."""
        pixels, noise, sigma, captions = batch.to(self.device)
        with self._autocast():
            return flow.velocity_errors(network, pixels, noise, sigma, captions)

    def _of_all(self, values: list[float]) -> Tensor:
        """The values of this process's samples joined with those of the others; (N,) float32."""
        return torch.tensor([value for theirs in self.ranks.gather(values) for value in theirs])

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return nullcontext()
        # Each weight is used once per pass: caching its bfloat16 copy would only take memory.
        return torch.autocast(self.device.type, self.config.compute_dtype, cache_enabled=False)

    def _learning_rate(self) -> float:
        """Linear warm-up, then constant or cosine down to a tenth, for the step about to be made."""
        config = self.config
        factor = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.decay == "cosine" and self.step >= config.warmup_steps:
            done = (self.step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
            factor = COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * done)) / 2
        return config.lr * factor


def _read(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The elements of small tensors, with one wait for each of their devices."""
    flat = [tensor.detach().flatten().float() for tensor in tensors]
    devices = {tensor.device for tensor in flat}
    joined = {device: torch.cat([tensor for tensor in flat if tensor.device == device]) for device in devices}
    elements = {device: iter(tensor.tolist()) for device, tensor in joined.items()}
    return [list(islice(elements[tensor.device], len(tensor))) for tensor in flat]
