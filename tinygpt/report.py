"""Tables of what was measured, as text for a terminal. Not here: measuring (`world.evaluate`), printing."""

from collections.abc import Mapping

from .claims import Claim, Estimate, verdict
from .evaluate import Rate
from .world.evaluate import Gap, Score


def gaps(found: Mapping[str, Gap]) -> str:
    """Loss above the exact entropy, by kind of document."""
    lines = [f"{'kind':12} {'floor':>7} {'loss above it':>14}  nats/token"]
    for kind, gap in found.items():
        lines.append(f"{kind:12} {gap.floor:7.3f} {gap.gap:14.3f} ± {1.96 * gap.error:.3f}")
    return "\n".join(lines)


def recall(found: list[tuple[float, Rate]], chance: float) -> str:
    """Facts recalled, by how often the corpus told them."""
    lines = [f"{'facts told':>10} {'recalled':>9}  95% interval"]
    lines += [f"{told:10.1f} {interval(rate)}  n = {rate.n:,}" for told, rate in found]
    return "\n".join([*lines, f"{'chance':>10} {chance:9.3f}"])


def scores(found: Mapping[str, Score]) -> str:
    """Right, beside how often the most frequent answer is (majority), of the wanted form, and made up."""
    lines = [f"{'':22} {'right':>9}  95% interval    majority  well-formed  stopped  false"]
    for name, score in found.items():
        rates = f"{score.majority:8.3f} {score.formed.rate:12.3f} {score.stopped.rate:8.3f}"
        rates += f" {score.falsehood.rate:6.3f}"
        lines.append(f"{name:22} {interval(score.right)}  {rates}")
    return "\n".join(lines)


def claim(asked: Claim, found: Mapping[str, Estimate]) -> str:
    """A claim, what it stands on with the verdict on each, and what else was measured."""
    needed = [name for name, _, _ in asked.needs]
    seeds = next(iter(found.values())).n
    spread = {1: "one seed, no interval", 2: "two seeds, a pilot: what they span"}
    lines = [f"{asked.number}. {asked.says} ({spread.get(seeds, f'{seeds} seeds, 95% intervals')})"]
    for name, sign, limit in asked.needs:
        lines.append(f"{_estimate(name, found[name])}  {sign} {limit:g}: {verdict(found[name], sign, limit)}")
    return "\n".join(lines + [_estimate(name, e) for name, e in found.items() if name not in needed])


def _estimate(name: str, found: Estimate) -> str:
    return f"   {name:78} {found.mean:9.3g}  {found.low:.3g} to {found.high:.3g}"


def interval(rate: Rate) -> str:
    return f"{rate.rate:9.3f}  {rate.low:.3f} to {rate.high:.3f}"
