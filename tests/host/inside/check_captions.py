"""The host's text encoders as what fills a run's caption cache: the features of sampling, under a lasting name."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.lumina2
import comfy.text_encoders.z_image
import pytest
import torch
from comfy_extras.nodes_lumina2 import CLIPTextEncodeLumina2
from torch import Tensor

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.files.tensor_file import save
from comfyui_l2p.l2p_core.sources import SOURCES
from comfyui_l2p.l2p_core.sources.lumina2 import Lumina2Config
from comfyui_l2p.nodes.clip_captions import host_captions, identity_of
from comfyui_l2p.nodes.model.demo import load_demo
from comfyui_l2p.train import text_encoder

CAPTION = "a red circle in the centre on a white background"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HEAD = 128


def weights(seed: int = 0) -> dict[str, Tensor]:
    """A Qwen3 of three narrow layers, in the layout of qwen_3_4b.safetensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed_tokens.weight": (151936, 32), "norm.weight": (32,)}
    for layer in range(3):
        shapes |= {
            f"layers.{layer}.self_attn.q_proj.weight": (4 * HEAD, 32),
            f"layers.{layer}.self_attn.k_proj.weight": (2 * HEAD, 32),
            f"layers.{layer}.self_attn.v_proj.weight": (2 * HEAD, 32),
            f"layers.{layer}.self_attn.o_proj.weight": (32, 4 * HEAD),
            f"layers.{layer}.self_attn.q_norm.weight": (HEAD,),
            f"layers.{layer}.self_attn.k_norm.weight": (HEAD,),
            f"layers.{layer}.mlp.gate_proj.weight": (48, 32),
            f"layers.{layer}.mlp.up_proj.weight": (48, 32),
            f"layers.{layer}.mlp.down_proj.weight": (32, 48),
            f"layers.{layer}.input_layernorm.weight": (32,),
            f"layers.{layer}.post_attention_layernorm.weight": (32,),
        }
    return {
        f"model.{name}": 1 + 0.3 * torch.rand(shape, generator=generator)
        if "norm" in name
        else torch.randn(shape, generator=generator) * 0.3
        for name, shape in shapes.items()
    }


def clip(seed: int = 0) -> Any:
    """The host's text encoder of Z-Image, as CLIPLoader sets it up, with these weights."""
    target = comfy.supported_models_base.ClipTarget(
        comfy.text_encoders.z_image.ZImageTokenizer, comfy.text_encoders.z_image.te(torch.float32)
    )
    options = {"qwen3_4b_model_config": SIZES}
    return comfy.sd.CLIP(target, state_dict=[weights(seed)], model_options=options)


def of_the_command_line(path: Path, tokenizer: Path, source: str) -> text_encoder.TransformersEncoder:
    files = text_encoder.find(path, tokenizer, SOURCES[source].encoder)
    return text_encoder.TransformersEncoder(files, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return clip()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, text_encoder.TransformersEncoder]:
    """A narrow Gemma-2 with a tokenizer of letters: the host's CLIP as CLIPLoader sets it up, and ours."""
    import sentencepiece
    import transformers

    folder = tmp_path_factory.mktemp("gemma")
    texts = [SOURCES["lumina2"].encoder.text(CAPTION), " ".join("abcdefghijklmnopqrstuvwxyz")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=60, model_type="bpe", hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    torch.manual_seed(0)
    whole = transformers.Gemma2Model(
        transformers.Gemma2Config(vocab_size=len(pieces), **SIZES, attn_logit_softcapping=None)
    )
    for name, parameter in whole.named_parameters():
        parameter.data.uniform_(-0.5, 1) if "norm" in name else parameter.data.normal_(0, 0.3)
    state = {f"model.{name}": tensor.contiguous() for name, tensor in whole.state_dict().items()}
    save(state, folder / "gemma.safetensors", {})
    write_tokenizer(pieces, folder)
    ours = of_the_command_line(folder / "gemma.safetensors", folder, "lumina2")
    target = comfy.supported_models_base.ClipTarget(
        comfy.text_encoders.lumina2.LuminaTokenizer, comfy.text_encoders.lumina2.te(torch.float32)
    )
    data = torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)
    options = {"gemma2_2b_model_config": SIZES | {"vocab_size": len(pieces)}}
    host = comfy.sd.CLIP(target, tokenizer_data={"spiece_model": data}, state_dict=[state], model_options=options)
    return host, ours


