"""Our vLLM actor: the host's own, but for its executor and, on request, its random numbers."""

import asyncio
import math
from types import SimpleNamespace

import pytest

from pama_plugin.errors import RewardError
from pama_plugin.rewards import Response
from pama_plugin.settings.load import load_config

pytestmark = pytest.mark.contract


def actor_classes(seed: int | None, compare: bool = False) -> tuple[type, type]:
    from openrlhf.trainer.ray import vllm_engine

    from pama_plugin.host.actors.rollout import rollout_actor

    config = load_config("pama", ["length=builtin:length"], None, None, None, default_level="token")
    ours = rollout_actor(config, seed=seed, compare=compare).__ray_metadata__.modified_class
    return ours, vllm_engine.RolloutRayActor.__ray_metadata__.modified_class


def test_sleep_weight_sync_and_everything_else_is_the_hosts() -> None:
    ours, stock = actor_classes(None)
    own = {name for name in dir(ours) if getattr(ours, name) is not getattr(stock, name, None)}
    assert {name for name in own if not name.startswith("_") or name == "__init__"} == {
        "__init__",
        "begin_step",
        "generate_responses",
        "problems",
        "score_texts",
    }
    assert {"sleep", "wake_up", "pause_generation", "update_weight", "reset_prefix_cache"} <= set(dir(stock))


def test_an_engine_keeps_the_latest_reasons(monkeypatch) -> None:
    from pama_plugin.batch.outcome import Outcome, code_of
    from pama_plugin.errors import LONGEST_PROBLEM
    from pama_plugin.host.actors import rollout

    monkeypatch.setattr(rollout, "PROBLEMS_KEPT", 2)
    config = load_config("pama", ["length=builtin:length"], None, None, None, default_level="token")
    executor = rollout.ObjectiveExecutor(config, None)
    for problem in ("often", "once", "often", "x" * 9999, None):
        executor._remember(Outcome(math.nan, problem))
    assert list(executor.problems.values()) == ["often", "x" * LONGEST_PROBLEM]
    assert list(executor.problems)[0] == code_of(Outcome(math.nan, "often"))


def sample(seed: int | None, step: int = 0, prompt: str = "p", num_samples: int = 3) -> list[int | None]:
    """The seeds of the requests that reach the executor."""
    ours, _ = actor_classes(seed)
    actor = ours.__new__(ours)

    async def execute(*, sampling_params, **_):
        return sampling_params.seed

    async def generate():
        actor.executor, actor.steps_begun = SimpleNamespace(execute=execute, steps_done=0), 0
        await actor.begin_step(step)
        return await actor.generate_responses(
            prompt=prompt,
            label="",
            sampling_params=SimpleNamespace(seed=None),
            max_length=9,
            hf_tokenizer=None,
            num_samples=num_samples,
        )

    return asyncio.run(generate())


def test_without_full_determinism_the_engine_draws_as_the_host_lets_it() -> None:
    assert sample(None) == [None, None, None]


def test_with_a_seed_every_sample_of_every_step_has_its_own_and_always_the_same() -> None:
    seeds = sample(1)
    assert seeds == sample(1) and len(set(seeds)) == 3
    assert not set(seeds) & {*sample(1, step=1), *sample(2), *sample(1, prompt="q")}


@pytest.mark.parametrize("by_host", [None, 1])
def test_the_log_probabilities_of_the_first_two_rollouts_become_a_column(by_host) -> None:
    from pama_plugin.batch.keys import SAMPLED

    ours, _ = actor_classes(None, compare=True)
    actor = ours.__new__(ours)
    params = SimpleNamespace(seed=None, logprobs=by_host)

    async def execute(*, sampling_params, **_):
        log_probs = None if sampling_params.logprobs is None else [0.0, 0.0, -1.0, -2.0, 0.0, -4.0]
        return dict(rollout_log_probs=log_probs, observation_tokens=[5] * 6, action_ranges=[(2, 4), (5, 6)])

    async def generate():
        actor.executor, actor.steps_begun = SimpleNamespace(execute=execute, steps_done=0), 0
        found = []
        for step, max_length in ((7, 6), (8, 5), (9, 6)):  # as after a resume; OpenRLHF cuts the second response off
            await actor.begin_step(step)
            request = dict(prompt="p", label="", max_length=max_length, hf_tokenizer=None, num_samples=1)
            found += await actor.generate_responses(sampling_params=params, **request)
        return found

    first, cut, third = asyncio.run(generate())
    assert first["extra_logs"] == {SAMPLED: -7.0} and "extra_logs" not in third
    assert math.isnan(cut["extra_logs"][SAMPLED])
    assert all((each["rollout_log_probs"] is None) == (by_host is None) for each in (first, cut, third))
    assert params.logprobs == by_host, "the caller's own parameters are not changed"


@pytest.mark.parametrize("policy", ["fail", "mask", "impute:0"])
def test_a_file_that_cannot_be_imported_ends_the_run_and_not_the_engine(tmp_path, policy) -> None:
    """The host would wait for an engine that died while it starts."""
    from pama_plugin.host.actors.rollout import ObjectiveExecutor

    (tmp_path / "broken.py").write_text("import nothing_like_it\ndef f(queries, prompts, labels): ...\n")
    text = f"x=py:{tmp_path}/broken.py:f,on_failure={policy}"
    executor = ObjectiveExecutor(load_config("pama", [text], None, None, None, default_level="token"), None)
    with pytest.raises(RewardError, match="'x': cannot be loaded: ModuleNotFoundError: No module named 'nothing"):
        asyncio.run(executor.score_texts([Response("q", "p", "", "r", 1)], ["x"]))


def test_what_an_actor_has_started_ends_with_it_however_it_ends() -> None:
    """But not a process that has been given the id of one that ended before."""
    import signal
    import subprocess
    import sys
    import time

    actor = (
        "import subprocess, sys, time; from pama_plugin.host.actors import orphans\n"
        "engine, other = (subprocess.Popen(['sleep', '3600'], start_new_session=True) for _ in range(2))\n"
        "watcher = orphans.end_with_this_process([engine.pid, 2 ** 22 + 1])\n"
        "print(engine.pid, other.pid, flush=True); time.sleep(3600)"
    )
    with subprocess.Popen([sys.executable, "-c", actor], stdout=subprocess.PIPE, text=True) as process:
        engine, other = map(int, process.stdout.readline().split())
        process.send_signal(signal.SIGKILL)

    def runs(pid: int) -> bool:
        return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True).stdout[:1] not in (b"", b"Z")

    try:
        deadline = time.monotonic() + 10
        while runs(engine) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not runs(engine) and runs(other)
    finally:
        subprocess.run(["kill", "-9", str(engine), str(other)], capture_output=True)
