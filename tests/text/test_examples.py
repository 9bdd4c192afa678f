"""Files of examples: every form, what is left out and noted, and mistakes by file and line."""

import itertools
import json
from pathlib import Path

import pytest

from tinygpt.errors import UserError
from tinygpt.text import examples
from tinygpt.text.examples import COMPARISON, EXAMPLE, FORMS, PROMPT, Form, Notes
from tinygpt.text.tokenizer import END_OF_TEXT

QUESTION, GOOD, BAD = "Where does Ada live?", "    London", "Paris"


def message(role: str, content: object, kind: str = "role") -> dict:
    names = {"role": "role", "content": "content"} if kind == "role" else {"role": "from", "content": "value"}
    name = {"user": "human", "assistant": "gpt"}.get(role, role) if kind == "from" else role
    return {names["role"]: name, names["content"]: content}


def rows_of(form: Form) -> list[dict]:
    """A question and its answers in a form, in each way that a column may hold them."""
    parts = [{"type": "text", "text": QUESTION[:5]}, {"type": "text", "text": QUESTION[5:]}]
    rows = []
    for kind, question in itertools.product(("text", "role", "from", "message"), (QUESTION, parts)):
        wrap = "role" if kind == "text" else kind
        if kind == "text" and question is parts:
            continue

        def held(role: str, content: object, kind=kind, wrap=wrap) -> object:
            if kind == "text":
                return content
            one = message(role, content, "role" if kind == "message" else wrap)
            return one if kind == "message" else [one]

        row = {"id": 7, "source": "test"}
        for column in form.before[:1]:
            row[column] = held("user", question)
            if column in examples.WHOLE:
                talk = [message("user", question, wrap if wrap == "from" else "role")]
                talk += [message("assistant", GOOD, wrap if wrap == "from" else "role")] * (not form.answers)
                row[column] = talk
        for column, answer in zip(form.answers, (GOOD, BAD), strict=False):
            row[column] = held("assistant", answer)
            if not form.before:
                row[column] = [message("user", question), message("assistant", answer)]
        rows.append(row)
    return rows


def has(form: Form, needs: int) -> bool:
    return len(form.answers) >= needs or (needs == EXAMPLE and form.before[0] in examples.WHOLE)


def write(path: Path, rows: list[dict], indent: int | None = None) -> str:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(lines if indent is None else json.dumps(rows, indent=indent), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("needs", [PROMPT, EXAMPLE, COMPARISON])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form.before + form.answers))
@pytest.mark.parametrize("indent", [None, 0, 2], ids=["lines", "list", "indented list"])
def test_every_form_gives_what_a_command_needs(tmp_path, form, needs, indent):
    """Guards: alignment-handbook 67, TRL 3468, axolotl 1703: forms refused, or partly ignored."""
    path = write(tmp_path / "a.jsonl", rows := rows_of(form), indent)
    if not has(form, needs):
        with pytest.raises(UserError, match=r'a.jsonl:\d+: has .* a line is {"prompt"'):
            examples.read([path], needs)
        return
    for example, row in zip(examples.read([path], needs), rows, strict=True):
        assert example.prompt == QUESTION and example.row == row
        assert [m["content"] for m in example.messages[1:]] == [GOOD] * (needs != PROMPT)
        assert example.rejected == BAD * (needs == COMPARISON)


def test_a_page_shows_the_forms():
    """Guards: a form that nobody can find, or one that is promised and refused."""
    page = Path(__file__).parents[2] / "demos" / "formats.md"
    if not page.exists():
        pytest.skip("needs the sources")
    text = page.read_text(encoding="utf-8")
    for form in FORMS:
        columns = ", ".join(f"`{column}`" for column in (*form.before, *form.answers))
        marks = " | ".join("yes" if has(form, needs) else "no" for needs in (EXAMPLE, PROMPT, COMPARISON))
        assert f"| {columns} | {form.tools} | {marks} |" in text


def test_alpaca_has_an_input_that_may_be_missing(tmp_path):
    row = {"instruction": "Add.", "output": "3"}
    rows = [row | {"input": "1 and 2"}, row | {"input": ""}, row | {"input": None}, row]
    prompts = [example.prompt for example in examples.read([write(tmp_path / "a.json", rows, 4)])]
    assert prompts == ["Add.\n\n1 and 2", "Add.", "Add.", "Add."]