def write_tokenizer(pieces: Any, folder: Path) -> None:
    """The tokenizer.json of a sentencepiece model, as Gemma's is published."""
    import tokenizers

    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    merges = [
        (left, piece[len(left) :])
        for piece in sorted(vocabulary, key=vocabulary.__getitem__)
        for left in (piece[:cut] for cut in range(1, len(piece)))
        if left in vocabulary and piece[len(left) :] in vocabulary and vocabulary[piece] > 3
    ]
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")


def check_features_are_those_of_sampling(encoder: Any, tmp_path: Path) -> None:
    with torch.inference_mode():
        [[sampled, extra]] = encoder.encode_from_tokens_scheduled(encoder.tokenize(CAPTION))
    assert sampled.ndim == 3 and sampled.shape[0] == 1 and int(extra["attention_mask"].sum()) == sampled.shape[1]
    cache = host_captions(encoder, tmp_path, ModelConfig()).fill([CAPTION])
    assert torch.equal(cache.read(CAPTION), sampled[0].float())
    assert cache.read("").shape[1] == sampled.shape[2]
    assert not cache.read(CAPTION).is_inference()


def check_features_are_those_of_the_command_line(encoder: Any, tmp_path: Path) -> None:
    """The same template, layer and tokens as through the transformers library."""
    path = tmp_path / "qwen.safetensors"
    save(weights(), path, {})
    tokenizer = Path(os.environ["COMFYUI_PATH"]) / "comfy" / "text_encoders" / "qwen25_tokenizer"
    other = of_the_command_line(path, tokenizer, "z-image")
    here = host_captions(encoder, tmp_path / "cache", ModelConfig()).make_encoder()
    for one, two in zip(here.encode([CAPTION, ""]), other.encode([CAPTION, ""]), strict=True):
        assert one.shape == two.shape
        assert float((one - two).norm() / two.norm()) < 1e-5


def check_long_captions_are_cut_as_the_command_line_cuts_them(encoder: Any, tmp_path: Path) -> None:
    path, long = tmp_path / "qwen.safetensors", "word " * 600
    save(weights(), path, {})
    tokenizer = Path(os.environ["COMFYUI_PATH"]) / "comfy" / "text_encoders" / "qwen25_tokenizer"
    other = of_the_command_line(path, tokenizer, "z-image")
    here = host_captions(encoder, tmp_path / "cache", ModelConfig()).make_encoder()
    (one,), (two,) = here.encode([long]), other.encode([long])
    assert two.shape == (512, 32)
    one = one[: len(two)]
    assert float((one - two).norm() / two.norm()) < 1e-5
    assert here.lengths([long, CAPTION]) == other.lengths([long, CAPTION])
    assert here.lengths([CAPTION]) == [len(here.encode([CAPTION])[0])]


def check_lumina2s_features_are_those_of_the_command_line(gemma: Any, tmp_path: Path) -> None:
    """With the system prompt, which the host's CLIP does not add; the empty caption is without it."""
    host, other = gemma
    here = host_captions(host, tmp_path, Lumina2Config()).make_encoder()
    captions = [CAPTION, "", "fox " * 400]
    assert here.lengths(captions) == other.lengths(captions)
    assert [len(features) for features in here.encode(captions)] == here.lengths(captions)
    for one, two in zip(here.encode(captions), other.encode(captions), strict=True):
        one = one[: len(two)]
        assert float((one - two).norm() / two.norm()) < 1e-5
    assert len(other.encode(captions)[1]) == 1 and len(other.encode(captions)[2]) == 256


