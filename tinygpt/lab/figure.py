"""The family of the words "learning", "training" and "tuning" as a figure, with the numbers of a story.

The figure has three groups: pre-training, fine-tuning and in-context learning. The colour of a box says which
weights the stage changes. The story's page shows the figure, and `demos/learning.py` writes it to a file.
"""

from functools import partial
from html import escape

from .texts import text

COLOURS = {"all": "#ffd8a8", "few": "#d3f9d8", "none": "#e7f5ff"}  # by the weights that change
FONTS = "system-ui, 'Noto Sans KR', 'Apple SD Gothic Neo', 'Malgun Gothic', sans-serif"

GROUPS = {  # group -> its boxes: the text of each, and the weights that change
    "pre-training": {"figure pre-training": "all"},
    "fine-tuning": {"figure instruction tuning": "all", "figure RLHF": "all", "figure adapters": "few"},
    "in-context learning": {"figure zero-shot": "none", "figure few-shot": "none"},
}
STAGES = {
    "pre": "pre-training", "sft": "instruction tuning", "rlhf": "RLHF", "lora": "LoRA", "ptuning": "p-tuning",
}  # fmt: skip
WIDE, HIGH, GAP = 292, 88, 12  # a box


def figure(stages: dict[str, dict], language: str) -> str:
    """The SVG of a story in a language, "en" or "ko"; "" if the story lacks the numbers of a stage."""
    rows = {short: stages.get(name, {}).get("row") for short, name in STAGES.items()}
    if not all(rows.values()):
        return ""
    parts, say = [], partial(text, language, **rows)

    def box(x: int, y: int, wide: int, high: int, fill: str) -> None:
        place = f'x="{x}" y="{y}" width="{wide}" height="{high}"'
        parts.append(f'<rect {place} rx="8" fill="{fill}" stroke="#868e96"/>')

    def write(x: int, y: int, words: str, style: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>')

    middle, bold = 'text-anchor="middle"', 'font-weight="bold"'
    column = WIDE + 2 * GAP
    total, bottom = 3 * column + 4 * GAP, 132 + 3 * (HIGH + GAP) + GAP
    box(1, 1, total - 2, bottom + 98, "#ffffff")
    write(total // 2, 28, say("figure learning"), f'{middle} {bold} font-size="18"')
    for x, wide, name in ((GAP, 2 * column + GAP, "training"), (2 * column + 3 * GAP, column, "prompting")):
        box(x, 42, wide, bottom - 2, "#f8f9fa")
        write(x + wide // 2, 64, say(f"figure {name}"), f"{middle} {bold}")
    for n, (group, boxes) in enumerate(GROUPS.items()):
        x = GAP + n * (column + GAP)
        write(x + column // 2, 100, say(group), f'{middle} {bold} font-size="17" fill="#1864ab"')
        for m, (key, kind) in enumerate(boxes.items()):
            y, (name, *lines) = 114 + m * (HIGH + GAP), say(key).split(" | ")
            box(x + GAP, y, WIDE, HIGH, COLOURS[kind])
            write(x + 2 * GAP, y + 21, name, bold)
            for k, line in enumerate(lines):
                write(x + 2 * GAP, y + 41 + 19 * k, line, 'font-size="14"')
    italic = f'{middle} font-style="italic"'
    write(GAP + column + GAP // 2, bottom + 18, say("figure weights"), italic)
    write(2 * column + 3 * GAP + column // 2, bottom + 18, say("figure prompt"), italic)
    for n, (kind, colour) in enumerate(COLOURS.items()):
        x = 2 * GAP + n * (column + GAP)
        box(x, bottom + 60, 22, 16, colour)
        write(x + 30, bottom + 73, say(f"figure key {kind}"), 'font-size="14"')
    size = f'viewBox="0 0 {total} {bottom + 100}" width="{total}" height="{bottom + 100}"'
    style = f'font-family="{FONTS}" font-size="15" fill="#212529"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"
