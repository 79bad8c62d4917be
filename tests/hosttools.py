"""The real host's arguments, and rollouts of made-up tokens, for tests that run the host's code without its cluster."""

import argparse
import math
import os
import runpy
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from pama_plugin.host.hook import HOST_COMMAND

ROOT = Path(__file__).parents[1]

ALL_MODES = "PAMA_ALL_MODES" in os.environ


def by_hand(duration: str) -> pytest.MarkDecorator:
    """A mark for runs that CI has no time for, where another run in CI shows the same parts at work."""
    return pytest.mark.skipif(not ALL_MODES, reason=f"takes {duration}; run with PAMA_ALL_MODES=1")


# Ways to make rollouts, for tests of what prompts carry through them: the first one in CI, the others by hand.
ROLLOUT_MODES = {
    "value heads": "--algo.advantage.estimator gae --critic.save_value_network --ds.value_head_prefix score",
    "asynchronous": "--algo.advantage.estimator reinforce_baseline --train.async_enable --train.async_queue_size 1",
    "partial rollouts": "--algo.advantage.estimator group_norm --train.async_enable --train.partial_rollout_enable",
    "dynamic filtering": "--algo.advantage.estimator rloo --algo.dynamic_filtering_enable --pama.filter_by sum "
    "--algo.dynamic_filtering_range -99 99",
}


def rollout_modes(duration: str) -> list[Any]:
    """The names of ``ROLLOUT_MODES`` for parametrize; ``duration`` is that of those by hand."""
    first, *others = ROLLOUT_MODES
    return [first, *(pytest.param(mode, marks=by_hand(duration)) for mode in others)]


class _Parsed(Exception):
    pass


def parse_host_flags(
    *flags: str, extend: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """What the host's own parser, ``extend``-ed, makes of ``flags``: flat, without running the host any further.

    There is one vLLM engine unless the flags say otherwise.
    """
    stock = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        if extend is not None:
            extend(parser)
        raise _Parsed(stock(parser, ["--vllm.num_engines", "1", *flags]))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), mock.patch.object(sys, "argv", [HOST_COMMAND]):
        try:
            runpy.run_module(HOST_COMMAND, run_name="__main__", alter_sys=True)
        except _Parsed as parsed:
            return parsed.args[0]
    raise AssertionError("the host did not parse its arguments")


def host_args(*flags: str) -> SimpleNamespace:
    """The same, nested as the host nests it."""
    from openrlhf.utils.config import hierarchize

    args = hierarchize(parse_host_flags(*flags))
    args.pama_adapters = SimpleNamespace()  # as our own start sets it
    return args


def make_rollout(samples: int, seed: int = 0, names: tuple[str, ...] = ()) -> list[Any]:
    """Single-sample experiences of ragged length, as the host's sample generator returns them.

    ``names`` get a column ``reward/<name>`` each, as our rollout executor sends them.
    """
    from openrlhf.trainer.ppo_utils.experience import Experience

    generator = torch.Generator().manual_seed(seed)
    rollout = []
    for index in range(samples):
        prompt, response = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((2, 5), (1, 9)))
        length = prompt + response
        action_mask = torch.zeros(1, length - 1, dtype=torch.long)
        action_mask[:, prompt - 1 :] = 1
        columns = {f"reward/{name}": torch.randn(1, generator=generator) for name in names}
        columns |= {f"pama/problem/{name}": torch.zeros(1) for name in names}
        rollout.append(
            Experience(
                sequences=torch.randint(3, 50, (1, length), generator=generator),
                attention_mask=torch.ones(1, length, dtype=torch.long),
                action_mask=action_mask,
                prompts=[f"prompt {index}"],
                labels=[""],
                images=[None],
                mm_train_inputs=[None],
                response_length=torch.tensor([response]),
                truncated=torch.tensor([index % 3 == 0]),
                total_length=torch.tensor([float(length)]),
                info={"response_clip_ratio": torch.tensor([False])} | columns,
            )
        )
    return rollout


