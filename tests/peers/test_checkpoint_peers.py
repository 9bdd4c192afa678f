"""Folders that tinygpt writes, read by transformers, and the other way round."""

import shutil

import numpy as np
import pytest

from tinygpt.core.config import GPTConfig
from tinygpt.errors import UserError
from tinygpt.folders import checkpoint
from tinygpt.stages.variants import build
from tinygpt.text.tokenizer import BPETokenizer, CharTokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

TEXT = "To be, or not to be: that is the question.\n'Tis nobler in the mind — to suffer; naïve 東京"
TOKENIZERS = {"char": lambda: CharTokenizer.train(TEXT), "bpe": lambda: BPETokenizer.train(TEXT, 280)}
CLASSES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "openai-gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel"),
}


def randomise(arrays) -> None:
    """Weights so large that a wrong layout, activation or epsilon shows."""
    rng = np.random.default_rng(0)
    for p in arrays:
        p[:] = rng.normal(0, 0.3, p.shape) + (1 if p.ndim == 1 else 0)


def peer(kind: str, vocab_size: int, **changes):
    names = CLASSES[kind]
    config = getattr(transformers, names[0])(
        vocab_size=vocab_size, n_positions=24, n_embd=48, n_layer=3, n_head=4, **changes
    )
    model = getattr(transformers, names[1])(config).eval()
    randomise(p.detach().numpy() for p in model.parameters())
    return model


def logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.numpy()


def ids(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(vocab_size, size=(2, 24)).astype(np.int32)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("post_norm", [False, True])
def test_transformers_reads_what_we_write(tmp_path, kind, post_norm):
    """Guards: keys it reports as missing or unexpected, a post-norm model taken for a pre-norm one."""
    tokenizer = TOKENIZERS[kind]()
    config = GPTConfig(tokenizer.vocab_size, 24, 3, 4, 48, dropout=0.25, post_norm=post_norm)
    model = build(config)
    randomise(model.params.values())
    checkpoint.save(tmp_path, model, tokenizer)

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == CLASSES["openai-gpt" if post_norm else "gpt2"][1]
    assert not any(info.values()), info
    assert theirs.config.eos_token_id == tokenizer.eos_id
    x = ids(config.vocab_size)
    assert np.abs(logits(theirs.eval(), x) - model.forward(x)[0]).max() < 1e-4
    rates = {
        name.split(".")[-1]: m.p for name, m in theirs.named_modules() if isinstance(m, torch.nn.Dropout)
    }
    assert rates.pop("attn_dropout") == 0 and set(rates.values()) == {0.25}, rates  # as our own dropout

    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT + "<|endoftext|>" * (kind == "bpe")
    assert fast.encode(text) == tokenizer.encode(text).tolist()
    assert fast.decode(fast.encode(TEXT)) == TEXT


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("layout", ["one file", "shards", "no prefix", "with head", "float16", "bfloat16"])
def test_we_read_what_transformers_writes(tmp_path, kind, layout):
    """Guards: each way in which the hub's files differ; half precision read as if it were whole."""
    tokenizer = TOKENIZERS["bpe"]()
    theirs = peer(kind, tokenizer.vocab_size)
    if layout.endswith("16"):
        theirs = theirs.to(getattr(torch, layout))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if layout == "shards" else "1GB")
    tokenizer.save(tmp_path)
    path = tmp_path / "model.safetensors"
    assert path.exists() == (layout != "shards")
    if layout in ("no prefix", "with head"):
        tensors = safetensors_torch.load_file(path)
        if layout == "no prefix":  # and, as the hub's GPT-2 has them, the causal masks
            tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
            tensors |= {f"h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 24, 24)) for i in range(3)}
            tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
        else:
            tensors["lm_head.weight"] = theirs.lm_head.weight.detach().clone()
        safetensors_torch.save_file(tensors, path, {"format": "pt"})

    model, again = checkpoint.load(tmp_path)
    assert model.flat.dtype == np.float32
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    x = ids(tokenizer.vocab_size)
    assert np.abs(logits(theirs.float(), x) - model.forward(x)[0]).max() < 1e-4


def test_an_untied_head_is_refused(tmp_path):
    """Guards: a model whose own head is silently replaced by its token table."""
    theirs = peer("gpt2", 280, tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    TOKENIZERS["bpe"]().save(tmp_path)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        checkpoint.load(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    with pytest.raises(UserError, match="lm_head.weight"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"n_inner": 100},
        {"add_cross_attention": True},
    ],
    ids=str,
)
def test_another_computation_is_refused_by_name(tmp_path, change):
    """Guards: a model that loads and computes something else."""
    peer("gpt2", 280, **change).save_pretrained(tmp_path)
    TOKENIZERS["bpe"]().save(tmp_path)
    with pytest.raises(UserError, match=next(iter(change))):
        checkpoint.load(tmp_path)


def test_there_and_back(tmp_path):
    """Guards: a folder that goes on in transformers cannot come home."""
    tokenizer = TOKENIZERS["bpe"]()
    model = build(GPTConfig(tokenizer.vocab_size, 24, 2, 4, 48), np.random.default_rng(0))
    checkpoint.save(tmp_path / "ours", model, tokenizer)
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again, tok = checkpoint.load(tmp_path / "theirs")
    assert again.flat.tobytes() == model.flat.tobytes()
    assert tok.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    shutil.rmtree(tmp_path)
