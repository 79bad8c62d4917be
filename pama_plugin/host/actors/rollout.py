"""Objectives that score in the rollout, while other responses are still being generated."""

import asyncio
import copy
import logging
import math
import time
import zlib
from typing import Any

import ray
import torch
from openrlhf.trainer.ray import vllm_engine
from openrlhf.utils.agent import AgentExecutorBase

from pama_plugin.batch.metrics import PROBLEM, REWARD, SECONDS
from pama_plugin.batch.outcome import Outcome, attempt, code_of
from pama_plugin.errors import PamaError, RewardError
from pama_plugin.rewards import Response, Scorer
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

logger = logging.getLogger(__name__)

PROBLEMS_KEPT, PROBLEM_LENGTH = 4096, 500  # texts of the latest problems in an engine


class ObjectiveExecutor(AgentExecutorBase):
    """The host's executor, or the user's own agent, then one reward per objective that is scored in the rollout.

    The rewards leave as ``extra_logs``, which the host turns into one column per objective of ``Experience.info``: NaN
    for a response without a reward, where the objective's policy is not to fail, with the number of the reason. The
    host's own executor logs and swallows an exception of a reward.
    """

    def __init__(self, config: PamaConfig, base: AgentExecutorBase, scalar_reward: bool) -> None:
        self.config, self.base, self.scalar_reward = config, base, scalar_reward
        self.scored = config.scored_in("rollout", "agent")
        self.scorers = {objective.name: _load(objective) for objective in config.scored_in("rollout")}
        self.failures = dict.fromkeys(config.names, 0)
        self.problems: dict[int, str] = {}
        self.steps_done = 0

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
        given = {"reward": output.get("reward"), "scores": output.get("scores")} | logs
        outcomes = await asyncio.gather(*(self._score(own, response, given) for own in self.scored))
        columns: dict[str, float] = {}
        for own, (outcome, seconds) in zip(self.scored, outcomes):
            columns |= {f"{REWARD}{own.name}": outcome.reward, f"{SECONDS}{own.name}": seconds}
            columns |= {f"{PROBLEM}{own.name}": self._remember(outcome.problem)}
            if own.name not in self.scorers and outcome.problem is not None:
                # The host makes a column of every key, which all responses must have, as a number. These two are not.
                columns |= {own.location: math.nan} if own.location not in ("reward", "scores") else {}
        output["extra_logs"] = logs | columns
        if self.scalar_reward:
            trained = [(own, outcome) for own, (outcome, _) in zip(self.scored, outcomes) if own.role == "train"]
            total = sum(own.weight.at(self.steps_done) * outcome.reward for own, outcome in trained)
            output |= {"reward": total, "scores": total}
        return output

    async def score_texts(self, responses: list[Response]) -> dict[str, list[float]]:
        """What each objective but an agent's gives; NaN, and a line in the log, where it gives nothing."""
        found = {}
        for own in self.config.scored_in("rollout"):
            outcomes = await asyncio.gather(*(attempt(own, self.scorers[own.name](each)) for each in responses))
            for problem in [outcome.problem for outcome in outcomes if outcome.problem is not None][:1]:
                logger.warning("PAMA: objective %r, asked before the first step: %s", own.name, problem)
            found[own.name] = [outcome.reward for outcome in outcomes]
        return found

    def _remember(self, problem: str | None) -> int:
        """The problem's number, by which the driver asks for its text: a column carries no text."""
        code = code_of(problem)
        if problem is not None:
            self.problems.pop(code, None)  # so that it is the latest again
            self.problems[code] = problem[:PROBLEM_LENGTH]
            while len(self.problems) > PROBLEMS_KEPT:
                del self.problems[next(iter(self.problems))]
        return code

    async def _score(self, own: Objective, response: Response, given: dict[str, Any]) -> tuple[Outcome, float]:
        """The reward, or why there is none, and the seconds it took."""
        start = time.perf_counter()
        reward = self.scorers[own.name](response) if own.name in self.scorers else _read(given, own.location)
        outcome = await attempt(own, reward)
        if outcome.problem is not None:
            if own.on_failure.action == "fail":
                raise RewardError(own.name, outcome.problem, response.query)
            self._warn(own, outcome.problem)
        return outcome, time.perf_counter() - start

    def _warn(self, own: Objective, problem: str) -> None:
        """At the first failure, the second, the fourth …: a dead server must not fill the log."""
        self.failures[own.name] += 1
        count = self.failures[own.name]
        if count & (count - 1) == 0:
            logger.warning(
                "objective %r: %d responses without a reward in this engine so far (%s); the last: %s",
                *(own.name, count, own.on_failure, problem),
            )


