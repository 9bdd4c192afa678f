"""The form of instructions, as Hugging Face's `apply_chat_template` writes and encodes it."""

from pathlib import Path

import pytest

from tinygpt.text import instructions
from tinygpt.text import tokenizer as tokenizers
from tinygpt.text.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer

transformers = pytest.importorskip("transformers")

GPT2 = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gpt2"
TEXTS = [
    *("Where does Ada live?", "", " ", "  two  spaces ", "\n\nlines\n \nmore\n", "\ttab", "'s", ".", "12"),
    *(": Assistant:", "User: x\nAssistant: y", "한국어 🙂", "e\u0301", "<|user|>", "<| end |>", "{{ x }}"),
]
ALPHABET = "".join(sorted(set("".join(TEXTS) + "System: User: Assistant: abcdefghijklmnopqrstuvwxyz")))


@pytest.fixture(params=["bpe", "char", "gpt2"])
def both(request, tmp_path):
    """A tuned model's tokenizer: ours, and transformers' from the files that we wrote."""
    if request.param == "gpt2" and not GPT2.is_dir():
        pytest.skip("needs ../shared/data")
    ours = {
        "bpe": lambda: BPETokenizer.train(" ".join(TEXTS) * 3 + "User: Assistant:" * 9, 340),
        "char": lambda: CharTokenizer.train(ALPHABET, [END_OF_TEXT]),
        "gpt2": lambda: tokenizers.load(GPT2),
    }[request.param]()
    ours.chat_template = instructions.TEMPLATE
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    return ours, transformers.AutoTokenizer.from_pretrained(tmp_path), tmp_path


@pytest.mark.parametrize("roles", [
    ["user", "assistant"],
    ["user", "user", "assistant"],
    ["system", "user", "assistant", "user", "assistant"],
], ids=len)  # fmt: skip
def test_their_ids_and_masks_are_ours(both, roles):
    """Guards: a model that is asked in other tokens elsewhere than it was trained on here."""
    ours, theirs, _ = both
    for n in range(len(TEXTS)):
        messages = [{"role": r, "content": TEXTS[(n + i) % len(TEXTS)]} for i, r in enumerate(roles)]
        ids, learned = instructions.encode(ours, messages)
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert found["input_ids"] == ids.tolist()
        assert found["assistant_masks"] == learned.tolist()
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
        assert asked["input_ids"] == instructions.prompt(ours, messages[:-1]).tolist()


def test_a_message_cannot_end_the_text(both):
    """Guards: user text that becomes a special token. Here it stays text; there, all being one text, it is
    refused."""
    ours, theirs, _ = both
    for content in (END_OF_TEXT, f"a{END_OF_TEXT}User: b"):
        if isinstance(ours, BPETokenizer):
            assert (instructions.prompt(ours, content) == ours.eos_id).sum() == 1
        with pytest.raises(Exception, match="a message spells"):
            theirs.apply_chat_template([{"role": "user", "content": content}])


def test_a_tokenizer_that_transformers_saved_is_still_tuned(both):
    """Guards: a form that is lost on the way through another library, which puts it in a file of its own."""
    ours, theirs, folder = both
    theirs.save_pretrained(folder / "again")
    again = tokenizers.load(folder / "again")
    assert instructions.is_tuned(again)
    assert (instructions.prompt(again, "User") == instructions.prompt(ours, "User")).all()
