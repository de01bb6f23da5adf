"""The user's language model, through the optional transformers library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..l2p_core.device.accelerator import default_device
from ..l2p_core.files.sampled_hash import add_samples
from ..l2p_core.files.shards import files_of
from ..l2p_core.prompts.writer import CHATML_MARK, MAX_TOKENS, TEMPERATURE, TOP_K, TOP_P, Request, Turn, chatml


class ModelWriter:
    """A `Writer` of l2p_core.prompts. The model is loaded on first use.

    Args:
        model: a folder as transformers saves it, or one with `text_encoder` and `tokenizer` in it, as Z-Image is
            published.
        device: where it runs; None is the GPU if there is one.
        temperature: of sampling.
        at_once: requests in a batch. Each has its own seed and does not depend on the others, apart from rounding.
        download: whether `model` is a name on the Hugging Face hub, to be downloaded unless it is on disk already.

    Raises:
        ValueError: if transformers is missing or too old, or the folder is not that of a language model.
    """

    def __init__(
        self,
        model: str,
        *,
        device: torch.device | str | None = None,
        temperature: float = TEMPERATURE,
        at_once: int = 1,
        download: bool = False,
    ):
        self._transformers = _transformers()
        self._folders = (model, model) if download else _folders(Path(model).expanduser())
        self.name = model if download else _identity(Path(self._folders[0]))
        self.at_once = at_once
        self._temperature, self._download = temperature, download
        self._device = torch.device(device) if device else default_device()
        self._loaded: tuple[Any, Any] | None = None

    @torch.inference_mode()
    def write(self, requests: Sequence[Request]) -> list[str]:
        """The model's answers; see `Writer`."""
        if self._loaded is None:
            self._loaded = self._load()
        model, tokenizer = self._loaded
        texts = [_conversation(tokenizer, request.turns) for request in requests]
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        longest = max(map(len, tokens))
        stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
        padding = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
        # On the left, so that all answers begin at the same place; the mask hides it.
        ids = torch.tensor([[padding] * (longest - len(row)) + row for row in tokens])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens])
        made = model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._transformers.GenerationConfig(
                max_new_tokens=MAX_TOKENS,
                do_sample=False,  # `SeededSampling` does it
                pad_token_id=padding,
                eos_token_id=stop,
            ),
            logits_processor=[SeededSampling([request.seed for request in requests], self._temperature)],
        )
        answers: list[str] = tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        return answers

    def _load(self) -> tuple[Any, Any]:
        folder, tokenizer_folder = self._folders
        own = {"local_files_only": not self._download, "trust_remote_code": False}
        try:
            tokenizer = self._transformers.AutoTokenizer.from_pretrained(tokenizer_folder, **own)
            model = self._transformers.AutoModelForCausalLM.from_pretrained(
                folder, torch_dtype="auto", use_safetensors=True, **own
            )
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"{folder} cannot be loaded as a language model: {first}") from error
        if not tokenizer.chat_template and CHATML_MARK not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer of {folder} has no chat template: use a model that was trained to follow instructions, "
                "such as Qwen3-4B."
            )
        return model.to(self._device).eval(), tokenizer


class SeededSampling:
    """A processor of logits that samples with a seed for each row, so that a row's text does not depend on the others.

    It samples by the Gumbel-max trick among the TOP_K most likely tokens, cut at TOP_P, and leaves the chosen one only.
    """

    def __init__(self, seeds: Sequence[int], temperature: float):
        # On the CPU: the same numbers on every device.
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, vocabulary) that are 0 for the token of each row and minus infinity for all others."""
        values, tokens = scores.float().topk(min(TOP_K, scores.shape[-1]))
        values = values / self._temperature
        likely = values.softmax(-1)
        values = values.masked_fill(likely.cumsum(-1) - likely >= TOP_P, -torch.inf)
        uniform = torch.stack([torch.rand(values.shape[-1], generator=one) for one in self._generators])
        gumbel = -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
        chosen = tokens.gather(-1, (values + gumbel.to(values.device)).argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def _transformers() -> Any:
    try:
        import transformers
        from transformers import Qwen3ForCausalLM  # noqa: F401 (older versions lack it)
    except ImportError as error:
        raise ValueError(
            "Writing prompts with a model on disk needs the transformers library: install it with "
            "'pip install \"transformers>=4.51\"', or give the address of a server with --server."
        ) from error
    return transformers


def _folders(path: Path) -> tuple[str, str]:
    """The folders of the model and of its tokenizer."""
    if not path.is_dir():
        raise ValueError(
            f"There is no folder {path}: give the folder of a language model as transformers saves it, or add "
            "--download if this is a name on the Hugging Face hub."
        )
    model = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    tokenizer = path / "tokenizer" if (path / "tokenizer").is_dir() else model
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} has no config.json: give the folder of a language model as transformers saves it.")
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"There is no tokenizer in {tokenizer}: download the model's tokenizer files too.")
    return str(model), str(tokenizer)


def _identity(folder: Path) -> str:
    """The model's name for the journal: its folder's, and a digest of samples of its weights."""
    digest = hashlib.sha256()
    for file in files_of(folder):
        add_samples(digest, file)
    return f"{folder.resolve().name} {digest.hexdigest()[:16]}"


def _conversation(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """The text that the model continues, by its own chat template."""
    if not tokenizer.chat_template:
        return chatml(turns)
    from jinja2.exceptions import TemplateError  # what chat templates are written in

    def filled(turns: Sequence[Turn]) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return text

    try:
        return filled(turns)
    except TemplateError:
        # Some models, Gemma's among them, know no system turn.
        system, first, *rest = turns
        return filled([Turn(first.role, f"{system.text}\n\n{first.text}"), *rest])
