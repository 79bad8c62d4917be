"""Both ways in, what they swap, what they leave alone, and what is refused before anything starts."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hosttools import parse_host_flags

from pama_plugin.cli import main
from pama_plugin.host.hook import HOST_COMMAND
from pama_plugin.settings.run import PamaConfig

pytestmark = pytest.mark.contract

LENGTH = "length=builtin:length"
LITERAL = [sys.executable, "-W", "ignore", "-m", HOST_COMMAND]

# Put on the path as sitecustomize.py, this watches a real command from inside its own process. The flags are chosen
# such that the host's validation fails right after parse_args, when all its modules are loaded and all swaps are done.
OBSERVER = """
import atexit, json, os, sys

def describe(value):
    kind = getattr(getattr(value, "__ray_metadata__", None), "modified_class", value)
    bases = [f"{base.__module__}.{base.__qualname__}" for base in getattr(kind, "__mro__", [])]
    members = vars(kind) if isinstance(kind, type) else {"": kind}
    code = {name: getattr(getattr(member, "__func__", member), "__code__", None) for name, member in members.items()}
    return bases, {name: f"{c.co_filename}:{c.co_firstlineno}" for name, c in code.items() if hasattr(c, "co_filename")}

def dump():
    host = {name: module for name, module in sys.modules.items() if name.startswith("openrlhf") or name == "__main__"}
    seen = {f"{name}:{key}": describe(value) for name, module in host.items() for key, value in vars(module).items()}
    import argparse
    seen["argparse"] = argparse.ArgumentParser.parse_args.__module__
    ours = sorted(name for name in sys.modules if name.startswith("pama_plugin"))
    with open(os.environ["OBSERVED"], "w") as file:
        json.dump({"seen": seen, "ours": ours}, file)

if os.environ.get("OBSERVED"):
    atexit.register(dump)
