"""The page of one training step: its numbers are the model's, every operation is there; then in a browser."""

import base64
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from click.testing import CliRunner

from tinygpt.core import ops as textbook
from tinygpt.core.config import PRESETS, GPTConfig
from tinygpt.core.model import GPT
from tinygpt.core.optim import AdamW
from tinygpt.errors import UserError
from tinygpt.folders import adapters, checkpoint
from tinygpt.lab import look
from tinygpt.shell.cli import main
from tinygpt.stages import variants
from tinygpt.stages.adapter import AdapterConfig
from tinygpt.text import instructions
from tinygpt.text.tokenizer import BPETokenizer

CONFIG = GPTConfig(vocab_size=90, block_size=30, n_layer=2, n_head=2, n_embd=72)  # 72: more than 64 columns
KINDS = {
    "plain": None,
    "gpt1": None,
    "lora": AdapterConfig("lora", rank=2, alpha=2.0, targets=("c_attn", "mlp.c_proj")),
    "ptuning": AdapterConfig("ptuning", num_virtual_tokens=3, hidden=5),
    "prefix": AdapterConfig("prefix", num_virtual_tokens=3),
}
IDS = np.array([5, 80, 7, 7, 12, 3, 41], np.int32)
LEARNED = np.array([0, 0, 0, 1, 1, 0, 1], bool)
T = len(IDS) - 1
BLOCK = ["layernorm", "linear", "attention", "linear", "layernorm", "linear", "gelu", "linear"]


def make(kind: str, ops=None) -> GPT:
    config = GPTConfig(**vars(CONFIG) | {"post_norm": kind == "gpt1"})
    model = variants.build(config, np.random.default_rng(0), ops=ops)
    if KINDS[kind]:
        model = variants.create(model, KINDS[kind], np.random.default_rng(1))
        for name, p in model.adapter.params.items():
            if name.endswith("lora_B"):
                p[:] = np.random.default_rng(2).standard_normal(p.shape) * 0.3
    return model


def observed(model: GPT, learned=LEARNED) -> dict:
    return json.loads(json.dumps(look.observe(model, IDS, learned, str, 3)))


