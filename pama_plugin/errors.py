"""Errors that the plugin raises, and their texts. A message states what is wrong, the rule, and the value found."""

LONGEST_PROBLEM = 500  # characters


def printable(text: str, longest: int = LONGEST_PROBLEM) -> str:
    """The first ``longest`` characters, in which none can end a line, move a terminal's cursor or forge a line.

    >>> printable("no\\nERROR: \\x1b[2J" + 600 * "x") == "no\\\\nERROR: \\\\x1b[2J" + 486 * "x" + "…"
    True
    """
    cut = text[:longest] + ("…" if len(text) > longest else "")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in cut)


class PamaError(Exception):
    """Base class of the errors of this package."""


def problem_of(error: Exception) -> str:
    """The text of an error, with its type unless it is ours."""
    return printable(str(error) if isinstance(error, PamaError) else f"{type(error).__name__}: {text_of(error)}")


def text_of(error: BaseException) -> str:
    """``str(error)``, which the class of an error may define, in a reward file or in the code of a model."""
    try:
        return str(error)
    except Exception:  # __str__ is foreign code and may raise anything; the error is still reported, by its type
        return "(its text cannot be read)"


class ConfigError(PamaError, ValueError):
    """An invalid setting. Raised before Ray starts."""


class RewardError(PamaError, RuntimeError):
    """A response without a reward from an objective. Ends the run."""

    def __init__(self, objective: str, problem: str, response: str, step: int | None = None) -> None:
        # Exception.__init__ gets all four, so that Ray can pickle the error between actors.
        super().__init__(objective, problem, response, step)
        self.objective, self.problem, self.response, self.step = objective, problem, response, step

    def at_step(self, step: int) -> "RewardError":
        """A copy of the error with the global step in which it occurred."""
        return RewardError(self.objective, self.problem, self.response, step)

    def __str__(self) -> str:
        where = "" if self.step is None else f" at step {self.step}"
        return (
            f"objective {self.objective!r}{where}: {self.problem}; the run was stopped because a response has "
            f"no reward. Response: {self.response!r}"
        )


class HandshakeError(PamaError, RuntimeError):
    """A rank whose configuration differs from the driver's. Raised before the first training step."""


class ProbeError(PamaError, RuntimeError):
    """A reward that fails the start-up probe with ``--pama.probe strict``. Raised before the first training step."""
