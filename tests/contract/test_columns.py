"""Columns of the data set on their way through OpenRLHF, and objectives that apply to some prompts."""

import asyncio
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from faultserver import FaultServer
from hosttools import as_reward_groups, host_args, make_rollout, parse_host_flags

from pama_plugin.batch.metrics import reduce_columns
from pama_plugin.errors import ConfigError, PamaError, RewardError
from pama_plugin.rewards import Response
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

ROWS = [
    {"prompt": "2 + 2?", "answer": "4", "datasource": "math", "risky": False},
    {"prompt": "Hello", "answer": "Hi", "datasource": "chat", "risky": True},
    {"prompt": "3 + 3?", "answer": "6", "datasource": "math", "risky": True},
]


def config_of(*objectives: str, loss: str = "linear"):
    return load_config(loss, objectives, None, None, None, log_rollouts="all", default_level="token")


def write(path, rows=ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- before Ray starts


def check(tmp_path, *objectives: str, flags: tuple[str, ...] = (), rows=ROWS) -> None:
    from pama_plugin.host.preflight.columns import check_columns

    data = ("--data.prompt_dataset", write(tmp_path / "prompts.jsonl", rows), "--data.input_key", "prompt")
    check_columns(parse_host_flags(*data, *flags), config_of(*objectives))


@pytest.mark.parametrize("when", ["datasource:math", "datasource:math|chat", "risky:true", "answer:4"])
def test_a_condition_that_holds_for_a_prompt_is_fine(when, tmp_path) -> None:
    check(tmp_path, f"x=builtin:length,when={when}")


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("datasource:maths", r"'x': when=datasource:maths must name values of datasource, which has chat, math; no"),
        ("datasource:math|code", "no prompt has code"),
        ("risky:yes", "which has false, true"),
        ("task:math", r"'x': --data.prompt_dataset must have the column task, found prompt, answer, datasource"),
    ],
)
def test_a_column_or_value_that_is_not_there_is_refused(when, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, f"x=builtin:length,when={when}")


def test_a_data_set_without_datasource_has_the_default(tmp_path) -> None:
    rows = [{"prompt": "Hello"}]
    check(tmp_path, "x=builtin:length,when=datasource:default", rows=rows)
    with pytest.raises(ConfigError, match="which has default; no prompt has math"):
        check(tmp_path, "x=builtin:length,when=datasource:math", rows=rows)


def test_each_of_several_data_sets_must_have_the_columns(tmp_path) -> None:
    """OpenRLHF concatenates them, and fills what one of them lacks with None."""
    from pama_plugin.host.preflight.columns import check_columns

    one = write(tmp_path / "one.jsonl", [{"prompt": "Hello"}])
    both = f"{one},{write(tmp_path / 'two.jsonl')}"
    args = parse_host_flags("--data.prompt_dataset", both, "--data.input_key", "prompt")
    assert check_columns(args, config_of("x=builtin:length,when=datasource:default|math")) == []
    with pytest.raises(ConfigError, match="must have the column answer, found prompt"):
        check_columns(args, config_of("x=http:http://localhost/,columns=answer"))
    args.use_ms = True
    (warning,) = check_columns(args, config_of("x=http:http://localhost/,columns=answer"))
    assert "not checked whether the data sets have what is needed for answer" in warning


def test_a_rubric_with_a_label_needs_labels(tmp_path) -> None:
    from pama_plugin.host.preflight.flags import check_flags

    (tmp_path / "rubric.txt").write_text("{response} is {label}")
    config = config_of(f"x=judge:http://localhost/v1,model=m,rubric={tmp_path}/rubric.txt")
    check_flags(parse_host_flags("--data.label_key", "answer"), config)
    with pytest.raises(ConfigError, match="--data.label_key must name the column .*rubric of 'x'.*found none"):
        check_flags(parse_host_flags(), config)


def test_held_out_prompts_must_have_the_columns_too(tmp_path) -> None:
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": "Hello", "datasource": "chat"}])
    flags = ("--eval.dataset", held_out)
    check(tmp_path, "x=builtin:length,when=datasource:math", flags=flags)
    with pytest.raises(ConfigError, match="--eval.dataset must have the column answer"):
        check(tmp_path, "x=builtin:length,when=answer:4", flags=flags)


