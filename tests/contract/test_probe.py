"""The start-up probe: it finds what is broken, shows what is really seen, and ends the run only when told to."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosttools import as_reward_groups, host_args, make_rollout

from pama_plugin.errors import ProbeError
from pama_plugin.rewards.probes import PAIRS, judge
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

COUNT = sum(len(pairs) for pairs in PAIRS.values())


def test_a_reward_that_is_fine_has_no_findings() -> None:
    assert judge([1.0] * COUNT, [0.0] * COUNT, aspect="helpful", learned=True) == []


@pytest.mark.parametrize("aspect", PAIRS)
def test_a_reward_with_the_wrong_sign_is_found_in_its_own_pairs_alone(aspect) -> None:
    good, bad = [], []
    for name, pairs in PAIRS.items():
        good += [0.0 if name == aspect else 1.0] * len(pairs)
        bad += [1.0 if name == aspect else 0.0] * len(pairs)
    (finding,) = judge(good, bad, aspect=aspect, learned=True)
    assert finding.certain and f"2 of 2 bad {aspect} responses as high as the good one" in finding.text
    assert all(judge(good, bad, aspect=other, learned=True) == [] for other in PAIRS if other != aspect)


def test_a_constant_is_certain_of_a_model_only() -> None:
    for learned in (True, False):
        (finding,) = judge([0.5] * COUNT, [0.5] * COUNT, aspect=None, learned=learned)
        assert finding.text == f"gives 0.5 to all {2 * COUNT} texts" and finding.certain == learned
    (finding,) = judge([float("nan")] * COUNT, [0.5] * COUNT, aspect=None, learned=False)
    assert finding.text == f"gives no number to {COUNT} of {2 * COUNT} texts" and finding.certain


class Letters:
    """A tokenizer of letters."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(int(token)) for token in tokens)


def maker(groups: dict[str, Any], mode: str, *objectives: str) -> Any:
    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    args = host_args("--algo.advantage.estimator", "reinforce", "--rollout.micro_batch_size", "5")
    args.pama = load_config("pama", objectives, None, None, None, None, mode, default_level="token")
    rewards = as_reward_groups(args.pama, groups)
    strategy = SimpleNamespace(args=args)
    parts = (groups["actor"], None, rewards, None, SimpleNamespace(value=0.0), strategy)
    return MultiObjectiveExperienceMaker(*parts, Letters(), vllm_engines=[Rollouts(args.pama)])


class Rollouts:
    """The engine's side, in this process."""

    def __init__(self, config: Any) -> None:
        from pama_plugin.host.actors.rollout import ObjectiveExecutor

        self.executor = ObjectiveExecutor(config, None)
        self.score_texts = SimpleNamespace(remote=self._score)

    def _score(self, responses: Any, names: list[str]) -> Any:
        import asyncio

        import ray

        return ray.put(asyncio.run(self.executor.score_texts(responses, names)))


def probe(groups: dict[str, Any], mode: str, *objectives: str) -> None:
    from pama_plugin.host.actors.probe import probe_pairs

    probe_pairs(maker(groups, mode, *objectives).collector)


def test_every_kind_is_asked_and_what_it_sees_is_shown(groups, capsys) -> None:
    probe(groups, "strict", "helpful=rm:org/a", "words=builtin:length,unit=words", "own=agent:style")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"PAMA probe: {COUNT} pairs of a good and a bad response"
    assert [line.partition(":")[0] for line in lines] == ["helpful", "words", "own"]
    assert lines[0].endswith("\\x01'")  # the tail in the policy's tokens, end-of-sequence last
    assert lines[2] == "own: not probed, the agent scores it"


def test_a_reward_that_reads_labels_is_not_called_without_them(groups, tmp_path, capsys) -> None:
    from pama_plugin.host.actors.probe import probe_pairs

    (tmp_path / "rewards.py").write_text("def f(queries, prompts, labels):\n    raise SystemExit('called')\n")
    ours = maker(groups, "strict", f"right=py:{tmp_path}/rewards.py:f", "words=builtin:length,unit=words")
    ours.args.data.label_key = "answer"
    probe_pairs(ours.collector)
    output = capsys.readouterr()
    assert "right: not probed, it may read the labels" in output.out and "called" not in output.out + output.err


BROKEN = {
    "raises": ("raise KeyError('x')", f"gives no number to {2 * COUNT} of {2 * COUNT} texts"),
    "wrong sign": ("return [-float('wonderful' in queries[0] or 'Excellent' in queries[0])]", "2 of 2 bad sentiment"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_strict_ends_the_run_and_warn_does_not(name, groups, tmp_path, capsys) -> None:
    body, text = BROKEN[name]
    (tmp_path / "rewards.py").write_text(f"def f(queries, prompts, labels):\n    {body}\n")
    reward = f"own=py:{tmp_path}/rewards.py:f,probe=sentiment"
    with pytest.raises(ProbeError, match=f"in the probe 'own' .*{text}"):
        probe(groups, "strict", reward)
    assert "own: good" in capsys.readouterr().out, "the table comes first"
    probe(groups, "warn", reward)
    probe(groups, "strict", "fine=builtin:length", *([f"{reward},on_failure=mask"] if name == "raises" else []))


def test_the_first_rollout_is_looked_at_before_it_is_trained_on(groups) -> None:
    objectives = ("helpful=rm:org/a", "harmless=rm:org/b")
    fine = maker(groups, "strict", *objectives)
    fine.make_experience_batch(make_rollout(4))
    assert not fine.unprobed

    constant = maker(groups, "strict", *objectives)
    group = constant.collector.groups["helpful"]
    group.collect = lambda pending, sizes: [torch.ones(size) for size in sizes]
    with pytest.raises(ProbeError, match="in the first rollout 'helpful' gives 1 to all 4 texts"):
        constant.make_experience_batch(make_rollout(4))


def test_an_objective_is_looked_at_in_the_first_rollout_to_which_it_applies(groups) -> None:
    from pama_plugin.host.actors.prompts import with_columns

    late = maker(groups, "strict", "helpful=rm:org/a,when=task:late", "harmless=rm:org/b")
    group = late.collector.groups["helpful"]
    group.collect = lambda pending, sizes: [torch.ones(size) for size in sizes]

    def rollout(task: str):
        samples = make_rollout(4)
        for sample in samples:
            sample.prompts = [with_columns(sample.prompts[0], {"task": task})]
        return samples

    late.make_experience_batch(rollout("early"))
    assert late.unprobed == {"helpful"}
    with pytest.raises(ProbeError, match="'helpful' gives 1 to all 4 texts"):
        late.make_experience_batch(rollout("late"))


def test_a_reward_that_applies_to_no_text_of_its_aspect_does_not_rank_it(groups, tmp_path) -> None:
    (tmp_path / "rewards.py").write_text("def f(queries, prompts, labels):\n    return None\n")
    with pytest.raises(ProbeError, match="'own' rates 2 of 2 bad sentiment responses as high as the good one"):
        probe(groups, "strict", f"own=py:{tmp_path}/rewards.py:f,probe=sentiment,abstain=true")
    probe(groups, "strict", f"own=py:{tmp_path}/rewards.py:f,abstain=true")
