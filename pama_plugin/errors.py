"""Errors that a user of the plugin can meet, each with one sentence to act on."""


class PamaError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(PamaError, ValueError):
    """A setting that cannot be run: raised at the edge, before Ray starts. Says what, the rule, and what was found."""


class RewardError(PamaError, RuntimeError):
    """An objective that could not score a response: the run stops rather than train on a number nobody measured."""

    def __init__(self, objective: str, problem: str, response: str, step: int | None = None) -> None:
        # All four go to Exception.__init__, so that the error survives being pickled from one Ray actor to another.
        super().__init__(objective, problem, response, step)
        self.objective, self.problem, self.response, self.step = objective, problem, response, step

    def at_step(self, step: int) -> "RewardError":
        """The same error, once the caller knows which global step it happened in."""
        return RewardError(self.objective, self.problem, self.response, step)

    def __str__(self) -> str:
        where = "" if self.step is None else f" at step {self.step}"
        return (
            f"objective {self.objective!r}{where}: {self.problem}; the run was stopped because a missing reward must "
            f"not become a number. Response: {self.response!r}"
        )


class HandshakeError(PamaError, RuntimeError):
    """A rank that does not run what the driver configured: raised before the first training step."""


class ProbeError(PamaError, RuntimeError):
    """A reward that is not what it is taken for, by ``--pama.probe strict``: raised before it trains anything."""
