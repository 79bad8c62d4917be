"""Scores objectives in the rollout, while other responses are still being generated."""

import asyncio
import copy
import logging
import math
import numbers
import reprlib
import time
import zlib
from collections.abc import Mapping
from typing import Any

import psutil
import ray
from openrlhf.trainer.ray import vllm_engine
from openrlhf.utils.agent import AgentExecutorBase

from pama_plugin.batch.keys import PROBLEM, REWARD, SAMPLED, SECONDS
from pama_plugin.batch.outcome import NOT_ASKED, Outcome, attempt, code_of
from pama_plugin.errors import LONGEST_PROBLEM, PamaError, RewardError, problem_of
from pama_plugin.host.actors.orphans import end_with_this_process
from pama_plugin.host.actors.prompts import plain, preference_of, whole
from pama_plugin.rewards import Response, Scorer
from pama_plugin.rewards.numbers import only_number
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig
from pama_plugin.settings.source import Source

logger = logging.getLogger(__name__)

COMPARED = 2  # rollouts whose log-probabilities are compared: one before the first weight sync, and one after it
PROBLEMS_KEPT = 4096  # an engine keeps the texts of its latest problems


class ObjectiveExecutor(AgentExecutorBase):
    """Runs OpenRLHF's executor, or the user's agent, then scores the objectives that are scored in the rollout.

    The rewards are returned in ``extra_logs``, from which OpenRLHF makes columns of ``Experience.info``, one per
    objective. Unless the objective's policy is to fail, a missing reward is NaN, and another column has the code of the
    reason, or says that the objective does not apply. Objectives of one source share one call. OpenRLHF's own executor
    would log an exception of a reward and continue.
    """

    def __init__(self, config: PamaConfig, base: AgentExecutorBase) -> None:
        self.config, self.base = config, base
        self.sources = config.sources("rollout", "agent")
        self.reads_columns = bool(config.columns) or config.preferences is not None
        self.scorers = {source.name: _load(source) for source in config.sources("rollout")}
        self.failures = dict.fromkeys(config.names, 0)
        self.problems: dict[int, str] = {}
        self.steps_done = 0
        agents = config.scored_in("agent")
        self.locations = {objective.location for objective in agents}  # a failure if not a number
        # OpenRLHF logs the mean of every key in extra_logs, which is not to count prompts without a meaning for it.
        self.partial = {objective.location for objective in agents if objective.abstain or objective.when}

    async def execute(self, *, hf_tokenizer: Any, **request: Any) -> dict[str, Any]:
        output: dict[str, Any] = await self.base.execute(hf_tokenizer=hf_tokenizer, **request)
        columns: Mapping[str, Any] = {}
        if self.reads_columns:
            prompt = whole(request["prompt"])
            columns, output["prompt"] = prompt.columns, prompt.as_text(output["prompt"])
        if not self.sources:
            return output
        tokens, turns = output["observation_tokens"], output["action_ranges"]
        actions = [token for start, end in turns for token in tokens[start:end]]
        query = hf_tokenizer.decode(tokens, skip_special_tokens=False)
        if self.config.preferences is not None:  # rewards judge the response, not how well it fits the preference
            query = _without_preference(query, output["prompt"], tokens, turns, hf_tokenizer)
        response = Response(
            query=query,
            prompt=plain(output["prompt"]),
            label=output["label"],
            response=hf_tokenizer.decode(actions, skip_special_tokens=True),
            num_tokens=len(actions),
            columns=columns,
        )
        logs = output.get("extra_logs") or {}
        self._check_logs(logs)
        returned = {"reward": output.get("reward"), "scores": output.get("scores")} | logs
        logs = {key: value for key, value in logs.items() if key not in self.partial}
        # OpenRLHF makes columns of these, too: all responses must have them, or none.
        output |= dict.fromkeys(self.partial & {"reward", "scores"})
        scored = await asyncio.gather(*(self._score(source, response, returned) for source in self.sources))
        logged: dict[str, float] = {}
        applying: dict[str, float] = {}
        for source, (outcomes, seconds) in zip(self.sources, scored):
            for objective, outcome in zip(source.objectives, outcomes):
                name, key = objective.name, objective.location
                logged |= {f"{REWARD}{name}": outcome.reward, f"{SECONDS}{name}": seconds}
                logged |= {f"{PROBLEM}{name}": self._remember(outcome)}
                if source.name not in self.scorers and outcome.problem is not None:
                    # All responses must have the column of a key, as a number.
                    logged |= {key: math.nan} if key not in {"reward", "scores", *self.partial} else {}
                applying |= {} if math.isnan(outcome.reward) else {name: outcome.reward}
        output["extra_logs"] = logs | logged
        if self.config.filter_by is not None:  # by ``scores`` OpenRLHF filters prompts
            preference = preference_of(output["prompt"]) if self.config.preferences is not None else ()
            output["scores"] = self.config.rate(applying, self.steps_done, preference)
        return output

    def _check_logs(self, logs: dict[str, Any]) -> None:
        """OpenRLHF makes a column of every key: raise ``PamaError`` for one that has no number."""
        for key in logs.keys() - self.locations:
            value = logs[key]
            first = value.flatten()[0].item() if hasattr(value, "flatten") else value  # as OpenRLHF takes it
            first = first.item() if hasattr(first, "item") else first
            if not isinstance(first, numbers.Number):
                raise PamaError(
                    f"the agent's extra_logs: {key!r} must be one number, found {reprlib.repr(value)}, which OpenRLHF "
                    "cannot log"
                )

    async def score_texts(self, responses: list[Response], names: list[str]) -> dict[str, list[float]]:
        """Score texts with objectives that the rollout scores; a missing reward is NaN, and one reason is logged."""
        rewards = {}
        for source in self.config.sources("rollout"):
            if source.name not in names:
                continue
            scorer = self.scorers[source.name]
            scored = await asyncio.gather(*(attempt(source, scorer(response)) for response in responses))
            for objective, outcomes in zip(source.objectives, zip(*scored)):
                name = objective.name
                for problem in [outcome.problem for outcome in outcomes if outcome.problem is not None][:1]:
                    logger.warning("PAMA: objective %r gave no reward before the first step: %s", name, problem)
                rewards[name] = [outcome.reward for outcome in outcomes]
        return rewards

    def _remember(self, outcome: Outcome) -> int:
        """Keep the problem's text and return its code, by which the driver asks for it: a column carries no text."""
        code = code_of(outcome)
        if outcome.problem is not None:
            self.problems.pop(code, None)  # so that it becomes the latest
            self.problems[code] = outcome.problem[:LONGEST_PROBLEM]
            while len(self.problems) > PROBLEMS_KEPT:
                del self.problems[next(iter(self.problems))]
        return code

    async def _score(self, source: Source, response: Response, returned: dict[str, Any]) -> tuple[list[Outcome], float]:
        """Return the outcome of each objective and the seconds they took; ``returned`` is the agent's output.

        If none of them applies to the prompt, nothing is asked, and the seconds are NaN.
        """
        applies = [objective.applies_to(response.columns) for objective in source.objectives]
        if not any(applies):
            return [NOT_ASKED] * len(applies), math.nan
        start, first = time.perf_counter(), source.objectives[0]
        call = self.scorers[source.name](response) if source.name in self.scorers else _read(returned, first)
        asked = await attempt(source, call)
        outcomes = [outcome if applied else NOT_ASKED for outcome, applied in zip(asked, applies)]
        failed: dict[str, list[Objective]] = {}
        for objective, outcome in zip(source.objectives, outcomes):
            if outcome.problem is not None:
                failed.setdefault(outcome.problem, []).append(objective)
        for problem, objectives in failed.items():
            for objective in objectives:
                if objective.on_failure.action == "fail":
                    raise RewardError(objective.name, problem, response.query)
            self._warn(objectives, problem)
        return outcomes, time.perf_counter() - start

    def _warn(self, objectives: list[Objective], problem: str) -> None:
        """Log failure 1, 2, 4, 8 … only, so that a dead server does not fill the log."""
        for objective in objectives:
            self.failures[objective.name] += 1
        names, count = ", ".join(repr(objective.name) for objective in objectives), self.failures[objectives[0].name]
        if count & (count - 1) == 0:
            logger.warning(
                "objective %s: %d responses without a reward in this engine so far (%s); last reason: %s",
                *(names, count, objectives[0].on_failure, problem),
            )