"""
FILTERING = ["--algo.dynamic_filtering_enable", "--rollout.n_samples_per_prompt", "4"]
FAILS_VALIDATION = ["--algo.advantage.estimator", "rloo", "--rollout.n_samples_per_prompt", "1"]


def observe(folder: Path, **commands: list[str]) -> dict[str, dict]:
    """Run the stock OpenRLHF command with each set of flags, side by side; return what was loaded when it ended."""
    (folder / "sitecustomize.py").write_text(OBSERVER)
    running = {}
    for name, flags in commands.items():
        environment = os.environ | {"PYTHONPATH": str(folder), "OBSERVED": str(folder / f"{name}.json")}
        command = [*LITERAL, *FAILS_VALIDATION, *flags]
        running[name] = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    for process in running.values():
        _, stderr = process.communicate(timeout=240)
        assert "rloo requires n_samples_per_prompt > 1" in stderr, stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in commands}


def test_without_loss_nothing_of_the_host_differs(tmp_path) -> None:
    objective = ["--pama.objective", LENGTH]
    runs = observe(
        tmp_path, stock=[], named=["--loss", "ppo"], active=["--vllm.num_engines", "1", "--loss", "pama", *objective]
    )
    stock, named, active = (runs[name]["seen"] for name in ("stock", "named", "active"))
    assert runs["stock"]["ours"] == [] and stock["argparse"] == "argparse"
    assert named == stock

    differ = {key for key, value in active.items() if value != stock.get(key, value) or "pama_plugin" in str(value)}
    assert differ == {
        "__main__:CriticModelActor",
        "__main__:RayActorGroup",
        "__main__:get_strategy",
        "openrlhf.trainer.ppo_trainer:PPOTrainer",
        "openrlhf.trainer.ppo_trainer_async:GenerateSamplesActor",
        "openrlhf.trainer.ppo_trainer_async:PPOTrainerAsync",
        "openrlhf.trainer.ppo_trainer_async:TrainingActor",
        "openrlhf.trainer.ray.vllm_engine:RolloutRayActor",
    }


def test_the_literal_command_shows_our_flags_and_refuses_before_ray_starts() -> None:
    quiet, wrong = LITERAL[:3], ["--loss", "pareto", "--pama.objective", LENGTH]
    file = importlib.util.find_spec(HOST_COMMAND).origin
    commands = [[*LITERAL, "--help"], [*LITERAL, *wrong], [*quiet, file, *wrong]]
    commands += [[*quiet, *f"-m cProfile -m {HOST_COMMAND} --loss pama --pama.objective {LENGTH}".split()]]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for words in commands]
    (shown, _), (_, refused), (_, script), (_, profiled) = (process.communicate(timeout=240) for process in running)
    assert "found 'pareto'" in script and "put `-m pama_plugin train` in the place" in profiled
    assert "unrecognized arguments" not in script + profiled
    for flag in ("--loss", "--pama.objective", "--pama.config", "--pama.level", "--pama.noon", "--actor.adam.lr"):
        assert flag in shown
    assert [process.returncode for process in running][:3] == [0, 2, 2]
    assert re.search("error: --loss .*pama, .*ppo.*, found 'pareto'", refused)
    assert "Started a local Ray instance" not in refused and "usage:" not in refused


@pytest.mark.parametrize(
    ("command", "armed"),
    [
        ("python -m {module} --loss pama", True),
        ("python -m{module} --loss pama", True),
        ("python -W ignore -X dev -um {module} --loss pama", True),
        ("python -I -Wignore {file} --loss pama", True),
        ("python -m cProfile -o out -m {module} --loss pama", True),  # of which only an error can come
        ("python openrlhf/cli/train_ppo_ray.py --loss pama", True),
        ("python my_train_ppo_ray.py --loss pama", False),
        ("python /bin/ray job submit -- python -m {module} --loss pama", False),
        ("python submit.py python {file} --loss pama", False),
        ("python -c pass -m {module} --loss pama", False),
        ("python", False),
    ],
)
def test_only_the_hosts_own_process_is_armed(command, armed) -> None:
    from pama_plugin.host import hook

    with mock.patch.object(hook, "arm") as arm:
        hook.arm_command(command.format(module=HOST_COMMAND, file=f"/site/{hook.HOST_FILE}").split())
    assert arm.called == armed


def test_the_launcher_refuses_before_it_loads_the_host(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    with mock.patch("runpy.run_module") as host, pytest.raises(SystemExit) as end:
        main(["train", "--loss", "pama", "--pama.objective", "a=py:none.py:f", "--actor.adam.lr", "1e-6"])
    assert end.value.code == 2 and not host.called
    assert capsys.readouterr().err.startswith("pama train: error: --pama.objective 'a=py:none.py:f': ")
    with mock.patch("runpy.run_module") as host, mock.patch("pama_plugin.host.hook.arm"):
        for flags in (["--pama.obj", "whatever"], ["--help"], ["--loss", "pama", "--pama.objective", LENGTH]):
            main(["train", *flags])
    assert host.call_count == 3, "what is not plainly wrong is for the host's own parser"


def install(*flags: str):
    """Parse with the host's real parser and our group, then install, without swapping anything in this process."""
    from pama_plugin.host import seam
    from pama_plugin.settings.flags import add_flags

    with mock.patch.object(seam, "_swap") as swap:
        installed = seam.install(parse_host_flags(*flags, extend=add_flags))
    return installed, swap


REINFORCE = ("--algo.advantage.estimator", "reinforce")
GROUPS = ["--algo.advantage.estimator", "reinforce_baseline", "--rollout.n_samples_per_prompt", "4"]
LORA = ("--ds.lora.rank", "8")
FOUR_BITS = (*LORA, "--ds.load_in_4bit")
TWO = ("--loss", "pama", "--pama.objective", LENGTH, "--pama.objective", "r=rm:org/model")


def ready(args) -> Any:
    """The arguments as the host's ``train`` finds them, on a cluster that is large enough."""
    from openrlhf.utils.config import hierarchize

    from pama_plugin.host.preflight.placement import make_plan
    from pama_plugin.host.seam import _ready

    nested = hierarchize(args)
    node = {"Alive": True, "NodeManagerAddress": "here", "Resources": {"GPU": 64.0, "CPU": 64.0}}
    get_strategy = _ready(lambda _: "strategy", args.pama, make_plan(args, args.pama), None, allow_waiting=False)
    with (
        mock.patch("ray.nodes", return_value=[node]),
        mock.patch("pama_plugin.host.seam.ask_nodes", return_value=[]),
        mock.patch("pama_plugin.host.seam.end_on_sigterm") as handled,
    ):
        assert get_strategy(nested) == "strategy"
    handled.assert_called_once_with(nested)
    return nested