def test_of_many_values_some_are_shown_and_the_data_is_read_as_far_as_the_run_reads_it(tmp_path) -> None:
    rows = [{"prompt": f"{index}", "task": f"t{index:02}"} for index in range(40)]
    with pytest.raises(ConfigError, match=r"which has t00, .*t11 and 28 others; no prompt has no$"):
        check(tmp_path, "x=builtin:length,when=task:no", rows=rows)
    with pytest.raises(ConfigError, match="which has t00, t01; no prompt has t02"):
        check(tmp_path, "x=builtin:length,when=task:t02", rows=rows, flags=("--data.max_samples", "2"))


def test_a_data_set_that_cannot_be_read_is_named(tmp_path) -> None:
    from pama_plugin.host.preflight.columns import check_columns

    args = parse_host_flags("--data.prompt_dataset", f"{tmp_path}/none.jsonl")
    with pytest.raises(ConfigError, match=r"cannot read the data set .*none.jsonl"):
        check_columns(args, config_of("x=builtin:length,when=task:a"))
    check_columns(args, config_of("x=builtin:length"))  # is not read for nothing


@pytest.mark.parametrize(
    ("objectives", "by", "problem"),
    [
        (["x=builtin:length,when=task:a"], "x", "must be an objective that applies to every prompt, or sum, found x"),
        (["x=py:{f},abstain=true"], "x", "must be an objective that applies to every prompt"),
        (["x=builtin:length,when=task:a", "y=builtin:length"], "sum", None),
        (["x=builtin:length,when=task:a", "y=builtin:length"], "y", None),
    ],
)
def test_prompts_are_filtered_by_what_applies_to_all(objectives, by, problem, tmp_path) -> None:
    from pama_plugin.host.preflight.flags import check_flags

    (tmp_path / "f.py").write_text("def f(queries, prompts, labels):\n    return None\n")
    flags = ("--algo.dynamic_filtering_enable", "--algo.dynamic_filtering_range", "0", "9")
    flags += ("--rollout.n_samples_per_prompt", "2")
    texts = [text.format(f=f"{tmp_path}/f.py:f") for text in objectives]
    config = load_config("linear", texts, None, None, None, filter_by=by, default_level="token")
    if problem is None:
        check_flags(parse_host_flags(*flags), config)
    else:
        with pytest.raises(ConfigError, match=problem):
            check_flags(parse_host_flags(*flags), config)


def test_a_sum_rates_a_response_by_what_applies_to_it() -> None:
    texts = ["x=builtin:length,when=task:a,weight=2", "y=builtin:length"]
    config = load_config("linear", texts, None, None, None, filter_by="sum", default_level="token")
    assert config.rate({"x": 1.0, "y": 3.0}, 0) == 5 and config.rate({"y": 3.0}, 0) == 3 and config.rate({}, 0) == 0


# ---- through OpenRLHF's data loader


def test_prompts_carry_their_columns_through_the_data_loader_and_pickle(tmp_path, monkeypatch) -> None:
    from openrlhf.trainer import ppo_trainer

    from pama_plugin.host.actors.dataset import read_columns
    from pama_plugin.host.actors.prompts import columns_of

    class Strategy(SimpleNamespace):
        def setup_dataloader(self, dataset, batch_size, pin_memory, shuffle, collate_fn, num_workers):
            return torch.utils.data.DataLoader(dataset, batch_size, collate_fn=collate_fn)

    stock = ppo_trainer.PromptDataset
    monkeypatch.setattr(ppo_trainer, "PromptDataset", stock)
    path = write(tmp_path / "prompts.jsonl")
    args = host_args("--data.prompt_dataset", path, "--eval.dataset", path, "--data.input_key", "prompt")
    strategy = Strategy(args=args, print=print, is_rank_0=lambda: True)
    args.pama = config_of("x=builtin:length")
    read_columns(strategy)
    assert ppo_trainer.PromptDataset is stock, "nothing changes where no objective needs a column"

    args.pama = config_of("x=builtin:length,when=datasource:math", "y=http:http://localhost/,columns=answer")
    read_columns(strategy)
    for loader in ppo_trainer.prepare_datasets(strategy, None)[:2]:
        rows = [(names[0], pickle.loads(pickle.dumps(prompts[0]))) for names, prompts, *_ in loader]
        assert [str(prompt) for _, prompt in rows] == [row["prompt"] for row in ROWS]
        for row, (name, prompt) in zip(ROWS, rows):
            assert columns_of(prompt) == {"datasource": row["datasource"], "answer": row["answer"]}
            assert name == row["datasource"]
    with pytest.raises(PamaError, match="'Hello' has lost the columns"):
        columns_of("Hello")