def _without_preference(query: str, prompt: str, tokens: list[int], turns: Any, hf_tokenizer: Any) -> str:
    """The query with the prompt as it is without its preference; an agent may have added texts around it."""
    if prompt in query:
        return query.replace(prompt, plain(prompt), 1)
    first = turns[0][0] if turns else len(tokens)  # the tokenizer does not return the text that it was given
    return plain(prompt) + str(hf_tokenizer.decode(tokens[first:], skip_special_tokens=False))


def _load(source: Source) -> Scorer:
    """Return the scorer; if it cannot be loaded, one that ends the run at its first call, whatever the policy.

    OpenRLHF would wait for ever for an engine that dies at its start.
    """
    try:
        scorer: Scorer = source.load(patient=source.patient)
        return scorer
    except Exception as error:  # the user's file may raise anything
        problem = f"cannot be loaded: {problem_of(error)}"

        async def refuse(response: Response) -> float:
            raise RewardError(source.name, problem, response.query)

        return refuse


async def _read(returned: dict[str, Any], objective: Objective) -> float | None:
    """Read one number from the agent's output; None if it is missing and the objective may abstain."""
    key = objective.location
    if returned.get(key) is None:
        if objective.abstain:
            return None
        names = ", ".join(name for name, value in returned.items() if value is not None)
        raise PamaError(f"the agent must return {key!r}, found {names} (abstain=true takes it as: does not apply)")
    try:
        return only_number(returned[key])
    except PamaError as error:
        raise PamaError(f"the agent's {key!r}: {error}") from error


