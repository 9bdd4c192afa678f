"""Generation: the cache changes nothing, neighbours change nothing, and the sampler draws what it says."""

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core import generate as g
from tinygpt.core import kernels, ops, replay
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.errors import UserError
from tinygpt.folders import checkpoint
from tinygpt.shell.cli import main
from tinygpt.stages.variants import build
from tinygpt.text import stream
from tinygpt.text.tokenizer import BPETokenizer, CharTokenizer

CONFIG = GPTConfig(vocab_size=29, block_size=16, n_layer=2, n_head=2, n_embd=24)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [27], [18, 2, 8], [1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0], [18, 2, 8]]


def make(dtype=np.float32, backend="numpy", **changes) -> GPT:
    """A model whose weights are large enough that every token matters and greedy text wanders."""
    model = build(GPTConfig(**(vars(CONFIG) | changes)), dtype=dtype, ops=kernels.backend(backend))
    rng = np.random.default_rng(2)
    for name, p in model.params.items():
        gain = "ln_" in name and name.endswith("weight")
        p[:] = gain + rng.normal(0, 0.6 if p.ndim == 2 else 0.2, p.shape)
    return model


def logits_after(model: GPT, text: list[int]) -> np.ndarray:
    """The textbook: all of the text, no cache, no padding."""
    return model.forward(np.array([text], np.int32))[0][0, -1]


