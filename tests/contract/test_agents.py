"""Objectives around the user's own agent, which runs as the host runs it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faultserver import FaultServer, reward_of

from pama_plugin.errors import PamaError, RewardError
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

AGENT = """
import torch

from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class Guess(AgentInstanceBase):
    turn = 0

    def __init__(self):
        pass

    async def step(self, states, **_):
        self.turn += 1
        style = {STYLE}
        return {
            "rewards": torch.tensor(1.0),
            "scores": torch.tensor(0.5),
            "environment_feedback": " 50 51" if self.turn < 3 else "",
            "done": self.turn == 3,
            "extra_logs": {"style": style, "turns": torch.tensor([float(self.turn)])},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Guess)
"""


class Numbers:
    """A tokenizer whose tokens are numbers, written in decimal."""

    def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]], dtype=torch.long)}

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(str(token) for token in tokens if not (skip_special_tokens and token == 9))


class Engine:
    """Answers every turn with the tokens 7 8 9, of which 9 ends a turn."""

    async def generate(self, tokens, sampling_params, multi_modal_data=None):
        output = SimpleNamespace(token_ids=[7, 8, 9], text=" 7 8", finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


def play(
    tmp_path, *objectives: str, style: str = "torch.tensor([0.1 * self.turn])", by=None, columns=None
) -> tuple[dict, dict]:
    """What the agent returns by itself, and with our objectives around it."""
    from openrlhf.trainer.ray.vllm_engine import _load_agent_executor

    from pama_plugin.host.actors.prompts import with_columns
    from pama_plugin.host.actors.rollout import ObjectiveExecutor

    path = tmp_path / "agent.py"
    path.write_text(AGENT.replace("{STYLE}", style))
    config = load_config("pama", objectives, None, None, None, filter_by=by, default_level="sequence")

    def run(executor):
        sampling = SimpleNamespace(logprobs=None, max_tokens=4)
        prompt = "3 4" if columns is None else with_columns("3 4", columns)
        request = dict(prompt=prompt, label="L", sampling_params=sampling, max_length=64)
        return asyncio.run(executor.execute(**request, hf_tokenizer=Numbers(), llm_engine=Engine()))

    stock = _load_agent_executor(str(path))
    return run(stock), run(ObjectiveExecutor(config, stock))


def test_a_multi_turn_agent_keeps_all_it_returns_and_its_keys_become_objectives(tmp_path) -> None:
    objectives = ("style=agent:style", "total=agent:reward", "score=agent:scores", "words=builtin:length,unit=words")
    alone, ours = play(tmp_path, *objectives)
    rewards = {key: ours["extra_logs"].pop(f"reward/{key}") for key in ("style", "total", "score", "words")}
    assert rewards == pytest.approx({"style": 0.3, "total": 3.0, "score": 0.5, "words": 6})  # 3 turns of 2 words
    assert {key for key in ours["extra_logs"] if key.startswith("seconds/")} == {f"seconds/{key}" for key in rewards}
    problems = {f"pama/problem/{key}" for key in rewards}
    assert {key for key in ours["extra_logs"] if key.startswith("pama/problem/")} == problems
    own = {key: value for key, value in ours["extra_logs"].items() if not key.startswith(("seconds/", "pama/problem/"))}
    assert own == alone["extra_logs"] and ours | {"extra_logs": None} == alone | {"extra_logs": None}


@pytest.mark.parametrize(("by", "rating"), [("style", 0.3), ("n", 9), ("sum", None)])
def test_prompts_are_filtered_by_an_objective_or_by_the_weighted_sum(tmp_path, by, rating) -> None:
    (tmp_path / "rewards.py").write_text("def f(queries, prompts, labels):\n    return 2.0\n")
    objectives = ("style=agent:style,weight=10", f"own=py:{tmp_path}/rewards.py:f", "n=builtin:length,role=monitor")
    with FaultServer() as server:
        _, ours = play(tmp_path, *objectives, f"judge=http:{server.url}", by=by)
        (body,) = server.bodies
    assert ours["scores"] == pytest.approx(rating or 10 * 0.3 + 2 + reward_of(body["query"][0]))
    assert ours["reward"] == 3.0, "the agent's own reward"


@pytest.mark.parametrize(("style", "code"), [("None", -2), ("0.5", 0), ("[]", None)])
def test_an_agents_key_may_abstain_and_others_apply_to_some_of_its_prompts(tmp_path, style, code) -> None:
    """The conversation keeps its columns through all turns of OpenRLHF's executor."""
    (tmp_path / "f.py").write_text(
        "def f(queries, prompts, labels, answer):\n    return float(answer[0] in queries[0])\n"
    )
    objectives = (
        "style=agent:style,abstain=true,on_failure=mask",
        "total=agent:reward,when=task:chat",
        f"right=py:{tmp_path}/f.py:f,columns=answer,when=task:math",
        "words=builtin:length,unit=words",
    )
    _, ours = play(tmp_path, *objectives, style=style, columns={"task": "math", "answer": "50"})
    logs = ours["extra_logs"]
    assert (logs["reward/right"], logs["reward/words"]) == (1, 6) and logs["pama/problem/total"] == -1
    assert logs["pama/problem/style"] == code if code is not None else logs["pama/problem/style"] > 0
    assert "style" not in logs and ours["reward"] is None, "OpenRLHF would average what does not apply"
    assert ours["prompt"].columns == {"task": "math", "answer": "50"}


