"""Reward models with a tokenizer of their own: what they are given of a rollout, and where they run."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from hosttools import host_args, make_rollout, parse_host_flags

from pama_plugin.host.preflight.placement import make_plan
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract


class Letters:
    """The policy's tokenizer: a token is a letter, 1 ends a text."""

    pad_token_id = 0
    all_special_tokens = ["<user>", "<assistant>"]

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(96 + int(token)) for token in tokens if not (skip_special_tokens and int(token) == 1))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def conversations(tmp_path, *flags: str, prompts: list[str], rows: list[dict] | None = None):
    from openrlhf.trainer.ppo_utils.experience import Experience

    from pama_plugin.host.actors.conversations import Conversations

    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows or []))
    args = host_args("--data.prompt_dataset", f"{tmp_path}/prompts.jsonl", "--data.input_key", "prompt", *flags)
    strategy = SimpleNamespace(args=args, print=print, is_rank_0=lambda: True)
    rollout = make_rollout(len(prompts), seed=3)
    for sample, prompt in zip(rollout, prompts):
        sample.prompts = [prompt]
    texts = []
    for sample in rollout:
        response = sample.sequences[0, int(sample.action_mask[0].nonzero()[0]) + 1 :]
        texts.append(Letters().decode(response, skip_special_tokens=True))
    batch = Experience.concat_experiences(rollout, 0)
    return Conversations(strategy, Letters()).of([batch]), texts


def test_a_prompt_without_a_template_is_one_message_and_padding_is_no_response(tmp_path) -> None:
    found, texts = conversations(tmp_path, prompts=["Hello", "Good day", "Hi"])
    assert [list(own.messages) for own in found] == [
        [{"role": "user", "content": text}] for text in ("Hello", "Good day", "Hi")
    ]
    assert [own.response for own in found] == texts


def test_prompts_that_hold_the_policys_template_give_a_warning(tmp_path, caplog) -> None:
    conversations(tmp_path, prompts=["<user>Hello<assistant>", "<user>Hi<assistant>", "Hi"])
    (warning,) = [record.getMessage() for record in caplog.records if "template" in record.getMessage()]
    assert "<user>, <assistant>" in warning and "--data.apply_chat_template" in warning and "text=full" in warning


