"""A score of a text in place of the next token's logits: a reward model.

    scores = ln_f(x) score^T          score.weight (num_labels, C) instead of the token table
"""

from ..core.model import GPT


class Score(GPT):
    """A GPT whose `forward` gives scores (B, T, num_labels) instead of logits."""

    table = "score.weight"
