"""The quickstart's first reward: how much of a sentence its summary covers, with the signature of a ``reward_func``."""

import re
from collections.abc import Sequence

# Words of four letters or more that say little about what a sentence is about.
COMMON = re.compile(
    "about|after|also|been|before|being|between|both|could|does|doing|down|each|even|ever|every|"
    "from|have|having|here|into|itself|just|like|made|make|many|more|most|much|only|other|over|"
    "rather|same|some|such|than|that|their|them|then|there|these|they|this|those|through|under|"
    "until|upon|very|well|were|what|when|where|which|while|will|with|without|would|your"
)


def content_words(text: str) -> set[str]:
    """The distinct words of at least four letters that carry meaning, in lower case.

    >>> sorted(content_words("It is the most touching film about the touching of hands"))
    ['film', 'hands', 'touching']
    """
    return {word for word in re.findall(r"[^\W\d_]{4,}", text.lower()) if not COMMON.fullmatch(word)}


def coverage(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **kwargs: object) -> list[float]:
    """The share of the sentence's content words that are in the response, 0 … 1. The label is the sentence.

    >>> coverage(["Summarize: A touching film. Touching!"], ["Summarize: A touching film. "], ["A touching film."])
    [0.5]
    """
    rewards = []
    for query, prompt, sentence in zip(queries, prompts, labels):
        if not (wanted := content_words(sentence)):
            raise ValueError(f"coverage needs a sentence with content words as label, found {sentence!r}")
        found = wanted & content_words(query[len(prompt) :])
        rewards.append(len(found) / len(wanted))
    return rewards
