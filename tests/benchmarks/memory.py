"""What one rank keeps according to ``--pama.plan``, and what DeepSpeed keeps, for the stages of ZeRO.

    PYTHONPATH=.venv/bitsandbytes .venv/bin/python tests/benchmarks/memory.py        four minutes

A Llama of 11 M parameters on one rank, which has nothing to share with others. Counted are the tensors that the process
holds in the second step: after the backward pass, and when Adam's step begins.
"""

import gc
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.executable).parent / "cache" / "torch_extensions")

import openrlhf.trainer.ray.vllm_engine  # noqa: E402, F401  before deepspeed
import torch  # noqa: E402
from hosttools import host_args  # noqa: E402
from openrlhf.models import Actor  # noqa: E402
from openrlhf.utils.utils import get_strategy  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from pama_plugin.host.preflight.memory import BYTES, IN_4_BITS, kept, measure  # noqa: E402

SHAPE = dict(vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8)
ADAM = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
TRAINING = dict(optim="adam", muon={}, adam=ADAM, lr_scheduler="constant", scheduler_steps=10)
CASES = (
    *(f"--ds.zero_stage {stage} --ds.param_dtype bf16" for stage in range(4)),
    *(f"--ds.zero_stage {stage} --ds.param_dtype fp32" for stage in (0, 2)),
    *(f"--ds.zero_stage {stage} --ds.param_dtype bf16 --ds.lora.rank 8" for stage in (0, 2)),
    "--ds.zero_stage 2 --ds.param_dtype bf16 --ds.lora.rank 8 --ds.load_in_4bit",
)


def held() -> int:
    """Bytes of all tensors of this process, and of their gradients."""
    gc.collect()
    storages = {}
    for tensor in (found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)):
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if part is not None and part.device.type == "cpu":
                storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


def compare(folder: str, flags: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    args = host_args("--train.batch_size", "2", "--train.micro_batch_size", "2", *flags)
    strategy, ds = get_strategy(args), args.ds
    strategy.setup_distributed()
    size = measure(LlamaForCausalLM(LlamaConfig(**SHAPE)), ds.lora.rank)
    before = held()
    actor = Actor(
        folder,
        attn_implementation="eager",
        param_dtype=ds.param_dtype,
        load_in_4bit=ds.load_in_4bit,
        lora_rank=ds.lora.rank,
        target_modules="all-linear",
        ds_config=strategy.get_ds_train_config(),
    )
    actor, optimizer, scheduler = strategy.prepare((actor, TRAINING))
    tokens, mask = torch.randint(0, 512, (2, 8)), torch.ones(2, 7, dtype=torch.long)
    adam, found = getattr(optimizer, "optimizer", optimizer), []
    adam.register_step_pre_hook(lambda *_: found.append(held() - before))
    for _ in range(2):
        strategy.backward(actor(tokens, mask, torch.ones_like(tokens)).float().mean(), actor, optimizer)
        found.append(held() - before)
        strategy.optimizer_step(optimizer, actor, scheduler)
    after_backward, in_step = found[-2:]

    width = BYTES[ds.param_dtype]
    weights = width * (size.base + size.adapters) + ds.load_in_4bit * (IN_4_BITS - width) * size.linear
    trained = size.adapters if ds.lora.rank else size.base
    estimated = kept(weights, trained, width, stage=ds.zero_stage, ranks=1)
    print(
        f"{' '.join(flags):86} {estimated / 2**20:9.1f} {after_backward / 2**20:9.1f} {in_step / 2**20:9.1f}",
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compare(sys.argv[1], sys.argv[2:])
        sys.exit()
    print(f"{'MiB on one rank':86} {'estimated':>9} {'backward':>9} {'step':>9}", flush=True)
    with tempfile.TemporaryDirectory() as model:
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(model)
        for case in CASES:
            command = [sys.executable, __file__, model, *case.split()]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            print(run.stdout.splitlines()[-1], flush=True)