def test_a_reward_model_makes_the_host_build_reward_groups() -> None:
    args, swap = install(*GROUPS, "--loss", "pama", "--pama.objective", LENGTH, "--pama.objective", "r=rm:org/model")
    assert isinstance(args.pama, PamaConfig) and args.pama.level == "sequence"
    assert getattr(args, "reward.model_name_or_path") == "org/model"
    assert not [key for key in vars(args) if key.startswith("pama.")]
    swap.assert_called_once_with(args, args.pama, mock.ANY, None, allow_waiting=False)

    # The host may take rewards for granted while it validates --eval.dataset, and builds the groups in train.
    assert getattr(args, "reward.remote_url")
    assert ready(args).reward.remote_url is None


def test_without_a_reward_model_the_host_builds_no_group() -> None:
    args, _ = install(*GROUPS, "--loss", "pama", "--pama.objective", LENGTH, "--pama.level", "batch", "--pama.no_noon")
    nested = ready(args)
    assert nested.reward.model_name_or_path is None and nested.reward.remote_url
    assert (args.pama.level, args.pama.noon) == ("batch", False)


@pytest.mark.parametrize(("flags", "noon"), [([], False), (["--pama.noon"], True), (["--pama.no_noon"], False)])
def test_noon_can_be_asked_for(flags, noon) -> None:
    args, _ = install(*GROUPS, "--loss", "min_norm", "--pama.objective", LENGTH, *flags)
    ready(args)
    assert args.pama.noon is noon


def test_gae_projects_tokens_unless_told() -> None:
    args, _ = install("--algo.advantage.estimator", "gae", "--loss", "pama", "--pama.objective", LENGTH)
    assert args.pama.level == "token"


def test_the_head_of_one_model_is_not_the_others() -> None:
    flags = (
        "--algo.advantage.estimator",
        "gae",
        "--loss",
        "pama",
        "--pama.objective",
        "r=rm:org/a,value_head_prefix=h",
    )
    args, _ = install(*flags, "--pama.objective", "s=rm:org/b")
    assert getattr(args, "ds.value_head_prefix") == "score"


def test_with_gae_the_critic_starts_as_the_first_reward_model_as_in_the_host() -> None:
    args, _ = install("--algo.advantage.estimator", "gae", *TWO)
    assert getattr(args, "critic.model_name_or_path") == "org/model"


def test_the_host_looks_names_up_where_they_are_swapped() -> None:
    """A body that bound them elsewhere would make our swap a silent no-op."""
    import inspect

    import openrlhf.cli.train_ppo_ray as command
    import openrlhf.trainer.ray.vllm_engine as vllm_engine
    from openrlhf.trainer import ppo_trainer_async

    looked_up = {"RayActorGroup", "RewardModelActor", "PolicyModelActor", "CriticModelActor", "get_strategy"}
    assert looked_up <= set(command.train.__code__.co_names)
    trainer_async = inspect.getsource(ppo_trainer_async)
    assert "= TrainingActor.remote(" in trainer_async and "= GenerateSamplesActor.remote(" in trainer_async
    assert "from openrlhf.trainer.ppo_trainer import PPOTrainer" in inspect.getsource(command.train)
    assert "RolloutRayActor" in vllm_engine.create_vllm_engines.__code__.co_names


def test_4_bits_need_their_package(monkeypatch) -> None:
    from pama_plugin.errors import ConfigError
    from pama_plugin.host.preflight import flags
    from pama_plugin.settings.flags import add_flags
    from pama_plugin.settings.load import load_config

    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    args = parse_host_flags(*TWO, *GROUPS, *FOUR_BITS, extend=add_flags)
    with pytest.raises(ConfigError, match="--ds.load_in_4bit needs the package bitsandbytes, found none"):
        flags.check_models(args, load_config("pama", [LENGTH], None, None, None, default_level="token"))


