"""A data set of two tasks, and objectives that apply to one of them each."""

import json
import math
from statistics import fmean
from typing import Any

import pytest
from faultserver import FaultServer, judgement
from hosttools import ALL_MODES, ROLLOUT_MODES, evaluations, rollout_modes
from tiny import make_prompts

from pama_plugin.runs.rollouts import Rollout, read_rollouts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(700)]

GRADE = """
async def grade(queries, prompts, labels, answer):
    (query,), (prompt,), (right,) = queries, prompts, answer
    response = query[len(prompt):]
    with open({log!r}, "a") as log:
        log.write("call\\n")
    style = None if len(response) < 9 else len(set(response)) / 10
    return {{"correct": [float(response.count(right))], "style": style}}
"""


def rate(body: dict) -> dict:
    """A judge that counts letters in place of a language model."""
    (message,) = body["messages"]
    return judgement(json.dumps({"tone": message["content"].count("e")}))


@pytest.mark.parametrize("mode", rollout_modes("ten minutes"))
def test_objectives_that_apply_to_one_of_two_tasks(mode, run_host, models, tmp_path) -> None:
    calls = tmp_path / "calls"
    (tmp_path / "grade.py").write_text(GRADE.format(log=str(calls)))
    (tmp_path / "rubric.txt").write_text("Rate {response} to {prompt}")
    rows = [
        {"prompt": prompt, "datasource": "math" if index % 2 else "chat", "answer": "a" if index % 4 else "the"}
        for index, prompt in enumerate(make_prompts(64))
    ]
    for name, chosen in {"prompts": rows, "held_out": rows[:4]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    grade = f"py:{tmp_path}/grade.py:grade,columns=answer,when=datasource:math"
    with FaultServer(answer=rate) as judge:
        objectives = {
            "correct": f"{grade},key=correct",
            "style": f"{grade},key=style,abstain=true",
            "tone": f"judge:http://127.0.0.1:{judge.port}/v1,model=m,rubric={tmp_path}/rubric.txt,when=datasource:chat",
            "helpful": f"rm:{models}/helpful,when=datasource:chat",
        }
        if mode == "dynamic filtering":  # of what is scored in the rollout
            objectives["helpful"] += ",role=monitor"
        flags = (
            *ROLLOUT_MODES[mode].split(),
            *"--rollout.n_samples_per_prompt 4 --train.batch_size 16 --ckpt.save_steps 2 --pama.probe off".split(),
            *f"--data.prompt_dataset {tmp_path}/prompts.jsonl --eval.dataset {tmp_path}/held_out.jsonl".split(),
            *"--eval.steps 2 --eval.n_samples_per_prompt 2 --pama.log_rollouts all --algo.kl.init_coef 0".split(),
            *("--loss", "pama"),
            *(word for name, spec in objectives.items() for word in ("--pama.objective", f"{name}={spec}")),
        )
        run = run_host(*flags, "--data.max_samples", "16", steps=4)
        assert run.status == 0, run.output[-5000:]
        rollouts = read_rollouts(tmp_path / "logs")
        applying = {"chat": {"tone", "helpful"}, "math": {"correct", "style"}}
        tasks = {row["prompt"]: row["datasource"] for row in rows}
        trained = {"chat": 0, "math": 0}
        for rollout in rollouts:
            task = tasks[rollout.prompt]
            trained[task] += 1
            scored = {name for name, reward in rollout.rewards.items() if reward is not None}
            assert scored <= applying[task] and applying[task] - scored <= {"style"} and not rollout.problems
        evaluated = 2 * 2 * 2  # two evaluations of two prompts of each task, with two responses each
        if mode == "value heads":  # in other modes rollouts are made that are not trained on
            assert judge.requests == trained["chat"] + evaluated
            assert calls.read_text().count("call") == trained["math"] + evaluated
        check_metrics(run, rollouts)
        logged = evaluations(tmp_path)
        assert {key for key in logged if key.count("/") == 1 and not key.endswith(("_se", "_std"))} == {
            *("eval_math/correct", "eval_math/style", "eval_chat/tone", "eval_chat/helpful"),
            *(f"eval_all/{name}" for name in objectives),
        }
        # Asynchronous training evaluates when the generator has come that far.
        assert logged["eval_all/tone"] == logged["eval_chat/tone"] and len(logged["eval_all/tone"]) in (1, 2)
        if not ALL_MODES:
            return  # the resume costs another minute
        resumed = run_host(*flags, "--ckpt.load_enable", "--data.max_samples", "24", steps=6)
    assert resumed.status == 0, resumed.output[-5000:]
    assert list(resumed.by_step) == [5, 6]
    check_metrics(resumed, read_rollouts(tmp_path / "logs"))


def check_metrics(run: Any, rollouts: list[Rollout]) -> None:
    """What was logged is what the responses say, and nothing else."""
    for number, step in run.by_step.items():
        of_step = [rollout for rollout in rollouts if rollout.step == number]
        abstained = sum(
            rollout.rewards["style"] is None and rollout.rewards["correct"] is not None for rollout in of_step
        )
        assert step["pama/abstained/style"] == abstained and "pama/abstained/correct" not in step
        for name in of_step[0].rewards:
            rewards = [rollout.rewards[name] for rollout in of_step if rollout.rewards[name] is not None]
            assert step[f"pama/failures/{name}"] == 0 and (f"reward/{name}" in step) == bool(rewards)
            if rewards:
                assert step[f"reward/{name}"] == pytest.approx(fmean(rewards), rel=1e-3, abs=1e-5)
        # Of returns that are all the same no variance is explained.
        assert not [key for key, value in step.items() if math.isnan(value) and "explained_variance" not in key]
