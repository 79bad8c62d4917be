"""Scores objectives in the rollout, while other responses are still being generated."""

import asyncio
import copy
import logging
import math
import numbers
import reprlib
import time
import zlib
from typing import Any

import psutil
import ray
from openrlhf.trainer.ray import vllm_engine
from openrlhf.utils.agent import AgentExecutorBase

from pama_plugin.batch.keys import PROBLEM, REWARD, SAMPLED, SECONDS
from pama_plugin.batch.outcome import Outcome, attempt, code_of
from pama_plugin.errors import LONGEST_PROBLEM, PamaError, RewardError, problem_of
from pama_plugin.host.actors.orphans import end_with_this_process
from pama_plugin.rewards import Response, Scorer
from pama_plugin.rewards.numbers import only_number
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

logger = logging.getLogger(__name__)

COMPARED = 2  # rollouts whose log-probabilities are compared: one before the first weight sync, and one after it
PROBLEMS_KEPT = 4096  # an engine keeps the texts of its latest problems


class ObjectiveExecutor(AgentExecutorBase):
    """Runs OpenRLHF's executor, or the user's agent, then scores the objectives that are scored in the rollout.

    The rewards are returned in ``extra_logs``, from which OpenRLHF makes columns of ``Experience.info``, one per
    objective. Unless the objective's policy is to fail, a missing reward is NaN, and another column has the code of the
    reason. OpenRLHF's own executor would log an exception of a reward and continue.
    """

    def __init__(self, config: PamaConfig, base: AgentExecutorBase) -> None:
        self.config, self.base = config, base
        self.scored = config.scored_in("rollout", "agent")
        self.scorers = {objective.name: _load(objective) for objective in config.scored_in("rollout")}
        self.failures = dict.fromkeys(config.names, 0)
        self.problems: dict[int, str] = {}
        self.steps_done = 0
        self.locations = {objective.location for objective in config.scored_in("agent")}  # a failure if not a number

    async def execute(self, *, hf_tokenizer: Any, **request: Any) -> dict[str, Any]:
        output: dict[str, Any] = await self.base.execute(hf_tokenizer=hf_tokenizer, **request)
        if not self.scored:
            return output
        tokens, turns = output["observation_tokens"], output["action_ranges"]
        actions = [token for start, end in turns for token in tokens[start:end]]
        response = Response(
            query=hf_tokenizer.decode(tokens, skip_special_tokens=False),
            prompt=output["prompt"],
            label=output["label"],
            response=hf_tokenizer.decode(actions, skip_special_tokens=True),
            num_tokens=len(actions),
        )
        logs = output.get("extra_logs") or {}
        self._check_logs(logs)
        returned = {"reward": output.get("reward"), "scores": output.get("scores")} | logs
        outcomes = await asyncio.gather(*(self._score(objective, response, returned) for objective in self.scored))
        columns: dict[str, float] = {}
        for objective, (outcome, seconds) in zip(self.scored, outcomes):
            name, key = objective.name, objective.location
            columns |= {f"{REWARD}{name}": outcome.reward, f"{SECONDS}{name}": seconds}
            columns |= {f"{PROBLEM}{name}": self._remember(outcome.problem)}
            if name not in self.scorers and outcome.problem is not None:
                # OpenRLHF makes a column of every key in extra_logs: all responses must have it, as a number.
                columns |= {key: math.nan} if key not in ("reward", "scores") else {}
        output["extra_logs"] = logs | columns
        if self.config.filter_by is not None:  # by ``scores`` OpenRLHF filters prompts
            rewards = {objective.name: outcome.reward for objective, (outcome, _) in zip(self.scored, outcomes)}
            output["scores"] = self.config.rate(rewards, self.steps_done)
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
        for objective in self.config.scored_in("rollout"):
            if objective.name not in names:
                continue
            scorer = self.scorers[objective.name]
            outcomes = await asyncio.gather(*(attempt(objective, scorer(response)) for response in responses))
            for problem in [outcome.problem for outcome in outcomes if outcome.problem is not None][:1]:
                logger.warning("PAMA: objective %r gave no reward before the first step: %s", objective.name, problem)
            rewards[objective.name] = [outcome.reward for outcome in outcomes]
        return rewards

    def _remember(self, problem: str | None) -> int:
        """Keep the problem's text and return its code, by which the driver asks for it: a column carries no text."""
        code = code_of(problem)
        if problem is not None:
            self.problems.pop(code, None)  # so that it becomes the latest
            self.problems[code] = problem[:LONGEST_PROBLEM]
            while len(self.problems) > PROBLEMS_KEPT:
                del self.problems[next(iter(self.problems))]
        return code

    async def _score(self, objective: Objective, response: Response, returned: dict[str, Any]) -> tuple[Outcome, float]:
        """Return the outcome and the seconds it took; ``returned`` is the agent's output."""
        start, name = time.perf_counter(), objective.name
        reward = self.scorers[name](response) if name in self.scorers else _read(returned, objective.location)
        outcome = await attempt(objective, reward)
        if outcome.problem is not None:
            if objective.on_failure.action == "fail":
                raise RewardError(name, outcome.problem, response.query)
            self._warn(objective, outcome.problem)
        return outcome, time.perf_counter() - start

    def _warn(self, objective: Objective, problem: str) -> None:
        """Log failure 1, 2, 4, 8 … only, so that a dead server does not fill the log."""
        self.failures[objective.name] += 1
        count = self.failures[objective.name]
        if count & (count - 1) == 0:
            logger.warning(
                "objective %r: %d responses without a reward in this engine so far (%s); last reason: %s",
                *(objective.name, count, objective.on_failure, problem),
            )


def _load(objective: Objective) -> Scorer:
    """Return the scorer; if it cannot be loaded, one that ends the run at its first call, whatever the policy.

    OpenRLHF would wait for ever for an engine that dies at its start.
    """
    try:
        return objective.load_scorer(patient=objective.on_failure.action == "fail")
    except Exception as error:  # the user's file may raise anything
        problem = f"cannot be loaded: {problem_of(error)}"

        async def refuse(response: Response) -> float:
            raise RewardError(objective.name, problem, response.query)

        return refuse


async def _read(returned: dict[str, Any], key: str) -> float:
    """Read one number from the agent's output."""
    if returned.get(key) is None:
        names = ", ".join(name for name, value in returned.items() if value is not None)
        raise PamaError(f"the agent must return {key!r}, found {names}")
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
