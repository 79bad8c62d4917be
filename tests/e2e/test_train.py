"""Whole runs on the real Ray, DeepSpeed and vLLM, a few steps each."""

import math

import pytest
from hosttools import by_hand

from pama_plugin import __version__
from pama_plugin.runs.rollouts import read_rollouts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(700)]  # the first run compiles DeepSpeed's operators

GROUPS = [
    "--algo.advantage.estimator",
    "reinforce_baseline",
    "--rollout.n_samples_per_prompt",
    "4",
    "--train.batch_size",
    "16",
]
ADAPTERS = "--ds.lora.rank 4 --ds.lora.alpha 8 --actor.adam.lr 3e-2".split()
# Rewards do not see the policy's adapters: the run without them, and those of ``test_lora``, show both halves.
BY_HAND = by_hand("two minutes")
WITHOUT_REFERENCE = ["--algo.kl.init_coef", "0"]  # a process less to start, where it adds nothing

AGENT = """
import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class Twice(AgentInstanceBase):
    turns = 0

    def __init__(self):
        pass

    async def step(self, states, **_):
        self.turns += 1
        words = len(states["action_text"].split())
        extra_logs = {"words": torch.tensor([float(words)]), "turns": self.turns}
        return {
            "rewards": torch.tensor(0.0),
            "environment_feedback": " and",
            "done": self.turns == 2,
            "extra_logs": extra_logs,
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Twice)
"""


@pytest.mark.parametrize("adapters", [[], pytest.param(ADAPTERS, marks=BY_HAND)], ids=["full", "LoRA"])
def test_all_six_kinds_with_the_stock_command(adapters, run_host, models, serve_rm, tmp_path) -> None:
    """Models of two tokenizers, the host's reward server, a function, a rule and a multi-turn agent in one run."""
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "rewards.py").write_text(
        "import torch\n\n\ndef vowels(queries, prompts, labels):\n"
        "    rewards = torch.tensor([float(sum(query.count(v) for v in 'aeiou')) for query in queries])\n"
        "    return {'rewards': rewards, 'scores': rewards, 'extra_logs': {}}\n"
    )
    objectives = {
        "helpful": f"rm:{models}/helpful,weight=2",
        "polite": f"hf:{models}/polite,label=polite,output=log_odds,replicas=2,gpus=0",
        "harmless": f"http:{serve_rm},timeout=60",
        "vowels": f"py:{tmp_path}/rewards.py:vowels,normalize=running",
        "length": "builtin:length,scale=4,clip=0:3",
        "words": "agent:words,on_failure=mask",
        "form": "builtin:json,role=monitor",
    }
    run = run_host(
        *GROUPS,
        *adapters,
        *("--train.agent_func_path", f"{tmp_path}/agent.py", "--loss", "pama"),
        *(word for name, spec in objectives.items() for word in ("--pama.objective", f"{name}={spec}")),
        # At batch level some objective always binds; at the others so many untrained ones may well agree on nothing.
        *("--pama.level", "batch"),
        # No ratio is as far from 1 as these bounds: every token is out of them, and its weight the lower one.
        *("--algo.advantage.is_correction_level", "token", "--algo.advantage.is_correction_mode", "clip"),
        *("--algo.advantage.is_correction_threshold", "2", "3"),
        steps=3,
    )
    assert run.status == 0, run.output[-5000:]
    line = "active: 7 objectives, policy 1/1, critic –, reward groups 1/1, reference 1/1, rollout 1/1"
    assert f"PAMA {__version__} {line}" in run.output
    assert "PAMA probe: 8 pairs" in run.output and "words: not probed, the agent scores it" in run.output

    trained = [name for name in objectives if name != "form"]
    assert len(run.steps) == 3
    for step in run.steps:
        assert all(math.isfinite(step[f"reward/{name}"]) and step[f"pama/failures/{name}"] == 0 for name in objectives)
        assert all(step[f"seconds/{name}"] > 0 for name in objectives)
        assert all(f"{stem}/{name}" in step for stem in ("pama/coefficient", "pama/gain") for name in trained)
        assert "pama/gain/form" not in step and 1 <= step["turns"] <= 2
        assert step["is_filter_ratio"] == 1
        assert sum(step[f"pama/coefficient/{name}"] for name in trained) == pytest.approx(1, abs=1e-5)
        # vLLM and the trained policy agree on every token: the weights of each step did arrive, the tied head's too
        assert abs(step["vllm_kl"]) < 1e-3
    # The host ends a conversation whose turn is cut off by its length, as most are here.
    assert max(step["turns"] for step in run.steps) > 1
    assert run.steps[-1]["kl"] > 1e-4, "the policy did not move, so the agreement above shows nothing"
    assert (tmp_path / "model" / f"{'adapter_' if adapters else ''}model.safetensors").exists()

    assert "PAMA step 3/3  helpful " in run.output and "form 0 (monitor)" in run.output
    rollouts = read_rollouts(tmp_path / "logs")
    assert [rollout.step for rollout in rollouts] == [step for step in (1, 2, 3) for _ in range(8)]
    turns = [[who for turn in rollout.turns for who in turn] for rollout in rollouts]
    assert ["policy", "environment", "policy"] in turns
    for rollout in rollouts:
        assert set(rollout.rewards) == set(objectives) and None not in rollout.rewards.values()
        assert rollout.nats is not None and rollout.reference_nll > 0
    assert [abs(rollout.nats) < 1e-3 for rollout in rollouts[:8]] == [True] * 8, "the first step is the reference's"


def test_a_reward_that_raises_stops_the_run_with_its_name_and_step(run_host, tmp_path) -> None:
    (tmp_path / "rewards.py").write_text(
        "calls = 0\n\n\ndef fragile(queries, prompts, labels):\n"
        "    global calls\n    calls += 1\n"
        "    if calls > 16:\n        raise KeyError('no such label')\n    return [float(calls)]\n"
    )
    objective = ["--loss", "linear", "--pama.objective", f"fragile=py:{tmp_path}/rewards.py:fragile,isolate=false"]
    run = run_host(*GROUPS, *WITHOUT_REFERENCE, *objective, "--pama.probe", "off", steps=3)
    assert run.status != 0 and len(run.steps) == 1
    problem = f"KeyError: 'no such label' ({tmp_path}/rewards.py, line 8)"
    assert f"objective 'fragile' at step 2: {problem}; the run was stopped" in run.output
    assert "Response: '" in run.output