def test_columns_beside_a_conversation_are_ignored(tmp_path):
    """UltraChat has the first question beside it, UltraFeedback whole conversations under chosen."""
    talk = [message("system", "Be brief."), message("user", QUESTION), message("assistant", GOOD)]
    longer = [*talk, message("user", "And Alan?"), message("assistant", "Wilmslow")]
    row = {"prompt": "Where?", "prompt_id": "ab", "messages": longer, "chosen": longer,
           "rejected": [*longer[:-1], message("assistant", BAD)], "score_chosen": 3.0}  # fmt: skip
    path = write(tmp_path / "a.jsonl", [row])
    (example,) = examples.read([path])
    assert example.messages == longer
    (comparison,) = examples.read([path], COMPARISON)
    assert comparison.messages == longer and comparison.rejected == BAD
    assert comparison.prompt == tuple((m["role"], m["content"]) for m in longer[:-1])
    (prompt,) = examples.read([path], PROMPT)
    assert prompt.prompt == comparison.prompt


def test_columns_and_keys_that_are_null_are_missing(tmp_path):
    """Guards: rows of several data sets in one file, with null in each column that a row lacks."""
    none = {"role": None, "content": None, "from": None, "value": None, "weight": None}
    talk = [none | message("user", QUESTION), none | message("assistant", GOOD, "from")]
    empty = dict.fromkeys(("prompt", "completion", "messages", "conversations", "instruction", "output"))
    rows = [empty | {"prompt": QUESTION, "completion": GOOD}, empty | {"messages": talk}, empty | {
        "instruction": QUESTION, "input": None, "output": GOOD}]  # fmt: skip
    for example in examples.read([write(tmp_path / "a.jsonl", rows)]):
        assert example.messages == [message("user", QUESTION), message("assistant", GOOD)]


def test_other_lines_ends_and_marks(tmp_path):
    """Guards: a byte order mark, Windows' line ends, a line without its end, messages after the last."""
    talk = [message("user", "p"), message("assistant", "c")]
    lines = [json.dumps(row).encode() for row in (
        {"prompt": "p", "completion": " c\n", "meta": {"k": 1}},
        {"messages": talk}, {"messages": [*talk, {"role": "user", "content": "and?", "name": "x"}], "id": 7},
    )]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n" + lines[1] + b"\n" + lines[2])
    pairs = examples.read([path, path])
    assert [e.where for e in pairs] == [f"{path}:1", f"{path}:3", f"{path}:4"] * 2
    assert [e.messages[1]["content"] for e in pairs[:3]] == [" c\n", "c", "c"]
    assert pairs[1].messages == pairs[2].messages == talk


# --- left out and noted -------------------------------------------------------------------------------------

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b"}


@pytest.mark.parametrize(("needs", "changes", "reason"), [
    (EXAMPLE, {"completion": ""}, "an answer is empty"),
    (EXAMPLE, {"completion": " \n"}, "an answer is empty"),
    (EXAMPLE, {"completion": END_OF_TEXT}, "an answer is empty"),
    (EXAMPLE, {"messages": []}, "an answer is empty"),
    (EXAMPLE, {"messages": [message("user", "a")]}, "an answer is empty"),
    (EXAMPLE, {"messages": [message("user", "a"), message("assistant", ""), message("user", "b"),
                            message("assistant", "c")]}, "an answer is empty"),
    (EXAMPLE, {"messages": [message("assistant", "b")]}, "the prompt is empty"),
    (EXAMPLE, {"prompt": " "}, "the prompt is empty"),
    (EXAMPLE, {"instruction": [], "input": "x", "output": "b", "prompt": None}, "the prompt is empty"),
    (EXAMPLE, {"messages": [message("user", "a"), {**message("assistant", "b"), "weight": 0}]},
     "nothing of it is learned"),
    (PROMPT, {"prompt": " "}, "the prompt is empty"),
    (PROMPT, {"messages": [message("assistant", "b")]}, "the prompt is empty"),
    (COMPARISON, {"chosen": ""}, "an answer is empty"),
    (COMPARISON, {"rejected": "\t"}, "an answer is empty"),
    (COMPARISON, {"rejected": "b\n"}, "chosen and rejected are the same"),
    (COMPARISON, {"prompt": [], "chosen": "b"}, "the prompt is empty"),
    (COMPARISON, {"rejected": [message("user", "z"), message("assistant", "c")]},
     "chosen and rejected are no answers to one prompt"),
], ids=str)  # fmt: skip
def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, needs, changes, reason):
    """Guards: one empty completion of 52,000 that ends a run; a loss of examples without a word."""
    path = write(tmp_path / "a.jsonl", [PAIR, PAIR | changes, PAIR, PAIR | changes])
    usable = examples.read([path], needs, notes := Notes())
    assert [example.where for example in usable] == [f"{path}:1", f"{path}:3"]
    assert str(notes).splitlines()[-1] == f"Left out, as {reason}: 2, the first is {path}:2"
    path = write(tmp_path / "b.jsonl", [PAIR | changes])
    with pytest.raises(UserError, match=f"no example can be used.*as {reason}: 1, the first is .*b.jsonl:1"):
        examples.read([path], needs)


