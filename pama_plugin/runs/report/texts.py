"""What the policy wrote, for the report: the same prompts early and late, and the best and worst late responses."""

from collections.abc import Sequence
from typing import NamedTuple

from pama_plugin.runs.rollouts import Rollout, by_reward, ranked

PROMPTS = 4
EARLY, LATE = 0.2, 0.8  # of the steps


class Answer(NamedTuple):
    """A response with a heading above it and its rewards below it."""

    heading: str
    text: str
    rewards: str


class Exchange(NamedTuple):
    """A prompt and responses to it."""

    prompt: str
    answers: list[Answer]


def early_and_late(rollouts: Sequence[Rollout]) -> list[Exchange]:
    """Up to four prompts that were answered in the first and in the last fifth of the steps, with both answers."""
    if not rollouts:
        return []
    last = rollouts[-1].step
    early = {rollout.prompt: rollout for rollout in reversed(rollouts) if rollout.step <= max(1, EARLY * last)}
    late = {rollout.prompt: rollout for rollout in rollouts if rollout.step > LATE * last}
    both = [prompt for prompt in early if prompt in late and early[prompt].step < late[prompt].step]
    return [Exchange(prompt, [answer_of(early[prompt]), answer_of(late[prompt])]) for prompt in both[:PROMPTS]]


def best_and_worst(rollouts: Sequence[Rollout], names: Sequence[str]) -> list[tuple[str, Exchange]]:
    """For every objective the late response with the highest reward and that with the lowest, each with its prompt."""
    late = [rollout for rollout in rollouts if rollout.step > LATE * rollouts[-1].step]
    found = []
    for name in names:
        order = ranked(late, by_reward(name), reverse=True)
        if order and order[0].rewards[name] != order[-1].rewards[name]:
            for word, rollout in (("best", order[0]), ("worst", order[-1])):
                found.append((f"{name}: {word}", Exchange(rollout.prompt, [answer_of(rollout)])))
    return found


def answer_of(rollout: Rollout) -> Answer:
    """The response as it is shown."""
    rewards = [f"{name} {'–' if reward is None else f'{reward:.3g}'}" for name, reward in rollout.rewards.items()]
    if rollout.nats is not None:
        rewards.append(f"{rollout.nats:.2g} nats")
    return Answer(f"step {rollout.step}", rollout.response.strip() or "(empty)", " · ".join(rewards))