def test_a_data_set_without_a_source_beside_one_that_has_it_is_the_default(monkeypatch) -> None:
    """OpenRLHF's concatenation has None there."""
    from pama_plugin.host.actors.dataset import PromptsWithColumns

    args = host_args("--data.input_key", "prompt")
    args.pama = config_of("x=builtin:length,when=datasource:default")
    rows = [{"prompt": "a", "datasource": None}, {"prompt": "b", "datasource": "math"}]
    data = PromptsWithColumns(rows, None, SimpleNamespace(args=args, is_rank_0=lambda: True))
    assert [prompt.columns["datasource"] for prompt in data.prompts] == ["default", "math"]


@pytest.mark.parametrize("name", ["trainer.PPOTrainer", "trainer_async.GenerateSamplesActor"])
def test_both_trainers_read_the_columns_before_they_make_their_data_sets(name, monkeypatch) -> None:
    import pkgutil

    from openrlhf.trainer import ppo_trainer

    from pama_plugin.host.actors import trainer
    from pama_plugin.host.actors.dataset import PromptsWithColumns

    monkeypatch.setattr(ppo_trainer, "PromptDataset", ppo_trainer.PromptDataset)
    kind = pkgutil.resolve_name(f"pama_plugin.host.actors.{name}").__ray_metadata__.modified_class
    args = host_args()
    args.pama = config_of("x=builtin:length,when=datasource:math")

    class Made(Exception):
        pass

    def init(self, *_, **__):
        raise Made

    base = trainer.MultiObjectiveTrainer if name.endswith("PPOTrainer") else kind.__mro__[1]
    monkeypatch.setattr(base, "__init__", init)
    with pytest.raises(Made):
        kind("policy", SimpleNamespace(args=args))
    assert ppo_trainer.PromptDataset is PromptsWithColumns


# ---- in the rollout


class Tokenizer:
    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(map(str, tokens))


class Base:
    """In the place of OpenRLHF's executor, or of the user's agent."""

    def __init__(self, extra_logs=(), **output):
        self.extra_logs, self.output = dict(extra_logs), output

    async def execute(self, *, prompt, label, hf_tokenizer, **_):
        return {
            "prompt": str(prompt),
            "label": label,
            "observation_tokens": [1, 2, 3],
            "action_ranges": [(1, 3)],
            "extra_logs": dict(self.extra_logs),
            **self.output,
        }


def execute(config, columns, base=None):
    from pama_plugin.host.actors.prompts import with_columns
    from pama_plugin.host.actors.rollout import ObjectiveExecutor

    executor = ObjectiveExecutor(config, base or Base())
    prompt = with_columns("2 + 2?", columns) if columns is not None else "2 + 2?"
    return asyncio.run(executor.execute(prompt=prompt, label="4", hf_tokenizer=Tokenizer(), sampling_params=None))