def uncached(model: GPT, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by definition, and the rule of the full context by its description."""
    text, new = prompt[-model.config.block_size :], []
    for _ in range(count):
        if len(text) > model.config.block_size:
            text = text[-(model.config.block_size // 2) :]
        new.append(int(logits_after(model, text).argmax()))
        text = text + new[-1:]
    return new


@pytest.mark.parametrize("backend", kernels.available())
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 7, 36])
def test_one_bad_logit_is_told(backend, bad, place):
    """Guards: a NaN that hides behind a larger number, from which anything would be drawn."""
    logits = np.random.default_rng(0).standard_normal((3, 37)).astype(np.float32)
    logits[1, place] = bad
    with pytest.raises(UserError, match="not finite"):
        kernels.backend(backend).sample(logits, np.full(3, 0.5))


@pytest.mark.skipif("c" not in kernels.available(), reason="the C core was not built")
def test_weights_are_packed_once(monkeypatch):
    """Guards: weights packed at every step, or at none."""
    model, packed, run = make(backend="c"), [], kernels._run
    monkeypatch.setattr(kernels, "_run", lambda op, *more: (packed.append(op), run(op, *more)))
    g.generate(model, [[1]], g.PACK_AFTER + 6, temperature=0)
    assert packed.count("pack_panels") == 4 * CONFIG.n_layer + 1


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", kernels.available())
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("post_norm", [False, True])
def test_cached_logits_are_the_uncached(backend, dtype, tolerance, post_norm):
    """Guards: keys of a wrong position or layer, positions that restart, a chunk that sees its own future."""
    model = make(dtype, backend, post_norm=post_norm)
    ids = np.random.default_rng(2).integers(0, 29, (3, 16)).astype(np.int32)
    expected = model.forward(ids)[0]
    kv, done = g.KVCache(model, 3, 16), 0
    for chunk in (5, 1, 1, 3, 1, 5):
        output, _ = model.forward(ids[:, done : done + chunk], past=kv, keep=False)
        atol = tolerance * np.abs(expected).max()  # a sum rounds as its largest term
        np.testing.assert_allclose(output, expected[:, done : done + chunk], rtol=tolerance, atol=atol)
        done += chunk


@pytest.mark.parametrize("backend", kernels.available())
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_mixed_lengths_give_the_logits_of_one_by_one(backend, dtype, tolerance):
    """Guards: padding that is attended to, or counted in positions; a row left with another's cache."""
    model, texts = make(dtype, backend), [list(p) for p in PROMPTS]
    kv = g.KVCache(model, len(texts), 16)
    logits, pad = g._read(model, texts, kv)
    alive = np.array([True, False, True, True, False])
    for drop, token in ((False, 7), (True, 28), (False, 0)):
        for output, text in zip(logits[:, -1], texts, strict=True):
            np.testing.assert_allclose(output, logits_after(model, text), rtol=tolerance, atol=tolerance)
        if drop:
            rows = kv.keep(alive)
            texts, pad = [texts[row] for row in rows], pad[rows]
        texts = [text + [token] for text in texts]
        ids = np.full((len(texts), 1), token, np.int32)
        logits, _ = model.forward(ids, positions=kv.length - pad, start=pad, past=kv, keep=False)


def test_dropping_rows_keeps_the_others():
    """Guards: a compaction that overwrites a row before it moved, for every pattern of five rows."""
    model = make()
    for alive in itertools.product([False, True], repeat=5):
        alive = np.array(alive)
        kv = g.KVCache(model, 5, 4)
        kv.keys[:] = np.arange(5.0)[:, None, None]
        kv.values[:] = -kv.keys
        kv.length[...] = 4
        rows = kv.keep(alive)
        assert sorted(rows) == np.flatnonzero(alive).tolist()
        assert (kv.keys == rows[:, None, None]).all() and (kv.values == -rows[:, None, None]).all()


# --- generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", kernels.available())
@pytest.mark.parametrize("count", [1, 4, 60])
def test_greedy_text_is_the_uncached(backend, count):
    """Guards the whole path, past the end of the context (16) several times over."""
    model = make(backend=backend)
    new = g.generate(model, PROMPTS, count, temperature=0)
    assert [tokens.tolist() for tokens in new] == [uncached(model, prompt, count) for prompt in PROMPTS]
    assert count < 60 or all(len(set(tokens)) > 9 for tokens in new)  # a stuck model would prove nothing
    assert all(tokens.dtype == np.int32 for tokens in new)


CUT = {"temperature": 2, "top_k": 9, "top_p": 0.9}


@pytest.mark.parametrize("backend", kernels.available())
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.3}, CUT])
def test_a_batch_is_one_by_one(settings, backend):
    """Guards: a row whose random numbers, stop or full context depend on its neighbours, and a recorded step
    that goes on with rows that ended."""
    model, settings = make(np.float64, backend), settings | {"stop": {2, 4, 11, 20}}
    together = g.generate(model, PROMPTS, 50, rng=np.random.default_rng(3), **settings)
    rng = np.random.default_rng(3)
    alone = [g.generate(model, [prompt], 50, rng=rng, **settings)[0] for prompt in PROMPTS]
    assert [tokens.tolist() for tokens in together] == [tokens.tolist() for tokens in alone]
    if settings["temperature"]:
        assert together[2].tolist() != together[4].tolist()  # the same prompt, drawn twice
        assert len({len(tokens) for tokens in together}) > 2  # they do end at different times


def test_more_tokens_begin_with_the_same():
    """Guards: random numbers that depend on max_new_tokens, or are all drawn in advance."""
    few, many = (g.steps(make(), PROMPTS, n, rng=np.random.default_rng(0)) for n in (3, 10**12))
    assert [ids.tolist() for _, ids in few] == [ids.tolist() for _, ids in itertools.islice(many, 3)]


def test_the_stop_token_is_kept_and_ends_the_row():
    """Guards: RLHF scoring a text without its end (TRL 1623), and a row that goes on after it."""
    model = make()
    free = g.generate(model, PROMPTS, 12, rng=np.random.default_rng(5))
    stop = {int(free[0][3]), int(free[3][7])}
    ended = g.generate(model, PROMPTS, 12, stop=stop, rng=np.random.default_rng(5))
    for tokens, whole in zip(ended, free, strict=True):
        ends = [i for i, token in enumerate(whole) if token in stop]
        assert tokens.tolist() == whole[: ends[0] + 1 if ends else None].tolist()