@pytest.mark.parametrize(
    "content", ["What now?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]]
)
def test_the_policys_chat_template_is_taken_back(tmp_path, content) -> None:
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    prompt = Letters().apply_chat_template(messages, False, True)
    rows = [{"prompt": content}]
    (found,), _ = conversations(tmp_path, "--data.apply_chat_template", prompts=[prompt], rows=rows)
    assert list(found.messages) == messages


def test_an_input_template_is_taken_back(tmp_path) -> None:
    flags = ("--data.input_template", "Human: {}\nAssistant: ")
    (found,), _ = conversations(tmp_path, *flags, prompts=["Human: Why?\nAssistant: "], rows=[{"prompt": "Why?"}])
    assert list(found.messages) == [{"role": "user", "content": "Why?"}]


def plan(*objectives: str, flags: tuple[str, ...] = ()):
    sizes = [word for group in ("actor", "ref", "reward") for word in (f"--{group}.num_gpus_per_node", "2")]
    config = load_config("pama", objectives, None, None, None, default_level="token")
    args = parse_host_flags(*sizes, "--vllm.num_engines", "2", "--algo.advantage.estimator", "reinforce", *flags)
    return config, make_plan(args, config)


def test_replicas_take_gpus_of_their_own_shares_of_one_or_none() -> None:
    _, found = plan(
        "a=hf:org/a,replicas=3", "b=hf:org/b,gpus=0.25,replicas=2", "c=hf:org/c,gpus=0.5", "d=hf:org/d,gpus=0"
    )
    blocks = {role.name: (block.gpus, role.share) for block in found.blocks for role in block.roles}
    assert blocks["reward/a"] == (3, 1) and blocks["reward/d"] == (0, 0)
    assert blocks["reward/b"] == (1, 0.25) and blocks["reward/c"] == (1, 0.5)
    assert found.gpus == 2 + 2 + 2 + 3 + 1


def test_colocated_they_split_the_share_of_one_reward_model() -> None:
    _, found = plan("a=hf:org/a", "b=rm:org/b", "c=hf:org/c,gpus=0", flags=("--train.colocate_all",))
    shares = {role.name: role.share for block in found.blocks for role in block.roles}
    assert (shares["reward/a"], shares["reward/b"], shares["reward/c"]) == (0.1, 0.1, 0)
    assert found.gpus == 2


def test_replicas_that_do_not_fit_a_gpu_are_refused() -> None:
    from pama_plugin.errors import ConfigError

    with pytest.raises(ConfigError, match="replicas × gpus.*at most 1, found 3 × 0.5"):
        plan("a=hf:org/a,gpus=0.5,replicas=3")


@pytest.mark.parametrize(("count", "threads"), [(1, [8]), (3, [2]), (99, [1])])
def test_replicas_on_the_cpu_share_its_cores(count, threads, monkeypatch) -> None:
    """Without a word of ours each would have one thread."""
    from pama_plugin.host.actors import replicas
    from pama_plugin.settings.objective import parse_objective
    from pama_plugin.settings.source import group_by_source

    seen: list[int] = []
    monkeypatch.setattr("pama_plugin.rewards.hf.HfScorer", lambda *_: None)
    monkeypatch.setattr(replicas.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    (source,) = group_by_source([parse_objective(f"a=hf:org/a,gpus=0,replicas={count}")])
    replicas.Replica(source)
    assert seen == threads
    (source,) = group_by_source([parse_objective("a=hf:org/a,gpus=1,timeout=7")])
    assert replicas.Replica(source).timeout == 7
    assert seen == threads


@pytest.mark.parametrize(("replicas", "gpus"), [(2, "0.5"), pytest.param(3, "0", marks=pytest.mark.e2e)])
def test_every_response_gets_its_own_reward_whatever_the_number_of_replicas(
    replicas, gpus, local_ray, monkeypatch
) -> None:
    import ray

    from pama_plugin.host.actors.replicas import Replica
    from pama_plugin.host.actors.reward_groups import group_builder
    from pama_plugin.rewards.hf import Conversation, HfScorer

    class Length(HfScorer):  # local, as all that follows: it travels by value
        def __init__(self): ...

        def score(self, conversations):
            if any(own.response == "bad" for own in conversations):
                raise ValueError("Conversation roles must alternate")
            if any(own.response == "endless" for own in conversations):
                time.sleep(1000)
            return [float(len(own.response)) for own in conversations]

    class Stub(Replica):
        timeout = 2

        def __init__(self, source):
            self.model = Length()

    monkeypatch.setattr("pama_plugin.host.actors.replicas.Replica", Stub)
    config, own = plan(f"a=hf:org/a,replicas={replicas},gpus={gpus}")
    actor = object()
    build = group_builder(config, own, None, reward_actor=actor, policy_actor=None)
    groups = build(1, 1, actor, pg=None, num_gpus_per_actor=1, duplicate_actors=1)
    ray.get(groups.async_init_model_from_pretrained(None, "org/a"), timeout=120)
    group = groups.groups["a"]
    texts = ["x" * length for length in (3, 1, 4, 1, 5, 9, 2)]
    for one_by_one in (True, False):
        pending = group.request([Conversation([], text) for text in texts], one_by_one=one_by_one)
        rewards = [part.tolist() for part in group.collect(pending, [4, 3])]
        assert rewards == [[3, 1, 4, 1], [5, 9, 2]] and len(group.replicas) == replicas
        assert 0 < pending.seconds() < 60

    # One that a template cannot take costs its own reward alone; a dead replica those of its share.
    texts[2] = "bad"
    pending = group.request([Conversation([], text) for text in texts], one_by_one=False)
    (rewards,) = group.collect(pending, [len(texts)])
    assert torch.equal(rewards.isnan(), torch.tensor([text == "bad" for text in texts]))
    assert pending.reasons == {2: "ValueError: Conversation roles must alternate"}

    # One that does not return costs the rewards of its call alone.
    group.chunk = 2
    pending = group.request([Conversation([], text) for text in ["endless", *texts[3:]]], one_by_one=gpus == "0.5")
    (rewards,) = group.collect(pending, [5])
    assert rewards.isnan().tolist() == [True, True, False, False, False] and pending.seconds() < 60
    assert all("took longer than timeout=600 s" in pending.reasons[index] for index in (0, 1))
    (rewards,) = group.collect(group.request([Conversation([], text) for text in texts[3:]], one_by_one=False), [4])
    assert rewards.tolist() == [1, 5, 9, 2]

    for replica in group.replicas:
        ray.kill(replica)
        with pytest.raises(ray.exceptions.RayActorError):
            while True:
                ray.get(replica.ready.remote())
    pending = group.request([Conversation([], "x")], one_by_one=False)
    (rewards,) = group.collect(pending, [1])
    assert rewards.isnan().all() and "its replica died, or took longer" in pending.reasons[0]


def test_objectives_of_one_model_share_its_replicas_and_its_gpu(local_ray, monkeypatch) -> None:
    """Each gets its own label, of the responses to which it applies; a text that one model cannot read has neither."""
    import ray

    from pama_plugin.host.actors.prompts import with_columns
    from pama_plugin.host.actors.replicas import Replica
    from pama_plugin.host.actors.reward_groups import group_builder
    from pama_plugin.rewards.hf import HfScorer

    class Labels(HfScorer):  # local, as all that follows: it travels by value
        def __init__(self, labels):
            self.labels = labels

        def score(self, conversations):
            if any("bad" in own.response for own in conversations):
                raise ValueError("no template")
            return [[len(own.response) + 100.0 * label for label in self.labels] for own in conversations]

    class Stub(Replica):
        timeout = 60

        def __init__(self, source):
            self.model = Labels(source.picked)

    monkeypatch.setattr("pama_plugin.host.actors.replicas.Replica", Stub)
    shared = "hf:org/a,gpus=0.5,replicas=2"
    texts = [f"a={shared},label=1,when=task:x", f"c={shared},label=2,when=task:y|x", "d=hf:org/other,gpus=0"]
    config, own = plan(*texts)
    assert {role.name for block in own.blocks for role in block.roles} >= {"reward/a", "reward/d"}
    assert "reward/c" not in {role.name for block in own.blocks for role in block.roles}
    actor = object()
    groups = group_builder(config, own, None, reward_actor=actor, policy_actor=None)(
        1, 1, actor, pg=None, num_gpus_per_actor=1, duplicate_actors=1
    )
    assert groups.groups["a"] is groups.groups["c"] is not groups.groups["d"] and len(groups.groups["a"].replicas) == 2
    assert len(groups.async_init_model_from_pretrained(None, "org/a")) == 3

    from pama_plugin.host.actors.collector import RewardCollector

    args = host_args("--rollout.micro_batch_size", "3")
    args.pama = load_config("linear", texts[:2], None, None, None, default_level="token")
    collector = RewardCollector(SimpleNamespace(args=args), Letters(), groups.groups, [])
    rollout = make_rollout(4, seed=3)
    for sample, task in zip(rollout, ("x", "y", "z", "x")):
        sample.prompts = [with_columns("Hello", {"task": task})]
    table = collector.score(rollout)
    lengths = [len(own.response) for own in collector.conversations.of(rollout)]
    assert table.row("a").nan_to_num(-1).tolist() == [lengths[0] + 100, -1, -1, lengths[3] + 100]
    assert table.row("c").nan_to_num(-1).tolist() == [lengths[0] + 200, lengths[1] + 200, -1, lengths[3] + 200]
    assert table.problems == {}
    for replica in groups.groups["a"].replicas:
        ray.kill(replica)
