"""Byte-level byte-pair encoding: splitting text into pieces, learning merges, applying merges.

BPE starts with 256 tokens, one for each byte: it can write any text in any script. Learning counts pairs of
neighbouring tokens, joins the most frequent pair into a new token, and repeats this. Encoding applies these
merges in the order of learning. Before both, text is split into pieces: a word with the space before it, a
number, a run of punctuation. No merge crosses from one piece to the next.

Here tokens are numbers. `tokenizer.py` gives them names, files and special tokens.

References: Sennrich, Haddow, Birch 2016, "Neural Machine Translation of Rare Words with Subword Units",
section 3.2; Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

# Files write a byte as one visible character: a printable byte as itself, the other 68 as U+0100, U+0101 ...
# (a space is U+0120, "Ġ"). The order here is the order of GPT-2's first 256 ids.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}

Pair = tuple[int, int]


@functools.cache
def _splitter() -> re.Pattern:
    r"""GPT-2's rule, '(s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, for Python's re.

    re has no \p{..}: letters and numbers are listed as ranges, from Python's Unicode tables. \p{N} is a
    numeric character that is no letter (一 and 二 are letters). \s is listed too: Python's own \s contains
    U+001C to U+001F, which are no white space in Unicode.
    """
    chars = np.arange(0x110000, dtype=np.uint32).view("U1")
    is_letter = np.char.isalpha(chars)

    def ranges(mask: np.ndarray) -> str:
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
        return "".join(f"{chr(a)}-{chr(b - 1)}" for a, b in zip(edges[::2], edges[1::2], strict=True))

    letter, number = ranges(is_letter), ranges(np.char.isnumeric(chars) & ~is_letter)
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(rf"'(?:[stmd]|re|ve|ll)| ?[{letter}]+| ?[{number}]+| ?[^{space}{letter}{number}]+"
                      rf"|[{space}]+(?![^{space}])|[{space}]+")


def pieces(text: str) -> Iterator[str]:
    r"""The pieces of a text by GPT-2's rule. Joined they are the text.

    >>> list(pieces("I'm  here:\n42 cats"))
    ['I', "'m", ' ', ' here', ':', '\n', '42', ' cats']
    """
    return (match[0] for match in _splitter().finditer(text))


def learn_merges(words: dict[bytes, int], count: int) -> list[Pair]:
    """The most frequent pairs of neighbouring tokens, each counted after the merges before it.

    words: each distinct piece -> its number of occurrences. Token i < 256 is the i-th byte of BYTE_OF. Merge
    n makes token 256 + n. Returns `count` pairs, or fewer if no neighbours are left. Of equally frequent
    pairs the smaller comes first, as in Hugging Face's trainer. "aaa" contains "aa" twice.

    >>> learn_merges({b"abab": 1, b"ab": 5}, 2)    # "a" is token 64, "b" is 65
    [(64, 65), (256, 256)]

    All words lie in one linked list. `places` says where a pair begins: a merge takes as many steps as the
    pair has occurrences. A merge makes some entries of `places` and of the heap wrong. They stay there, and
    are skipped when they come up.
    """
    token_of = {byte: i for i, byte in enumerate(BYTE_OF.values())}
    tokens, weight = [-1], [0]  # -1 stands between words, and in the place of a token that was joined
    for word, times in words.items():
        tokens += [*map(token_of.__getitem__, word), -1]
        weight += [times] * (len(word) + 1)
    left, right = list(range(-1, len(tokens) - 1)), list(range(1, len(tokens) + 1))
    frequency, places, heap, merges = defaultdict(int), defaultdict(list), [], []
    unqueued = set()  # pairs whose frequency is not in the heap

    def count_pair(i: int, j: int, times: int) -> None:
        pair = tokens[i], tokens[j]
        if min(pair) >= 0:
            frequency[pair] += times
            if times > 0:
                places[pair].append(i)
                unqueued.add(pair)

    for i, j in pairwise(range(len(tokens))):
        count_pair(i, j, weight[i])
    while len(merges) < count:
        for pair in unqueued:
            heappush(heap, (-frequency[pair], pair))
        unqueued.clear()
        times, pair = heappop(heap) if heap else (0, None)
        if times == 0:
            break
        if -times != frequency[pair]:
            unqueued.add(pair)
            continue
        new = 256 + len(merges)
        merges.append(pair)
        for i in sorted(places.pop(pair)):
            j = right[i]
            if (tokens[i], tokens[j]) == pair:
                before, after = left[i], right[j]
                count_pair(before, i, -weight[i])
                count_pair(j, after, -weight[i])
                tokens[i], tokens[j] = new, -1
                right[i], left[after] = after, i
                count_pair(before, i, weight[i])
                count_pair(i, after, weight[i])
    return merges


def apply_merges(tokens: list[int], merges: dict[Pair, tuple[int, int]]) -> list[int]:
    """Join the pair of lowest rank, the leftmost first, until no merge applies. n log n steps for n tokens.

    merges: pair -> (rank, the new token).

    >>> apply_merges([1, 2, 2, 1, 2], {(1, 2): (0, 3), (2, 2): (1, 4), (3, 2): (2, 5)})
    [5, 3]
    """
    # A linked list: place i holds a token, or -1 after it was joined to the token before it. The -1 at the
    # end stands to the right of the last token and, as tokens[-1], to the left of the first.
    find, n = merges.get, len(tokens)
    tokens = [*tokens, -1]
    left, right = list(range(-1, n)), list(range(1, n + 2))
    heap = [(merge[0], i) for i, pair in enumerate(pairwise(tokens)) if (merge := find(pair))]
    heapify(heap)
    while heap:
        rank, i = heappop(heap)
        j = right[i]
        merge = find((tokens[i], tokens[j]))
        if merge is None or merge[0] != rank:  # one of the two was joined to another token before
            continue
        tokens[i], tokens[j] = merge[1], -1
        right[i], left[right[j]] = right[j], i
        for a, b in ((left[i], i), (i, right[i])):
            if merge := find((tokens[a], tokens[b])):
                heappush(heap, (merge[0], a))
    return [token for token in tokens if token >= 0]


def merge_steps(tokens: list[int], merges: dict[Pair, tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """The steps of `apply_merges`, for people to read: each (rank, tokens after it). Quadratic.

    >>> list(merge_steps([1, 2, 2, 1], {(1, 2): (0, 3), (3, 2): (1, 4)}))
    [(0, [3, 2, 1]), (1, [4, 1])]
    """
    while candidates := [(*merges[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in merges]:
        rank, new, i = min(candidates)
        tokens = [*tokens[:i], new, *tokens[i + 2:]]
        yield rank, tokens