def test_an_end_token_that_is_spelled(tmp_path):
    """Guards: nshepperd/gpt-2 33: an <|endoftext|> learned as characters before each real end."""
    rows = [PAIR | {"prompt": f"a{END_OF_TEXT}", "completion": f"b{END_OF_TEXT}\n"},
            PAIR | {"completion": f"b{END_OF_TEXT}{END_OF_TEXT}"}]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    pairs = examples.read([path], EXAMPLE, notes := Notes())
    contents = [[m["content"] for m in pair.messages] for pair in pairs]
    assert contents == [[f"a{END_OF_TEXT}", "b"], ["a", f"b{END_OF_TEXT}"]]
    assert str(notes).splitlines() == [
        f"Taken as characters, a {END_OF_TEXT} within a text: 2, the first is {path}:1",
        f"Taken off, a {END_OF_TEXT} that ends an answer: 2, the first is {path}:1",
    ]


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "says"), [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('{"prompt": "a", "completion": "b"} x', "is not JSON (Extra data at character 35)"),
    ("[1]", "is [1], not an object"),
    ("{}", 'a line is {"prompt"'),
    ('{"prompt": "a"}', "has ['prompt']"),
    ('{"question": "a", "answer": "b"}', "has ['answer', 'question']"),
    ('{"prompt": 1, "completion": "b"}', "prompt is 1: it must be"),
    ('{"prompt": "a", "completion": null}', "the assistant's text is None"),
    ('{"prompt": ["a"], "completion": "b"}', "prompt is ['a']: it must be a text or a list of messages"),
    ('{"instruction": "a", "input": 3, "output": "b"}', "the user's text is 3"),
    ('{"messages": "a"}', "messages is 'a': it must be a list"),
    ('{"messages": ["a"]}', "messages is ['a']: it must be a list of messages"),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "role is 'tool': it must be system"),
    ('{"messages": [{"role": [], "content": "a"}]}', "role is []"),
    ('{"messages": [{"role": "user"}]}', "the user's text is None"),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "or parts of type text"),
    ('{"messages": [{"role": "user", "content": [{"type": "image", "text": "a cat"}]}]}', "of type text"),
    ('{"messages": [{"content": "a"}]}', "role is None: it must be system"),
    ('{"instruction": "a", "input": 0, "output": "b"}', "the user's text is 0"),
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', "weight is 0.5: it must be 0"),
], ids=str)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path, line, says):
    """Guards: a traceback; an example with nothing to learn; a search for the line among thousands."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        examples.read([path])
    assert str(error.value).startswith(f"{path}:3: ") and says in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_files_that_hold_no_examples(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, says in (
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xfc"}', "a.jsonl:2: byte 12 is not UTF-8"),
        (b" \n\n", "a.jsonl: has no examples: a line is"),
        (b"[\n]\n", "a.jsonl: has no examples: a line is"),
        (b'[{"prompt": "a", "completion": "b"}]\n[{"prompt": "a"}]', "a.jsonl: has text after its list"),
        (b'PAR1\x15\x00\xff{"prompt"', "is no text file"),
        (b'[{"prompt": "a", "completion": "b"},\n {"prompt": }]', "a.jsonl:2: is not JSON"),
        (b'[{"prompt": "a", "completion": "b"}', "a.jsonl:1: is not JSON"),
        (b'\n[\n{"prompt": "a", "completion": "b"},\n3]', "a.jsonl:4: is 3, not an object"),
        ('{"prompt": "어디 살아요?", "completion": "서울"}'.encode("cp949"), "it looks like CP949"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            examples.read([path])
        assert says in str(error.value)
    with pytest.raises(UserError, match="is a folder"):
        examples.read([tmp_path])
    with pytest.raises(UserError, match="no such file"):
        examples.read([tmp_path / "none.jsonl"])


def test_a_line_that_never_ends_is_one_line(tmp_path, monkeypatch):
    """Guards: a file of zeros, or of ten million values, that takes all memory."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\0" * (examples.MOST_BYTES + 2))
    with pytest.raises(UserError, match="pairs.jsonl:1: is longer than"):
        examples.read([path])
    path.write_text('{"prompt": [' + "[]," * (1 << 20) + '[]], "completion": "a"}')
    with pytest.raises(UserError, match="pairs.jsonl:1: is not JSON .more than"):
        examples.read([path])
    monkeypatch.setattr(examples, "MOST_LIST", 10)
    with pytest.raises(UserError, match="is one list, of more than 10 bytes.*json.dumps.*pairs.jsonl >"):
        examples.read([write(path, [PAIR], indent=0)])
