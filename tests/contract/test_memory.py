"""The GPU memory of a plan, from the config.json of its models."""

import pytest
from hosttools import parse_host_flags
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pama_plugin.host.preflight.memory import IN_4_BITS, estimate
from pama_plugin.host.preflight.placement import format_plan, make_plan, parse_cluster
from pama_plugin.settings.flags import add_flags
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract

HEAD = 50 * 32
LINEAR = 2 * (4 * 32 * 32 + 3 * 32 * 64)
REST = 50 * 32 + 5 * 32  # the embeddings, and the norms
POLICY, TRUNK = HEAD + LINEAR + REST, LINEAR + REST


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=50, num_labels=1, **shape)
    for name, kind in {"policy": LlamaForCausalLM, "reward": LlamaForSequenceClassification}.items():
        kind(config).half().save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("policy", "reward")}


def bytes_of(models, *flags: str, objectives=()) -> dict[str, int]:
    args = parse_host_flags("--actor.model_name_or_path", models["policy"], *flags, extend=add_flags)
    config = load_config("pama", ["length=builtin:length", *objectives], None, None, None, default_level="token")
    memory = estimate(args, config, make_plan(args, config))
    return {role: round(gib * 2**30) for role, gib in memory.by_role.items()}


GROUPS = ("--algo.advantage.estimator", "reinforce_baseline")
TWO_RANKS = "--actor.num_gpus_per_node 2 --ref.num_gpus_per_node 2 --critic.num_gpus_per_node 2".split()


@pytest.mark.parametrize(
    ("flags", "policy", "reference"),
    [
        (["--ds.zero_stage", "0"], 20 * POLICY, 2 * POLICY),
        (["--ds.zero_stage", "0", "--ds.param_dtype", "fp32"], 16 * POLICY, 4 * POLICY),
        (["--ds.zero_stage", "1"], (2 + 2 + 8) * POLICY, 2 * POLICY),
        (["--ds.zero_stage", "2"], (2 + 1 + 8) * POLICY, 2 * POLICY),
        (["--ds.zero_stage", "2", "--ref.offload"], (2 + 1 + 8) * POLICY, 2 * POLICY),
        (["--ds.zero_stage", "2", "--ds.param_dtype", "fp32"], (4 + 2 + 8) * POLICY, 4 * POLICY),
        (["--ds.zero_stage", "2", "--ds.ring_attn_size", "2"], (2 + 1 + 8) * POLICY, 2 * POLICY),
        (["--ds.zero_stage", "3"], 10 * POLICY, POLICY),
        (["--ds.zero_stage", "3", "--ds.adam_offload", "--ref.offload"], POLICY, 0),
    ],
)
def test_stages_of_zero_on_two_ranks(flags, policy, reference, models) -> None:
    found = bytes_of(models, *GROUPS, *TWO_RANKS, *flags)
    assert found == {"policy": policy, "reference": reference}


@pytest.mark.parametrize(
    ("flags", "weights", "adapters"),
    [
        ([], 2 * POLICY, 4 * 2 * (4 * 64 + 3 * 96)),
        (["--ds.lora.target_modules", "q_proj", "down_proj"], 2 * POLICY, 4 * 2 * (64 + 96)),
        (["--ds.lora.target_modules", "self_attn.q_proj"], 2 * POLICY, 4 * 2 * 64),
        (["--ds.load_in_4bit"], 2 * (POLICY - LINEAR) + IN_4_BITS * LINEAR, 4 * 2 * (4 * 64 + 3 * 96)),
    ],
)
def test_adapters(flags, weights, adapters, models) -> None:
    """They are all that is trained, and the reference is the policy."""
    found = bytes_of(models, *GROUPS, "--ds.zero_stage", "0", "--ds.lora.rank", "4", *flags)
    assert found == {"policy": round(weights + 20 * adapters)}


def test_critic_and_rewards(models, tmp_path) -> None:
    for name in "bcd":  # one location has one set of options
        (tmp_path / name).symlink_to(models["reward"])
    rewards = (f"a=rm:{models['reward']}", f"b=hf:{tmp_path}/b", f"c=hf:{tmp_path}/c,dtype=float32")
    cpu, unknown = f"d=hf:{tmp_path}/d,gpus=0", "e=hf:org/that-is-not-here"
    found = bytes_of(models, "--ds.zero_stage", "0", objectives=(*rewards, cpu, unknown))
    assert found["critic"] == 20 * TRUNK and found["reward/a"] == 2 * TRUNK
    assert (found["reward/b"], found["reward/c"]) == (2 * (TRUNK + 32), 4 * (TRUNK + 32))
    assert not {"reward/d", "reward/e"} & set(found)


def test_the_plan_says_what_its_numbers_leave_out(models, capsys, monkeypatch) -> None:
    from pama_plugin.host import seam

    flags = (*GROUPS, *"--actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1".split(), "--pama.plan", "1x8")
    objective = ("--loss", "pama", "--pama.objective", "length=builtin:length")
    args = parse_host_flags(
        "--actor.model_name_or_path",
        models["policy"],
        "--vllm.gpu_memory_utilization",
        "0.45",
        *flags,
        *objective,
        extend=add_flags,
    )
    capsys.readouterr()
    with pytest.raises(SystemExit):
        seam.install(args)
    found = capsys.readouterr().out
    assert "GiB each  block" in found and "vLLM takes 0.45 of each of its GPUs." in found and "not known" not in found


def test_a_model_that_cannot_be_read_is_named_with_the_reason(models, tmp_path) -> None:
    args = parse_host_flags("--actor.model_name_or_path", str(tmp_path / "nowhere"), *GROUPS, extend=add_flags)
    config = load_config("pama", ["length=builtin:length"], None, None, None, default_level="token")
    memory = estimate(args, config, make_plan(args, config))
    assert memory.by_role == {} and set(memory.unknown) == {"policy", "reference"}
    assert "nowhere" in memory.unknown["policy"]


def test_the_table_has_a_column_if_anything_is_known(models) -> None:
    ones = "--actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1".split()
    args = parse_host_flags("--actor.model_name_or_path", models["policy"], *GROUPS, *ones, extend=add_flags)
    config = load_config("pama", ["length=builtin:length"], None, None, None, default_level="token")
    table = format_plan(make_plan(args, config), parse_cluster("1x8"), {"policy": 112.26})
    assert table.splitlines() == [
        "PAMA plan: 3 of 8 GPUs, one CPU beside each",
        "role       ranks  GPUs each  GiB each  block  node",
        "rollout        1          1         –      1  1",
        "policy         1          1     112.3      2  1",
        "reference      1          1         –      3  1",
    ]
