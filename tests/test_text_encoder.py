"""The text encoders of the command line, on tiny ones made here: template, layer, length, and what is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from comfyui_l2p.l2p_core.dataset.caption_cache import CaptionCache
from comfyui_l2p.l2p_core.files.tensor_file import load_tensors, save
from comfyui_l2p.l2p_core.sources import SOURCES
from comfyui_l2p.train import text_encoder
from comfyui_l2p.train.text_encoder import EncoderFiles, TransformersEncoder

LAYERS = 3
SPECIAL = ["<|im_start|>", "<|im_end|>"]
QWEN = SOURCES["z-image"].encoder
SOURCE_NAMES = ["z-image", "lumina2"]


class Published(NamedTuple):
    """A folder with text_encoder and tokenizer, and the whole model in it."""

    source: str
    folder: Path
    model: Any

    def files(self, path: Path | None = None, tokenizer: Path | None = None) -> EncoderFiles:
        return text_encoder.find(path or self.folder, tokenizer, SOURCES[self.source].encoder)

    def encoder(self, files: EncoderFiles | None = None) -> TransformersEncoder:
        return TransformersEncoder(files or self.files(), device="cpu", dtype=torch.float32)

    @torch.no_grad()
    def features(self, text: str) -> torch.Tensor:
        """What the published pipeline computes of a text: all layers, then the last hidden states but one."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        limit = {"z-image": 512, "lumina2": 256}[self.source]
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)["input_ids"]
        output = self.model.model(input_ids=ids, output_hidden_states=True)
        assert len(output.hidden_states) == LAYERS + 1
        return output.hidden_states[-2][0]


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("transformers", minversion="4.51", reason="transformers is not installed")


@pytest.fixture(scope="module")
def made(library: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    """An encoder of every source, with random weights."""
    return {name: write(library, tmp_path_factory.mktemp(name), name) for name in SOURCE_NAMES}


@pytest.fixture
def qwen(made: dict[str, Published]) -> Published:
    return made["z-image"]


@pytest.fixture(params=SOURCE_NAMES)
def published(request: pytest.FixtureRequest, made: dict[str, Published]) -> Published:
    return made[request.param]


def write(library: Any, folder: Path, source: str, width: int = 32) -> Published:
    torch.manual_seed(0)
    row = SOURCES[source].encoder
    values = {"head_dim": 16} | dict(row.unseen) | dict(row.settings)
    config = library.AutoConfig.for_model(
        row.model_type,
        vocab_size=300,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        **values,
    )
    model = library.AutoModelForCausalLM.from_config(config).eval()
    # Away from their initial ones, so that a norm too many or too few shows.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2)
        else:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder / "text_encoder")
    write_tokenizer(library, folder / "tokenizer", first=source == "lumina2")
    return Published(source, folder, model)


