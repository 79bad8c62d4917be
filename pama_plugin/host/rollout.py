"""Objectives that score in the rollout, while other responses are still being generated."""

import asyncio
import copy
import math
import zlib
from typing import Any

import ray
from openrlhf.trainer.ray import vllm_engine
from openrlhf.utils.agent import SingleTurnAgentExecutor

from pama_plugin.config import Objective, PamaConfig
from pama_plugin.errors import RewardError
from pama_plugin.rewards import Response, Scorer, load_builtin, load_function


def _scorer(objective: Objective) -> Scorer:
    if objective.kind == "py":
        return load_function(objective.location)
    return load_builtin(objective.location, objective.options)


class ObjectiveExecutor(SingleTurnAgentExecutor):
    """The host's single-turn executor, then one reward per ``py`` and ``builtin`` objective.

    The rewards leave as ``extra_logs``, which the host turns into one column per objective of ``Experience.info``. The
    host's own executor logs and swallows an exception of a reward; here it stops the run.
    """

    def __init__(self, config: PamaConfig, scalar_reward: bool) -> None:
        super().__init__(remote_rm_url=None)
        self.config = config
        self.scalar_reward = scalar_reward
        self.scored = config.of_kind("py", "builtin")
        self.scorers = {objective.name: _scorer(objective) for objective in self.scored}

    async def execute(self, *, hf_tokenizer: Any, **request: Any) -> dict[str, Any]:
        output: dict[str, Any] = await super().execute(hf_tokenizer=hf_tokenizer, **request)
        if not self.scorers:
            return output
        response = Response(
            query=hf_tokenizer.decode(output["observation_tokens"], skip_special_tokens=False),
            prompt=output["prompt"],
            label=output["label"],
            num_tokens=sum(end - start for start, end in output["action_ranges"]),
        )
        rewards = await asyncio.gather(
            *(asyncio.to_thread(_score, name, scorer, response) for name, scorer in self.scorers.items())
        )
        output["extra_logs"] = {f"reward/{name}": reward for name, reward in zip(self.scorers, rewards)}
        if self.scalar_reward:
            total = sum(objective.weight * reward for objective, reward in zip(self.scored, rewards))
            output |= {"reward": total, "scores": total}
        return output


def _score(name: str, scorer: Scorer, response: Response) -> float:
    try:
        reward = scorer(response)
    except Exception as error:  # the user's code may raise anything, and every failure must name its objective
        raise RewardError(name, f"{type(error).__name__}: {error}", response.query) from error
    if not math.isfinite(reward):
        raise RewardError(name, f"returned {reward}", response.query)
    return reward


def rollout_actor(config: PamaConfig, scalar_reward: bool, seed: int | None) -> Any:
    """The host's vLLM actor with our executor.

    The host gives this actor neither its arguments nor a hook, so the class carries the configuration: being local, it
    travels to the actors by value.

    Args:
        config: the objectives.
        scalar_reward: give the weighted sum as *the* reward, too.
        seed: makes what is sampled depend on nothing but the seed, the step, the prompt and the sample's number.
    """

    class RolloutRayActor(vllm_engine.RolloutRayActor.__ray_metadata__.modified_class):
        async def __init__(self, *args: Any, remote_rm_url: Any = None, **kwargs: Any) -> None:
            await super().__init__(*args, **kwargs)
            self.executor = ObjectiveExecutor(config, scalar_reward)
            self.step = 0

        async def begin_step(self, step: int) -> None:
            self.step = step

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
                own.seed = zlib.crc32(f"{seed} {self.step} {index} {prompt}".encode())
                samples.append(generate(prompt=prompt, sampling_params=own, num_samples=1, **request))
            return [sample for (sample,) in await asyncio.gather(*samples)]

    return ray.remote(RolloutRayActor)
