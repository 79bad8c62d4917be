"""What rewards do in real life, on the path of a rollout: executor, host's samples, experience maker, policy gradient.

Every fault once under each policy: ``fail`` ends the run with the objective's name, ``mask`` and ``impute`` go on with
what is left, and no gradient is ever anything but a finite number.
"""

import asyncio
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faultserver import FaultServer, reward_of
from hosttools import BROKEN, as_reward_groups, host_args

from pama_plugin.errors import RewardError
from pama_plugin.settings.load import load_config
from pama_plugin.settings.run import PamaConfig

pytestmark = pytest.mark.contract

RESPONSES = 8
POLICIES = ("fail", "mask", "impute:0.25")


class Words:
    """A tokenizer of made-up tokens, each a word."""

    pad_token_id = 0

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{int(token)}" for token in tokens)


class Generation:
    """The host's executor, had it generated these."""

    async def execute(self, prompt: str, hf_tokenizer: Any, **_: Any) -> dict[str, Any]:
        index = int(prompt)
        tokens = list(range(3, 8 + index))  # of one length each
        return {
            "prompt": prompt,
            "label": "",
            "observation_tokens": tokens,
            "action_ranges": [(2, len(tokens))],
            "rollout_log_probs": None,
            "truncated": False,
            "reward": None,
            "scores": None,
            "extra_logs": {},
        }


def roll_out(config: PamaConfig, problems: dict[int, str] | None = None) -> list[Any]:
    """Samples as the host's generator has them from our executor, whose problems go into ``problems``."""
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    from pama_plugin.host.actors.rollout import ObjectiveExecutor

    async def generate() -> list[dict[str, Any]]:
        executor = ObjectiveExecutor(config, Generation())
        outputs = await asyncio.gather(
            *(executor.execute(prompt=str(index), hf_tokenizer=Words()) for index in range(RESPONSES))
        )
        if problems is not None:
            problems.update(executor.problems)
        return outputs

    generator = SamplesGenerator(SimpleNamespace(args=None), None, None, None, None)
    return [generator._process_response_into_experience(each) for each in asyncio.run(generate())]


def train_on(
    config: PamaConfig,
    groups: dict[str, Any],
    samples: list[Any],
    estimator: str,
    n_samples: int = 4,
    models: dict[str, Any] | None = None,
    engines: Sequence[Any] = (),
) -> tuple[Any, torch.Tensor]:
    """One batch through our experience maker and the host's loss: what it logs, and the policy's gradient."""
    from openrlhf.models import PolicyLoss

    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    flags = ("--rollout.micro_batch_size", "3", "--algo.advantage.estimator", estimator)
    args = host_args(*flags, "--rollout.n_samples_per_prompt", str(n_samples), "--algo.kl.init_coef", "0")
    args.pama = config
    strategy = SimpleNamespace(args=args)
    readers = as_reward_groups(config, models)
    parts = (groups["actor"], None, readers, None, SimpleNamespace(value=0.0), strategy, Words())
    maker = MultiObjectiveExperienceMaker(*parts, vllm_engines=engines)
    experiences = maker.make_experience_batch(samples)
    gradients = []
    for experience in experiences:
        log_probs = torch.zeros_like(experience.advantages, requires_grad=True)
        loss = PolicyLoss()(log_probs, torch.zeros_like(log_probs), experience.advantages, experience.action_mask)[0]
        loss.backward()
        gradients.append(log_probs.grad)
        assert log_probs.grad.isfinite().all()
    return maker, torch.cat([gradient.flatten() for gradient in gradients])


def column(samples: list[Any], name: str) -> list[float]:
    return [sample.info[f"reward/{name}"].item() for sample in samples]