@pytest.mark.parametrize("flags", [(), ("--loss", "ppo")])
def test_stock_flags_come_through_untouched(flags) -> None:
    args, swap = install(*GROUPS, *flags)
    assert vars(args) == vars(parse_host_flags(*GROUPS))
    swap.assert_not_called()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pama.objective", LENGTH), r"--pama\.\*.*--loss.*other than ppo, found --loss None"),
        (("--loss", "ppo", "--pama.level", "token"), r"--pama\.\*.*other than ppo, found --loss ppo"),
        (("--loss", "pama"), "at least one --pama.objective"),
        (
            ("--loss", "pareto_rank", "--pama.objective", LENGTH, *REINFORCE, "--rollout.n_samples_per_prompt", "3"),
            "--rollout.n_samples_per_prompt must be at least 4 with --loss pareto_rank.*found 3",
        ),
        (
            ("--loss", "gdpo", "--pama.objective", LENGTH, *REINFORCE, "--rollout.n_samples_per_prompt", "1"),
            "--rollout.n_samples_per_prompt must be at least 2 with --loss gdpo.*found 1",
        ),
        (
            ("--loss", "pama", "--pama.objective", LENGTH, *REINFORCE, "--pama.level", "token")
            + ("--pama.option", "reference_clip=0.2", "--algo.kl.estimator", "k3"),
            "--pama.option reference_clip needs .*--algo.kl.use_loss or --algo.kl.estimator k1, found 0.01 and k3",
        ),
        ((*TWO, *GROUPS, "--vllm.num_engines", "0"), "--vllm.num_engines must be at least 1.*found none"),
        ((*TWO, *GROUPS, "--reward.model_name_or_path", "x"), "--pama.objective, found --reward.model_name_or_path x"),
        ((*TWO, *GROUPS, "--reward.remote_url", "http://h"), "--pama.objective, found --reward.remote_url http://h"),
        ((*TWO, *GROUPS, "--train.agent_func_path", "a.py"), "--train.agent_func_path must be a file, found a.py"),
        ((*TWO, *GROUPS, "--pama.objective", "s=agent:k"), "agent.*--train.agent_func_path, found none .*s$"),
        (
            (*TWO, *GROUPS, *FILTERING),
            "--pama.filter_by .*within --algo.dynamic_filtering_range 0 1.*found none with .*r",
        ),
        ((*TWO, *GROUPS, "--pama.filter_by", "sum"), "--pama.filter_by .*--algo.dynamic_filtering_enable"),
        ((*TWO, *GROUPS, *FILTERING, "--pama.filter_by", "q"), "--pama.filter_by .*sum .*r.*found 'q'"),
        ((*TWO, *GROUPS, *FILTERING, "--pama.filter_by", "sum"), "sum needs a --algo.dynamic_filtering_range.*default"),
        (
            (*TWO, *GROUPS, *FILTERING, "--pama.filter_by", "r"),
            "--pama.filter_by r .*in the rollout, found r of kind rm",
        ),
        (
            (*TWO, *GROUPS, *FILTERING, "--pama.filter_by", "sum", "--algo.dynamic_filtering_range", "0", "9"),
            "--pama.filter_by sum .*in the rollout, found r of kind rm",
        ),
        (
            ("--loss", "pama", "--pama.objective", f"{LENGTH},on_failure=mask", *GROUPS, *FILTERING),
            "--algo.dynamic_filtering_enable.*on_failure.*fail, found .*length$",
        ),
        (
            ("--loss", "pama", "--pama.objective", f"{LENGTH},range=1:12,weight=0.01", *GROUPS, *FILTERING),
            "--algo.dynamic_filtering_range 0 1 .*between 1 and 12.*length.*filtered out",
        ),
        (
            (
                "--loss",
                "pama",
                "--pama.objective",
                f"{LENGTH},range=0:2",
                "--pama.objective",
                "s=builtin:json,range=0:1",
            )
            + (*GROUPS, *FILTERING, "--pama.filter_by", "sum", "--algo.dynamic_filtering_range", "3", "4"),
            "--algo.dynamic_filtering_range 3 4 .*between 0 and 3.*sum.*filtered out",
        ),
        (
            (
                "--loss",
                "pama",
                "--pama.objective",
                f"{LENGTH},normalize=group",
                *"--algo.advantage.estimator reinforce".split(),
            ),
            "--rollout.n_samples_per_prompt.*at least 2.*normalize=group.*length.*found 1$",
        ),
        ((*TWO, *GROUPS, "--pama.probe", "maybe"), "--pama.probe.*off, warn, strict, found 'maybe'"),
        ((*TWO, *GROUPS, "--pama.probe_gradients", "0"), "--pama.probe_gradients.*whole number.*found '0'"),
        ((*TWO, *GROUPS, "--pama.stop_at_front", "2"), "--pama.stop_at_front.*SHARE.*found '2'"),
        (
            (*TWO, *GROUPS, "--pama.probe_gradients", "9", "--ds.tensor_parallel_size", "2"),
            "--ds.tensor_parallel_size must be 1.*--pama.probe_gradients.*found 2",
        ),
        (
            (*TWO, *GROUPS, "--pama.probe_gradients", "9", "--actor.gradient_checkpointing_reentrant"),
            "--actor.gradient_checkpointing_reentrant must be False.*--pama.probe_gradients.*found True",
        ),
        (
            (*TWO, *GROUPS, *LORA, "--ds.tensor_parallel_size", "2"),
            "--ds.tensor_parallel_size must be 1 with --ds.lora.rank.*found 2",
        ),
        ((*TWO, *GROUPS, *LORA, "--train.enable_ema"), "--train.enable_ema must be False with --ds.lora.rank.*True"),
        ((*TWO, *GROUPS, *LORA, "--actor.optim", "muon"), "--actor.optim must be adam with --ds.lora.rank.*found muon"),
        (
            (*TWO, *GROUPS, *LORA, "--ds.lora.target_modules", "all-linear"),
            "target_modules must be left out.*all-linear",
        ),
        (
            (*TWO, *GROUPS, "--data.max_images_per_prompt", "2"),
            "--data.max_images_per_prompt.*left out.*text alone.*found 2",
        ),
        ((*TWO, *GROUPS, "--ds.load_in_4bit"), "--ds.lora.rank must be above 0 with --ds.load_in_4bit.*found 0"),
        ((*TWO, *GROUPS, *FOUR_BITS, "--ds.param_dtype", "fp16"), "--ds.param_dtype must be bf16.*found fp16"),
        ((*TWO, *GROUPS, *FOUR_BITS, "--ds.zero_stage", "3"), "--ds.zero_stage must be at most 2.*found 3"),
        (
            (*TWO, "--algo.advantage.estimator", "gae", "--ds.tensor_parallel_size", "2"),
            "--ds.tensor_parallel_size.*1.*gae.*several objectives.*found 2",
        ),
        (
            (*TWO, *GROUPS, "--train.async_enable", "--eval.dataset", "x", "--ds.tensor_parallel_size", "2")
            + ("--actor.num_gpus_per_node", "8"),
            "--ds.ring_attn_size × --ds.tensor_parallel_size.*1.*--eval.dataset.*--train.async_enable.*found 2",
        ),
        ((*TWO, *GROUPS, "--pama.best", "mean"), "--pama.best.*min, weighted, hypervolume, found 'mean'"),
        (
            (*TWO, *GROUPS, "--pama.best", "min", "--ckpt.best_metric_key", "k"),
            "one of --pama.best and --ckpt.best_metric_key.*found min and k",
        ),
        (("--loss", "ppo", "--pama.config", "run.yaml"), r"--pama\.\*.*other than ppo, found --loss ppo"),
    ],
)
def test_what_cannot_run_is_refused(flags, message) -> None:
    from pama_plugin.errors import ConfigError

    with pytest.raises(ConfigError, match=message):
        install(*flags)