def write_tokenizer(library: Any, folder: Path, first: bool = False) -> None:
    """A tokenizer of bytes with Qwen3's special tokens; `first` adds one before each text, as Gemma's does."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if first:
        tokenizer.add_special_tokens(["<bos>"])
        marked = [("<bos>", tokenizer.token_to_id("<bos>"))]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=marked)
    fast = library.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.save_pretrained(folder)


PROMPTS = {
    "z-image": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "lumina2": "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <Prompt Start> {}",
}


def test_features_are_the_published_ones_whatever_shares_the_batch(published: Published) -> None:
    captions = ["a red fox in snow", "Ünïcode 狐", "{braces} " * 8]
    features = published.encoder().encode(captions)
    for caption, found in zip(captions, features, strict=True):
        expected = published.features(PROMPTS[published.source].format("%").replace("%", caption))
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_negative_captions_are_encoded_as_the_source_was_trained(published: Published) -> None:
    """Those of Lumina-2, the empty one among them, have no system prompt."""
    prompt = "{}" if published.source == "lumina2" else PROMPTS[published.source]
    encoder = published.encoder()
    (empty,), (negative,) = encoder.encode([""]), encoder.encode(["blurred"], negative=True)
    torch.testing.assert_close(empty, published.features(prompt.format("")), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(negative, published.features(prompt.format("blurred")), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("source", "limit"), [("z-image", 512), ("lumina2", 256)])
def test_no_more_tokens_than_published_count(made: dict[str, Published], source: str, limit: int) -> None:
    encoder = made[source].encoder()
    long, longer = encoder.encode(["x" * 600, "x" * 600 + " and more"])
    assert long.shape == (limit, 32)
    assert torch.equal(long, longer)
    torch.testing.assert_close(long, made[source].features(PROMPTS[source].format("x" * 600)), atol=1e-4, rtol=1e-4)
    one, more = encoder.lengths(["x", "x" * 600])
    assert more == one + 599


def test_special_tokens_of_the_template_are_single_tokens(qwen: Published) -> None:
    plain = len(QWEN.text("").encode()) - len("<|im_start|>" * 2 + "<|im_end|>")
    assert qwen.encoder().lengths([""]) == [plain + 3]


def test_a_single_file_with_a_tokenizer_given_is_the_same(published: Published, tmp_path: Path) -> None:
    [weights] = published.files().weights
    single = tmp_path / "encoder.safetensors"
    save(load_tensors(weights)[0], single)
    files = published.files(single, published.folder / "tokenizer")
    assert files.config is None
    found = published.encoder(files).encode(["a red fox"])[0]
    torch.testing.assert_close(found, published.encoder().encode(["a red fox"])[0])


def test_what_is_not_needed_is_not_used(published: Published, tmp_path: Path) -> None:
    """Neither the last layer, nor the final norm, nor the output projection."""
    [weights] = published.files().weights
    tensors = load_tensors(weights)[0]
    for name in [name for name in tensors if any(part in name for part in (f"layers.{LAYERS - 1}.", "model.norm."))]:
        tensors[name].fill_(float("nan"))
    single = tmp_path / "poisoned.safetensors"
    save(tensors | {"lm_head.weight": torch.full((300, 32), float("nan"))}, single)
    files = published.files(single, published.folder / "tokenizer")
    found = published.encoder(files).encode(["a red fox"])[0]
    torch.testing.assert_close(found, published.encoder().encode(["a red fox"])[0])


def test_a_folder_of_shards_is_read(published: Published, tmp_path: Path) -> None:
    published.model.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    files = published.files(tmp_path, published.folder / "tokenizer")
    assert len(files.weights) > 1
    found = published.encoder(files).encode(["a red fox"])[0]
    torch.testing.assert_close(found, published.encoder().encode(["a red fox"])[0])


def test_the_cache_is_filled_with_it(published: Published, tmp_path: Path, unflushed: None) -> None:
    row = SOURCES[published.source].encoder
    cache = CaptionCache(tmp_path, text_encoder.identity(published.files(), torch.float32), row.max_tokens)
    assert cache.fill(["a fox", "x" * 600], published.encoder) == 3
    torch.testing.assert_close(cache.read("a fox"), published.encoder().encode(["a fox"])[0], atol=1e-4, rtol=1e-4)
    assert len(cache.read("x" * 600)) == row.max_tokens and list(cache.cut(["a fox", "x" * 600])) == ["x" * 600]


def test_identity_tells_weights_tokenizers_and_precisions_apart(qwen: Published, tmp_path: Path) -> None:
    files = qwen.files()
    tensors = load_tensors(files.weights[0])[0]
    identities = {text_encoder.identity(files), text_encoder.identity(files, torch.float32)}
    for number in range(2):
        tensors["model.embed_tokens.weight"][0, 0] = float(number)
        save(tensors, tmp_path / f"{number}.safetensors")
        changed = qwen.files(tmp_path / f"{number}.safetensors", qwen.folder / "tokenizer")
        identities.add(text_encoder.identity(changed))
    assert len(identities) == 4
    assert text_encoder.identity(qwen.files()) == text_encoder.identity(files)
    assert text_encoder.identity(files).startswith("Qwen3 ")
    assert text_encoder.identity(files).endswith(", hidden_states[-2], 512 tokens, bfloat16")


def test_wrong_files_are_named(published: Published, tmp_path: Path) -> None:
    family = SOURCES[published.source].encoder.family
    with pytest.raises(ValueError, match="does not exist"):
        published.files(tmp_path / "none")
    [weights] = published.files().weights
    with pytest.raises(ValueError, match=f"no tokenizer in .*nowhere: give the folder .* of {family}"):
        published.files(weights, tmp_path / "nowhere")
    tensors = load_tensors(weights)[0]

    def load(changed: dict[str, torch.Tensor]) -> None:
        save(changed, tmp_path / "changed.safetensors", overwrite=True)
        published.encoder(published.files(tmp_path / "changed.safetensors", published.folder / "tokenizer"))

    with pytest.raises(ValueError, match=f"not a {family} text encoder"):
        load({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="has no .*layers.1.mlp.up_proj"):
        load({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name})
    with pytest.raises(ValueError, match="is inconsistent: .*is .3, 32., not .48, 32."):
        load(tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 32)})
    with pytest.raises(ValueError, match="is quantised"):
        load(tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.int8)})


def test_weights_that_a_folder_lacks_are_not_made_up(qwen: Published, tmp_path: Path) -> None:
    [weights] = qwen.files().weights
    tensors = {name: tensor for name, tensor in load_tensors(weights)[0].items() if "layers.1.mlp.up" not in name}
    save(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((qwen.folder / "text_encoder" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="is not a complete Qwen3 model"):
        qwen.encoder(qwen.files(tmp_path, qwen.folder / "tokenizer"))


def test_another_family_of_models_is_refused(qwen: Published, made: dict[str, Published], tmp_path: Path) -> None:
    [weights] = qwen.files().weights
    save(load_tensors(weights)[0], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ValueError, match="is of a llama model"):
        qwen.encoder(qwen.files(tmp_path, qwen.folder / "tokenizer"))
    with pytest.raises(ValueError, match="not a Qwen3 text encoder: use Qwen3-4B"):
        qwen.encoder(qwen.files(made["lumina2"].folder))


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match="needs the transformers library: install it"):
        text_encoder._transformers()