def spy(model: GPT) -> list[tuple[int, int]]:
    """The shapes (B, T) of every forward pass to come."""
    shapes, forward = [], model.forward
    model.forward = lambda ids, *args, **kwargs: shapes.append(ids.shape) or forward(ids, *args, **kwargs)
    return shapes


def test_rows_that_ended_cost_nothing():
    """Guards: a batch that computes all its rows until the last one ends."""
    model = make(block_size=32)
    shapes = spy(model)
    new = g.generate(model, PROMPTS, 14, stop=range(0, 29, 3), rng=np.random.default_rng(4))
    assert shapes[0] == (4, 12)  # two of the prompts are the same
    assert shapes[1:] == [(sum(len(tokens) > n for tokens in new), 1) for n in range(1, max(map(len, new)))]


@pytest.mark.parametrize("backend", kernels.available())
def test_equal_prompts_are_read_once(backend):
    """Guards: rows that get another's keys, a prompt taken for one that its padding makes look the same."""
    model, prompts = make(np.float64, backend), [[5], [0, 5], [7, 3, 0, 5], [0, 5], [5], [7, 3, 0, 5]]
    shapes = spy(model)
    together = g.generate(model, prompts, 5, temperature=0)
    assert shapes[0] == (3, 4)
    assert [ids.tolist() for ids in together] == [uncached(model, prompt, 5) for prompt in prompts]
    drawn = g.generate(model, [prompts[0]] * 20, 5, rng=np.random.default_rng(0))
    assert len({tuple(ids) for ids in drawn}) > 5


@pytest.mark.skipif("c" not in kernels.available(), reason="the C core is not built here")
def test_rows_that_ended_leave_the_replayed_step(monkeypatch):
    """Guards: the same for what is replayed in C."""
    model, rows, replays = make(backend="c", block_size=32), [], []

    class Tape(replay.Tape):
        def __init__(self, inputs, *args):
            rows.append(len(inputs[0]))
            super().__init__(inputs, *args)

        def run(self):
            rows.append(len(self.inputs[0]))
            replays.append(self.is_whole)
            return super().run()

    monkeypatch.setattr(replay, "Tape", Tape)
    new = g.generate(model, PROMPTS, 14, stop=range(0, 29, 3), rng=np.random.default_rng(4))
    alive = [sum(len(tokens) > n for tokens in new) for n in range(1, max(map(len, new)))]
    assert rows == alive and alive[0] != alive[-1] and all(replays) and replays


@pytest.mark.skipif("c" not in kernels.available(), reason="the C core is not built here")
@pytest.mark.parametrize("batch", [1, 16, 128])
def test_many_texts_read_packed_weights(batch):
    """Guards: a copy of a weight in memory that an intermediate of the same step is written to. With 16 texts
    and more, intermediates are as large as weights."""
    model = make(backend="c", block_size=32, n_layer=4, n_embd=64, n_head=4)
    prompts = np.random.default_rng(0).integers(29, size=(batch, 3))
    new = np.array(g.generate(model, prompts, 24, temperature=0))
    ids = np.hstack([prompts, new]).astype(np.int32)
    logits, _ = model.forward(ids[:, :-1])
    assert (logits.argmax(-1)[:, 2:] == new).all()


def test_a_full_context_is_read_anew_once_in_half_a_context():
    """Guards: a full context that costs a whole forward pass for every token."""
    model = make()
    shapes = spy(model)
    g.generate(model, [[1]], 100, temperature=0)
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 8)] * 10  # after 16, then after every 9 tokens