# What a model gives instead of a reward, by the length of the text modulo 8.
BROKEN = {0: math.nan, 1: math.inf, 2: -math.inf, 3: 1e30}


def fixed_group(name: str, ranks: int = 1) -> Any:
    """The host's own ``RayActorGroup``, whose "model" is a fixed function of the tokens.

    ``actor``, ``critic`` and ``reference`` give one number per token; any other name is a reward model. Different names
    give different numbers; ``shaky`` is BROKEN for half of the texts.
    """
    import ray
    from openrlhf.trainer.ray import launcher, utils
    from ray import cloudpickle

    seed = 0.5 + zlib.crc32(name.encode()) % 97

    class Fixed(launcher.BaseDistributedActor):
        strategy = SimpleNamespace(is_rank_0=lambda: False)
        execute_batch = launcher.BaseModelActor.execute_batch

        def forward(self, sequences, action_mask=None, attention_mask=None, **_):
            values = torch.sin(sequences * attention_mask * seed)
            if name == "shaky":
                lengths = attention_mask.sum(-1).tolist()
                return torch.tensor([BROKEN.get(length % 8, 0.5 * length) for length in lengths])
            return values.sum(-1) if action_mask is None else values[:, 1:] * action_mask

    # By value: an actor need not import OpenRLHF, vLLM and DeepSpeed for it, which takes 7 s of a core.
    for module in (launcher, utils):
        cloudpickle.register_pickle_by_value(module)
    try:
        return launcher.RayActorGroup(1, ranks, ray.remote(Fixed), num_gpus_per_actor=0.2)
    finally:
        for module in (launcher, utils):
            cloudpickle.unregister_pickle_by_value(module)


def head_of(values_BA: torch.Tensor, name: str) -> torch.Tensor:
    """The values that the head of an objective has in ``give_value_heads``."""
    return values_BA * (3.0 if name == "harmless" else 1.0)


def give_value_heads(maker: Any, critic: Any, names: Sequence[str]) -> None:
    """Let the maker see (b, A, K) values, as of a critic with one head for each of the K objectives."""
    maker.critic_model_group = critic
    dispatch, critic_refs = maker._flatten_results, None

    def with_columns(refs, copies):
        results = dispatch(refs, copies)
        if refs is critic_refs:
            results = [torch.stack([head_of(own, name) for name in names], -1).squeeze(-1) for own in results]
        return results

    def dispatch_forward(group, *args, **kwargs):
        nonlocal critic_refs
        refs = type(maker)._dispatch_forward(maker, group, *args, **kwargs)
        critic_refs = refs if group is critic else critic_refs
        return refs

    maker._flatten_results, maker._dispatch_forward = with_columns, dispatch_forward


def as_reward_groups(config: Any, actors: dict[str, Any]) -> SimpleNamespace:
    """In the place of the driver's ``RewardGroups``: ``actors`` by objective, wrapped where they are the host's."""
    from pama_plugin.host.actors.reward_groups import RankGroup

    ranks = {each.name: RankGroup(each, actors[each.name]) for each in config.scored_in("ranks") if actors}
    return SimpleNamespace(groups=(actors or {}) | ranks)


def save_tiny_model(folder: Path, tokens: int, *, embeddings: int | None = None, word: str = "t") -> str:
    """A folder with configuration, tokenizer and table of weights of a reward model whose tokens are t0, t1, …

    The weights themselves are missing.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"{word}{index}": index for index in range(tokens)}, unk_token=f"{word}0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    LlamaConfig(vocab_size=embeddings or tokens).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"{word}1").save_pretrained(folder)
    (Path(folder) / "model.safetensors.index.json").write_text('{"weight_map": {"score.weight": "model.safetensors"}}')
    return str(folder)


def evaluations(folder: Path) -> dict[str, list[float]]:
    """What the host's TensorBoard has of every ``eval/`` key, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (folder / "logs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    keys = [key for key in events.Tags()["scalars"] if key.startswith("eval/")]
    return {key.removeprefix("eval/"): [event.value for event in events.Scalars(key)] for key in keys}
