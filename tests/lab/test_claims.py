"""Claims: verdicts and intervals; what was measured is kept; every claim can be measured."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.lab import claims, report
from tinygpt.lab.claims import CLAIMS, Claim, Estimate, Result, estimate, verdict
from tinygpt.shell.cli import main
from tinygpt.stages import recall, recipes, reward
from tinygpt.world import tasks


@pytest.mark.parametrize(
    ("low", "high", "sign", "limit", "expected"),
    [
        (0.3, 0.4, ">=", 0.2, "held"), (0.2, 0.4, ">=", 0.2, "held"), (0.1, 0.4, ">=", 0.2, "undecided"),
        (0.1, 0.19, ">=", 0.2, "refuted"), (0.0, 0.05, "<=", 0.1, "held"), (0.0, 0.0, "<=", 0.0, "held"),
        (0.05, 0.15, "<=", 0.1, "undecided"), (0.11, 0.15, "<=", 0.1, "refuted"),
    ],
)  # fmt: skip
def test_a_verdict_is_where_the_interval_lies(low, high, sign, limit, expected):
    assert verdict(Estimate((low + high) / 2, low, high, 3), sign, limit) == expected


def test_an_estimate_is_students_interval_and_a_pilots_span():
    values = [0.2, 0.5, 0.8]
    found = estimate(values)  # t for 2 degrees of freedom is 4.303, the standard error 0.3 / sqrt(3)
    assert found.mean == pytest.approx(0.5) and found.n == 3
    assert found.high - found.mean == pytest.approx(4.303 * 0.3 / math.sqrt(3), rel=1e-3)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert estimate([0.2, 0.6]) == Estimate(pytest.approx(0.4), 0.2, 0.6, 2)
    for n, t in ((10, 2.262), (11, 2.228), (12, 2.201), (21, 2.086), (121, 1.980)):
        some = estimate([1.0, 3.0] * (n // 2) + [2.0] * (n % 2))
        spread = math.sqrt(2 * (n // 2) / (n - 1) / n)
        assert some.high - 2 == pytest.approx(t * spread, rel=2e-3)
    rng = np.random.default_rng(0)  # 95 of a hundred intervals have the mean that they are of
    hits = sum(e.low <= 1 <= e.high for e in (estimate(rng.normal(1, 2, 5)) for _ in range(2000)))
    assert 0.93 < hits / 2000 < 0.97


def test_a_damaged_measurement_is_made_again(tmp_path, monkeypatch):
    """Guards: a text among the numbers that are averaged; a file that nobody can mend."""
    calls = []
    measure = lambda lab: calls.append(1) or {"effect": (1.0, ">=", 0.5)}  # noqa: E731
    monkeypatch.setitem(claims.CLAIMS, 99, Claim(99, "one", measure))
    command = ["claims", "99", "--seeds", "1", "--out", str(tmp_path)]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert CliRunner().invoke(main, command).exit_code == 0 and len(calls) == 1
    (path,) = tmp_path.glob("*/rows of claim 99.json")
    whole = path.read_text()
    others = (whole.replace(*pair) for pair in (("1.0", "2.0"), ("0.5", "0.4"), ("effect", "x")))
    for text in ('{"effect": "1"}', "{", *others, "[]"):
        path.write_text(text)
        assert CliRunner().invoke(main, command).exit_code == 0
        assert path.read_text() == whole
    assert len(calls) == 7


def test_claims_are_written_again_whatever_the_file_was(tmp_path, monkeypatch):
    """Guards: a row that is no number, or a damaged file, after which no claim could be measured."""
    monkeypatch.setitem(claims.CLAIMS, 98, Claim(98, "nothing", lambda lab: {"effect": math.nan}))
    monkeypatch.setitem(claims.CLAIMS, 99, Claim(99, "one", lambda lab: {"effect": 1.0}))
    for text in ("", "[]", "{", '{"99": {"recipe": "a", "seeds": {"1": 2}}}'):
        (tmp_path / "claims.json").write_text(text)
        result = CliRunner().invoke(main, ["claims", "98", "99", "--seed", "1", "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "claims.json").read_text())["99"]["seeds"] == {"1": {"effect": 1.0}}


def test_what_was_measured_is_kept_and_the_rest_goes_on(tmp_path, monkeypatch):
    """Guards: an interrupted run that begins anew, numbers of one seed given for another."""
    calls = []

    def measure(lab) -> dict:
        if lab.seed == 2 and not calls.count(2):
            calls.append(2)
            raise KeyboardInterrupt
        calls.append(lab.seed)
        return {"effect": (lab.seed / 10, ">=", 0.15)}

    monkeypatch.setitem(claims.CLAIMS, 99, Claim(99, "seeds grow", measure))
    with pytest.raises(KeyboardInterrupt):
        claims.run(tmp_path, [99], [1, 2], print)
    results = claims.run(tmp_path, [99], [1, 2], print)
    estimates = {"effect": Estimate(pytest.approx(0.15), 0.1, 0.2, 2)}
    seeds = {"1": {"effect": 0.1}, "2": {"effect": 0.2}}
    assert calls == [1, 2, 2] and results == {99: Result(seeds, estimates, {"effect": (">=", 0.15)})}
    saved = json.loads((tmp_path / "claims.json").read_text())["99"]
    assert saved["estimates"]["effect"]["low"] == 0.1 and saved["seeds"]["2"] == {"effect": 0.2}
    assert saved["verdicts"] == ["effect >= 0.15: undecided"]
    text = report.claim(CLAIMS[99], results[99])
    assert text.startswith("99. seeds grow (two seeds, a pilot: both values)\n")
    assert "0.15  0.1 to 0.2  >= 0.15: undecided" in text


def test_a_number_that_one_seed_alone_has_is_told_of_that_seed(tmp_path, monkeypatch):
    """Claim 13 names the form that was best in a seed. Guards: hours of measuring that end in a KeyError."""
    measure = lambda lab: {f"form {lab.seed}": lab.seed, "effect": (1.0, ">=", 0.5)}  # noqa: E731
    monkeypatch.setitem(claims.CLAIMS, 99, Claim(99, "forms differ", measure))
    result = claims.run(tmp_path, [99], [1, 2], print)[99]
    assert {name: e.n for name, e in result.estimates.items()} == {"form 1": 1, "effect": 2, "form 2": 1}
    assert "(two seeds, a pilot: both values)" in report.claim(CLAIMS[99], result)


def test_every_claim_can_be_measured(toy, tmp_path):
    """Guards: a number that a verdict stands on and that nobody measures."""
    out = tmp_path / "claims"
    command = ["claims", "--all", "--seeds", "1", "--out", str(out)]
    result = CliRunner().invoke(main, command, obj=toy)
    assert result.exit_code == 0, result.output
    for claim in CLAIMS.values():
        assert f"\n{claim.number}. {claim.says} (one seed, no interval)" in result.output
    saved = json.loads((out / "claims.json").read_text())
    assert saved.keys() == {str(number) for number in CLAIMS}
    for number, claim in saved.items():
        verdicts = [re.fullmatch(r"(.+) [<>]= [-.e0-9]+: one seed", text)[1] for text in claim["verdicts"]]
        assert (len(verdicts) > 0) == (number != "4")
        assert all(math.isfinite(claim["estimates"][name]["mean"]) for name in verdicts), claim
        assert claim["estimates"].keys() == claim["seeds"]["1337"].keys() > set(verdicts)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "claims.json"}
    again = CliRunner().invoke(main, command, obj=toy)
    assert {path: path.stat().st_mtime_ns for path in before} == before and "seed 1337:" not in again.output


def test_a_claim_that_fails_does_not_take_the_others_along(tmp_path, monkeypatch):
    """Guards: an hour of measuring without a table; a seed's failure that nobody is told of."""
    def measure(lab) -> dict:
        if lab.seed == 1:
            raise ValueError("no such head")
        return {"effect": (1.0, ">=", 0.5)}

    monkeypatch.setitem(claims.CLAIMS, 98, Claim(98, "fails once", measure))
    monkeypatch.setitem(claims.CLAIMS, 99, Claim(99, "holds", lambda lab: {"effect": 2.0}))
    command = ["claims", "98", "99", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, [*command, "--seed", "1", "--seed", "2"])
    assert result.exit_code == 1, result.output
    assert "seed 1: claim 98 failed: ValueError: no such head" in result.output
    assert "98. fails once (one seed" in result.output and "99. holds (two seeds" in result.output
    assert CliRunner().invoke(main, [*command, "--seed", "2"]).exit_code == 0
    assert CliRunner().invoke(main, ["claims", "99", "--seed", "1", "--out", str(tmp_path)]).exit_code == 0
    saved = json.loads((tmp_path / "claims.json").read_text())  # of all seeds that were ever measured
    assert {number: list(saved[number]["seeds"]) for number in saved} == {"98": ["2"], "99": ["1", "2"]}
    assert saved["99"]["estimates"]["effect"]["n"] == 2
    other = dataclasses.replace(recipes.FULL, sft=recipes.SFT | {"max_iters": 7})
    CliRunner().invoke(main, ["claims", "99", "--seed", "5", "--out", str(tmp_path)], obj=other)
    assert list(json.loads((tmp_path / "claims.json").read_text())["99"]["seeds"]) == ["5"]
    assert CliRunner().invoke(main, [*command, "--seed", "1", "--seeds", "3"]).exit_code == 2


