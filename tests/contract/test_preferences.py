"""Preferences on their way through OpenRLHF: into the prompts, to the rule, and into evaluations."""

import asyncio
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from hosttools import as_reward_groups, give_value_heads, host_args, make_rollout, parse_host_flags
from torch.nn.functional import pad

from pama_plugin import aggregate
from pama_plugin.errors import ConfigError, PamaError
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

OBJECTIVES = ("helpful=builtin:length", "terse=builtin:length,scale=100")
ROWS = [{"prompt": f"Question {index}?", "w": [index, 2]} for index in range(4)]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT


def config_of(*objectives: str, loss: str = "linear", **settings):
    settings = {"preferences": "dirichlet:1", "log_rollouts": "all"} | settings
    return load_config(loss, objectives or OBJECTIVES, None, None, None, **settings, default_level="token")


def tokenizer_with(template: str):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)


def dataset_of(config, rows=ROWS, tokenizer=None, *flags: str):
    from pama_plugin.host.actors.dataset import PromptsWithColumns

    args = host_args("--data.input_key", "prompt", *flags)
    args.pama = config
    template = args.data.input_template
    return PromptsWithColumns(rows, tokenizer, SimpleNamespace(args=args, is_rank_0=lambda: True), template)


def loader_of(config, rows=ROWS, *flags: str):
    data = dataset_of(config, rows, None, *flags)
    return torch.utils.data.DataLoader(data, 1, collate_fn=data.collate_fn)


def draw_for(config, number: int = 0):
    from pama_plugin.host.actors.dataset import NumberedDraw, PromptsWithPreferences

    draw = NumberedDraw(config, seed=42)
    draw.number = number
    return [prompts[0] for _, prompts, *_ in PromptsWithPreferences(loader_of(config), config.template, draw)]


# ---- into the prompts


def test_each_prompt_has_its_preference_in_its_text_and_keeps_it_through_pickle() -> None:
    from pama_plugin.host.actors.prompts import plain, preference_of

    prompts = [pickle.loads(pickle.dumps(prompt)) for prompt in draw_for(config_of())]
    assert [plain(prompt) for prompt in prompts] == [row["prompt"] for row in ROWS]
    for prompt in prompts:
        helpful, terse = preference_of(prompt)
        assert prompt == f"[helpful {helpful:.2f}, terse {terse:.2f}]\n{plain(prompt)}"
    assert len({preference_of(prompt) for prompt in prompts}) == len(prompts)


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws() -> None:
    from pama_plugin.host.actors.dataset import NumberedDraw, PromptsWithPreferences

    config = config_of()
    loader = PromptsWithPreferences(loader_of(config), config.template, draw := NumberedDraw(config, 42))
    twice = [prompts[0] for _ in range(2) for _, prompts, *_ in loader]
    assert twice[4:] == draw_for(config, number=4) != twice[:4], "the next epoch has others"
    assert draw.number == 8


def test_a_column_gives_the_preferences_and_held_out_prompts_need_none() -> None:
    from pama_plugin.host.actors.prompts import preference_of

    config = config_of(preferences="column:w")
    assert [preference_of(prompt)[0] for prompt in draw_for(config)] == pytest.approx([0, 1 / 3, 1 / 2, 3 / 5])
    assert dataset_of(config, [{"prompt": "Held out?"}]).prompts[0].slots.endswith("Held out?")


MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "Two"},
    {"role": "user", "content": "Three"},
]
SYSTEM = "({helpful:.1f}, {terse:.1f})"


@pytest.mark.parametrize(
    ("template", "prompt", "written"),
    [
        (None, "Hello", "<user>[helpful 0.25, terse 0.75]\nHello<assistant>"),
        (
            None,
            MESSAGES,
            "<system>Be kind.<user>One<assistant>Two<user>[helpful 0.25, terse 0.75]\nThree<assistant>",
        ),
        (SYSTEM, "Hello", "<system>(0.2, 0.8)<user>Hello<assistant>"),
        (SYSTEM, MESSAGES[1:2], "<system>(0.2, 0.8)<user>One<assistant>"),
        (SYSTEM, MESSAGES, "<system>Be kind.\n(0.2, 0.8)<user>One<assistant>Two<user>Three<assistant>"),
    ],
)
def test_a_preference_passes_through_the_chat_template(template, prompt, written) -> None:
    from pama_plugin.host.actors.prompts import plain

    config = config_of(preference_template=template)
    data = dataset_of(config, [{"prompt": prompt}], tokenizer_with(CHAT), "--data.apply_chat_template")
    conditioned = data.prompts[0].with_preference(config.template, (0.25, 0.75))
    assert conditioned == written
    assert "0.2" not in plain(conditioned) and plain(conditioned) == data.prompts[0]