def _log_prob(output: dict[str, Any], request: dict[str, Any]) -> float:
    """Of all tokens that the policy wrote; NaN if they are not known, or cut off by OpenRLHF."""
    log_probs, tokens = output["rollout_log_probs"], output["observation_tokens"]
    # An agent may ask for other turns itself, and without log-probabilities.
    if log_probs is None or len(log_probs) != len(tokens) or len(tokens) > request["max_length"]:
        return math.nan
    return math.fsum(sum(log_probs[start:end]) for start, end in output["action_ranges"])


def rollout_actor(config: PamaConfig, seed: int | None, *, compare: bool) -> Any:
    """OpenRLHF's vLLM actor with our executor around its own.

    OpenRLHF passes neither its arguments nor a hook to this actor, so the class carries the configuration: as a local
    class it travels to the actors by value.

    Args:
        config: the run's configuration.
        seed: if set, sampling depends only on the seed, the step, the prompt and the sample's number.
        compare: add a column with the log-probability of each response of the first two rollouts, to be compared with
            the policy's.
    """

    class RolloutRayActor(vllm_engine.RolloutRayActor.__ray_metadata__.modified_class):
        executor: Any
        watcher: Any

        # Ray awaits the constructor of an asynchronous actor.
        async def __init__(self, *args: Any, remote_rm_url: Any = None, **kwargs: Any) -> None:  # type: ignore[misc]
            await super().__init__(*args, **kwargs)
            self.watcher = end_with_this_process([each.pid for each in psutil.Process().children(recursive=True)])
            self.executor = ObjectiveExecutor(config, self.executor)
            self.steps_begun = 0

        async def score_texts(self, responses: list[Response], names: list[str]) -> dict[str, list[float]]:
            return await self.executor.score_texts(responses, names)

        async def problems(self, codes: list[int]) -> dict[int, str]:
            return {code: self.executor.problems[code] for code in codes if code in self.executor.problems}

        async def begin_step(self, steps_done: int) -> None:
            self.executor.steps_done = steps_done
            self.steps_begun += 1

        async def generate_responses(
            self, *, prompt: str, sampling_params: Any, num_samples: int = 1, **request: Any
        ) -> list[dict[str, Any]]:
            if not (compare and self.steps_begun <= COMPARED):
                return await self._generate(prompt, sampling_params, num_samples, request)
            asked = copy.deepcopy(sampling_params)
            asked.logprobs = 1
            outputs = await self._generate(prompt, asked, num_samples, request)
            for output in outputs:
                output["extra_logs"] = (output.get("extra_logs") or {}) | {SAMPLED: _log_prob(output, request)}
                if sampling_params.logprobs is None:
                    output["rollout_log_probs"] = None  # asked for by us alone; OpenRLHF expects none
            return outputs

        async def _generate(
            self, prompt: str, sampling_params: Any, num_samples: int, request: dict[str, Any]
        ) -> list[dict[str, Any]]:
            generate = super().generate_responses
            if seed is None:
                return await generate(
                    prompt=prompt, sampling_params=sampling_params, num_samples=num_samples, **request
                )
            samples = []
            for index in range(num_samples):
                params = copy.deepcopy(sampling_params)
                params.seed = zlib.crc32(f"{seed} {self.executor.steps_done} {index} {prompt}".encode())
                samples.append(generate(prompt=prompt, sampling_params=params, num_samples=1, **request))
            return [sample for (sample,) in await asyncio.gather(*samples)]

    return ray.remote(RolloutRayActor)