def test_a_response_is_scored_by_what_applies_once_per_scorer(tmp_path) -> None:
    from pama_plugin.host.actors.prompts import columns_of

    (tmp_path / "f.py").write_text("def f(queries, prompts, labels, answer):\n    return {'a': [1.0], 'b': None}\n")
    function = f"py:{tmp_path}/f.py:f,columns=answer,isolate=false"
    with FaultServer(answer=lambda body: {"tone": 1, "safe": 2, "seen": len(body)}) as server:
        config = config_of(
            f"tone=http:{server.url},key=tone,when=datasource:chat",
            f"safe=http:{server.url},key=safe,when=datasource:chat|math",
            f"other=http:{server.url}/other,key=safe,when=datasource:code",
            f"a={function},key=a",
            f"b={function},key=b,abstain=true",
        )
        output = execute(config, {"datasource": "math", "answer": "4"})
        assert server.requests == 1
    logs = output["extra_logs"]
    rewards = {name: logs[f"reward/{name}"] for name in config.names}
    assert (rewards["safe"], rewards["a"]) == (2, 1)
    assert all(math.isnan(rewards[name]) for name in ("tone", "other", "b"))
    assert [logs[f"pama/problem/{name}"] for name in config.names] == [-1, 0, -1, 0, -2]
    assert math.isnan(logs["seconds/other"]) and logs["seconds/safe"] > 0
    assert columns_of(output["prompt"]) == {"datasource": "math", "answer": "4"}


def test_a_prompt_that_lost_its_columns_ends_the_run() -> None:
    with pytest.raises(PamaError, match="has lost the columns"):
        execute(config_of("x=builtin:length,when=datasource:math"), None)
    assert execute(config_of("x=builtin:length"), None)["extra_logs"]["reward/x"] == 2


def test_a_missing_key_of_an_agent_may_mean_that_it_does_not_apply() -> None:
    config = config_of("words=agent:words,abstain=true", "x=builtin:length")
    assert execute(config, None, Base({"words": 3.0}))["extra_logs"]["reward/words"] == 3
    logs = execute(config, None, Base())["extra_logs"]
    assert math.isnan(logs["reward/words"]) and logs["pama/problem/words"] == -2
    assert "words" not in logs, "OpenRLHF would average over responses without it"
    for key in ("reward", "scores"):
        base = Base({"words": 1.0}, **{key: None})
        output = execute(config_of(f"words=agent:{key},abstain=true"), None, base)
        assert output["extra_logs"]["pama/problem/words"] == -2
        base = Base({"words": 1.0}, **{key: 3.0})
        output = execute(config_of(f"words=agent:{key},abstain=true"), None, base)
        assert output["extra_logs"]["reward/words"] == 3 and output[key] is None, "as where it is missing"
    with pytest.raises(RewardError, match=r"must return 'words', found .*abstain=true"):
        execute(config_of("words=agent:words"), None, Base())


def test_a_failed_shared_call_is_one_warning_and_a_failure_of_each(caplog) -> None:
    with FaultServer("404") as server:
        url = f"http:{server.url},retries=0"
        config = config_of(f"a={url},key=a,on_failure=mask", f"b={url},key=b,on_failure=mask", "x=builtin:length")
        logs = execute(config, None)["extra_logs"]
        assert server.requests == 1
        with pytest.raises(RewardError, match="'b': .*HTTP 404"):
            execute(config_of(f"a={url},key=a,on_failure=mask", f"b={url},key=b"), None)
    assert logs["pama/problem/a"] == logs["pama/problem/b"] > 0
    (warning,) = [each.getMessage() for each in caplog.records if "'a', 'b'" in each.getMessage()]
    assert "1 responses without a reward" in warning


def test_texts_of_the_probe_are_scored_whatever_an_objective_applies_to(tmp_path) -> None:
    from pama_plugin.host.actors.rollout import ObjectiveExecutor

    config = config_of("x=builtin:length,when=datasource:math")
    executor = ObjectiveExecutor(config, None)
    assert asyncio.run(executor.score_texts([Response("q", "p", "", "r", 7)], ["x"])) == {"x": [7]}


# ---- in the experience: as if each objective were alone with its prompts

GROUP = 4
TASKS = ("math", "chat", "math", "chat", "math")
OBJECTIVES = {
    "helpful": "rm:org/a,when=datasource:math",
    "harmless": "rm:org/b,when=datasource:chat",
    "some": "py:{f},abstain=true",
    "tone": "builtin:length,when=datasource:chat",
    "length": "builtin:length",
}