def test_a_long_prompt_is_cut_with_a_notice():
    """Guards: a crash, or a silent cut, where the prompt does not fit."""
    model, prompt = make(), list(range(20))
    with pytest.warns(UserWarning, match="first 4 of the prompt's 20 tokens are cut"):
        long = g.generate(model, [prompt], 5, temperature=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert long[0].tolist() == g.generate(model, [prompt[-16:]], 5, temperature=0)[0].tolist()


def test_the_smallest_cases():
    """Guards: block_size 1 (half of it is 0), no prompts, no tokens."""
    assert g.generate(make(), [], 5, temperature=0) == []
    assert [tokens.tolist() for tokens in g.generate(make(), [[1], [2, 3]], 0, temperature=0)] == [[], []]
    tiny = make(block_size=1)
    new = g.generate(tiny, [[1]], 4, temperature=0)[0].tolist()
    assert new == [int(logits_after(tiny, [token]).argmax()) for token in [1, *new[:-1]]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": math.inf}, "top_k is inf"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": math.inf}, "max_new_tokens is inf"),
        ({"rng": None}, "needs rng"),
        ({"prompts": [[1], []]}, "a prompt is empty"),
    ],
)
def test_settings_out_of_range(settings, message):
    right = {"prompts": [[1]], "max_new_tokens": 3, "rng": np.random.default_rng(0)}
    with pytest.raises(UserError, match=message):
        g.generate(make(), **right | settings)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_broken_model_is_named(temperature):
    """Guards: a diverged model that goes on to write token 0 forever."""
    model = make()
    model.params["ln_f.weight"][3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        g.generate(model, [[1]], 3, temperature=temperature, rng=np.random.default_rng(0))


# --- sampling -----------------------------------------------------------------------------------------------


def by_definition(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """One row's distribution, slowly: sort everything, keep the first that suffice and their equals."""
    top = float(max(logits))
    probs = [math.exp((float(x) - top) / temperature) for x in logits]
    ranked = sorted(probs, reverse=True)
    if 0 < top_k <= len(probs):
        probs = [p if p >= ranked[top_k - 1] else 0 for p in probs]
    total = math.fsum(probs)
    if top_p < 1:
        ranked = sorted(probs, reverse=True)
        masses = itertools.accumulate(ranked)
        last = next(p for p in ranked if next(masses) >= top_p * total - 1e-12)
        probs = [p if p >= last else 0 for p in probs]
    return np.array(probs) / math.fsum(probs)


SETTINGS = [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8}]
SETTINGS += [{"temperature": 0.9, "top_k": 20, "top_p": 0.7}]
EXTREMES = [{"top_k": 40}, {"top_k": 99}, {"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1 - 1e-9}]


def chi_squared(counts: np.ndarray, probs: np.ndarray) -> float:
    """How far counts are from what they should be, in standard deviations (Wilson and Hilferty 1931)."""
    possible = probs > 0
    if counts[~possible].any():
        return math.inf
    expected = probs[possible] * counts.sum()
    statistic, freedom = ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("backend", kernels.available())
@pytest.mark.parametrize("settings", SETTINGS)
def test_chi_squared(settings, backend):
    """Guards: draws that do not follow the exact probabilities; a temperature a quarter off is found."""
    draws, rng = 200_000, np.random.default_rng(6)
    logits = rng.normal(0, 1, 40).astype(np.float32)
    rows, uniform = np.broadcast_to(logits, (draws, 40)), rng.random(draws)
    tokens = kernels.backend(backend).sample(rows, uniform, **settings)
    counts = np.bincount(tokens, minlength=40)
    assert abs(chi_squared(counts, by_definition(logits, **settings))) < 4
    warmer = settings | {"temperature": 1.25 * settings.get("temperature", 1)}
    assert chi_squared(counts, by_definition(logits, **warmer)) > 8


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("settings", [*SETTINGS, *EXTREMES])
def test_probabilities_are_the_definition(dtype, settings):
    """Guards: top_k beyond the vocabulary, a nucleus of one, several rows, an argument written to."""
    logits = np.random.default_rng(7).normal(0, 3, (2, 3, 40)).astype(dtype)
    before = logits.copy()
    output = ops.probabilities(logits, **settings)
    expected = [[by_definition(row, **settings) for row in rows] for rows in logits]
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-6 if dtype == np.float32 else 1e-12)
    assert output.dtype == dtype and (logits == before).all()


def test_a_wide_nucleus():
    """Guards the search that sorts only the likeliest: rows that need 1, 64, 65 and nearly all of 5,000."""
    logits = np.random.default_rng(8).normal(0, 0.1, (4, 5000))
    logits[0, 9], logits[1, 100:164], logits[2, 100:165] = 30, 30, 30
    for top_p in (0.5, 0.985, 0.999):
        output = ops.probabilities(logits, top_p=top_p)
        expected = [by_definition(row, top_p=top_p) for row in logits]
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-12)
    assert np.count_nonzero(output[0]) == 1 and np.count_nonzero(output[3]) > 4900


def test_ties_are_kept_together():
    """Guards: a result that depends on the order of the vocabulary."""
    tied = np.array([[2.0, 1, 1, 1, 0]])
    for settings in ({"top_k": 2}, {"top_p": 0.6}):
        assert (ops.probabilities(tied, **settings) > 0).tolist() == [[True, True, True, True, False]]
        backwards = ops.probabilities(tied[:, ::-1], **settings)
        assert (backwards > 0).tolist() == [[False, True, True, True, True]]
    assert np.allclose(ops.probabilities(np.zeros((1, 5)), top_p=0.1), 0.2)


@pytest.mark.parametrize("backend", kernels.available())
@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-9])
def test_the_coldest_are_greedy(temperature, backend):
    """Guards: division by zero (nanoGPT 738), and the extreme numbers that a generator may give."""
    logits = np.random.default_rng(9).normal(0, 1, (50, 30)).astype(np.float32)
    for uniform in (0.0, 0.5, np.nextafter(1, 0)):
        tokens = kernels.backend(backend).sample(logits, np.full(50, uniform), temperature)
        assert (tokens == logits.argmax(-1)).all()