def test_the_hosts_template_is_around_ours() -> None:
    data = dataset_of(config_of(), ROWS[:1], None, "--data.input_template", "Q: {} A:")
    assert data.prompts[0] == "Q: Question 0? A:"
    written = data.prompts[0].with_preference(config_of().template, (1.0, 0.0))
    assert written == "Q: [helpful 1.00, terse 0.00]\nQuestion 0? A:"


@pytest.mark.parametrize(
    ("chat", "template", "prompt", "message"),
    [
        (WITHOUT_SYSTEM, SYSTEM, "Hello", "row 0: .*the preference once, .*into the system message, found it 0 times"),
        (REFUSES_SYSTEM, SYSTEM, "Hello", "row 0: the chat template refuses the preference: no system role"),
        (CHAT + "{{ messages[0].content }}", SYSTEM, "Hello", "found it 2 times"),
        (CHAT, None, MESSAGES[2:3], "row 0: .*must have a user's message of text, found none"),
        (CHAT, None, "a \ue0f0 b", "row 0: .*the preference once"),
        (None, SYSTEM, "Hello", r"must have \{prompt\}, the text of the user, without --data.apply_chat_template"),
    ],
)
def test_a_prompt_without_a_place_for_it_is_refused(chat, template, prompt, message) -> None:
    flags = ("--data.apply_chat_template",) if chat else ()
    with pytest.raises(ConfigError, match=message):
        dataset_of(config_of(preference_template=template), [{"prompt": prompt}], chat and tokenizer_with(chat), *flags)


# ---- before Ray starts


def check(tmp_path, config, rows, *flags: str) -> list[str]:
    from pama_plugin.host.preflight.columns import check_columns

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return check_columns(
        parse_host_flags("--data.prompt_dataset", str(path), "--data.input_key", "prompt", *flags), config
    )


def test_what_is_fine_is_not_refused(tmp_path) -> None:
    assert check(tmp_path, config_of(), ROWS) == check(tmp_path, config_of(preferences="column:w"), ROWS) == []
    rows = [{"prompt": "a", "w": {"terse": 1, "helpful": 0}}]
    assert check(tmp_path, config_of(preferences="column:w"), rows) == []


@pytest.mark.parametrize(
    ("column", "bad", "message"),
    [
        ("weights", [1, 1], "--pama.preferences column:weights: .*must have the column weights, found prompt, w"),
        ("w", [1, -1], "prompts.jsonl, row 2: must be 2 numbers .*found .1, -1"),
        ("w", [0, 0], "row 2: .*not all 0, found .0, 0"),
        ("w", [1], "row 2: must be 2 numbers"),
        ("w", [1, None], "row 2: must be 2 numbers"),
        ("w", [1, 1, 1], "row 2: must be 2 numbers"),
    ],
)
def test_columns_that_are_not_weights_are_refused_with_the_row(column, bad, message, tmp_path) -> None:
    rows = [*ROWS[:2], {"prompt": "x", "w": bad}, *ROWS[2:]]
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, config_of(preferences=f"column:{column}"), rows)


def test_every_row_of_every_data_set_is_checked_before_ray_starts(tmp_path) -> None:
    bad = [{"prompt": MESSAGES[2:3]}]
    chat = ({"prompt": MESSAGES[1:2]}, {"prompt": MESSAGES[1:2]})
    tokenizer_with(CHAT).save_pretrained(tmp_path / "policy")
    flags = ["--actor.model_name_or_path", str(tmp_path / "policy"), "--data.apply_chat_template"]
    with pytest.raises(ConfigError, match="--data.prompt_dataset .*prompts.jsonl: row 2: .*a user's message of text"):
        check(tmp_path, config_of(), [*chat, *bad], *flags)
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*chat, *bad]))
    with pytest.raises(ConfigError, match="--eval.dataset .*held_out.jsonl: row 2: "):
        check(tmp_path, config_of(), chat, *flags, "--eval.dataset", str(tmp_path / "held_out.jsonl"))
    system = [{"prompt": [{"role": "system", "content": None}, *MESSAGES[1:2]]}]
    with pytest.raises(ConfigError, match="row 2: the system message must be a text, found None"):
        check(tmp_path, config_of(preference_template=SYSTEM), [*chat, *system], *flags)
    with pytest.raises(ConfigError, match="row 1: .*the preference once"):
        check(tmp_path, config_of(), [{"prompt": "fine"}, {"prompt": "a \ue0f0 b"}])


