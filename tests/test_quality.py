"""Metrics of answers against independent computations."""

import math
from collections import Counter

import numpy as np
import pytest

from mlx_specstream.measure import quality

TEXTS = [
    "the cat sat on the old mat by the door",
    "there is a small blue house near the river",
    "she sold the house near the river",
]
REFERENCES = [
    ["a cat sat on the old mat", "the cat is sitting on the mat by the door today"],
    ["there is a blue house near the river"],
    ["he sold the small house near the wide river", "she sold it", "they left the old town"],
]


def test_exact_match():
    texts = ["SELECT a  FROM b", "select a", "x", ""]
    references = [["SELECT a FROM b"], ["SELECT a"], ["y", " x "], ["z"]]
    assert quality.score(["exact"], texts, references) == {"exact": 50.0}
    assert quality.score(["exact"], [], []) == {"exact": 0.0}


def grams(text: str, n: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_bleu_is_papinenis():
    pytest.importorskip("sacrebleu")
    logs, length, closest = 0.0, 0, 0
    for n in range(1, 5):
        matched = total = 0
        for text, several in zip(TEXTS, REFERENCES, strict=True):
            own = grams(text, n)
            matched += sum(min(c, max(grams(r, n)[g] for r in several)) for g, c in own.items())
            total += sum(own.values())
        logs += math.log(matched / total) / 4
    for text, several in zip(TEXTS, REFERENCES, strict=True):
        size = len(text.split())
        length += size
        closest += min((abs(len(r.split()) - size), len(r.split())) for r in several)[1]
    expected = 100 * math.exp(logs) * min(1.0, math.exp(1 - closest / length))
    found = quality.score(["bleu"], TEXTS, REFERENCES)["bleu"]
    assert found == pytest.approx(expected)
    assert 20 < found < 80


def f1(matched: int, own: int, theirs: int) -> float:
    return 200 * matched / (own + theirs) if matched else 0.0


def longest(a: list, b: list) -> int:
    """Length of the longest common subsequence."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest(a[1:], b[1:])
    return max(longest(a[1:], b), longest(a, b[1:]))


def test_rouge_takes_the_best_reference():
    pytest.importorskip("rouge_score")
    found = quality.score(["rouge"], TEXTS, REFERENCES)
    sizes = lambda n, *texts: (sum(grams(t, n).values()) for t in texts)  # noqa: E731
    for n in (1, 2):
        best = [
            max(f1(sum((grams(t, n) & grams(r, n)).values()), *sizes(n, t, r)) for r in several)
            for t, several in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert found[f"rouge{n}"] == pytest.approx(np.mean(best))
    best = [
        max(f1(longest(t.split(), r.split()), *sizes(1, t, r)) for r in several)
        for t, several in zip(TEXTS, REFERENCES, strict=True)
    ]
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(np.mean(best))
    # Sentences in another order: their union is all of it, their sequence is not.
    turned = quality.score(["rouge"], ["Dogs bark. Cats meow."], [["Cats meow. Dogs bark."]])
    assert turned["rougeLsum"] == pytest.approx(100.0)
    assert turned["rougeL"] == pytest.approx(50.0)


def test_metrics_are_chosen_by_what_answers_look_like():
    assert quality.choose_metrics([["Zizzi is cheap.", "Cheap: Zizzi!"], ["yes"]]) == [
        "bleu",
        "rouge",
    ]
    assert quality.choose_metrics([["SELECT a FROM b"], ['{"a": "x."}'], ["A sentence."]]) == [
        "exact"
    ]
    assert quality.choose_metrics([[], []]) == []