def rollout_of(config, tasks=TASKS) -> list:
    """Samples of five prompts; the rewards of the rollout, and the codes of those that do not apply."""
    from pama_plugin.host.actors.prompts import with_columns

    samples = make_rollout(GROUP * len(tasks), seed=5)
    kept = []
    for index, sample in enumerate(samples):
        task = tasks[index // GROUP]
        sample.prompts = [with_columns(f"prompt {index // GROUP}", {"datasource": task})]
        for objective in config.scored_in("rollout"):
            reward = math.sin(3.0 * index + len(objective.name))
            code = 0
            if not objective.applies_to({"datasource": task}):
                code = -1
            elif objective.name == "some" and index % 3 == 0:
                code = -2
            sample.info[f"reward/{objective.name}"] = torch.tensor([math.nan if code else reward])
            sample.info[f"pama/problem/{objective.name}"] = torch.tensor([float(code)])
        kept.append(sample)
    return kept


PENALTIES = "--reward.overlong_buffer_len 4 --rollout.max_new_tokens 8 --reward.stop_properly_penalty_coef 0.5".split()


def estimate(groups, config, samples, estimator, *flags):
    """The advantages of every objective, before they are combined, by response; and the maker."""
    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker
    from pama_plugin.host.actors.write_back import join

    args = host_args(
        *("--algo.advantage.estimator", estimator, "--rollout.n_samples_per_prompt", str(GROUP)),
        *("--algo.kl.init_coef", "0", "--rollout.micro_batch_size", "3", *flags),
    )
    args.pama = config
    rewards = as_reward_groups(config, {name: groups[name] for name in ("helpful", "harmless")})
    maker = MultiObjectiveExperienceMaker(
        groups["actor"],
        groups["critic"] if estimator == "gae" else None,
        rewards,
        None,
        SimpleNamespace(value=0.0),
        SimpleNamespace(args=args),
        SimpleNamespace(pad_token_id=0, decode=lambda tokens, **_: str(tokens)),
    )
    runs = []
    stock = maker._estimate

    def spy(*arguments):
        run = stock(*arguments)
        runs.append([each.advantages.clone() for each in run])  # of the first run the combination takes the place
        return run

    maker._estimate = spy
    experiences = maker.make_experience_batch(samples)
    lengths = torch.cat([each.action_mask.sum(1) for each in experiences])
    order = maker.table.order_B.argsort()
    found = {}
    for objective, run in zip(config.trained, runs):
        rows = join(run)
        mask = join([each.action_mask for each in experiences]).bool()
        found[objective.name] = [rows[index][mask[index]] for index in order.tolist()]
    assert len(lengths) == len(samples)
    return found, maker, experiences


ESTIMATORS = ["reinforce_baseline", "reinforce", "rloo", "group_norm", "dr_grpo", "flash_reinforce", "gae"]


@pytest.mark.parametrize("penalties", [[], PENALTIES], ids=["", "penalties"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_objective_is_estimated_as_if_it_were_alone_with_its_prompts(
    estimator, penalties, groups, tmp_path
) -> None:
    (tmp_path / "f.py").write_text("def f(queries, prompts, labels):\n    return None\n")
    texts = {name: f"{name}={spec.format(f=f'{tmp_path}/f.py:f')}" for name, spec in OBJECTIVES.items()}
    config = config_of(*texts.values())
    samples = rollout_of(config)
    together, maker, _ = estimate(groups, config, samples, estimator, *penalties)
    for objective in config.objectives:
        name = objective.name
        its = [index for index, sample in enumerate(samples) if objective.applies_to(sample.prompts[0].columns)]
        single = config_of(texts[name].partition(",when=")[0])
        alone_samples = [rollout_of(config)[index] for index in its]
        kept = () if name in ("helpful", "harmless") else (f"reward/{name}", f"pama/problem/{name}")
        for sample in alone_samples:
            sample.info = {key: value for key, value in sample.info.items() if "/" not in key or key in kept}
        alone, alone_maker, _ = estimate(groups, single, alone_samples, estimator, *penalties)
        applies = maker.table.applies_to(name)[maker.table.order_B.argsort()]
        for position, index in enumerate(its):
            if applies[index]:
                torch.testing.assert_close(together[name][index], alone[name][position], rtol=1e-4, atol=1e-5)
        ours, own = maker.state.objectives[name], alone_maker.state.objectives[name]
        assert ours.rewards.count == own.rewards.count
        assert ours.rewards.mean == pytest.approx(own.rewards.mean, rel=1e-5)
        assert ours.spread.mean == pytest.approx(own.spread.mean, rel=1e-4)


@pytest.mark.parametrize("penalties", [[], PENALTIES], ids=["", "penalties"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_of_an_incomplete_group_those_with_a_reward_are_a_group(estimator, penalties, groups, tmp_path) -> None:
    """Three responses and one to which the objective does not apply have the advantages of three."""
    (tmp_path / "f.py").write_text("def f(queries, prompts, labels):\n    return None\n")
    config = config_of(f"some=py:{tmp_path}/f.py:f,abstain=true")
    samples = rollout_of(config, tasks=("math",) * 3)
    kept = [index for index in range(len(samples)) if index % GROUP != 1]
    for index, sample in enumerate(samples):
        code = 0.0 if index in kept else -2.0
        sample.info["reward/some"] = torch.tensor([math.sin(3.0 * index) if code == 0 else math.nan])
        sample.info["pama/problem/some"] = torch.tensor([code])
        sample.truncated = torch.tensor([index % 3 == 0])
    three = [pickle.loads(pickle.dumps(samples[index])) for index in kept]
    found, _, experiences = estimate(groups, config, samples, estimator, *penalties)
    alone, _, _ = estimate(groups, config, three, estimator, "--rollout.n_samples_per_prompt", "3", *penalties)
    for position, index in enumerate(kept):
        torch.testing.assert_close(found["some"][index], alone["some"][position], rtol=1e-4, atol=1e-5)
    shown = torch.cat([each.info["reward"] for each in experiences])
    assert (shown == 0).sum() >= 3 and shown.isfinite().all(), "what OpenRLHF shows counts what there is"


def test_a_rule_of_rewards_compares_what_applies_to_a_prompt(groups) -> None:
    """tchebycheff follows the farthest objective: not one that does not apply, as far as its mean may be."""
    config = config_of("tone=builtin:length,when=datasource:chat", "length=builtin:length", loss="tchebycheff")
    together, maker, experiences = estimate(groups, config, rollout_of(config), "reinforce_baseline")
    alone = config_of("length=builtin:length", loss="tchebycheff")
    samples = rollout_of(config)
    its = [index for index in range(len(samples)) if TASKS[index // GROUP] == "math"]
    _, single, expected = estimate(groups, alone, [samples[index] for index in its], "rloo")
    combined = torch.cat([each.info["reward"] for each in experiences])[maker.table.order_B.argsort()]
    own = torch.cat([each.info["reward"] for each in expected])[single.table.order_B.argsort()]
    ranks = [combined[its].argsort().tolist(), own.argsort().tolist()]
    assert ranks[0] == ranks[1], "responses to math prompts are ordered by length alone"


@pytest.mark.parametrize("loss", ["linear", "pama", "min_norm", "morlhf"])
def test_a_response_is_combined_from_what_applies_and_nothing_is_a_failure(loss, groups, tmp_path) -> None:
    (tmp_path / "f.py").write_text("def f(queries, prompts, labels):\n    return None\n")
    texts = [f"{name}={spec.format(f=f'{tmp_path}/f.py:f')}" for name, spec in OBJECTIVES.items()]
    config = config_of(*texts, loss=loss)
    _, maker, experiences = estimate(groups, config, rollout_of(config), "reinforce_baseline")
    info = {key: torch.cat([each.info[key] for each in experiences]) for key in experiences[0].info if "/" in key}
    math_B = torch.tensor([TASKS[index // GROUP] == "math" for index in maker.table.order_B.tolist()])
    assert (info["reward/helpful"].isnan() == ~math_B).all() and (info["reward/harmless"].isnan() == math_B).all()
    assert all(info[f"pama/failures/{name}"].sum() == 0 for name in config.names)
    assert info["pama/abstained/some"].sum() == 7 and "pama/abstained/tone" not in info
    assert all(each.advantages.isfinite().all() for each in experiences)
    (row, *_) = [row for row in maker.rows if row["rewards"]["helpful"] is None]
    assert row["problems"] == {}


@pytest.mark.parametrize("estimator", ["reinforce_baseline", "group_norm", "rloo", "reinforce"])
@pytest.mark.parametrize("loss", ["linear", "pama", "min_norm", "gdpo", "morlhf", "lagrangian", "tchebycheff"])
def test_a_batch_to_which_an_objective_does_not_apply_is_fine(loss, estimator, groups, tmp_path) -> None:
    (tmp_path / "f.py").write_text("def f(queries, prompts, labels):\n    return None\n")
    constraint = ",role=constraint,threshold=0" if loss == "lagrangian" else ""
    texts = [
        "harmless=rm:org/b,when=datasource:chat" + constraint,
        "tone=builtin:length,when=datasource:chat",
        "length=builtin:length",
    ]
    config = load_config(loss, texts, None, None, None, default_level="sequence")
    _, maker, experiences = estimate(groups, config, rollout_of(config, tasks=("math",) * 5), estimator)
    assert all(each.advantages.isfinite().all() for each in experiences)
    assert maker.state.objectives["harmless"].rewards.count == 0
    assert sum(each.advantages.abs().sum() for each in experiences) > 0

    keys = [key for key in experiences[0].info if "/" in key]
    columns = {key: torch.cat([each.info[key] for each in experiences]).float() for key in keys}
    reduced = reduce_columns(columns, config.names)
    assert not {"reward/tone", "reward/harmless", "seconds/harmless"} & set(reduced)
    assert math.isfinite(reduced["reward/length"]), "and no NaN in the trackers of what does not apply"


def test_models_are_asked_for_what_applies_only(groups, monkeypatch) -> None:
    """Without padding that only others need; and not at all if nothing applies."""
    from pama_plugin.host.actors.reward_groups import RankGroup

    asked = []
    stock = RankGroup.request

    def request(self, samples_list, **options):
        asked.append([len(samples.sequences) for samples in samples_list])
        assert all(samples.attention_mask.any(0).all() for samples in samples_list if len(samples.sequences) < 3)
        return stock(self, samples_list, **options)

    monkeypatch.setattr(RankGroup, "request", request)
    config = config_of("helpful=rm:org/a,when=datasource:math", "harmless=rm:org/b,when=datasource:chat")
    estimate(groups, config, rollout_of(config), "reinforce_baseline")
    assert asked == [[3, 1, 1, 3, 2, 2], [2, 2, 3, 1]]
    asked.clear()
    estimate(groups, config, rollout_of(config, tasks=("math",) * 3), "reinforce_baseline")
    assert asked == [[3, 3, 3, 3]]


def test_an_evaluation_counts_what_applies(groups) -> None:
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    from pama_plugin.batch.rating import rate
    from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator

    config = config_of("helpful=rm:org/a,when=datasource:math,weight=2", "tone=builtin:length,when=datasource:chat")
    _, maker, _ = estimate(groups, config, rollout_of(config), "reinforce_baseline")
    stock = SamplesGenerator(SimpleNamespace(args=maker.args), None, [], maker.tokenizer, None)
    generator = ScoredSamplesGenerator(stock, maker.collector)
    samples = rollout_of(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplesGenerator, "generate_eval_samples", lambda self, **_: samples)
        found = generator.generate_eval_samples(n_samples_per_prompt=GROUP)
    metrics, _ = generator.pop(1)
    assert {key for key in metrics if not key.endswith(("_se", "_std"))} == {
        *("eval_math/helpful", "eval_chat/tone", "eval_all/helpful", "eval_all/tone")
    }
    assert metrics["eval_all/tone"] == metrics["eval_chat/tone"]
    tones = [math.sin(3.0 * index + 4) for index in range(20) if TASKS[index // GROUP] == "chat"]
    assert metrics["eval_chat/tone"] == pytest.approx(sum(tones) / 8, rel=1e-5)
    totals = torch.cat([sample.rewards for sample in found])
    assert totals.isfinite().all(), "OpenRLHF's own metric sums what applies"
    assert math.isfinite(rate(config, maker.state, metrics))
