"""A readable map of a router: which words mark the prompts of each expert."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """How a word marks an expert's prompts.

    Attributes:
        text: the word, lower case.
        log_odds: natural logarithm of its odds here over its odds elsewhere; above 0: more usual here.
        z: log_odds over its standard error, by which words are ranked.
        prompts: how many prompts of this expert have it.
    """

    text: str
    log_odds: float
    z: float
    prompts: int


def typical_words(
    prompts: Sequence[str], experts: Sequence[int], count: int = 8, at_least: int = 2
) -> dict[int, list[Word]]:
    """Expert -> the words that are most typical of its prompts, best first.

        log_odds = log((n + .5) / (N - n + .5)) - log((m + .5) / (M - m + .5))
        z = log_odds / sqrt(1/(n + .5) + 1/(N - n + .5) + 1/(m + .5) + 1/(M - m + .5))

    with n of the expert's N prompts that have the word, and m of the M others. A word counts once a prompt.

    Args:
        experts: the expert of each prompt.
        count: words of each expert at most, all more usual in its prompts than in the others'.
        at_least: prompts of the expert that have the word.

    Returns:
        Experts that have prompts. With a single one there is nothing to compare with, and its list is empty.

    Reference:
        The log-odds ratio with Haldane's and Anscombe's half, and its standard error by Gart.
    """
    words = [set(re.findall(r"\w+", prompt.lower())) for prompt in prompts]
    everywhere = Counter(word for each in words for word in each)
    found = {}
    for expert in sorted(set(experts)):
        here = Counter(word for each, other in zip(words, experts, strict=True) if other == expert for word in each)
        size = sum(other == expert for other in experts)
        rest, ranked = len(prompts) - size, []
        for word, n in here.items():
            m = everywhere[word] - n
            if n < at_least or n * rest <= m * size:  # not more usual here than elsewhere
                continue
            cells = [n + 0.5, size - n + 0.5, m + 0.5, rest - m + 0.5]
            log_odds = math.log(cells[0] / cells[1]) - math.log(cells[2] / cells[3])
            z = log_odds / math.sqrt(sum(1 / cell for cell in cells))
            ranked.append(Word(word, log_odds, z, n))
        ranked.sort(key=lambda word: (-word.z, word.text))
        found[expert] = ranked[:count]
    return found
