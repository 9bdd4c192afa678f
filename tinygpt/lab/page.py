"""A story as one page that needs no network: the table, the curves, samples. Needs matplotlib ("plots").

Not here: measuring (`story`), sentences (`texts`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import partial
from html import escape

from .figure import figure
from .report import COLUMNS, HEADS, cells, legend
from .story import compared
from .texts import LANGUAGES, narrow, spoken, text, wide

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 14px; width: 100% } svg { max-width: 100%; height: auto }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .5rem; text-align: left; vertical-align: top }
.n { text-align: right; font-variant-numeric: tabular-nums }
:lang(ko) { word-break: keep-all } .wide { overflow-x: auto }
h2 small { color: #777 }
"""


Say = Callable[..., str]  # from a key of `texts` and values to a text


def html(story: dict, language: str = LANGUAGES[0]) -> str:
    """The page of a story that `story.tell` returned. Raises ImportError without matplotlib."""
    say: Say = partial(text, language)
    quick = f" {say('page quick')}" * story["quick"]
    parts = [
        f"<h1>{say('page heading', seed=story['seed'])}{quick}</h1>",
        f"<p>{escape(say('story world'))}</p>", _table(story["stages"], language),
    ]  # fmt: skip
    rows = "".join(f"<tr><td>{name}</td><td>{escape(about)}</td></tr>" for name, about in legend(language))
    parts.append(f"<p></p><table>{rows}</table><p>{escape(say('rates'))}</p>")
    parts.append(figure(story["stages"], language))
    for name, result in story["stages"].items():
        parts.append(f"<h2>{say(name)} <small>{say(f'{name}, term')}</small></h2>")
        parts.append(f"<p>{escape(say(f'{name}, says'))}</p>")
        if "failed" in result:
            parts.append(f"<p>{escape(say('story failed', error=result['failed']))}</p>")
            continue
        if name in _FIGURES:
            parts += [_svg(draw, result, language) for draw in _FIGURES[name]]
        parts += [f"<p>{escape(spoken(language, note))}</p>" for note in result.get("notes", ())]
        parts.append(_samples(result, language))
    parts.append(f"<h2>{say('page changes')}</h2>" + _svg(_changes, story["stages"], language))
    head = f'<html lang="{language}"><meta charset="utf-8"><title>{say("page title")}</title>'
    return "\n".join(["<!doctype html>", head, f"<style>{_STYLE}</style>", *parts, "</html>\n"])


def _table(stages: dict, language: str) -> str:
    rows = ["".join(f"<th{' class=n' * (n > 1)}>{text(language, name)}</th>" for n, name in enumerate(HEADS))]
    for name, result in stages.items():
        row = [f"<td>{text(language, name)}</td>"]
        line = cells(result["row"], language) if "row" in result else [text(language, "failed")]
        for n, cell in enumerate(line):
            span = f' colspan="{len(COLUMNS)}"' * (n == 4 and "summary" in result["row"])
            row.append(f'<td{span}{" class=n" * (n > 0 and not span)}>{escape(cell)}</td>')
        rows.append("".join(row))
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _samples(result: dict, language: str) -> str:
    if not result.get("samples"):
        return ""
    heads = [text(language, name) for name in ("question", *compared(result))]
    rows = [heads, *([spoken(language, cell) for cell in row] for row in result["samples"])]
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


# --- figures ------------------------------------------------------------------------------------------------


def _svg(draw: Callable[..., None], result: dict, language: str) -> str:
    """A figure. English letters are drawn as curves.

    matplotlib's font has no Hangul. So Korean stays text, and the reader's browser chooses the font. For the
    layout, a box and FILLER are about as wide as a syllable.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.StringIO()
    with rc_context({"svg.fonttype": "path" if language == "en" else "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        draw(figure.add_subplot(), result, lambda key, **values: wide(text(language, key, **values)))
        figure.savefig(file, format="svg")
    svg = file.getvalue()
    return narrow(svg[svg.index("<svg") :])  # a page has no XML declaration inside


def _loss(axes, result: dict, say: Say) -> None:
    curves = result["curves"]
    axes.plot(curves["update"], curves["loss"], lw=0.8, label=say("loss of a batch"))
    axes.axhline(result["floor"], color="black", ls="--", lw=1, label=say("entropy of the text"))
    axes.set(xlabel=say("update"), ylabel=say("nats a token"), ylim=(0, None))
    axes.legend()


def _recall(axes, result: dict, say: Say) -> None:
    curves = result["curves"]
    axes.plot(curves["told"], curves["recalled"], "o-")
    axes.set(xscale="symlog", xlabel=say("times told"), ylabel=say("recalled"), ylim=(0, 1.02))


def _shots(axes, result: dict, say: Say) -> None:
    curves = dict(result["curves"])
    shots, best = curves.pop("shots"), curves.pop("best possible")
    for n, (share, right) in enumerate(curves.items(), 1):
        shade, label = str(0.85 - 0.85 * n / len(curves)), say("at share", share=share)
        axes.plot(shots, right, "o-", color=shade, label=label)
    axes.plot(shots, best, "r--", lw=1, label=say("best possible"))
    axes.set(xlabel=say("examples in the prompt"), ylabel=say("right"), ylim=(0, 1.02))
    axes.legend(title=say("of pre-training"), fontsize="small")


def _head(axes, result: dict, say: Say) -> None:
    head = result["head"]
    axes.imshow(head["map"], cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(head["tokens"]))
    axes.set_xticks(ticks, head["tokens"], rotation=90, fontsize=7)
    axes.set_yticks(ticks, head["tokens"], fontsize=7)
    axes.set_title(say("head", layer=head["layer"], head=head["head"]), fontsize=9)
    axes.figure.set_size_inches(5, 5)


def _alone(axes, result: dict, say: Say) -> None:
    names, lost = list(result["alone"]), result["alone"].values()
    axes.bar(names, lost, color=["tab:red" if name in result["heads"] else "tab:blue" for name in names])
    axes.set(xlabel=say("cut heads"), ylabel=say("mappings right"), ylim=(0, 1))


def _rewards(axes, result: dict, say: Say) -> None:
    curves, other = result["curves"], axes.twinx()
    for name, label in (("reward", "judge's reward"), ("gold", "gold reward")):
        axes.plot(curves["iter"], curves[name], lw=1, label=say(label))
    other.plot(curves["iter"], curves["kl"], "k:", lw=1)
    axes.set(xlabel=say("update"), ylabel=say("reward"))
    other.set_ylabel(say("KL"))
    axes.legend()


def _changes(axes, stages: dict, say: Say) -> None:
    order = list(max((result.get("change", {}) for result in stages.values()), key=len))
    for name, result in stages.items():
        moved = {tensor: value for tensor, value in result.get("change", {}).items() if value > 0}
        if moved:
            places = [order.index(tensor) for tensor in moved]
            axes.plot(places, list(moved.values()), "o", ms=3, label=say(name))
            axes.set(xlabel=say("tensors"))
    axes.set(yscale="log", ylabel=say("change over norm"))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


_FIGURES = {"pre-training": (_loss, _recall), "in-context learning": (_shots, _head), "RLHF": (_rewards,),
            "two memories": (_alone,)}  # fmt: skip
