"""How good answers are as answers of the task: exact match, BLEU, ROUGE.

BLEU is sacrebleu's and ROUGE rouge-score's, so that figures can be compared with published ones; both
are in the extra ``eval``. Exact match needs neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

from ..errors import BadArgument

LIBRARIES = {"exact": None, "bleu": "sacrebleu", "rouge": "rouge-score"}
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
TITLES = {"exact": "exact", "bleu": "BLEU", **ROUGE}  # of figures
SENTENCE_END = re.compile(r"[.!?。…][\"')\]”]*$")
BETWEEN_SENTENCES = re.compile(r"(?<=[.!?。…])\s+")


def is_missing(metric: str) -> bool:
    """The library that a metric needs is not installed."""
    library = LIBRARIES[metric]
    return library is not None and find_spec(library.replace("-", "_")) is None


def how_to_install(metric: str) -> str:
    """One line for the user."""
    return f"{metric} needs {LIBRARIES[metric]}: pip install {LIBRARIES[metric]}"


def check_metrics(metrics: list[str]) -> None:
    """Raises BadArgument if a metric is unknown or its library is missing."""
    for metric in metrics:
        if metric not in LIBRARIES:
            raise BadArgument(f"[metrics] must be of {', '.join(LIBRARIES)}; got '{metric}'.")
        if is_missing(metric):
            raise BadArgument(f"[metrics] {how_to_install(metric)}.")


def choose_metrics(references: list[list[str]]) -> list[str]:
    """What suits such answers: BLEU and ROUGE for prose, exact match for everything else.

    Prose is where most answers end as a sentence does: SQL, JSON, code and labels do not.
    """
    answers = [text for texts in references for text in texts]
    if not answers:
        return []
    ended = sum(bool(SENTENCE_END.search(text)) for text in answers)
    return ["bleu", "rouge"] if 2 * ended > len(answers) else ["exact"]


def score(metrics: list[str], texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """The figures of ``metrics``, each 0..100, higher is better.

    Args:
        texts: an answer per prompt.
        references: what it may be, at least one per prompt. Exact match and ROUGE take the best one,
            BLEU counts with all.
    """
    found: dict[str, float] = {}
    for metric in metrics:
        found |= SCORES[metric](texts, references)
    return found


def about(metrics: list[str]) -> list[str]:
    """What the figures are, in words."""
    lines = {
        "exact": lambda: "exact: answers equal to a reference, spaces aside, per cent",
        "bleu": lambda: f"BLEU: sacrebleu {version('sacrebleu')}, 13a, mixed case, all references",
        "rouge": lambda: (
            f"ROUGE: rouge-score {version('rouge-score')}, F1 with stemming, mean over prompts of the "
            "best reference; Lsum by sentences"
        ),
    }
    return [lines[metric]() for metric in metrics]


def _exact(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    same = [
        " ".join(text.split()) in {" ".join(r.split()) for r in several}
        for text, several in zip(texts, references, strict=True)
    ]
    return {"exact": 100 * sum(same) / max(1, len(same))}


def _bleu(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    from sacrebleu.metrics import BLEU

    # sacrebleu wants the first references of all prompts, then the second ones, None where there
    # is none.
    most = max(map(len, references), default=0)
    columns = [[r[n] if n < len(r) else None for r in references] for n in range(most)]
    # force: answers with a space before the full stop are the model's own, not to be warned of
    return {"bleu": BLEU(force=True).corpus_score(texts, columns).score if texts else 0.0}


def _rouge(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    def by_sentence(text: str) -> str:
        return BETWEEN_SENTENCES.sub("\n", text)

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    totals = dict.fromkeys(ROUGE, 0.0)
    for text, several in zip(texts, references, strict=True):
        best = scorer.score_multi([by_sentence(r) for r in several], by_sentence(text))
        for name in ROUGE:
            totals[name] += float(best[name].fmeasure)
    return {name: 100 * total / max(1, len(texts)) for name, total in totals.items()}


SCORES: dict[str, Callable[[list[str], list[list[str]]], dict[str, float]]] = {
    "exact": _exact,
    "bleu": _bleu,
    "rouge": _rouge,
}