def check(shaky: str, policy: str, groups: dict[str, Any], problem: str | None, failing: int = RESPONSES) -> None:
    """One row of the table: ``failing`` of the responses have no reward, for the reason ``problem``."""
    objectives = ["steady=builtin:length", f"shaky={shaky},on_failure={policy}"]
    config = load_config("linear", objectives, None, None, None, default_level="token")
    if problem is not None and policy == "fail":
        with pytest.raises(RewardError, match=f"(?s)objective 'shaky': .*{problem}"):
            roll_out(config)
        return
    samples = roll_out(config)
    rewards = torch.tensor(column(samples, "shaky"))
    assert int(rewards.isnan().sum()) == (0 if problem is None else failing) and not rewards.isinf().any()
    maker, gradient = train_on(config, groups, samples, "reinforce_baseline")
    assert gradient.abs().sum() > 0
    if problem is None:
        return
    assert maker.state.objectives["shaky"].rewards.count == RESPONSES - failing
    if failing == RESPONSES:  # masked, or the same number for all: as if it were not there
        alone = load_config("linear", objectives[:1], None, None, None, default_level="token")
        torch.testing.assert_close(gradient, train_on(alone, groups, roll_out(alone), "reinforce_baseline")[1])


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    from tenacity import wait_none

    from pama_plugin.rewards import server as client

    monkeypatch.setattr(client, "BACKOFF", wait_none())
    monkeypatch.setattr(client, "OPEN_SECONDS", 0.05)
    monkeypatch.setattr(client, "POLL_SECONDS", 0.01)


