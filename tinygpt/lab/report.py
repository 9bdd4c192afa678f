"""Tables of measurements, as text for a terminal. Not here: measuring (`stages.evaluate`), printing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..stages.answers import Estimate, Rate
from ..stages.evaluate import Gap, Score
from .texts import LANGUAGES, narrow, spoken, text, wide

if TYPE_CHECKING:  # it imports every stage
    from .claims import Claim, Result


def gaps(by_kind: Mapping[str, Gap]) -> str:
    """Loss above the exact entropy, by kind of document."""
    lines = [f"{'kind':12} {'floor':>7} {'loss above it':>14}  nats/token"]
    for kind, gap in by_kind.items():
        lines.append(f"{kind:12} {gap.floor:7.3f} {gap.gap:14.3f} ± {1.96 * gap.error:.3f}")
    return "\n".join(lines)


def recall(rates: list[tuple[float, Rate]], chance: float) -> str:
    """The share of recalled facts, by how often the corpus has them."""
    lines = [f"{'facts told':>10} {'recalled':>9}  95% interval"]
    lines += [f"{times:10.1f} {interval(rate)}  n = {rate.n:,}" for times, rate in rates]
    return "\n".join([*lines, f"{'chance':>10} {chance:9.3f}"])


_SCORES_KEY = """\
None of these people, phrases or problems is in the tuning. majority: the rate of the most frequent answer.
false: well-formed, not right and not "I do not know.", the right answer about people whom no text names."""


def scores(by_set: Mapping[str, Score]) -> str:
    """Rates of answers by set of questions: right, the most frequent answer, well-formed, stopped, false."""
    lines = [f"{'':22} {'right':>9}  95% interval    majority  well-formed  stopped  false"]
    for name, score in by_set.items():
        rates = f"{score.majority:8.3f} {score.formed.rate:12.3f} {score.stopped.rate:8.3f}"
        rates += f" {score.falsehood.rate:6.3f}"
        lines.append(f"{name:22} {interval(score.right)}  {rates}")
    return "\n".join([*lines, _SCORES_KEY])


def claim(statement: Claim, result: Result) -> str:
    """A claim, its numbers with a limit and their verdicts, then its other numbers."""
    estimates, verdicts = result.estimates, result.verdicts()
    seeds = max(e.n for e in estimates.values())  # some numbers come from a part of the seeds
    spread = {1: "one seed, no interval", 2: "two seeds, a pilot: both values"}
    lines = [f"{statement.number}. {statement.says} ({spread.get(seeds, f'{seeds} seeds, 95% intervals')})"]
    lines += [f"{_estimate(name, estimates[name])}  {text}" for name, text in verdicts.items()]
    return "\n".join(lines + [_estimate(name, e) for name, e in estimates.items() if name not in verdicts])


def _estimate(name: str, estimate: Estimate) -> str:
    return f"   {name:78} {estimate.mean:9.3g}  {estimate.low:.3g} to {estimate.high:.3g}"


def interval(rate: Rate) -> str:
    return f"{rate.rate:9.3f}  {rate.low:.3f} to {rate.high:.3f}"


COLUMNS = "form", "known", "falsehoods", "reasoning", "few-shot"  # the rates of a row
HEADS = "stage", "data", "trained", "change", "seconds", *COLUMNS, "base intact"
LINE, RATES = "{:24} {:24} {:>9}  {:>6} {:>4}  ", "{:>4}  {:>5}  {:>5}  {:>6}  {:>8}  "


def cells(row: Mapping, language: str) -> list[str]:
    """A stage's data, weights, change and seconds; its rates, or one other result in their place; whether the
    base is intact. A dash stands for a number that the stage does not have."""
    rates = [f"{row[key]:.2f}" if key in row else "-" for key in COLUMNS]
    return [
        spoken(language, row["data"]), f"{row['weights']:,}",
        f"{row['change']:.1%}" if row["weights"] else text(language, "none"),
        f"{row['seconds']:.0f}" if "seconds" in row else "-",
        *([spoken(language, row["summary"])] if "summary" in row else rates),
        text(language, "yes" if row["base"] else "no"),
    ]  # fmt: skip


def story(stages: Mapping[str, dict], language: str = LANGUAGES[0]) -> str:
    """The table of a story: a row for each stage, and the meaning of each column."""
    lines = [(LINE + RATES + "{}").format(*(wide(text(language, name)) for name in HEADS))]
    for name, result in stages.items():
        title = wide(text(language, name))
        if "failed" in result:
            lines.append(f"{title:24} {text(language, 'table failed', error=result['failed'])}")
            continue
        row = [wide(cell) for cell in cells(result["row"], language)]
        middle = RATES if len(row) > 6 else "{:36}  "
        lines.append((LINE + middle + "{}").format(title, *row))
    meanings = [f"{wide(name):14} {meaning}" for name, meaning in legend(language)]
    return narrow("\n".join([*lines, "", *meanings, text(language, "rates")]))


def legend(language: str) -> list[tuple[str, str]]:
    """Each column of the table and its meaning."""
    return [(text(language, name), text(language, f"{name}, means")) for name in HEADS[2:]]