def _load(own: Objective) -> Scorer:
    """The scorer; if it cannot be loaded, one that ends the run, whatever the policy, as soon as it is asked.

    An engine that died while it starts would leave the host waiting for it.
    """
    try:
        return own.load_scorer(patient=own.on_failure.action == "fail")
    except Exception as error:  # of the user's own file, too
        problem = f"cannot be loaded: {type(error).__name__}: {error}"

        async def refuse(response: Response) -> float:
            raise RewardError(own.name, problem, response.query)

        return refuse


async def _read(given: dict[str, Any], key: str) -> float:
    """One number of what the agent returned."""
    if given.get(key) is None:
        raise PamaError(
            f"the agent returned no {key!r}, but {', '.join(name for name in given if given[name] is not None)}"
        )
    dtype = None if isinstance(given[key], torch.Tensor) else torch.float64  # not whatever is the default
    values = torch.as_tensor(given[key], dtype=dtype).flatten()
    if len(values) != 1:
        raise PamaError(f"the agent returned {len(values)} values as {key!r}")
    return float(values[0])


def rollout_actor(config: PamaConfig, scalar_reward: bool, seed: int | None) -> Any:
    """The host's vLLM actor with our executor around its own.

    The host gives this actor neither its arguments nor a hook, so the class carries the configuration: being local, it
    travels to the actors by value.

    Args:
        config: the objectives.
        scalar_reward: give the weighted sum as *the* reward, too.
        seed: makes what is sampled depend on nothing but the seed, the step, the prompt and the sample's number.
    """

    class RolloutRayActor(vllm_engine.RolloutRayActor.__ray_metadata__.modified_class):
        executor: Any

        # Ray awaits the constructor of an asynchronous actor.
        async def __init__(self, *args: Any, remote_rm_url: Any = None, **kwargs: Any) -> None:  # type: ignore[misc]
            await super().__init__(*args, **kwargs)
            self.executor = ObjectiveExecutor(config, self.executor, scalar_reward)

        async def score_texts(self, responses: list[Response]) -> dict[str, list[float]]:
            return await self.executor.score_texts(responses)

        async def problems(self, codes: list[int]) -> dict[int, str]:
            return {code: self.executor.problems[code] for code in codes if code in self.executor.problems}

        async def begin_step(self, steps_done: int) -> None:
            self.executor.steps_done = steps_done

        async def generate_responses(
            self, *, prompt: str, sampling_params: Any, num_samples: int = 1, **request: Any
        ) -> list[dict[str, Any]]:
            generate = super().generate_responses
            if seed is None:
                return await generate(
                    prompt=prompt, sampling_params=sampling_params, num_samples=num_samples, **request
                )
            samples = []
            for index in range(num_samples):
                own = copy.deepcopy(sampling_params)
                own.seed = zlib.crc32(f"{seed} {self.executor.steps_done} {index} {prompt}".encode())
                samples.append(generate(prompt=prompt, sampling_params=own, num_samples=1, **request))
            return [sample for (sample,) in await asyncio.gather(*samples)]

    return ray.remote(RolloutRayActor)