SERVERS = {
    "refuse": "ConnectError",
    "reset": "",
    "hang": "no complete reply within 0.3 s",
    "drip": "no complete reply within 0.3 s",
    "long": "longer than 1048576 bytes",
    "401": "HTTP 401",
    "429": "HTTP 429",
    "500": "HTTP 500",
    "502": "HTTP 502",
    "empty": "not JSON",
    "html": "not JSON",
    "wrong_length": "a list of one finite number",
    "null": r"returned None \(abstain=true",
    "nan": "a list of one finite number",
    "inf": "a list of one finite number",
    "-inf": "a list of one finite number",
    "string": "a list of one finite number",
    "huge": r"returned 1e\+300, more than 1e\+18",
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", SERVERS)
def test_a_server_that_fails(mode, policy, groups) -> None:
    with FaultServer(mode) as server:
        check(f"http:{server.url},timeout=0.3,retries=1", policy, groups, SERVERS[mode])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_server_that_recovers_in_time(policy, groups) -> None:
    with FaultServer("flaky", count=3) as server:
        check(f"http:{server.url},retries=4", policy, groups, None)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_server_that_dies_in_the_middle_of_a_step(policy, groups) -> None:
    with FaultServer("dying", count=3) as server:
        check(f"http:{server.url},retries=1,concurrency=1", policy, groups, "Error", failing=RESPONSES - 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replica_that_dies_and_comes_back(policy, groups) -> None:
    with FaultServer("refuse") as dead, FaultServer() as alive:
        location = f"http:{dead.url}|{alive.url},retries=2"
        check(location, policy, groups, None)
        assert alive.requests == RESPONSES and dead.requests == 0
        dead.mode = "ok"
        check(location, policy, groups, None)
        assert dead.requests > 0


FUNCTIONS = {
    "raises": ("raise KeyError('label')", "KeyError: 'label'"),
    "never returns": ("time.sleep(3600)", "no answer within 1 s"),
    "holds the interpreter": ("re.match(r'(a+)+$', 'a' * 60 + 'b')", "no answer within 1 s"),
    "crashes": ("os.kill(os.getpid(), 11)", "its process was ended by SIGSEGV"),
    "exits": ("sys.exit(1)", "SystemExit: 1"),
    "gives nothing": ("return None", "returned None"),
    "nan": ("return [math.nan]", "returned nan"),
    "inf": ("return torch.tensor([math.inf])", "returned inf"),
    "huge": ("return [1e300]", r"returned 1e\+300, more than 1e\+18"),
    "wrong length": ("return torch.zeros(1, 2)", "returned 2 rewards for 1 response"),
    "text": ("return ['0.5']", ""),
    "other dtypes": ("return torch.tensor([[float(len(queries[0]))]], dtype=torch.float16)", None),
    "integers": ("return torch.tensor(len(queries[0]))", None),
    "mutates": ("n = len(queries[0]); queries.clear(); prompts.append('x'); return [float(n)]", None),
    "prints": ("print('reward!', file=sys.stderr); return {'rewards': [float(len(queries[0]))]}", None),
}


ISOLATED = ("raises", "never returns", "holds the interpreter", "crashes", "exits", "integers")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_fails(name, policy, groups, tmp_path) -> None:
    body, problem = FUNCTIONS[name]
    libraries = "math, os, re, sys, time" + (", torch" if "torch" in body else "")
    (tmp_path / "rewards.py").write_text(f"import {libraries}\n\n\ndef f(queries, prompts, labels):\n    {body}\n")
    isolate = name in ISOLATED  # a process for each of the others would show nothing more
    check(f"py:{tmp_path}/rewards.py:f,timeout=1,concurrency=8,isolate={isolate}", policy, groups, problem)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_reward_outside_its_range(policy, groups) -> None:
    """Lengths are 3 … 10: one is too short, one too long."""
    check("builtin:length,range=4:9", policy, groups, "outside range=4:9", failing=2)


class ShakyReader:
    """A group of the kind hf whose model fails as that of ``groups["shaky"]`` does."""

    def request(self, conversations: list[Any], *, one_by_one: bool) -> Any:
        return SimpleNamespace(seconds=lambda: 0.1, reasons={3: "ValueError: System role not supported"})

    def collect(self, _: Any, sizes: list[int]) -> list[torch.Tensor]:
        rewards = [BROKEN.get((5 + index) % 8, 0.5 * index) for index in range(sum(sizes))]
        return list(torch.tensor(rewards).split(sizes))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["rm", "hf"])
def test_a_model_that_gives_no_number(kind, policy, groups, monkeypatch, caplog) -> None:
    from pama_plugin.host.actors import conversations

    monkeypatch.setattr(conversations, "Conversations", lambda *_: SimpleNamespace(of=lambda _: [*range(RESPONSES)]))
    objectives = ["steady=builtin:length", f"shaky={kind}:org/model,on_failure={policy}"]
    config = load_config("linear", objectives, None, None, None, probe="off", default_level="token")
    models = {"shaky": groups["shaky"] if kind == "rm" else ShakyReader()}
    if policy == "fail":
        reason = "returned nan" if kind == "rm" else "ValueError: System role not supported"
        with pytest.raises(RewardError, match=f"objective 'shaky': {reason}; the run was stopped"):
            train_on(config, groups, roll_out(config), "reinforce_baseline", models=models)
        return
    maker, gradient = train_on(config, groups, roll_out(config), "reinforce_baseline", models=models)
    assert gradient.abs().sum() > 0
    assert maker.state.objectives["shaky"].rewards.count == RESPONSES / 2
    assert ("1 of 8 rewards are missing; the first: ValueError: System role" in caplog.text) == (kind == "hf")


def test_what_is_imputed_is_trained_on_and_what_is_masked_is_not(groups) -> None:
    advantages = {}
    for policy in ("mask", "impute:5", "impute:mean"):
        objectives = ["a=builtin:length", f"b=builtin:length,scale=2,range=0:3.5,on_failure={policy}"]
        config = load_config("linear", objectives, None, None, None, default_level="token")
        samples = roll_out(config)
        maker, advantages[policy] = train_on(config, groups, samples, "reinforce")
        assert maker.state.objectives["b"].rewards.mean == pytest.approx(sum([3, 4, 5, 6, 7]) / 2 / 5)
        assert maker.state.objectives["b"].rewards.count == 5, "nothing imputed is measured"
    assert len({tuple(gradient.tolist()) for gradient in advantages.values()}) == 3


def test_the_others_are_whitened_without_who_has_no_reward(groups) -> None:
    """Advantages of the responses with a reward are what they would be in a batch of those alone."""
    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    objectives = ["b=builtin:length,range=0:7,on_failure=mask"]
    flags = ("--rollout.micro_batch_size", "8", "--algo.advantage.estimator", "reinforce", "--algo.kl.init_coef", "0")
    args = host_args(*flags)
    args.pama = load_config("linear", objectives, None, None, None, default_level="token")

    def advantages(samples: list[Any]) -> torch.Tensor:
        parts = (groups["actor"], None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=args), Words())
        (found,) = MultiObjectiveExperienceMaker(*parts).make_experience_batch(samples)
        rows_B = found.info["reward/b"].isfinite()
        assert (found.advantages[~rows_B][found.action_mask[~rows_B].bool()] == 0).all()
        return found.advantages[rows_B][found.action_mask[rows_B].bool()]

    samples = roll_out(args.pama)
    alone = [sample for sample in roll_out(args.pama) if sample.info["reward/b"].isfinite()]
    torch.testing.assert_close(advantages(samples), advantages(alone))