def test_other_objectives_see_the_whole_conversation(tmp_path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def f(queries, prompts, labels):\n"
        "    assert queries == ['3 4 7 8 9 50 51 7 8 9 50 51 7 8 9'] and prompts == ['3 4'] and labels == ['L']\n"
        "    return 2.0\n"
    )
    _, ours = play(tmp_path, f"seen=py:{tmp_path}/rewards.py:f")
    assert ours["extra_logs"]["reward/seen"] == 2.0


@pytest.mark.parametrize(
    ("key", "style", "problem"),
    [
        ("charm", "0.1", "the agent .*'charm', found reward, scores, style, turns"),
        ("style", "None", "the agent .*'style', found .*turns"),
        ("style", "torch.zeros(2)", "the agent's 'style': returned 2 rewards"),
        ("style", "float('nan')", "returned nan"),
    ],
)
def test_what_the_agent_does_not_return_is_a_failure_of_that_objective(tmp_path, key, style, problem) -> None:
    with pytest.raises(RewardError, match=f"objective 'a': {problem}"):
        play(tmp_path, f"a=agent:{key}", style=style)
    _, ours = play(tmp_path, f"a=agent:{key},on_failure=mask", "b=builtin:length", style=style)
    assert ours["extra_logs"]["reward/a"] != ours["extra_logs"]["reward/a"]


@pytest.mark.parametrize(
    ("style", "problem"),
    [("'good'", "found 'good'"), ("None", "found None"), ("[1, 2]", r"found .1, 2.")],
)
def test_what_openrlhf_cannot_log_is_named(tmp_path, style, problem) -> None:
    """It would make a column of it, and end the run with an error of torch's."""
    with pytest.raises(PamaError, match=f"extra_logs: 'style' must be one number, {problem}"):
        play(tmp_path, "n=builtin:length", style=style)


def test_what_openrlhf_can_log_is_accepted(tmp_path) -> None:
    import numpy as np

    for style in ("True", "torch.tensor([True])", "torch.tensor([1.0, 2.0])", "__import__('numpy').bool_(True)", "2"):
        _, ours = play(tmp_path, "n=builtin:length", style=style)
        assert np.asarray(ours["extra_logs"]["style"]).size


def test_the_hosts_single_turn_executor_is_used_without_an_agent() -> None:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    from pama_plugin.host.actors.rollout import ObjectiveExecutor

    config = load_config("pama", ["n=builtin:length"], None, None, None, filter_by="n", default_level="sequence")
    executor = ObjectiveExecutor(config, SingleTurnAgentExecutor(None))
    sampling = SimpleNamespace(logprobs=None, max_tokens=4)
    request = dict(prompt="3 4", label="", sampling_params=sampling, max_length=64)
    output = asyncio.run(executor.execute(**request, hf_tokenizer=Numbers(), llm_engine=Engine()))
    assert output["observation_tokens"] == [3, 4, 7, 8, 9] and output["extra_logs"]["reward/n"] == 3
    assert output["scores"] == 3


def test_the_host_makes_columns_of_what_an_agent_gives_now_and_then(tmp_path) -> None:
    """Under mask neither a key that some responses lack nor one that is no number loses the run."""
    import torch
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    generator = SamplesGenerator.__new__(SamplesGenerator)
    rollout = []
    for style in ("0.5", "None", "'text'", "torch.zeros(2)"):
        _, ours = play(tmp_path, "a=agent:style,on_failure=mask", style=style)
        rollout.append(generator._process_response_into_experience(ours, truncate_length=64, max_new_tokens=8))
    joined = Experience.concat_experiences(rollout, 0)
    assert joined.info["style"].isnan().tolist() == joined.info["reward/a"].isnan().tolist() == [False] + [True] * 3
    assert joined.info["reward/a"][0] == torch.tensor(0.5)
