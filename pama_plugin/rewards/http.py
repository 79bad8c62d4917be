"""Kind ``http``: a reward server with OpenRLHF's protocol. The rollout sends one request per response.

The reply to POST ``{"query": [q], "prompts": [p], "labels": [l]}`` is ``{"rewards": [r]}``; other keys are ignored,
unless ``key=`` picks them. Columns of the data set are sent in the same way as labels. ``server`` has the requests.
"""

import math
from collections.abc import Sequence
from typing import Any

from pama_plugin.rewards.options import HttpOptions, refuse_columns
from pama_plugin.rewards.response import Response, Scorer
from pama_plugin.rewards.server import Server, check_servers
from pama_plugin.rewards.urls import keys_of, split_replicas


def check_http(location: str, options: HttpOptions) -> list[str]:
    """``check_servers``, and that no column takes the place of another part of the request."""
    refuse_columns(options.columns, ("query", "prompts", "labels"))
    return check_servers(location, options)


def load_http(
    location: str, options: HttpOptions, *, patient: bool = False, keys: Sequence[str | None] | None = None
) -> Scorer:
    """Load a scorer. Await it in one event loop only; it raises ``ServerFailure`` for a response without a reward.

    Args:
        location: the replicas.
        options: limits of the requests, and the token.
        keys: of the reply, for several rewards; None stands for ``rewards``.
        patient: while all replicas are suspended, wait for up to the time of one attempt, because a failure ends the
            run. Otherwise wait for up to 30 s, because the run goes on without these rewards.

    Raises:
        ValueError: as ``check_http``.
    """
    return _HttpScorer(location, options, patient, keys or (options.key,))


class _HttpScorer(Server):
    """Sends each response with OpenRLHF's protocol."""

    def __init__(self, location: str, options: HttpOptions, patient: bool, keys: Sequence[str | None]) -> None:
        super().__init__(split_replicas(location), options, keys_of(location), patient=patient)
        self.keys = keys

    async def __call__(self, response: Response) -> Any:
        body = {"query": [response.query], "prompts": [response.prompt], "labels": [response.label]}
        body |= {column: [response.columns[column]] for column in self.options.columns}
        return await self.ask(body, lambda document: pick(document, self.keys))


def pick(document: Any, keys: Sequence[str | None]) -> list[float | str | None]:
    """The number or null of each key of a JSON object; a text, why there is none, where a number is missing.

    Args:
        document: what the server sent.
        keys: each with a number, alone or in a list; None stands for ``rewards``, a list as OpenRLHF's protocol has it.

    >>> pick({"helpful": [0.5], "safe": 1.0}, ["helpful", "safe", "polite"])
    [0.5, 1.0, 'polite must be one finite number, found the keys helpful, safe']
    """
    return [_number(document, key) for key in keys]


def _number(document: Any, key: str | None) -> float | str | None:
    match document, key:
        case {"rewards": [float(number)]}, None if math.isfinite(number):
            return number
        case {"rewards": [None]}, None:
            return None
        case dict(), str() if key in document:
            found = document[key]
            found = found[0] if isinstance(found, list) and len(found) == 1 else found
            if found is None or isinstance(found, float) and math.isfinite(found):
                return found
    rule = f"{key} must be one finite number" if key else "rewards must be a list of one finite number"
    if isinstance(document, dict) and (key or "rewards") not in document:
        rule += f", found the keys {', '.join(document) or 'none'}"
    return rule
