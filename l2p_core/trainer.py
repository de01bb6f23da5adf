"""The training loop: takes batches, yields metrics (arXiv 2605.12013 sections 3.2 and 4.1).

It knows no files but its own saves, and no display. Randomness depends on the step alone (`sample_randomness`), so the
step counter is the whole random state and the whole position in the data, and a run that was killed goes on bit for bit
from its last save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from . import flow, lora, sharding, training_state
from .batch import Batch as Batch
from .batch import BatchSource as BatchSource
from .freeze import freeze_all_but, is_new, trainable_names
from .model import L2PModel
from .parallel import Ranks
from .sample_randomness import draw
from .sharding import local, whole
from .step_metrics import SIGMA_EDGES as SIGMA_EDGES
from .step_metrics import StepMetrics as StepMetrics
from .step_metrics import step_metrics
from .training_config import TrainingConfig

COSINE_FLOOR = 0.1


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is no longer a finite number; the weights are those before that step."""


class Trainer:
    """Shallow-layer training of one L2PModel, in place.

    Args:
        model: on the device to train on. Weights that train become float32; under "bf16" the others bfloat16.
        config: how to train.
        empty_caption: (L, caption_dim) features of the empty text, needed for caption dropout.
        ranks: the processes that train together; every one makes all calls of this class at the same points. Of more
            than one, each has the model on its device, or under "fsdp" on the CPU.

    Raises:
        ValueError: if captions are to be dropped and there is no empty one.
    """

    def __init__(
        self,
        model: L2PModel,
        config: TrainingConfig,
        empty_caption: Tensor | None = None,
        ranks: Ranks | None = None,
    ):
        if config.caption_dropout and empty_caption is None:
            raise ValueError("Caption dropout needs the features of the empty caption.")
        self.model = model
        self.config = config
        self.step = 0
        self.ranks = ranks or Ranks(device=model.x_pad_token.device)
        self.device = self.ranks.device
        self._empty_caption = empty_caption
        self._sigmas = flow.training_sigmas(config.shift)
        self.parameters = self._prepare_parameters()
        self._network: nn.Module = model
        if self.ranks.count > 1:
            self._network = sharding.distributed(model, self.parameters, self.ranks, config)
            self.parameters = {name: p for name, p in model.named_parameters() if name in self.parameters}
        self._optimiser = self._make_optimiser()
        averaged = self.parameters if config.ema_decay else {}
        self._averages = {name: parameter.detach().clone() for name, parameter in averaged.items()}

    def run(self, batches: BatchSource) -> Iterator[StepMetrics]:
        """Train from the current step to the last, yielding after each.

        Stop by leaving the loop; `save` then keeps everything needed to go on.

        Raises:
            TrainingDiverged: when the loss or the gradient stops being finite, before any weight changes.
        """
        self.model.train()
        self.model.gradient_checkpointing = self.config.gradient_checkpointing
        while self.step < self.config.steps:
            yield self._train_step(batches)

    def save(self, path: Path | str) -> None:
        """Write weights, averages, optimiser state and step to a safetensors file, whole or not at all."""

        def write(state: Mapping[str, Tensor]) -> None:
            training_state.save(path, state, step=self.step, config=self.config)

        sharding.write_from_first(self.ranks, self._state(), write)

    def resume(self, path: Path | str) -> None:
        """Go on from a file that `save` wrote, bit for bit.

        Raises:
            ValueError: if the file is no saved run, or one of another model or with other settings than these.
        """
        self.step = training_state.load(path, self._state(), config=self.config)
        for group in self._optimiser.param_groups:
            for parameter in group["params"]:
                self._optimiser.state[parameter]["step"].fill_(float(self.step))

    def trained(self, averaged: bool = True) -> dict[str, Tensor]:
        """The trained weights by name, averaged ones where there are any and they are wanted.

        For `delta.save`; under FSDP2 cut among the processes, see `sharding.write_from_first`.
        """
        if averaged and self._averages:
            return lora.with_alphas(self._averages, self.config.lora_alpha)
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return lora.with_alphas(weights, self.config.lora_alpha)

    @contextmanager
    def averaged(self) -> Iterator[L2PModel]:
        """The model with the averaged weights in place, in evaluation mode and the run's precision; training weights
        return afterwards."""
        own = self._put_averages_in_place()
        self.model.eval()
        try:
            # Under "bf16" frozen and trained weights differ in dtype, which only autocast brings together.
            with self._autocast():
                yield self.model
        finally:
            self._put_back(own)
            self.model.train()

    def _put_averages_in_place(self) -> dict[str, Tensor]:
        """Hang the averages into the model; what hung there, for `_put_back`."""
        if self._is_sharded():
            # FSDP2 keeps the memory of its parameters to itself, so that only numbers can be exchanged.
            sharding.exchange(self.parameters, self._averages)
            return {}
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, average in self._averages.items():
            self.parameters[name].data = average
        return own

    def _put_back(self, own: dict[str, Tensor]) -> None:
        if self._is_sharded():
            sharding.exchange(self.parameters, self._averages)
        for name, data in own.items():
            self.parameters[name].data = data

    def _is_sharded(self) -> bool:
        return sharding.is_sharded(next(iter(self.parameters.values())))

    def _prepare_parameters(self) -> dict[str, Tensor]:
        """Freeze what does not train, add what the policy adds; master weights in float32."""
        config = self.config
        names = trainable_names(self.model.config, config.blocks, config.policy)
        if config.policy == "lora":
            layers = lora.adapted_layers(self.model.config, names)
            names |= lora.attach(self.model, layers, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
        freeze_all_but(self.model, names)
        frozen_dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name in names else frozen_dtype)
        return {name: parameter for name, parameter in self.model.named_parameters() if name in names}

    def _make_optimiser(self) -> torch.optim.AdamW:
        """AdamW over two groups: what conversion initialised, and what the source already knew."""
        config = self.config
        new = [p for name, p in self.parameters.items() if is_new(name)]
        known = [p for name, p in self.parameters.items() if not is_new(name)]
        assert len(new) + len(known) == len(self.parameters)
        groups = [{"params": new, "scale": 1.0}, {"params": known, "scale": config.backbone_lr_scale}]
        optimiser = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        for parameter in self.parameters.values():
            optimiser.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        return optimiser

    def _state(self) -> dict[str, Tensor]:
        """Everything a save holds, by name; loading fills these very tensors."""
        state = {f"parameter.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        state |= {f"average.{name}": average for name, average in self._averages.items()}
        for name, parameter in self.parameters.items():
            moments = self._optimiser.state[parameter]
            state |= {f"{moment}.{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return state

    def _train_step(self, batches: BatchSource) -> StepMetrics:
        started = time.perf_counter()
        errors: list[float] = []
        levels: list[float] = []
        own = self.ranks.micro_batches(self.config.accumulate)
        for micro in own:
            batch = batches.batch(self.step * self.config.accumulate + micro)
            with sharding.averaging(self._network, last=micro == own[-1]):
                batch_errors, batch_levels = self._backward(batch, len(own))
            errors += batch_errors
            levels += batch_levels
        error, sigma = self._of_all(errors), self._of_all(levels)
        self._drop_empty_gradients()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm))
        if not math.isfinite(float(norm)) or not bool(error.isfinite().all()):
            self._optimiser.zero_grad()
            raise TrainingDiverged(
                f"Training diverged at step {self.step + 1}: the loss is no longer a finite number. The last save is "
                "good; go on from it with a lower learning rate."
            )
        lr = self._set_learning_rate()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._average()
        self.step += 1
        return step_metrics(self.step, error, sigma, lr, float(norm), time.perf_counter() - started)

    def _backward(self, batch: Batch, micro_batches: int) -> tuple[list[float], list[float]]:
        """Add the gradients of one of a step's micro-batches; its samples' errors and noise levels."""
        config = self.config
        draws = [
            draw(
                config.seed,
                number,
                batch.pixels.shape[1:],
                levels=len(self._sigmas),
                dropout=config.caption_dropout,
                own_seed=own_seed if config.noise == "seeded" else None,
            )
            for number, own_seed in zip(batch.numbers, batch.seeds, strict=True)
        ]
        sigma = self._sigmas[[d.sigma_index for d in draws]]
        noise = torch.stack([d.noise for d in draws])
        captions = [
            self._empty_caption if d.drop_caption and self._empty_caption is not None else caption
            for d, caption in zip(draws, batch.captions, strict=True)
        ]
        with self._autocast():
            errors = flow.velocity_errors(
                self._network,
                batch.pixels.to(self.device, non_blocking=True),
                noise.to(self.device, non_blocking=True),
                sigma.to(self.device),
                [caption.to(self.device) for caption in captions],
            )
        (errors.mean() / micro_batches).backward()
        return errors.detach().tolist(), sigma.tolist()

    def _of_all(self, values: list[float]) -> Tensor:
        """A value of each sample of this process's, joined with those of the others; (N,) float32."""
        return torch.tensor([value for theirs in self.ranks.gather(values) for value in theirs])

    def _drop_empty_gradients(self) -> None:
        """Leave a pad token that no sample of the step needed as it is, without weight decay.

        Several processes give each of them a gradient always, of zeros where it was not needed.
        """
        for name in ("x_pad_token", "cap_pad_token"):
            token = self.parameters.get(name)
            if token is not None and token.grad is not None and not bool(whole(token.grad).any()):
                token.grad = None

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _set_learning_rate(self) -> float:
        """Linear warm-up, then constant or cosine down to a tenth, for the step about to be made."""
        config = self.config
        factor = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.decay == "cosine" and self.step >= config.warmup_steps:
            done = (self.step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
            factor = COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * done)) / 2
        for group in self._optimiser.param_groups:
            group["lr"] = config.lr * factor * group["scale"]
        return config.lr * factor

    def _average(self) -> None:
        if not self._averages:
            return
        # A young average would otherwise be mostly the untrained initialisation.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        averages = [local(average) for average in self._averages.values()]
        torch._foreach_lerp_(averages, [local(p.detach()) for p in self.parameters.values()], 1 - decay)