@pytest.mark.parametrize("given", ["0:7", "900:901"], ids=["some", "none"])
def test_the_value_head_learns_nothing_from_who_has_no_reward(given, groups) -> None:
    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    flags = ("--rollout.micro_batch_size", "3", "--algo.advantage.estimator", "gae", "--algo.kl.init_coef", "0")
    args = host_args(*flags)
    objectives = [f"a=builtin:length,range={given},on_failure=mask"]
    args.pama = load_config("linear", objectives, None, None, None, default_level="token")
    parts = (groups["actor"], groups["critic"], None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=args))
    maker = MultiObjectiveExperienceMaker(*parts, Words())
    for experience in maker.make_experience_batch(roll_out(args.pama)):
        masked_B = experience.info["reward/a"].isnan()
        assert torch.equal(experience.returns[masked_B], experience.values[masked_B])
        assert experience.returns.isfinite().all() and experience.advantages.isfinite().all()
        mask_BA = experience.action_mask.bool()
        assert (experience.advantages[masked_B][mask_BA[masked_B]] == 0).all()
        assert not torch.equal(experience.returns[~masked_B], experience.values[~masked_B]) or masked_B.all()


def test_too_many_failures_end_the_run(groups) -> None:
    def run(ceiling: float) -> None:
        shaky = f"b=builtin:length,range=0:7,on_failure=mask,max_failures={ceiling}"
        config = load_config("pama", ["a=builtin:length", shaky], None, None, None, default_level="token")
        train_on(config, groups, roll_out(config), "reinforce")

    run(0.375)
    with pytest.raises(RewardError, match="'b': 3 of 8 responses .*, more than max_failures=0.25; 3 of them:"):
        run(0.25)


def test_too_many_failures_say_what_most_of_them_were(groups) -> None:
    """The reason comes from the engine that scored: a column carries its number alone."""
    import ray

    with FaultServer("502") as server:
        objectives = ["a=builtin:length", f"judge=http:{server.url},retries=0,on_failure=mask,max_failures=0.5"]
        config = load_config("pama", objectives, None, None, None, default_level="token")
        samples = roll_out(config, problems := {})
    remote = SimpleNamespace(remote=lambda codes: ray.put({code: problems[code] for code in codes}))
    with pytest.raises(RewardError, match="8 of 8 responses .*max_failures=0.5; 8 of them: .*502"):
        train_on(config, groups, samples, "reinforce", engines=[SimpleNamespace(problems=remote)])


def test_a_reward_at_its_bound_is_judged_once_in_the_precision_it_was_made_in(groups) -> None:
    """0.3 is no float32: as one it lies above 0.3."""
    for bounds in ("max=0.3,range=0:0.3", "max=0.1,range=0:0.1", "min=0.7,max=0.7,range=0.7:1"):
        objectives = [f"a=builtin:length,scale=10,{bounds}", "b=builtin:length"]
        config = load_config("pama", objectives, None, None, None, default_level="token")
        maker, _ = train_on(config, groups, roll_out(config), "reinforce")
        assert maker.state.objectives["a"].rewards.count == RESPONSES


def test_a_dead_server_does_not_fill_the_log(caplog, groups) -> None:
    with FaultServer("500") as server:
        objectives = ["a=builtin:length", f"judge=http:{server.url},retries=0,on_failure=mask"]
        roll_out(load_config("pama", objectives, None, None, None, default_level="token"))
    counts = [record.args[1] for record in caplog.records if "without a reward" in record.message]
    assert counts == [1, 2, 4, 8]


def test_the_server_gets_what_the_host_sends(groups) -> None:
    with FaultServer() as server:
        config = load_config("pama", [f"judge=http:{server.url}"], None, None, None, default_level="token")
        samples = roll_out(config)
        queries = [body["query"][0] for body in server.bodies]
        assert sorted(column(samples, "judge")) == pytest.approx(sorted(map(reward_of, queries)))
        assert {"query": ["w3 w4 w5 w6 w7"], "prompts": ["0"], "labels": [""]} in server.bodies
        assert all(math.isfinite(sample.info["seconds/judge"].item()) for sample in samples)
