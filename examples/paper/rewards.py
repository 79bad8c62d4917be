"""Reward function of the replication: the held-out judge."""

from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()  # reads a lexicon from disk


def judge(queries: list[str], prompts: list[str], labels: list[str], **_: Any) -> list[float]:
    """Compound sentiment of the whole review by VADER, -1 … 1."""
    return [_analyzer().polarity_scores(query)["compound"] for query in queries]
