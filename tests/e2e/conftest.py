"""A stack of its own for the end-to-end tests: Ray by its process id, models made on the fly, every run bounded."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import WORDS, make_config, make_prompts, make_tokenizer

from pama_plugin.host.hook import HOST_COMMAND

ROOT = Path(__file__).parents[2]
LITERAL = [sys.executable, "-m", HOST_COMMAND]
BIN = Path(sys.executable).parent


class Run(NamedTuple):
    """A finished command: exit status, everything it printed, and the metrics of every global step it made."""

    status: int
    output: str
    by_step: dict[int, dict[str, float]]

    @property
    def steps(self) -> list[dict[str, float]]:
        return list(self.by_step.values())


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    lines = (ROOT / "examples" / "cpu.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    cache = BIN.parent / "cache" / "torch_extensions"  # DeepSpeed compiles its CPU operators once
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return os.environ | settings | {"TORCH_EXTENSIONS_DIR": str(cache), "PYTHONWARNINGS": "ignore", "PATH": path}


@pytest.fixture(scope="session")
def ray_address(environment: dict[str, str]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="pama-", dir="/tmp")  # short: Ray keeps sockets in it
    # Eight logical GPUs: the host asks for one per model, and Ray only counts them.
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-gpus=8", "--num-cpus=16"]
    command += ["--include-dashboard=false", f"--temp-dir={folder}"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    address = f"127.0.0.1:{port}"
    try:
        check = [BIN / "ray", "health-check", "--address", address]
        deadline = time.monotonic() + 120
        while subprocess.run(check, env=environment, capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < deadline, "Ray did not start"
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def orphaned_engines(address: str) -> list[int]:
    """The processes of vLLM that outlived the actor that started them."""
    orphans = []
    for pid in subprocess.run(["pgrep", "-f", "^VLLM::"], capture_output=True, text=True).stdout.split():
        process = Path("/proc") / pid
        try:
            ours = f":{address.rpartition(':')[2]}\0" in (process / "environ").read_text()
            orphaned = "\nPPid:\t1\n" in (process / "status").read_text()
        except OSError:  # it has ended
            continue
        if ours and orphaned:
            orphans.append(int(pid))
    return orphans


def check_that_nothing_is_left(address: str) -> None:
    """Nothing of a run outlives it, by more than some seconds."""
    deadline = time.monotonic() + 20
    while orphans := orphaned_engines(address):
        if time.monotonic() > deadline:
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"processes of vLLM outlived the run: {orphans}")
        time.sleep(0.2)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``policy``, reward models ``helpful`` and ``harmless``, classifier ``polite``, all untrained; prompts."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    fast = make_tokenizer()
    config = make_config(fast)
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    for name in ("helpful", "harmless"):
        LlamaForSequenceClassification(config).save_pretrained(folder / name)  # saves model.* and score.weight
    for name in ("policy", "helpful", "harmless"):
        fast.save_pretrained(folder / name)
    save_classifier(folder / "polite")
    prompts = make_prompts(64)
    for name, chosen in {"prompts": prompts, "held_out": prompts[:3]}.items():
        lines = [json.dumps({"prompt": prompt, "datasource": "default"}) + "\n" for prompt in chosen]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def save_classifier(folder: Path) -> None:
    """A classifier of two labels, with a tokenizer that has nothing in common with the policy's."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(names), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    config.id2label = {0: "rude", 1: "polite"}
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.fixture
def serve_rm(environment: dict[str, str], models: Path, tmp_path: Path) -> Iterator[str]:
    """The host's own reward server, with ``harmless``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "openrlhf.cli.serve_rm", "--reward.model_name_or_path", f"{models}/harmless"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--ds.attn_implementation", "eager"]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "Uvicorn running" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/get_reward"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def run_host(environment: dict[str, str], ray_address: str, models: Path, tmp_path: Path) -> Callable[..., Run]:
    """``run_host(flags, steps=…, command=…)``: the host's command on the small models, four prompts a step."""

    def run(*flags: str, **options: Any) -> Run:
        finished = run_once(*flags, **options)
        # OpenRLHF looks for a free port some time before it listens on it: another process may have taken it.
        taken = finished.status and "EADDRINUSE" in finished.output
        return run_once(*flags, **options) if taken else finished

    def run_once(*flags: str, steps: int, command: list[str] = LITERAL, limit: float = 600, kill_after: int = 0) -> Run:
        common = f"""
            --actor.model_name_or_path {models}/policy --data.prompt_dataset {models}/prompts.jsonl
            --data.input_key prompt --data.max_len 64 --data.max_samples {4 * steps} --rollout.max_new_tokens 12
            --rollout.batch_size 4 --rollout.micro_batch_size 4 --train.micro_batch_size 4
            --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --critic.num_gpus_per_node 1
            --reward.num_gpus_per_node 1 --vllm.num_engines 1 --vllm.enforce_eager --vllm.sync_backend gloo
            --vllm.gpu_memory_utilization 0.1 --ds.attn_implementation eager --ds.zero_stage 2 --ds.param_dtype fp32
            --actor.adam.lr 1e-2 --actor.lr_scheduler constant --ckpt.path {tmp_path}/checkpoints
            --ckpt.output_dir {tmp_path}/model --logger.tensorboard_dir {tmp_path}/logs
        """.split()
        log = tmp_path / "output.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *common, *flags],
                env=environment | {"RAY_ADDRESS": ray_address},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit) if not kill_after else kill(process, log, kill_after, limit)
            except subprocess.TimeoutExpired:
                stacks = what_the_actors_do()
                os.killpg(process.pid, signal.SIGKILL)
                pytest.fail(f"no end after {limit} s\n{log.read_text()[-5000:]}\n{stacks}")
        check_that_nothing_is_left(ray_address)
        output = log.read_text()
        found = re.findall(r"Global step (\d+): ({.*})", output)
        return Run(status, output, {int(step): eval(metrics, {"nan": math.nan}) for step, metrics in found})

    return run