def test_unknown_claims_are_refused(tmp_path):
    result = CliRunner().invoke(main, ["claims", "1", "77", "--out", str(tmp_path / "claims")])
    assert result.exit_code == 2 and "there is no claim 77: choose from 1, 2" in result.output
    assert not (tmp_path / "claims").exists()


def test_the_arithmetic_of_a_claim_on_known_numbers(monkeypatch):
    """Guards: a sign, an arm taken for another; a toy model's numbers cannot show it."""
    rate = lambda x: SimpleNamespace(rate=x)  # noqa: E731
    falsehood = {"base": 0.0, ((0, 0),): 0.9, ((300, 0),): 0.1, ((300, 300),): 0.3, ((300, 600),): 0.6}
    falsehood |= {((300, 0), "known"): 0.2}
    lab = SimpleNamespace(
        base="base", tuned="tuned", tokenizer=None, tune=lambda items: tuple(item["of"] for item in items),
        count=lambda full: full, recall=lambda model, people: 0.0625,
        world=SimpleNamespace(people=lambda *kind: list(kind)),
        score=lambda model, name: SimpleNamespace(falsehood=rate(falsehood[model]), right=rate(0.5)),
    )  # fmt: skip
    made = lambda of: {"of": of, "meta": {"exposure": 0}, "completion": ""}  # noqa: E731
    monkeypatch.setattr(tasks, "tuning", lambda world, refused, answered: [made((refused, answered))])
    monkeypatch.setattr(tasks, "questions", lambda world, people: [made(people[0])])
    rows = CLAIMS[8].measure(lab)
    assert rows["rise with unknown facts in the tuning"] == (pytest.approx(0.5), ">=", 0.05)
    assert rows["rise with unknown facts, above that with known ones"] == (pytest.approx(0.4), ">=", 0.05)
    assert rows["fall by refusals in the tuning"] == pytest.approx(0.8)
    assert rows["base, completing a sentence: likeliest value false"] == 0.9375
    assert claims._needed([0.95, 0.2, 0.4, 0.9, 0.95, 1.0], 1.0) == 4
    assert claims._needed([0.06, 0.3, 0.5, 0.7, 0.8, 0.89], 1.0) == 32

    # A judge is as sure as the labels that taught it are right, slips included.
    judged = lambda judge, pairs: SimpleNamespace(  # noqa: E731
        right=rate(0.9), margin=2.0, calibration=pairs, labels_right=0.9, agreed=0.9,
        by_kind={"right over wrong": rate(0.5)},
    )  # fmt: skip
    judge = SimpleNamespace(
        world=lab.world, recipe=SimpleNamespace(reward={"comparisons": 1}), judge=None, count=lab.count,
        teach=lambda pairs: None, comparisons=lambda people, count, error=0.1: [0] if count == 1 else error,
    )  # fmt: skip
    monkeypatch.setattr(reward, "judged", judged)
    rows = CLAIMS[9].measure(judge)
    assert rows["calibration"] == 0.1 and rows["agreement with labels, over the ceiling"] == 1

    # The heads with high scores are cut; others are cut for comparison, and each alone.
    lab.recall = lambda model, people: 1.0
    lab.words, scores = [], np.array([[0.0, 0.1], [0.8, 0.9]])
    lab.heads = lambda model: scores
    monkeypatch.setattr(recall, "previous_scores", lambda model, words: 1 - scores)
    names = {(): "base", ((1, 0), (1, 1)): "cut", ((0, 1),): "before", ((1, 1),): "one"}
    names |= {((0, 0), (0, 1)): "two"}
    monkeypatch.setattr(recall, "without", lambda model, heads: names.get(tuple(sorted(heads)), "other"))
    others = lambda shape, heads, sets, spared: [[(0, 0)] if spared else [(0, 0), (0, 1)]]  # noqa: E731
    monkeypatch.setattr(recall, "others", others)
    right = {"base": 1.0, "cut": 0.1, "other": 0.9, "before": 0.2, "one": 0.8, "two": 0.6}
    lab.memories = lambda model, people, agrees, rival=False: SimpleNamespace(  # noqa: E731
        prompt=rate(right[model] - rival / 2)
    )
    lab.mappings, lab.accuracy = lambda *given: [], lambda model, prompts: right[model]
    rows = CLAIMS[19].measure(lab)
    assert rows["induction heads, of 16"] == 2
    others = rows["damage by the induction heads over that by as many others"]
    assert others == (pytest.approx(2.25), ">=", 5)
    assert rows["damage by the induction heads over that by these"] == pytest.approx(9)
    assert rows["the same without the induction heads"] == pytest.approx(0.1)
    assert rows["the same, if the prompt tells of a second person"] == 0.5
    assert rows["mappings without one induction head, the worst"] == 0.8
    assert rows["mappings without one head, the worst of all"] == 0.2
    assert rows["attention of that head to the token before"] == 0.9