def check_lumina2s_features_are_those_of_the_hosts_own_node(gemma: Any, tmp_path: Path) -> None:
    host, _ = gemma
    conditioning = CLIPTextEncodeLumina2.execute(host, CAPTION, "superior")[0]
    cache = host_captions(host, tmp_path, Lumina2Config()).fill([CAPTION])
    assert torch.equal(cache.read(CAPTION), conditioning[0][0][0].float())
    assert host_captions(host, tmp_path, ModelConfig()).identity != cache.identity


def check_the_demo_makes_the_features_that_its_model_was_trained_with(tmp_path: Path) -> None:
    _, words = load_demo()
    cache = host_captions(words, tmp_path, ModelConfig()).fill([CAPTION])
    assert torch.equal(cache.read(CAPTION), tiny.load_words().encode(CAPTION))


def check_long_captions_of_the_demo_are_counted_although_its_tokenizer_does_not_split_them(tmp_path: Path) -> None:
    _, words = load_demo()
    long = "red " * 600
    cache = host_captions(words, tmp_path, ModelConfig()).fill([long, CAPTION])
    assert cache.cut([long, CAPTION]) == {long: 601} and len(cache.read(long)) == 512


def check_the_name_lasts_and_follows_the_content(encoder: Any) -> None:
    name = identity_of(encoder)
    assert identity_of(clip()) == name
    assert identity_of(clip(seed=1)) != name
    assert identity_of(load_demo()[1]) != name
    skipping = encoder.clone()
    skipping.clip_layer(-1)
    assert identity_of(skipping) != name


def check_the_name_is_that_of_the_last_start() -> None:
    script = (
        "import sys; sys.argv = sys.argv[:1]; import conftest; "
        "from comfyui_l2p.nodes.clip_captions import identity_of; "
        "from comfyui_l2p.nodes.model.demo import load_demo; print('NAME', identity_of(load_demo()[1]))"
    )
    here = identity_of(load_demo()[1])
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert f"NAME {here}" in done.stdout.splitlines(), done.stderr[-2000:]


def check_a_lora_has_a_name_of_its_own_whatever_is_loaded(encoder: Any) -> None:
    key = "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj"
    file = {f"{key}.lora_up.weight": torch.ones(48, 2), f"{key}.lora_down.weight": torch.ones(2, 32)}
    _, patched = comfy.sd.load_lora_for_models(None, encoder, file, 0.0, 1.0)
    assert patched.patcher.patches
    plain, name = identity_of(encoder), identity_of(patched)
    assert name != plain
    _, weaker = comfy.sd.load_lora_for_models(None, encoder, file, 0.0, 0.5)
    assert identity_of(weaker) not in (name, plain)
    with torch.inference_mode():
        patched.encode_from_tokens_scheduled(patched.tokenize(CAPTION))
    # The weights lie patched in memory now; `host_captions` looks at those of the file.
    assert host_captions(encoder, Path("unused"), ModelConfig()).identity == plain
    assert host_captions(patched, Path("unused"), ModelConfig()).identity == name


def check_a_clip_with_hooks_is_refused(encoder: Any, tmp_path: Path) -> None:
    hooked = encoder.clone()
    hooked.patcher.forced_hooks = comfy.hooks.HookGroup()
    with pytest.raises(ValueError, match="connect the CLIP without them"):
        host_captions(hooked, tmp_path, ModelConfig())


def check_the_text_encoder_is_let_go_of(tmp_path: Path) -> None:
    encoder = clip()
    captions = host_captions(encoder, tmp_path, ModelConfig())

    def loaded() -> list[Any]:
        return [one for one in comfy.model_management.current_loaded_models if one.model is encoder.patcher]

    seen: list[int] = []
    captions.fill([CAPTION], lambda done, total: seen.append(len(loaded())))
    assert seen == [1] and not loaded()


def check_an_interrupt_keeps_what_is_encoded(encoder: Any, tmp_path: Path) -> None:
    captions = host_captions(encoder, tmp_path, ModelConfig())
    texts = [f"{'x ' * i}end" for i in range(1, 12)]
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        captions.fill(texts, lambda done, total: comfy.model_management.interrupt_current_processing())
    assert captions.fill([]).missing(texts) == texts[:3]
