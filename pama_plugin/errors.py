"""Errors that the plugin raises. Each message states what is wrong, the rule, and the value found."""


class PamaError(Exception):
    """Base class of the errors of this package."""


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
