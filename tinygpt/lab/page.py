"""A story as one page that needs no network: the table, the curves, samples. Needs matplotlib ("plots").

Not here: measuring anything (`story`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from html import escape

from .report import COLUMNS, KEY, cells

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 14px; width: 100% } svg { max-width: 100%; height: auto }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .5rem; text-align: left; vertical-align: top }
.n { text-align: right; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
h2 small { color: #777 }
"""


def html(story: dict) -> str:
    """The page of what `story.tell` returned. Raises ImportError without matplotlib."""
    quick = " (--quick: too short for steps and RLHF to show what they do)" * story["quick"]
    parts = [f"<h1>A GPT's life, in world {story['seed']}{quick}</h1>", _table(story["stages"])]
    parts.append(f"<p>{escape(KEY)}</p>")
    for name, result in story["stages"].items():
        parts.append(f"<h2>{escape(name)} <small>{escape(result['term'])}</small></h2>")
        parts.append(f"<p>{escape(result['says'])}</p>")
        if "failed" in result:
            parts.append(f"<p>This stage failed: {escape(result['failed'])}</p>")
            continue
        if name in _FIGURES:
            parts += [_svg(draw, result) for draw in _FIGURES[name]]
        parts += [f"<p>{escape(note)}</p>" for note in result.get("notes", ())]
        parts.append(_samples(result.get("samples", ()), result.get("compares", ("before", "after"))))
    parts.append("<h2>How far each stage moved each tensor</h2>" + _svg(_changes, story["stages"]))
    body = "\n".join(parts)
    return (f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>tinygpt: a story</title>\n'
            f"<style>{_STYLE}</style>\n{body}\n</html>\n")  # fmt: skip


def _table(stages: dict) -> str:
    names = ("stage", "data", "trained", "change", "s", *COLUMNS.values(), "base intact")
    rows = ["".join(f"<th>{name}</th>" for name in names)]
    for name, result in stages.items():
        row = [f"<td>{escape(name)}</td>"]
        for n, cell in enumerate(cells(result["row"]) if "row" in result else ["failed"]):
            wide = f' colspan="{len(COLUMNS)}"' * (n == 4 and "shown" in result["row"])
            row.append(f'<td{wide}{" class=n" * (n > 0 and not wide)}>{escape(cell)}</td>')
        rows.append("".join(row))
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _samples(samples: list, names: Sequence[str]) -> str:
    if not samples:
        return ""
    rows = [("question", *names, "true"), *samples]
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


# --- figures ------------------------------------------------------------------------------------------------


def _svg(draw: Callable, result: dict) -> str:
    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(8, 3.2), layout="constrained"), io.StringIO()
    draw(figure.add_subplot(), result)
    figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration, which has no place inside a page


def _loss(axes, result: dict) -> None:
    curves = result["curves"]
    axes.plot(curves["update"], curves["loss"], lw=0.8, label="loss of a batch")
    axes.axhline(result["floor"], color="black", ls="--", lw=1, label="entropy of the text")
    axes.set(xlabel="update", ylabel="nats a token", ylim=(0, None))
    axes.legend()


def _recall(axes, result: dict) -> None:
    curves = result["curves"]
    axes.plot(curves["told"], curves["recalled"], "o-")
    axes.set(xscale="symlog", xlabel="times that a fact was told", ylabel="recalled", ylim=(0, 1.02))


def _shots(axes, result: dict) -> None:
    curves = dict(result["curves"])
    shots, best = curves.pop("shots"), curves.pop("best possible")
    for n, (share, right) in enumerate(curves.items(), 1):
        axes.plot(shots, right, "o-", color=str(0.85 - 0.85 * n / len(curves)), label=f"at {share}")
    axes.plot(shots, best, "r--", lw=1, label="best possible")
    axes.set(xlabel="examples in the prompt", ylabel="right", ylim=(0, 1.02))
    axes.legend(title="of pre-training", fontsize="small")


def _head(axes, result: dict) -> None:
    head = result["head"]
    axes.imshow(head["map"], cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(head["tokens"]))
    axes.set_xticks(ticks, head["tokens"], rotation=90, fontsize=7)
    axes.set_yticks(ticks, head["tokens"], fontsize=7)
    title = f"layer {head['layer']}, head {head['head']}: looks at what followed the same word"
    axes.set_title(title, fontsize=9)
    axes.figure.set_size_inches(5, 5)


def _alone(axes, result: dict) -> None:
    names, lost = list(result["alone"]), result["alone"].values()
    axes.bar(names, lost, color=["tab:red" if name in result["heads"] else "tab:blue" for name in names])
    axes.set(xlabel="layer.head that is cut out (red: induction)", ylabel="mappings: right", ylim=(0, 1))


def _rewards(axes, result: dict) -> None:
    curves, other = result["curves"], axes.twinx()
    for name, label in (("reward", "reward, by the judge"), ("gold", "gold: what people would say")):
        axes.plot(curves["iter"], curves[name], lw=1, label=label)
    other.plot(curves["iter"], curves["kl"], "k:", lw=1)
    axes.set(xlabel="update", ylabel="reward")
    other.set_ylabel("KL to the start, nats an answer (dotted)")
    axes.legend()


def _changes(axes, stages: dict) -> None:
    order = list(max((result.get("change", {}) for result in stages.values()), key=len))
    for name, result in stages.items():
        moved = {tensor: value for tensor, value in result.get("change", {}).items() if value > 0}
        if moved:
            axes.plot([order.index(tensor) for tensor in moved], list(moved.values()), "o", ms=3, label=name)
            axes.set(xlabel="tensors, in the order of the model")
    axes.set(yscale="log", ylabel="change over norm")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


_FIGURES = {"pre-training": (_loss, _recall), "in-context learning": (_shots, _head), "RLHF": (_rewards,),
            "two memories": (_alone,)}  # fmt: skip