def test_a_column_that_the_data_set_lacks_is_refused(tmp_path) -> None:
    from pama_plugin.errors import ConfigError

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    flags = (*GROUPS, "--loss", "linear", "--data.prompt_dataset", f"{tmp_path}/prompts.jsonl")
    with pytest.raises(ConfigError, match="--data.prompt_dataset must have the column task, found prompt"):
        install(*flags, "--pama.objective", "x=builtin:length,when=task:a")


def test_a_rule_of_rewards_whose_value_nobody_knows_is_refused_with_a_critic(monkeypatch) -> None:
    from pama_plugin import Combination, register_rule
    from pama_plugin.aggregation import registry
    from pama_plugin.aggregation.weights import shares
    from pama_plugin.errors import ConfigError

    monkeypatch.setattr(registry.RULES, "entries", dict(registry.RULES.entries))

    def largest(advantages_KBA, mask_BA, weights_KB, active_K, present_KB):
        return Combination(advantages_KBA.amax(0), shares(weights_KB))

    register_rule("largest", of="rewards")(largest)
    register_rule("a_sum", of="rewards", linear=True)(largest)
    flags = ("--pama.objective", LENGTH, "--algo.advantage.estimator", "gae")
    with pytest.raises(ConfigError, match="--loss largest .*--algo.advantage.estimator.*without a critic, found gae"):
        install("--loss", "largest", *flags)
    assert install("--loss", "a_sum", *flags)[0].pama.loss == "a_sum"