@pytest.fixture
def check_value_heads() -> Callable[[dict[int, dict[str, float]], list[str], Path], None]:
    """``check(by_step, names, folder)``: one value head per objective, which learns, is logged and is saved."""
    import torch
    from safetensors import safe_open

    def check(by_step: dict[int, dict[str, float]], names: list[str], folder: Path) -> None:
        for step in by_step.values():
            losses = [step[f"critic_loss/{name}"] for name in names]
            assert step["critic_loss"] == pytest.approx(sum(losses) / len(names), rel=1e-4)
            assert all(f"explained_variance/{name}" in step for name in names)
        # Nearly all responses earn a length reward of 1: its head, new and close to 0, must learn that. At this rate it
        # overshoots now and then, so the loss of any one step tells little; without learning all stay at the first.
        first, *later = [step["critic_loss/length"] for step in by_step.values()]
        assert min(later) < 0.3 * first, later
        with safe_open(folder / "model_critic" / "value_heads.safetensors", "pt") as file:
            assert json.loads(file.metadata()["objectives"]) == names
            heads = file.get_tensor("value_heads")
        assert heads.shape == (len(names), 64) and heads.dtype == torch.float32 and (heads != 0).all()

    return check


def kill(process: subprocess.Popen, log: Path, step: int, limit: float) -> int:
    """SIGKILL once the log tells of ``step``: it is being saved, or the next one has begun."""
    deadline = time.monotonic() + limit
    while f"Global step {step}:" not in log.read_text():
        if process.poll() is not None:
            return process.returncode
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, limit)
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def what_the_actors_do() -> str:
    """The Python stack of every Ray worker on this machine, from py-spy."""
    listed = subprocess.run(["pgrep", "-f", "^ray::"], capture_output=True, text=True).stdout.split()
    dumps = [subprocess.run([BIN / "py-spy", "dump", "--pid", pid], capture_output=True, text=True) for pid in listed]
    return "\n".join(dump.stdout for dump in dumps)
