"""The family of the words "learning", "training" and "tuning" as a figure, with the numbers of a story.

The figure has three groups: pre-training, fine-tuning and in-context learning. The colour of a box says which
weights the stage changes. The story's page shows the figure, and `demos/learning.py` writes it to a file.
"""

from html import escape

from .texts import LANGUAGES

COLOURS = {"all": "#ffd8a8", "few": "#d3f9d8", "none": "#e7f5ff"}  # by the weights that change
FONTS = "system-ui, 'Noto Sans KR', 'Apple SD Gothic Neo', 'Malgun Gothic', sans-serif"

# English, Korean. {...} is a number of the story.
KEYS = {
    "all": ("changes all weights", "모든 가중치를 바꾼다"),
    "few": ("changes a few weights beside the base", "베이스 옆의 적은 가중치만 바꾼다"),
    "none": ("changes no weight", "아무 가중치도 바꾸지 않는다"),
}
LEARNING = ("learning: getting better at a task", "학습(learning): 과제를 더 잘하게 되는 일")
TRAINING = ("training: learning that changes weights", "훈련(training): 가중치를 바꾸는 학습")
PROMPTING = ("learning without training", "훈련 없는 학습")
WEIGHTS = ("parametric memory: in the weights", "매개변수적 기억: 가중치 안에 있다")
PROMPT = ("non-parametric memory: in the prompt", "비매개변수적 기억: 프롬프트 안에 있다")
GROUPS = (
    (("pre-training", "사전 훈련 (사전학습)"), (
        ("all", ("self-supervised learning", "자기지도 학습"), (
            ("predicts the next token", "다음 토큰을 예측한다"),
            ("all {pre[weights]:,} weights, random at first", "가중치 {pre[weights]:,}개, 처음에는 무작위"),
            ("weights move by {pre[change]:.0%}", "가중치가 {pre[change]:.0%} 움직인다"),
        )),
    )),
    (("fine-tuning", "세부 훈련 (미세조정)"), (
        ("all", ("instruction tuning", "지시 미세조정 (SFT)"), (
            ("supervised, by prompts with answers", "지도 학습: 프롬프트와 답의 쌍"),
            ("weights move by {sft[change]:.0%}", "가중치가 {sft[change]:.0%} 움직인다"),
            ("wanted form: {pre[form]:.0%} → {sft[form]:.0%}",
             "원하는 형식: {pre[form]:.0%} → {sft[form]:.0%}"),
        )),
        ("all", ("RLHF", "RLHF (인간 피드백 기반 강화학습)"), (
            ("reinforcement learning, by a judge", "강화학습: 보상 모델의 점수"),
            ("weights move by {rlhf[change]:.1%}", "가중치가 {rlhf[change]:.1%} 움직인다"),
            ("invented: {sft[falsehoods]:.0%} → {rlhf[falsehoods]:.0%}",
             "지어낸 답: {sft[falsehoods]:.0%} → {rlhf[falsehoods]:.0%}"),
        )),
        ("few", ("adapters: LoRA, p-tuning", "어댑터: LoRA, p-tuning"), (
            ("trained: {lora[weights]:,}, {ptuning[weights]:,} weights",
             "훈련: 가중치 {lora[weights]:,}개, {ptuning[weights]:,}개"),
            ("the base moves by 0%", "베이스는 0% 움직인다"),
            ("right answers: {lora[known]:.0%}, {ptuning[known]:.0%}",
             "맞은 답: {lora[known]:.0%}, {ptuning[known]:.0%}"),
        )),
    )),
    (("in-context learning", "문맥 학습 (문맥 내 학습)"), (
        ("none", ("zero-shot learning", "제로샷 학습"), (
            ("no example in the prompt", "프롬프트에 예시가 없다"),
            ("known people, after tuning:", "아는 사람, 지시 미세조정 뒤:"),
            ("{sft[known]:.0%} right", "{sft[known]:.0%} 정답"),
        )),
        ("none", ("few-shot learning", "퓨샷 학습"), (
            ("examples in the prompt", "프롬프트에 예시가 있다"),
            ("a new rule, after 8 examples:", "새 규칙, 예시 8개 뒤:"),
            ("{pre[few-shot]:.0%} right", "{pre[few-shot]:.0%} 정답"),
        )),
    )),
)  # fmt: skip
STAGES = {
    "pre": "pre-training", "sft": "instruction tuning", "rlhf": "RLHF", "lora": "LoRA", "ptuning": "p-tuning",
}  # fmt: skip
WIDE, HIGH, GAP = 292, 88, 12  # a box


def figure(stages: dict[str, dict], language: str) -> str:
    """The SVG of a story in a language, "en" or "ko"; "" if the story lacks the numbers of a stage."""
    rows = {short: stages.get(name, {}).get("row") for short, name in STAGES.items()}
    if not all(rows.values()):
        return ""
    parts, column_of = [], LANGUAGES.index(language)

    def box(x: int, y: int, wide: int, high: int, fill: str) -> None:
        place = f'x="{x}" y="{y}" width="{wide}" height="{high}"'
        parts.append(f'<rect {place} rx="8" fill="{fill}" stroke="#868e96"/>')

    def text(x: int, y: int, words: tuple[str, str], style: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" {style}>{escape(words[column_of].format(**rows))}</text>')

    middle, bold = 'text-anchor="middle"', 'font-weight="bold"'
    column = WIDE + 2 * GAP
    total, bottom = 3 * column + 4 * GAP, 132 + 3 * (HIGH + GAP) + GAP
    box(1, 1, total - 2, bottom + 98, "#ffffff")
    text(total // 2, 28, LEARNING, f'{middle} {bold} font-size="18"')
    for x, wide, words in ((GAP, 2 * column + GAP, TRAINING), (2 * column + 3 * GAP, column, PROMPTING)):
        box(x, 42, wide, bottom - 2, "#f8f9fa")
        text(x + wide // 2, 64, words, f"{middle} {bold}")
    for n, (group, boxes) in enumerate(GROUPS):
        x = GAP + n * (column + GAP)
        text(x + column // 2, 100, group, f'{middle} {bold} font-size="17" fill="#1864ab"')
        for m, (kind, name, lines) in enumerate(boxes):
            y = 114 + m * (HIGH + GAP)
            box(x + GAP, y, WIDE, HIGH, COLOURS[kind])
            text(x + 2 * GAP, y + 21, name, bold)
            for k, line in enumerate(lines):
                text(x + 2 * GAP, y + 41 + 19 * k, line, 'font-size="14"')
    text(GAP + column + GAP // 2, bottom + 18, WEIGHTS, f'{middle} font-style="italic"')
    text(2 * column + 3 * GAP + column // 2, bottom + 18, PROMPT, f'{middle} font-style="italic"')
    for n, (kind, words) in enumerate(KEYS.items()):
        x = 2 * GAP + n * (column + GAP)
        box(x, bottom + 60, 22, 16, COLOURS[kind])
        text(x + 30, bottom + 73, words, 'font-size="14"')
    size = f'viewBox="0 0 {total} {bottom + 100}" width="{total}" height="{bottom + 100}"'
    style = f'font-family="{FONTS}" font-size="15" fill="#212529"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"