@pytest.mark.parametrize(
    ("objective", "warning"),
    [
        ("j=http:http://judge.example/get_reward", "objective 'j': .*plain http"),
        (LENGTH, "--train.agent_func_path: .*NAME=agent:reward"),
    ],
)
def test_what_may_be_meant_otherwise_is_pointed_out(objective, warning, tmp_path, caplog) -> None:
    (tmp_path / "agent.py").write_text("")
    install("--loss", "pama", "--pama.objective", objective, "--train.agent_func_path", f"{tmp_path}/agent.py", *GROUPS)
    assert re.search(warning, caplog.text)


def test_an_unsupported_release_is_refused_unless_overridden(monkeypatch, caplog) -> None:
    from pama_plugin.errors import ConfigError
    from pama_plugin.host.preflight import fingerprints

    monkeypatch.setattr(fingerprints, "version", lambda _: "0.12.0")
    flags = (*TWO, *GROUPS)
    with pytest.raises(ConfigError, match="0.11.0, 0.11.1, 0.11.2, found 0.12.0.*--pama.allow_unsupported_host"):
        install(*flags)
    assert install(*flags, "--pama.allow_unsupported_host")[0].pama
    assert re.search("OpenRLHF .*0.11.0, 0.11.1, 0.11.2, found 0.12.0", caplog.text)


def test_on_the_installed_release_there_is_nothing_to_warn_of(caplog) -> None:
    install(*TWO, *GROUPS)
    assert not caplog.records


@pytest.mark.parametrize(
    "command", [LITERAL, [Path(sys.executable).with_name("pama"), "train"]], ids=["literal", "pama"]
)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "pamma", "--pama.objective", LENGTH], "--loss must be one of "),
        (
            ["--loss", "pama", "--pama.objective", LENGTH, "--pama.probe_gradients", "zero"],
            "--pama.probe_gradients must",
        ),
    ],
)
def test_a_mistake_in_our_flags_is_found_before_the_host_is_imported(command, flags, message, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print(*(name for name in ('ray', 'vllm', 'deepspeed') if name in sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    found = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True)
    assert found.returncode == 2 and message in found.stderr and found.stderr.count("\n") == 1
    assert found.stdout.strip() == ""


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "pama", "--pama.obj", LENGTH],
        ["--los", "pama", "--pama.objective", LENGTH],
        ["--loss", "pama", "--pama.conf", "run.yaml"],
    ],
)
def test_abbreviations_are_left_to_the_hosts_parser(flags) -> None:
    from pama_plugin.settings.flags import load_flags

    assert load_flags(flags) is None


def test_help_is_shown_whatever_else_is_asked_for(capsys) -> None:
    from pama_plugin.host.hook import check_flags

    check_flags("pama train", ["--loss", "pama", "--help"])
    assert capsys.readouterr().err == ""


def test_a_misspelt_flag_of_ours_is_not_left_to_the_host(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--loss", "pama", "--pama.objective", LENGTH, "--pama.lvel=token"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "pama train: error: there is no flag --pama.lvel; did you mean --pama.level?\n"


@pytest.mark.parametrize(
    ("flags", "compared"),
    [
        ([], True),
        (["--rollout.temperature", "0.7"], False),
        (["--rollout.top_p", "0.9"], False),
        (["--train.async_enable"], False),
        (["--algo.dynamic_filtering_enable"], False),
    ],
)
def test_vllm_is_compared_with_the_policy_where_their_numbers_mean_the_same(flags, compared) -> None:
    from pama_plugin.host.seam import _may_compare

    assert _may_compare(parse_host_flags(*flags)) == compared