@pytest.mark.parametrize("backend", kernels.available())
def test_extreme_uniform_numbers_stay_in_the_support(backend):
    """Guards: a cut token drawn because a cumulative sum rounds, at either end."""
    logits = np.random.default_rng(10).normal(0, 2, (500, 30)).astype(np.float32)
    for uniform in (0.0, np.nextafter(1, 0)):
        tokens = kernels.backend(backend).sample(logits, np.full(500, uniform), top_k=3)
        assert (np.take_along_axis(ops.probabilities(logits, top_k=3), tokens[:, None], 1) > 0).all()


@pytest.mark.skipif("c" not in kernels.available(), reason="the C core is not built here")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("settings", [*SETTINGS, *EXTREMES, {"temperature": 0}, CUT])
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512bf16"])
def test_both_backends_draw_the_same(isa, settings, dtype):
    """Guards the selection without sorting: ties, widths around every vector and block, cut rows of a wider
    array, hidden tokens. A number that falls on the border of two tokens may go either way."""
    if not kernels.lib.tinygpt_choose_isa(isa.encode()):
        pytest.skip(f"no {isa} here")
    rng = np.random.default_rng(11)
    for V in (1, 2, 17, 40, 255, 257, 700):
        logits = rng.normal(0, 2, (300, V + 3)).round(1).astype(dtype)[:, :V]
        logits[::2, V // 2 :] += rng.normal(0, 1, (150, V - V // 2)).astype(dtype)
        logits[::3, 1:] = -np.inf
        uniform = rng.random(300)
        output, expected = (backend.sample(logits, uniform, **settings) for backend in (kernels, ops))
        for row in np.flatnonzero(output != expected):
            mass = ops.probabilities(logits[row], **settings).cumsum(dtype=np.float64)
            assert np.abs(mass - uniform[row]).min() < (1e-6 if dtype == np.float32 else 1e-14)
        assert (output != expected).sum() <= 1
    kernels.lib.tinygpt_choose_isa(kernels.isa.encode())


# --- text ---------------------------------------------------------------------------------------------------


class Recital:
    """Stands in for a model: writes the given ids, whatever it reads."""

    config, flat, ops = CONFIG, np.zeros(1), kernels.backend("numpy")
    context, prefix, bfloat16 = CONFIG.block_size, 0, False

    def __init__(self, ids, vocab_size: int) -> None:
        self.logits = iter(np.eye(vocab_size)[ids])

    def forward(self, ids, past, places=None, **kwargs):
        past.length += ids.shape[1]
        logits = next(self.logits)[None]
        return (logits[:, None] if places is None else logits), None


def recite(tok, ids, count: int) -> list[str]:
    return list(stream.stream(Recital(ids, tok.vocab_size), tok, [0], count, temperature=0))


def test_streamed_text_comes_in_whole_characters():
    """Guards: half a character on the screen, and one lost where the tokens run out inside it."""
    tok = BPETokenizer.train("x", vocab_size=257)
    ids = tok.encode("é🙂!")
    assert recite(tok, ids, 7) == ["", "é", "", "", "", "🙂", "!", ""]
    assert recite(tok, ids, 4) == ["", "é", "", "", "\ufffd"]


def test_streamed_text_ends_before_the_end_of_text():
    """Guards: <|endoftext|> printed to the user, and text after it."""
    tok = BPETokenizer.train("x", vocab_size=257)
    assert "".join(recite(tok, [*tok.encode("one"), tok.eos_id, *tok.encode("two")], 9)) == "one"


def test_until_is_a_cut_at_the_first_match():
    """Guards: a stop text that spans tokens, or one that almost came: every way to split a text in pieces."""
    for text, stop in itertools.product(["aabaabb", "abab", "b", "", "aaab"], ["ab", "aab", "b", "abc", ""]):
        for bars in itertools.product([False, True], repeat=max(len(text) - 1, 0)):
            pieces = [""]
            for char, bar in zip(text, (*bars, False), strict=False):
                pieces[-1] += char
                pieces += [""] * bar
            assert "".join(stream.until(pieces, stop)) == (text.split(stop)[0] if stop else text)


def test_until_does_not_hold_text_back():
    """Guards: a stream that lags by the length of the stop text."""
    assert list(stream.until(["one", "a", "two"], "ab")) == ["one", "", "atwo", ""]


def test_an_empty_prompt():
    """Guards: empty input crashes (minbpe 114)."""
    bpe = BPETokenizer.train("x", vocab_size=257)
    assert stream.encode_prompt(bpe, "").tolist() == [bpe.eos_id]
    lines, none = CharTokenizer.train("ab\n"), CharTokenizer.train("ab")
    assert lines.decode(stream.encode_prompt(lines, "")) == "\n"
    with pytest.raises(UserError, match="prompt is empty"):
        stream.encode_prompt(none, "")
    with pytest.raises(UserError, match="'z'"):
        stream.encode_prompt(none, "z")


# --- command line ------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command line beside a folder `model` with a character model."""
    tok = CharTokenizer.train("abcdefgh \n")
    checkpoint.save(tmp_path / "model", make(vocab_size=tok.vocab_size), tok)
    monkeypatch.chdir(tmp_path)
    return lambda *args, **kwargs: CliRunner().invoke(main, [*args], **kwargs)


def test_generate_prints_the_prompt_and_what_follows(run):
    """Guards: samples that repeat each other, a seed that does not fix them, a prompt that is lost."""
    args = ("generate", "model", "--prompt", "head ", "--max-new-tokens", "40", "--num-samples", "2")
    one, again, other = run(*args), run(*args), run(*args, "--seed", "2")
    assert one.exit_code == 0 and one.stderr == ""
    first, second = one.stdout.split("-" * 15 + "\n")
    assert len(first) == len(second) == 46 and first[:5] == second[:5] == "head " and first != second
    assert again.stdout == one.stdout != other.stdout


def test_generate_reads_a_prompt_from_a_pipe(run):
    args = ("--max-new-tokens", "9", "--temperature", "0")
    piped = run("generate", "model", "--prompt", "-", *args, input="bad\ncafe\n")
    assert piped.stdout == run("generate", "model", "--prompt", "bad\ncafe", *args).stdout
    assert run("generate", "model", *args).exit_code == 0  # no prompt: begins after a newline


def test_a_model_with_more_rows_than_tokens(run):
    """Guards: a padded vocabulary (GPT-2's 50304), whose rows beyond the tokenizer's ids are drawn."""
    _, tok = checkpoint.load("model")
    checkpoint.save(Path("model"), make(vocab_size=500), tok)
    for args in (("generate", "model"), ("chat", "model", "--stop", "")):
        result = run(*args, "--max-new-tokens", "40", "--temperature", "2", input="bad\n")
        assert result.exit_code == 0 and result.stderr == "" and len(result.stdout) > 40


def test_generate_stops_at_a_text(run):
    whole = run("generate", "model", "--prompt", "a", "--max-new-tokens", "60").stdout
    stop = whole[30:32]
    cut = run("generate", "model", "--prompt", "a", "--max-new-tokens", "60", "--stop", stop).stdout
    assert cut == "a" + whole[1:].split(stop)[0] + "\n"


def test_a_notice_is_one_line_beside_the_text(run):
    result = run("generate", "model", "--prompt", "a" * 20, "--max-new-tokens", "3")
    assert result.exit_code == 0 and len(result.stdout) == 24
    assert result.stderr == "tinygpt: the first 4 of the prompt's 20 tokens are cut: the context is 16\n"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--prompt", "abz"), "'z'"),
        (("--temperature", "-1"), "--temperature"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-p", "0"), "--top-p"),
        (("--top-p", "1.5"), "--top-p"),
        (("--top-k", "-1"), "--top-k"),
        (("--max-new-tokens", "-1"), "--max-new-tokens"),
        (("--seed", "-1"), "--seed"),
        (("--num-samples", "0"), "--num-samples"),
    ],
)
def test_mistakes_are_named_in_a_line(run, args, named):
    """Guards: a traceback, or a KeyError on an unseen character (nanoGPT 434)."""
    result = run("generate", "model", *args)
    assert result.exit_code == 2 and named in result.stderr.splitlines()[-1]
    assert isinstance(result.exception, SystemExit)


