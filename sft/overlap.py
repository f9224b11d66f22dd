"""How much of its reference an answer repeats: ROUGE of one answer, BLEU and chrF of all of them.

Computed by the libraries whose numbers others report: rouge-score (Lin 2004) and sacrebleu (Post
2018), whose signature stands beside the value. Chinese is cut into characters. An answer can be
right in other words: these numbers compare models, they do not say how good one is.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.eval import make_metric

ROUGE = ("rouge1", "rouge2", "rougeL")
BLEU_TOKENIZERS = {"zh": "zh", "en": "13a"}
RESAMPLES = 1000
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


class Words:
    """rouge-score's tokenizer for two languages: Latin words and numbers, Chinese characters."""

    pattern = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words without punctuation; every Chinese character is one."""
        return self.pattern.findall(text.lower())


def score_rouge(pairs: Sequence[tuple[str, str]]) -> list[dict[str, float]]:
    """ROUGE-1, -2 and -L of each (answer, reference): F1, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, tokenizer=Words())
    scores = (scorer.score(reference, answer) for answer, reference in pairs)
    return [{name: score[name].fmeasure for name in ROUGE} for score in scores]


def measure_corpora(answers: Sequence[dict]) -> dict[str, dict[str, Any]]:
    """BLEU and chrF of each language's answers, from 0 to 100, as sacrebleu has them.

    Args:
        answers: rows with `answer`, `reference` and `lang`.

    Returns:
        {"bleu/<lang>", "chrf/<lang>": an entry of eval.json with the `signature`}; the interval is
        that of sacrebleu's bootstrap over the answers.
    """
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import _bootstrap_resample, estimate_ci

    by_language = defaultdict(list)
    for row in answers:
        by_language[row["lang"]].append(row)
    metrics = {}
    for lang, rows in sorted(by_language.items()):
        said = [row["answer"] for row in rows]
        references = [[row["reference"] for row in rows]]
        scorers = {"bleu": BLEU(tokenize=BLEU_TOKENIZERS.get(lang, "13a")), "chrf": CHRF()}
        for name, scorer in scorers.items():
            score = scorer.corpus_score(said, references).score
            # What corpus_score does for n_bootstrap, which fails where a resample has no match: its
            # mean takes no mixture of floats and numpy's. The signature tells of n_bootstrap.
            scorer.n_bootstrap = RESAMPLES
            stats = scorer._extract_corpus_statistics(said, references)
            scorer.seed, resampled = _bootstrap_resample(stats, scorer, RESAMPLES)
            # The interval lies around the resamples' own mean, a little off the score itself.
            mean, half = estimate_ci(np.array([one.score for one in resampled], dtype=float))
            low, high = max(float(mean - half), 0), min(float(mean + half), 100)
            metric = make_metric(score, low, high, len(rows), "of 100")
            metrics[f"{name}/{lang}"] = metric | {"signature": str(scorer.get_signature())}
    return metrics
