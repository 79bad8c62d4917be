"""``Condition``: the prompts to which an objective applies, by a column of the data set."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from pama_plugin.errors import ConfigError
from pama_plugin.settings.names import DATASOURCE, DEFAULT_DATASOURCE

SHOWN = 12  # values in an error


class Condition(NamedTuple):
    """``COLUMN:VALUE|VALUE…``: the column has one of the values, compared as text.

    >>> condition = parse_condition("datasource:math|code")
    >>> condition.holds({"datasource": "code"}), condition.holds({"datasource": "chat"})
    (True, False)
    """

    column: str
    values: tuple[str, ...]

    def holds(self, columns: Mapping[str, Any]) -> bool:
        """Whether the column of a prompt has one of the values.

        Raises:
            KeyError: the prompt has no such column.
        """
        return text_of(columns[self.column]) in self.values

    def check(self, found: Collection[str], name: str) -> None:
        """Refuse values of the objective ``name`` that are not among those found. Raises ``ConfigError``."""
        if absent := [value for value in self.values if value not in found]:
            listed = sorted(found)
            more = f" and {len(listed) - SHOWN} others" if len(listed) > SHOWN else ""
            raise ConfigError(
                f"objective {name!r}: when={self} must name values of {self.column}, which has "
                f"{', '.join(listed[:SHOWN])}{more}; no prompt has {', '.join(absent)}"
            )

    def __str__(self) -> str:
        return f"{self.column}:{'|'.join(self.values)}"


def text_of(value: Any) -> str:
    """A value of a column, or of YAML, as it is written in a condition.

    >>> text_of(True), text_of(3), text_of("3")
    ('true', '3', '3')
    """
    return str(value).lower() if isinstance(value, bool) else str(value)


def column_of(row: Mapping[str, Any], name: str) -> Any:
    """A column of a row of a data set. The data source is ``default`` where OpenRLHF, or another data set, has none.

    >>> column_of({"answer": 4}, "answer"), column_of({"answer": 4}, "datasource")
    (4, 'default')
    """
    if name != DATASOURCE:
        return row[name]
    return DEFAULT_DATASOURCE if (value := row.get(name)) is None else value


def parse_condition(value: Any) -> Condition | None:
    """Parse ``COLUMN:VALUE|VALUE…``, or ``{COLUMN: VALUE or [VALUE, …]}`` of a file; else raise ``ValueError``."""
    if value is None or isinstance(value, Condition):
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        ((column, listed),) = value.items()
        values = [text_of(each) for each in (listed if isinstance(listed, list) else [listed])]
    else:
        column, _, text = value.partition(":") if isinstance(value, str) else ("", "", "")
        values = text.split("|")
    if not column or not values or not all(values):
        raise ValueError("must be COLUMN:VALUE or COLUMN:VALUE|VALUE (in a file also {COLUMN: [VALUE, …]})")
    return Condition(str(column), tuple(dict.fromkeys(values)))