def test_a_mistake_in_a_pipe_ends_the_chat(run):
    """Guards: a script that goes on without the answer to a line."""
    result = run("chat", "model", input="bad\nabz\nbad\n")
    assert result.exit_code == 2 and "'z'" in result.stderr


def test_a_pipe_that_is_not_text(run):
    for args in (("generate", "model", "--prompt", "-"), ("chat", "model")):
        result = run(*args, input=b"a\xffb\n")
        assert (result.exit_code, result.stderr) == (2, "tinygpt: standard input is not UTF-8 text\n")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    for command in ("generate", "chat"):
        for folder in (tmp_path, tmp_path / "missing"):
            result = CliRunner().invoke(main, [command, str(folder)])
            assert result.exit_code == 2 and str(folder) in result.stderr
            assert len(result.stderr.splitlines()) == 1


def test_chat_answers_every_line_and_remembers(run):
    """Guards: a conversation whose lines are answered as if each were the first."""
    settings = ("--max-new-tokens", "5", "--temperature", "0")
    chat = run("chat", "model", *settings, "--stop", "", input="bad\nhead\n")
    assert chat.exit_code == 0 and chat.stderr == ""
    before = "bad\n" + chat.stdout[:6] + "head\n"
    assert before + chat.stdout[6:] == run("generate", "model", "--prompt", before, *settings).stdout


def test_chat_goes_on_beyond_the_context(run):
    """Guards: a conversation that ends, or warns at every line, when its context is full."""
    result = run("chat", "model", "--max-new-tokens", "5", input="head\n" * 10 + "a" * 30 + "\n")
    assert result.exit_code == 0 and result.stderr.count("are cut") == 1
