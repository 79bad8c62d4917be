"""What the study runs: tasks, arms, settings and seeds. PROTOCOL.md says why."""

from typing import NamedTuple

HERE = "py:examples/paper/word_rewards.py"
MODELS = {"tiny": "runs/quickstart/models/policy", "smollm2": "runs/smollm2/models/policy"}
SENTIMENT = {"tiny": "hf:runs/paper/sentiment", "smollm2": "hf:runs/smollm2/models/sentiment,text=response"}
MONITOR = ",role=monitor,on_failure=mask"


class Task(NamedTuple):
    """The objectives by name, the monitors, which nothing trains on, and the policy: ``tiny`` or ``smollm2``."""

    policy: str
    objectives: dict[str, str]
    monitors: dict[str, str]


def functions(*names: str, more: str = "") -> dict[str, str]:
    # They return at once, so they need no processes of their own.
    return {name: f"{HERE}:{name},isolate=false{more}" for name in names}


COVERAGE = {
    "coverage": "py:examples/quickstart/rewards.py:coverage,isolate=false",
    # In characters: policies learned to join words with hyphens, which made them one word (PROTOCOL.md).
    "brevity": "builtin:length,unit=characters,scale=-60",
}
JUDGE = functions("judge", more=MONITOR)
TASKS = {
    # Stage A
    "length": Task("tiny", {"sentiment": SENTIMENT["tiny"], "length": "builtin:length,unit=words,scale=10"}, JUDGE),
    "concise": Task("tiny", functions("informative", "concise"), JUDGE),
    "shares4": Task("tiny", functions("shares4_bc", "shares4_deh", "shares4_fm", "shares4_gpw"), JUDGE),
    "shares8": Task("tiny", functions(*(f"shares8_{c}" for c in ("b", "c", "dn", "f", "gp", "lr", "m", "w"))), JUDGE),
    "exploit": Task(
        "tiny", functions("dense_hacked", "long_hacked"), functions("dense", "long", "trigger", more=MONITOR)
    ),
    # Stage B
    "summary": Task("smollm2", COVERAGE, {"sentiment": SENTIMENT["smollm2"] + MONITOR} | JUDGE),
    "summary4": Task("smollm2", COVERAGE | {"sentiment": SENTIMENT["smollm2"]} | functions("plain"), JUDGE),
}

KL_LOSS = "--algo.kl.use_loss --algo.kl.estimator k2"
KL_IN_REWARD = "--algo.kl.init_coef 0.2 --algo.kl.target 3"
NOON = "--pama.level token --pama.noon"
ARMS = {
    "linear": f"--loss linear {KL_LOSS}",
    "min_norm": f"--loss min_norm {KL_LOSS}",
    "pama": f"--loss pama {KL_LOSS}",
    "pama-paper": f"--loss pama {NOON} {KL_LOSS}",
    # As TRL 0.8.0 and RiC's script on it: four epochs, and the KL in every reward, with an adaptive coefficient.
    "pama-trl": f"--loss pama {NOON} --pama.rescale none --train.max_epochs 4 {KL_IN_REWARD}",
    "morlhf": f"--loss morlhf {KL_LOSS}",
    "gdpo": f"--loss gdpo {KL_LOSS}",
    "pareto_rank": f"--loss pareto_rank {KL_LOSS}",
}
CONTROL = {"uniform_scalar": f"--loss uniform_scalar {KL_LOSS}"}

SHARED = (
    "--algo.advantage.estimator reinforce_baseline --actor.lr_scheduler constant_with_warmup "
    "--train.colocate_actor_ref --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --reward.num_gpus_per_node 1 "
    "--vllm.num_engines 1 --vllm.enforce_eager --vllm.gpu_memory_utilization 0.1 --vllm.sync_backend gloo "
    "--ds.zero_stage 0 --ds.param_dtype fp32 --ds.attn_implementation sdpa --pama.probe off --pama.log_rollouts all "
    "--train.full_determinism_enable"  # so that the prompts of a seed come in the same order
)
FLAGS = {
    "tiny": "--data.prompt_dataset runs/quickstart/data/prompts.jsonl --data.input_key prompt --data.max_len 64 "
    "--rollout.batch_size 8 --rollout.n_samples_per_prompt 4 --rollout.micro_batch_size 32 --rollout.max_new_tokens 40 "
    "--train.batch_size 32 --train.micro_batch_size 32 --actor.lr_warmup_ratio 0.1 --algo.kl.init_coef 0.03",
    "smollm2": "--data.prompt_dataset runs/smollm2/models/train.jsonl --data.input_key messages --data.label_key label "
    "--data.apply_chat_template --data.max_len 128 --rollout.batch_size 8 --rollout.n_samples_per_prompt 4 "
    "--rollout.micro_batch_size 16 --rollout.max_new_tokens 24 --train.batch_size 16 --train.micro_batch_size 16 "
    "--actor.lr_warmup_ratio 0.05 --algo.kl.init_coef 0.02",
}


class Stage(NamedTuple):
    """Arms × tasks × seeds.

    Attributes:
        only: arm → its tasks, where they are not all.
        at_once: seeds that all tasks get before the next ones.
        jobs: runs at a time.
    """

    tasks: tuple[str, ...]
    arms: dict[str, str]
    seeds: range
    only: dict[str, tuple[str, ...]] = {}
    at_once: int = 2
    jobs: int = 2


STEPS = {"tiny": 45, "smollm2": 40}
LEARNING_RATES = {"tiny": 4e-4, "smollm2": 5e-5}
A = ("length", "concise", "shares4", "shares8", "exploit")
B = ("summary", "summary4")
# With two whitened objectives of equal weight the min-norm point is (½, ½): min_norm is linear there.
MORE_THAN_TWO = ("shares4", "shares8", "summary4")


def with_rate(arms: dict[str, str], policy: str) -> dict[str, str]:
    return {arm: f"{flags} --actor.adam.lr {LEARNING_RATES[policy]:g}" for arm, flags in arms.items()}


STAGES = {
    "A": Stage(
        A,
        with_rate(ARMS | CONTROL, "tiny"),
        range(21, 31),
        {"min_norm": MORE_THAN_TWO, **dict.fromkeys(CONTROL, ("concise",))},
    ),
    "B": Stage(
        B,
        with_rate({arm: ARMS[arm] for arm in ("linear", "min_norm", "pama", "pama-paper")}, "smollm2"),
        range(21, 24),
        {"min_norm": MORE_THAN_TWO},
        at_once=1,
        jobs=1,
    ),
}
