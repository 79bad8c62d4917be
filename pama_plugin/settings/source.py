"""``Source``: objectives whose rewards come from the same call, or from the same loaded model."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from pama_plugin.settings.objective import Objective


class Source(NamedTuple):
    """Objectives with one kind and one LOCATION, which differ in what they pick of its result, such as ``key=``.

    >>> from pama_plugin.settings.objective import parse_objective
    >>> found = group_by_source(map(parse_objective, ["style=agent:style", "a=builtin:length", "b=builtin:length"]))
    >>> [source.name for source in found]  # of these kinds nothing is shared
    ['style', 'a', 'b']
    """

    objectives: tuple[Objective, ...]

    @property
    def name(self) -> str:
        """The first name of its objectives in the alphabet: a resumed run may have them in another order."""
        return min(objective.name for objective in self.objectives)

    @property
    def picked(self) -> tuple[Any, ...]:
        """What each objective picks, as its option says; None for the default."""
        first = self.objectives[0]
        return tuple(getattr(each.settings, first.reward_kind.picks or "", None) for each in self.objectives)

    @property
    def patient(self) -> bool:
        """Whether a failure ends the run, so that a server that is down is waited for."""
        return any(objective.on_failure.action == "fail" for objective in self.objectives)

    def load(self, *where: Any, **how: Any) -> Any:
        """Load the scorer or the model. With several objectives its results are lists, one number for each."""
        first = self.objectives[0]
        if len(self.objectives) > 1:
            how["keys"] = self.picked
        return first.reward_kind.resolve("load")(first.location, first.settings, *where, **how)

    def split(self, result: Any) -> list[Any]:
        """The result of each objective."""
        return list(result) if len(self.objectives) > 1 else [result]


def group_by_source(objectives: Iterable[Objective]) -> tuple[Source, ...]:
    """Group objectives by what scores them, in the order of the first of each.

    Raises:
        ValueError: two objectives that would share a call have different options.
    """
    groups: dict[tuple[Any, ...], list[Objective]] = {}
    for index, objective in enumerate(objectives):
        kind, settings = objective.reward_kind, objective.settings
        located_by = [getattr(settings, option) for option in kind.located_by]
        key = (index,) if kind.picks is None else (objective.kind, objective.location, *located_by)
        groups.setdefault(key, []).append(objective)
    for first, *others in groups.values():
        for other in others:
            _check_options(first, other)
    return tuple(Source(tuple(group)) for group in groups.values())


def _check_options(one: Objective, other: Objective) -> None:
    picks = one.reward_kind.picks
    mine, its = (vars(objective.settings) for objective in (one, other))
    for key in mine:
        if key != picks and mine[key] != its[key]:
            raise ValueError(
                f"objectives {one.name!r} and {other.name!r} share {one.kind}:{one.location}: {key} must be the same "
                f"for both, found {mine[key]!r} and {its[key]!r}; of the options of the kind only {picks}= may differ"
            )