def test_a_prompt_whose_preference_would_be_cut_off_is_refused(tmp_path) -> None:
    tokenizer_with(CHAT).save_pretrained(tmp_path / "policy")
    flags = ["--actor.model_name_or_path", str(tmp_path / "policy"), "--rollout.max_new_tokens", "8"]
    rows = [{"prompt": "a"}, {"prompt": "a " * 40}]
    assert check(tmp_path, config_of(), rows, *flags, "--data.max_len", "2000") == []
    with pytest.raises(ConfigError, match=r"row 1: .*at most 12 tokens \(--data.max_len minus"):
        check(tmp_path, config_of(), rows, *flags, "--data.max_len", "20")


def test_an_evaluation_needs_moocore(tmp_path, monkeypatch) -> None:
    from pama_plugin.host.preflight import preferences

    (tmp_path / "held_out.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    monkeypatch.setattr(preferences, "find_spec", lambda _: None)
    assert check(tmp_path, config_of(), ROWS) == []
    with pytest.raises(ConfigError, match=r"needs pip install 'pama_plugin\[report\]'"):
        check(tmp_path, config_of(), ROWS, "--eval.dataset", str(tmp_path / "held_out.jsonl"))


def test_a_prompt_without_weights_in_its_column_ends_the_run() -> None:
    """Where the data sets could not be read before Ray started; nothing is drawn in their place."""
    from pama_plugin.host.actors.dataset import NumberedDraw, PromptsWithPreferences

    for column, message in (("weigths", "found None, for the prompt 'Question 0"), ("w", "not all 0, found .0, 0")):
        config = config_of(preferences=f"column:{column}")
        rows = [{"prompt": "Question 0?", "w": [0, 0]}]
        loader = PromptsWithPreferences(loader_of(config, rows), config.template, NumberedDraw(config, 42))
        with pytest.raises(PamaError, match=f"--pama.preferences column:{column}: .*{message}"):
            list(loader)


def test_a_chat_template_that_drops_the_preference_is_refused(tmp_path) -> None:
    tokenizer_with(WITHOUT_SYSTEM).save_pretrained(tmp_path / "policy")
    flags = ("--actor.model_name_or_path", str(tmp_path / "policy"), "--data.apply_chat_template")
    with pytest.raises(ConfigError, match="row 0: .*the preference once"):
        check(tmp_path, config_of(preference_template=SYSTEM), ROWS, *flags)
    assert check(tmp_path, config_of(), ROWS, *flags) == []


# ---- what rewards read


class Tokenizer:
    pad_token_id = 0

    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(map(str, list(tokens)))

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


def conditioned(text: str = "Why?", preference=(0.25, 0.75)):
    from pama_plugin.host.actors.prompts import Prompt

    prompt = Prompt(f"[{preference}] {text}")
    prompt.columns, prompt.plain, prompt.preference = {}, text, preference
    return prompt


def test_rewards_of_the_rollout_judge_the_prompt_without_the_preference(tmp_path) -> None:
    from pama_plugin.host.actors.prompts import preference_of
    from pama_plugin.host.actors.rollout import ObjectiveExecutor

    class Base:
        async def execute(self, *, prompt, label, **_):
            assert str(prompt).startswith("[(0.25"), "the policy reads it"
            turns = {"observation_tokens": [1, 2, 3, 4], "action_ranges": [(2, 4)]}
            return {"prompt": str(prompt), "label": label, "extra_logs": {}, **turns}

    (tmp_path / "f.py").write_text(
        "def f(queries, prompts, labels):\n"
        "    assert (queries, prompts) == (['Why?3 4'], ['Why?']), (queries, prompts)\n"
        "    return [3.0]\n"
    )
    objectives = (f"helpful=py:{tmp_path}/f.py:f,isolate=false", "terse=builtin:length")
    executor = ObjectiveExecutor(config_of(*objectives, filter_by="sum"), Base())
    output = asyncio.run(
        executor.execute(prompt=conditioned(), label="", hf_tokenizer=Tokenizer(), sampling_params=None)
    )
    assert preference_of(output["prompt"]) == (0.25, 0.75)
    length = output["extra_logs"]["reward/terse"]
    assert output["scores"] == pytest.approx(2 * (0.25 * 3 + 0.75 * length))


def test_reward_models_read_the_prompt_without_the_preference() -> None:
    from openrlhf.trainer.ppo_utils.experience import Experience

    from pama_plugin.host.actors.collector import without_preferences
    from pama_plugin.host.actors.conversations import Conversations

    samples = make_rollout(3, seed=1)
    responses = []
    for sample in samples:
        sample.prompts = [conditioned("Why")]
        responses.append(sample.sequences[0][int(sample.action_mask[0].nonzero()[0]) + 1 :])
        before = torch.tensor([ord(letter) for letter in sample.prompts[0]])
        sample.sequences = torch.cat([before, responses[-1]]).unsqueeze(0)
        sample.attention_mask = torch.ones_like(sample.sequences)
        sample.action_mask = (torch.arange(1, sample.sequences.shape[1]) >= len(before)).long().unsqueeze(0)
    batch = Experience.concat_experiences(samples, 0)
    stripped = without_preferences(batch, Tokenizer())
    for row, response in enumerate(responses):
        tokens = stripped.sequences[row][stripped.attention_mask[row].bool()].tolist()
        assert tokens == [ord(letter) for letter in "Why"] + response.tolist()
    for sample in samples:  # an agent wrote something before the prompt
        text = sample.prompts[0]
        sample.sequences, sample.attention_mask = (
            pad(each, (1, 0), value=1) for each in (sample.sequences, sample.attention_mask)
        )
        sample.action_mask, tokenizer = pad(sample.action_mask, (1, 0)), Tokenizer()
        tokenizer.decode = lambda tokens, text=text: f"tools: {text}"
        (stripped,) = without_preferences(sample, tokenizer).sequences
        assert "".join(map(chr, stripped[: len("tools: Why")].tolist())) == "tools: Why"

    args = host_args()
    read = Conversations(SimpleNamespace(args=args), SimpleNamespace(all_special_tokens=[], decode=lambda *_, **__: ""))
    assert read.of([batch])[0].messages == [{"role": "user", "content": "Why"}]


# ---- the combination


GROUP = 4


def estimate(groups, config, preferences, estimator="reinforce", heads=False, *flags):
    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    args = host_args(
        *("--algo.advantage.estimator", estimator, "--rollout.n_samples_per_prompt", str(GROUP)),
        *("--algo.kl.init_coef", "0", "--rollout.micro_batch_size", "3", *flags),
    )
    args.pama = config
    maker = MultiObjectiveExperienceMaker(
        groups["actor"],
        groups["critic"] if heads else None,
        as_reward_groups(config, {}),
        None,
        SimpleNamespace(value=0.0),
        SimpleNamespace(args=args),
        SimpleNamespace(pad_token_id=0, decode=lambda tokens, **_: str(tokens)),
    )
    if heads:
        give_value_heads(maker, groups["critic"], config.trained_names)
    samples = make_rollout(GROUP * len(preferences), seed=5, names=config.names)
    for index, sample in enumerate(samples):
        sample.prompts = [conditioned(f"prompt {index // GROUP}", preferences[index // GROUP])]
    return maker, maker.make_experience_batch(samples)


PREFERENCES = [(0.25, 0.75), (1.0, 0.0), (0.6, 0.4)]


@pytest.mark.parametrize("loss", ["linear", "pama", "min_norm", "gdpo", "tchebycheff", "morlhf"])
def test_the_rule_gets_the_weights_of_each_response(loss, groups, monkeypatch) -> None:
    from pama_plugin.settings import run

    calls = []
    config = config_of("helpful=builtin:length,weight=2", "terse=builtin:length", loss=loss)

    def spy(*arguments, **keywords):
        calls.append((arguments, keywords, result := aggregate(*arguments, **keywords)))
        return result

    monkeypatch.setattr(run, "aggregate", spy)
    maker, experiences = estimate(groups, config, PREFERENCES)
    ((_, keywords, result),) = calls
    expected = [[4 * PREFERENCES[group][0], 2 * PREFERENCES[group][1]] for group in maker.table.groups_B.tolist()]
    torch.testing.assert_close(keywords["weights"], torch.tensor(expected, dtype=torch.float64).T)
    if loss in ("linear", "pama", "min_norm"):
        for experience, advantages in zip(experiences, maker.table.split(result.advantages)):
            length = experience.advantages.shape[1]
            mask = experience.action_mask.bool()  # elsewhere it is OpenRLHF's padding
            torch.testing.assert_close(experience.advantages[mask], advantages[:, :length][mask])
    info = experiences[0].info
    assert info["pama/preference/helpful"][0] == pytest.approx(sum(one for one, _ in PREFERENCES) / 3)
    rows = {row["sample"]: row for row in maker.rows}
    assert rows[GROUP]["weights"] == {"helpful": 4.0, "terse": 0.0}
    assert {row["prompt"] for row in maker.rows} == {conditioned(f"prompt {n}", p) for n, p in enumerate(PREFERENCES)}


def test_a_preference_of_1_is_the_run_with_this_objective_alone(groups) -> None:
    """Each whitened for itself beforehand, so the others change nothing, and the size is that of one objective."""
    config = config_of(preferences="grid:2")
    _, conditioned_on = estimate(groups, config, [(1.0, 0.0), (0.0, 1.0)], "group_norm")
    for name, group in (("helpful", 0), ("terse", 1)):
        alone = load_config("linear", [f"{name}=builtin:length"], None, None, None, default_level="token")
        samples = make_rollout(2 * GROUP, seed=5, names=config.names)
        maker, _ = estimate(groups, config, [(1.0, 0.0), (0.0, 1.0)], "group_norm")
        maker.config = maker.collector.config = maker.args.pama = alone
        maker.state = type(maker.state).start(alone)
        single = maker.make_experience_batch(samples)
        for one, other, rows in zip(conditioned_on, single, maker.table.split(maker.table.groups_B == group)):
            masked = [(each.advantages * each.action_mask)[rows] for each in (one, other)]
            torch.testing.assert_close(*masked)


def test_with_value_heads_the_value_of_a_sum_of_rewards_has_the_weights_of_the_response(groups) -> None:
    config = config_of(loss="morlhf")
    maker, experiences = estimate(groups, config, PREFERENCES, "gae", True, "--critic.model_name_or_path", "critic")
    for group, preference in enumerate(PREFERENCES):
        weighted = [f"{n}=builtin:length,weight={max(2 * w, 1e-9)}" for n, w in zip(("helpful", "terse"), preference)]
        same = load_config("morlhf", weighted, None, None, None, default_level="token")
        other, fixed = estimate(groups, same, PREFERENCES, "gae", True, "--critic.model_name_or_path", "critic")
        for one, two, rows in zip(experiences, fixed, maker.table.split(maker.table.groups_B == group)):
            torch.testing.assert_close(one.info["return"][rows], two.info["return"][rows], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(one.rewards[rows], two.rewards[rows], atol=1e-5, rtol=1e-4)


# ---- evaluation


def test_held_out_prompts_are_answered_with_every_preference(groups) -> None:
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    from pama_plugin.host.actors.evaluation import ScoredSamplesGenerator
    from pama_plugin.host.actors.experience import MultiObjectiveExperienceMaker

    config = config_of(eval_preferences="3")
    args = host_args("--algo.advantage.estimator", "reinforce", "--rollout.batch_size", "64")
    args.pama = config
    strategy = SimpleNamespace(args=args)
    maker = MultiObjectiveExperienceMaker(
        None, None, as_reward_groups(config, {}), None, None, strategy, SimpleNamespace(pad_token_id=0)
    )
    rows = [{"prompt": text, "datasource": source} for text, source in (("a", "x"), ("b", "y"), ("a", "z"))]
    stock = SamplesGenerator(strategy, loader_of(config), loader_of(config, rows), Tokenizer(), None)
    generator = ScoredSamplesGenerator(stock, maker.collector)
    size = 2

    def generate(self, dataloader_iter, num_prompts, dynamic_filtering, **_):
        """Responses in another order than the prompts; the reward of helpful is its weight, of terse half of it."""
        prompts = [prompt for _, (prompt,), *_ in dataloader_iter]
        samples = make_rollout(len(prompts) * size, names=config.names)
        for index, sample in enumerate(samples):
            prompt = prompts[::-1][index // size]
            sample.prompts = [prompt]
            for name, factor in (("helpful", 1.0), ("terse", 0.5)):
                weight = prompt.preference[config.names.index(name)]
                sample.info[f"reward/{name}"] = torch.tensor(
                    [factor * weight + (prompt.plain == "b") + 0.1 * (index % 2)]
                )
        return samples, len(prompts), True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplesGenerator, "_generate_vllm", generate)
        found = generator.generate_eval_samples(n_samples_per_prompt=size)
    assert len(found) == 3 * 3 * size
    grid = config.evaluated_preferences
    assert [sample.prompts[0].preference for sample in found[::size]] == [*grid, *grid, *grid]
    metrics, rows = generator.pop(1)
    assert len(rows) == len(found) and rows[0]["weights"] == {"helpful": 2.0, "terse": 0.0}
    assert metrics["eval_preference/0.5_0.5/helpful"] == pytest.approx(0.5 + 1 / 3 + 0.05)
    assert metrics["eval_x/helpful"] == pytest.approx(0.55) and metrics["eval_y/helpful"] == pytest.approx(1.55)
    assert metrics["eval_z/helpful"] == pytest.approx(0.55), "the same text in another data set"
    assert metrics["eval_follows/helpful"] == pytest.approx(1) and metrics["eval_follows/terse"] == pytest.approx(1)
    assert metrics["eval_all/helpful_std"] == pytest.approx(1 / math.sqrt(3)), "over prompts, not over preferences"
    assert {source for (source,), *_ in generator.eval_dataloader} == {"x", "y", "z"}
    weighted = [
        2 * sum(w * float(found[i].info[f"reward/{n}"]) for n, w in zip(config.names, found[i].prompts[0].preference))
        for i in (0, 5)
    ]
    assert [float(found[i].rewards) for i in (0, 5)] == pytest.approx(weighted)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_resumed_run_goes_on_with_the_number_of_prompts_it_had_consumed(asynchronous, monkeypatch) -> None:
    from pama_plugin.host.actors import trainer, trainer_async

    generator = SimpleNamespace(draw=SimpleNamespace(number=0), batches=0)
    if asynchronous:
        kind = trainer_async.GenerateSamplesActor.__ray_metadata__.modified_class
        monkeypatch.setattr(kind.__mro__[1], "fit", lambda self, episode, total_consumed_prompts: None)
        actor = object.__new__(kind)
        actor.samples_generator = generator
        actor.fit(episode=1, total_consumed_prompts=96)
    else:
        kind = trainer.PPOTrainer.__ray_metadata__.modified_class
        states = {"total_consumed_prompts": 96, "data_loader_state_dict": {}}
        monkeypatch.setattr(trainer.MultiObjectiveTrainer, "init_checkpoint_states", lambda self: dict(states))
        actor = object.__new__(kind)
        actor.samples_generator, actor.prompts_dataloader = generator, []
        actor.init_checkpoint_states()
    assert generator.draw.number == 96


# ---- runs that only evaluate


def test_a_run_that_only_evaluates_needs_held_out_prompts_and_saves_nothing() -> None:
    from pama_plugin.host.actors.reward_groups import PolicyGroup
    from pama_plugin.host.preflight.flags import check_evaluation

    with pytest.raises(ConfigError, match="--pama.evaluate_only needs --eval.dataset, found none"):
        check_evaluation(parse_host_flags())
    held_out = ("--eval.dataset", "held_out.jsonl", "--critic.save_value_network")
    with pytest.raises(ConfigError, match="needs synchronous training, found --train.async_enable"):
        check_evaluation(parse_host_flags(*held_out, "--train.async_enable"))
    args = parse_host_flags(*held_out)
    check_evaluation(args)
    assert not getattr(args, "critic.save_value_network")
    group = object.__new__(PolicyGroup)
    group._actor_handlers = [SimpleNamespace(save_model=SimpleNamespace(remote=lambda: "saved"))]
    assert group.async_save_model() == ["saved"]
    group.saves = False
    assert group.async_save_model() == []


@pytest.mark.parametrize("steps", [0, 7])
def test_a_run_that_only_evaluates_syncs_a_checkpoint_and_closes_the_trackers(steps) -> None:
    from pama_plugin.host.actors import trainer

    called = []
    actor = object.__new__(trainer.PPOTrainer.__ray_metadata__.modified_class)
    actor.steps_at_start, actor.generate_kwargs = steps, {"max_len": 64, "temperature": 1.0}
    actor.args = SimpleNamespace(eval=SimpleNamespace(temperature=0.5, n_samples_per_prompt=3))
    actor.init_checkpoint_states = lambda: called.append("states")
    actor.broadcast_to_vllm = lambda: called.append("weights")
    actor.evaluate = lambda step, **settings: called.append((step, settings))
    actor.wandb_logger = None
    actor.tensorboard_logger = SimpleNamespace(close=lambda: called.append("closed"))
    actor.evaluate_only()
    settings = {"max_len": 64, "temperature": 0.5, "n_samples_per_prompt": 3}
    assert called == ["states", *["weights"] * bool(steps), (steps, settings), "closed"]