def truth(model: GPT, learned=LEARNED) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits and the gradients, from the model itself."""
    weights = (learned[1:] / learned[1:].sum()).astype(np.float32)[None]
    logits, cache = model.forward(IDS[None, :-1])
    _, grads = model.trained.gradients()
    nll, c_nll = model.ops.cross_entropy_forward(logits, IDS[None, 1:])
    model.backward(model.ops.cross_entropy_backward(weights, c_nll), cache, grads)
    return logits, grads


def elements(array: dict) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(array["data"]), "<f4")
    return values.reshape(len(array["rows"]), len(array["columns"]))


def shows(array: dict, a: np.ndarray) -> bool:
    """Whether an array of the page is `a`: shape, smallest and largest element, elements, whole rows."""
    flat = a.reshape(-1, a.shape[-1])
    whole = (flat[int(r)].tobytes() == base64.b64decode(row) for r, row in array["whole"].items())
    same = array["shape"] == list(a.shape) and [array["min"], array["max"]] == [a.min(), a.max()]
    part = flat[np.ix_(array["rows"], array["columns"])]
    return same and np.array_equal(elements(array), part) and all(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_forward_and_backward(kind, ops):
    """Guards: an array that is noted after it changed, a gradient beside the wrong array, a moved weight."""
    model = make(kind, ops)
    logits, grads = truth(model)
    before = {name: p.copy() for name, p in model.trained.params.items()}
    base = model.base.flat.copy() if KINDS[kind] else None
    data = observed(model)
    arrays, steps = data["arrays"], data["steps"]
    loss_at = next(n for n, step in enumerate(steps) if step["op"] == "cross_entropy_forward")
    assert shows(arrays[steps[loss_at]["arrays"][0]["a"]], logits)
    assert arrays[steps[loss_at]["arrays"][0]["a"]]["kinds"] == ["token", "word"]
    gradients = {row["param"]: arrays[row["g"]] for step in steps for row in step["arrays"]
                 if row["g"] is not None and row["param"]}  # fmt: skip
    for name, gradient in gradients.items():  # the last of a name is the sum of all its parts
        assert shows(gradient, grads[name].T if name.endswith("lora_A") else grads[name]), name
    copied = {"embedding.weight"} if kind == "prefix" else set()  # no operation computes this gradient
    assert gradients.keys() == grads.keys() - copied
    for name, update in data["update"].items():
        row = ... if update["row"] is None else update["row"]
        whole = [before[name], grads[name], None, None, model.trained.params[name]]
        for number, a in zip(update["arrays"], whole, strict=False):
            assert a is None or shows(arrays[number], a[row][None]), name
    assert data["update"].keys() == grads.keys()
    weights = (LEARNED[1:] / LEARNED[1:].sum()).astype(np.float32)[None]
    assert data["after"] == float(model.loss(IDS[None, :-1], IDS[None, 1:], weights)) != data["loss"]
    if base is not None:
        assert np.array_equal(model.base.flat, base)


def test_every_operation_is_there():
    """Guards: a step that is left out, in a wrong order, of a wrong layer or without its gradient."""
    data = observed(make("plain"))
    blocks = 2 * BLOCK
    forward = ["embedding", "embedding", "residual", *blocks, "layernorm", "linear"]
    back = ["linear", "layernorm", *blocks[::-1], "embedding", "embedding"]
    names = [f"{op}_forward" for op in forward] + ["cross_entropy_forward", "cross_entropy_backward"]
    names += [f"{op}_backward" for op in back] + ["weighted_sum", "squares", "adamw", "adamw"]
    steps = data["steps"]
    assert [step["op"] for step in steps] == names
    layers = [step["layer"] for step in steps if step["phase"] == "forward"]
    assert layers == [None] * 3 + [0] * 8 + [1] * 8 + [None] * 2
    layers = [step["layer"] for step in steps if step["phase"] == "backward"]
    assert layers == [None] * 3 + [1] * 8 + [0] * 8 + [None] * 2
    for step in steps:
        assert step["phase"] in ("loss", "update") or step["arrays"], step["op"]
        if step["phase"] == "backward":
            assert all(row["a"] is None or row["g"] is not None for row in step["arrays"]), step["op"]
    assert [sorted(step["weights"]) for step in steps[-2:]] == [
        sorted(n for n, p in make("plain").params.items() if (p.ndim == 1) == vectors) for vectors in (0, 1)
    ]


def test_gradients_of_activations_and_moments():
    """Guards: q, k and v in another order, a wrong sign beside a sum, the moments of another array."""
    data = observed(make("plain"))
    arrays, steps = data["arrays"], data["steps"]

    def row(number: int) -> np.ndarray:
        return np.frombuffer(base64.b64decode(arrays[number]["whole"]["2"]), "<f4")

    for step, following in zip(steps, steps[1:], strict=False):
        pictures = {each["name"]: each["g"] for each in step["arrays"]}
        if step["op"] == "attention_backward":  # what the map behind q, k and v gets is all three
            parts = np.concatenate([row(pictures[name]) for name in "qkv"])
            assert np.array_equal(parts, row(following["arrays"][0]["g"]))
        if step["op"] == "linear_backward" and "add" in pictures:
            assert pictures["add"] == pictures["out"]
    numbers = steps[-1]["numbers"]
    for name, update in data["update"].items():
        _, g, m, v, *_ = (elements(arrays[n]).astype(float) for n in update["arrays"])
        g = g * numbers["scale"]
        np.testing.assert_allclose(m, (1 - numbers["beta1"]) * g, rtol=1e-5, atol=1e-30, err_msg=name)
        np.testing.assert_allclose(v, (1 - numbers["beta2"]) * g * g, rtol=1e-4, atol=1e-30, err_msg=name)


@pytest.mark.parametrize("kind", ("plain", "gpt1", "lora", "prefix"))
def test_the_marked_lines_call(kind):
    """The innermost line of each step calls the operation; each line around calls the method inside it."""
    data = observed(make(kind))
    for step in data["steps"]:
        called = f"ops.{step['op']}("
        for source, line in step["frames"]:
            text = data["sources"][source]
            assert called in text["text"].split("\n")[line - text["first"]], (step["op"], text["name"])
            called = f".{text['name']}("
        assert data["sources"][step["source"]]["text"].startswith(f"def {step['op']}(")
        assert data["sources"][step["source"]]["file"] == "core/ops.py"


def test_views():
    """The last row of the logit lens is the model's output; heads, slopes and masks are right."""
    model = make("plain")
    logits, grads = truth(model)
    data = observed(model)
    assert len(data["lens"]) == CONFIG.n_layer + 1
    probs = textbook.probabilities(logits)[0]
    for t in range(T):
        likeliest, expected = data["lens"][-1][t]
        assert [i for i, _ in likeliest] == np.argsort(-probs[t], kind="stable")[:5].tolist()
        assert expected == pytest.approx(float(probs[t, IDS[t + 1]]), rel=1e-6)
        assert data["nll"][t] == pytest.approx(-np.log(probs[t, IDS[t + 1]]), rel=1e-5)
    for layer in data["attention"]:
        maps = np.frombuffer(base64.b64decode(layer["data"]), "<f4").reshape(layer["shape"])
        assert maps.shape == (CONFIG.n_head, T, T) and np.allclose(maps.sum(-1), 1)
        assert not np.triu(maps, 1).any()
    assert len(data["check"]) == look.CHECKED
    assert len({row["name"] for row in data["check"]}) > 15
    for row in data["check"]:
        assert row["backward"] == float(grads[row["name"]][tuple(row["at"])])
        assert row["slope"] == pytest.approx(row["backward"], rel=1e-3), row["name"]
    assert [weight > 0 for weight in data["weights"]] == LEARNED[1:].tolist()


def test_an_adapters_base_is_frozen():
    data = observed(make("lora"))
    rows = [row for step in data["steps"] for row in step["arrays"] if row["param"]]
    assert {row["frozen"] for row in rows} == {True, False}
    for row in rows:
        assert row["frozen"] == (".lora_" not in row["param"])
        assert not (row["frozen"] and row["g"] is not None)


def test_size_and_what_is_refused():
    """A small model and 16 tokens are at most 3 MB. Guards: code in a page, out of a token's text."""
    model, ids = GPT(PRESETS["small"], np.random.default_rng(0)), np.arange(100, 117, dtype=np.int32)
    page = look.html(look.observe(model, ids, np.ones(17, bool), lambda i: f"</script><b>{i}", 3))
    assert len(page.encode()) < 3e6 and page.count("</script>") == 2 and "http" not in page
    for given, token, words in ((ids[:1], 1, "text has 1"), (np.zeros(65, int), 1, "text has 65"),
                                (ids[:3], 3, "token is 3")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            look.observe(model, given, np.ones(len(given), bool), str, token)


# --- the command, and the page in a browser -----------------------------------------------------------------

TEXT = "고양이는 the cat. The cat is <b>here</b>."


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folders: `base`, a model, and `lora`, an adapter beside it."""
    folder = tmp_path_factory.mktemp("look")
    tokenizer = BPETokenizer.train(TEXT * 9, 275)
    config = GPTConfig(**vars(CONFIG) | {"vocab_size": tokenizer.vocab_size, "block_size": 64})
    model = GPT(config, np.random.default_rng(0))
    checkpoint.save(folder / "base", model, tokenizer)
    tuned = copy.copy(tokenizer)
    tuned.chat_template = instructions.TEMPLATE
    lora = variants.create(model, KINDS["lora"], np.random.default_rng(1))
    adapters.save(folder / "lora", lora, tuned, str(folder / "base"))
    return folder


def run(folder: Path, *words: str):
    return CliRunner().invoke(main, ["look", str(folder / "base"), *words])


def test_the_command(folders, tmp_path):
    files = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
    out = tmp_path / "page.html"
    result = run(folders, TEXT, "--out", str(out))
    assert result.exit_code == 0 and f"Saved {out}, " in result.output, result.output
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run(folders, TEXT, "--out", str(out)).exit_code == 2  # it is there
    weights = folders / "full" / "model.safetensors"
    for wrong in (str(tmp_path / "page.txt"), str(weights)):
        result = run(folders, TEXT, "--overwrite", "--out", wrong)
        assert result.exit_code == 2 and "the name of a page ends in .html" in result.output
    result = run(folders, TEXT, "--lr", "1e30", "--out", str(tmp_path / "large.html"))
    assert result.exit_code == 2 and "choose a smaller learning rate than 1e+30" in result.output
    assert not (tmp_path / "large.html").exists()
    answer = ["--answer", "고양이", "--adapter-folder", str(folders / "lora"), "--overwrite"]
    link = tmp_path / "link.html"
    link.symlink_to(out)
    assert run(folders, "the cat", *answer, "--out", str(link)).exit_code == 0 and link.is_symlink()
    data = json.loads(re.search('id="look">(.*?)</script>', out.read_text(encoding="utf-8"))[1])
    assert 0 in data["weights"] and sum(data["weights"]) == pytest.approx(1)
    for words in (["x", "--token", "9"], [TEXT * 9], [""]):
        result = run(folders, *words, "--out", str(tmp_path / "no.html"))
        assert result.exit_code == 2 and len(result.output.splitlines()) == 1, result.output
    assert not (tmp_path / "no.html").exists()
    assert files == {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}


CAPTIONS = """return [...document.querySelectorAll('figcaption')].map((caption) =>
  [caption.querySelector('b').textContent, caption.querySelector('span').textContent])"""
WIDE = "return document.documentElement.scrollWidth"


@pytest.mark.skipif(not Browser.is_here, reason="needs chromium and chromedriver")
def test_in_a_browser(folders, tmp_path):
    """Each step forward and back by the keyboard; the ranges shown are those of the model's own gradients."""
    out = tmp_path / "page.html"
    assert run(folders, TEXT, "--out", str(out)).exit_code == 0
    model, tokenizer = checkpoint.load(folders / "base")
    ids = tokenizer.encode(TEXT).astype(np.int32)
    weights = np.full((1, len(ids) - 1), np.float32(1) / (len(ids) - 1), np.float32)
    logits, _ = model.forward(ids[None, :-1])
    optimizer = AdamW(model)
    loss = float(model.loss(ids[None, :-1], ids[None, 1:], weights, optimizer.grads))

    def text(a: np.ndarray) -> str:
        low, high = (float(f"{x:.4g}") for x in (a.min(), a.max()))
        return f"({', '.join(map(str, a.shape))}) {low} to {high}"

    def same(shown: str, expected: str) -> bool:
        numbers = [[float(x) for x in re.findall(r"-?\d[\d.e-]*", part)] for part in (shown, expected)]
        return numbers[0] == numbers[1]

    with Browser(tmp_path / "browser") as browser:
        browser.open(out)
        count = browser.run("return look.steps.length")
        assert f"{float(f'{loss:.4g}')}" in browser.run("return byId('about').textContent")
        seen, ranges, gradients = [], [], {}
        for _ in range(count):
            seen.append(browser.run("return byId('status').textContent"))
            captions = browser.run(CAPTIONS)
            assert captions or "squares" in seen[-1], seen[-1]
            ranges += [shown for name, shown in captions if name == "logits"]
            for (name, _), (below, shown) in zip(captions, captions[1:], strict=False):
                if " = " in name and below.startswith("gradient of"):
                    gradients[name.split(" = ")[1]] = shown
            browser.press("ArrowRight")
        assert any("layer 0," in each for each in seen)  # as in the code
        assert not any(f"layer {CONFIG.n_layer}," in each for each in seen)
        assert len(set(seen)) == count and seen[0].startswith("Step 1: ") and f"Step {count}: " in seen[-1]
        assert ranges and same(ranges[0], text(logits))
        assert gradients.keys() == optimizer.grads.keys()
        for name, shown in gradients.items():
            assert same(shown, text(optimizer.grads[name])), (name, shown)
        for n in range(count - 1, 0, -1):
            assert browser.run("return byId('status').textContent") == seen[n]
            browser.press("ArrowLeft")

        # a number under the pointer, and one under the keyboard's focus: of tok, the embedding of token 3
        box = browser.run("""const canvas = document.querySelectorAll('canvas')[2];
            canvas.scrollIntoView({ block: 'center' });
            const { left, top, width, height } = canvas.getBoundingClientRect();
            return [left, top, width / canvas.width, height / canvas.height]""")
        columns = [n for n in range(72) if n % 2 == 0]
        browser.point(round(box[0] + 4.5 * box[2]), round(box[1] + 2.5 * box[3]))
        shown = browser.run("return document.querySelectorAll('figure')[2].querySelector('output').value")
        w = model.params["wte.weight"][ids[2]]
        assert shown.startswith("token 3 ") and f"channel {columns[4]}: " in shown, shown
        assert float(shown.split()[-1]) == float(f"{w[columns[4]]:.4g}")
        browser.run("document.querySelectorAll('canvas')[2].focus()")
        browser.press("Shift", "ArrowRight")
        shown = browser.run("return document.querySelectorAll('figure')[2].querySelector('output').value")
        assert f"channel {columns[5]}: " in shown, shown
        assert float(shown.split()[-1]) == float(f"{w[columns[5]]:.4g}")

        # the views, with the keys on tokens; then a phone, in the dark
        for view in browser.run("return Object.keys(VIEWS)"):
            browser.run("byId(arguments[0]).click()", view)
            assert browser.run("return byId('view').textContent.length") > 100
        browser.run("byId('Predictions').click()")
        browser.press("Home")
        browser.press("ArrowRight")
        assert "What comes after token 2 " in browser.run("return byId('view').textContent")
        browser.is_phone(360, 700, dark=True)
        mark = "return getComputedStyle(document.documentElement).getPropertyValue('--mark')"
        assert browser.run(mark) == "#5a4500"
        for view in browser.run("return Object.keys(VIEWS)"):
            browser.run("go({ view: arguments[0] })", view)
            assert browser.run(WIDE) <= 360, view
        for n in range(count):
            browser.run("go({ view: 'Steps', step: arguments[0] })", n)
            assert browser.run(WIDE) <= 360, seen[n]
        assert browser.errors() == []


@pytest.mark.skipif(not Browser.is_here, reason="needs chromium and chromedriver")
def test_frozen_and_masked_are_visible(folders, tmp_path):
    """Of an adapter: each picture of a frozen weight is grey, no other is; masked tokens are struck out."""
    out = tmp_path / "page.html"
    words = ["--answer", "고양이", "--adapter-folder", str(folders / "lora"), "--out", str(out)]
    assert run(folders, "the cat", *words).exit_code == 0
    grey = """return [...document.querySelectorAll('figure')].map((figure) => {
      const { width, height } = figure.querySelector('canvas');
      const { data } = figure.querySelector('canvas').getContext('2d').getImageData(0, 0, width, height);
      const grey = data.every((x, i) => i % 4 > 1 || x === data[i + 1]);
      const frozen = figure.querySelector('b').textContent.endsWith(', frozen');
      return [frozen, grey, data.every((x) => x === 255)] })"""
    with Browser(tmp_path / "browser") as browser:
        browser.open(out)
        pictures = []
        for n in range(browser.run("return look.steps.length")):
            browser.run("go({ step: arguments[0] })", n)
            pictures += [(frozen, is_grey) for frozen, is_grey, empty in browser.run(grey) if not empty]
        assert set(pictures) == {(True, True), (False, False)}
        masked = browser.run("return look.ids.map((_, t) => byId('token-' + t).classList.contains('masked'))")
        assert masked == [False, *(weight == 0 for weight in browser.run("return look.weights"))]
        assert sum(masked) > 1 and browser.errors() == []
