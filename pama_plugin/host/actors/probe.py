"""Is every reward what it is taken for? Asked before the first step, and of the first rollout before training on it."""

import math
from collections.abc import Sequence
from typing import Any

import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.utils.logging_utils import init_logger

from pama_plugin.errors import ProbeError
from pama_plugin.rewards import Response
from pama_plugin.rewards.probes import PAIRS, Finding, judge
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

logger = init_logger(__name__)

TAIL = 16  # tokens of a text's end that are shown
LEARNED = ("rm", "hf", "http")  # a rule may well give all texts the same
INSPECTED = 8  # responses of the first rollout whose truncation is looked at


def probe_pairs(maker: Any, vllm_engines: list[Any]) -> None:
    """Score the built-in pairs as rollouts are scored, and print what every objective makes of them.

    Args:
        maker: the experience maker, with the reward groups.
        vllm_engines: the first one scores what is scored in the rollout.

    Raises:
        ProbeError: with ``--pama.probe strict``, of a reward that is broken for certain.
    """
    pairs = [pair for pairs in PAIRS.values() for pair in pairs]
    texts = [(pair.prompt, pair.good) for pair in pairs] + [(pair.prompt, pair.bad) for pair in pairs]
    samples = [_as_sample(maker, prompt, text) for prompt, text in texts]
    responses = [_as_response(maker, *text, sample) for text, sample in zip(texts, samples)]
    rewards = {name: column.tolist() for name, column in maker.score_models(samples).items()}
    rewards |= ray.get(vllm_engines[0].score_texts.remote(responses))

    lines = [f"PAMA probe: {len(pairs)} pairs of a good and a bad response"]
    findings = {}
    for own in maker.config.objectives:
        if own.kind == "agent":
            lines.append(f"{own.name}: not probed, the agent scores it")
            continue
        if own.kind in ("py", "http") and maker.args.data.label_key:
            lines.append(f"{own.name}: not probed, it may read the labels of the data set")
            continue
        good, bad = rewards[own.name][: len(pairs)], rewards[own.name][len(pairs) :]
        findings[own.name] = judge(good, bad, aspect=own.probe, **_judged_as(own))
        tail = _tail(maker, own.name, samples[0], responses[0])
        lines.append(f"{own.name}: good {_mean(good):g}, bad {_mean(bad):g} on average; it sees {tail!r}")
    print("\n".join(lines), flush=True)
    _report(maker.config, findings, "the probe")


def probe_rollout(maker: Any, experiences: list[Experience]) -> None:
    """What the first rollout batch got: constants, failures, and responses that a model's maximum length cuts off.

    Raises:
        ProbeError: with ``--pama.probe strict``, of a reward that is broken for certain.
    """
    findings = {}
    for own in maker.config.objectives:
        rewards = torch.cat([experience.info[f"reward/{own.name}"] for experience in experiences]).tolist()
        found = judge(rewards, [], aspect=None, **_judged_as(own))
        if own.kind == "hf":
            conversations = maker.conversations.of(experiences)[:INSPECTED]
            inspected = [_inspect(maker, own.name, each) for each in conversations]
            cut = [each for each in inspected if each and each.truncated_response]
            if cut:
                text = f"max_length cuts {len(cut)} of {len(inspected)} responses; it sees the end {cut[0].tail!r}"
                found.append(Finding(text, True))
        findings[own.name] = found
    _report(maker.config, findings, "the first rollout")


def _judged_as(own: Objective) -> dict[str, bool]:
    return {"learned": own.kind in LEARNED, "tolerant": own.on_failure.action != "fail"}


def _report(config: PamaConfig, findings: dict[str, list[Finding]], where: str) -> None:
    broken = []
    for name, own in findings.items():
        for finding in own:
            logger.warning(f"PAMA: in {where} objective {name!r} {finding.text}")
            if finding.certain:
                broken.append(f"{name!r} {finding.text}")
    if broken and config.probe == "strict":
        raise ProbeError(f"--pama.probe strict: in {where} {'; '.join(broken)}")


def _as_sample(maker: Any, prompt: str, text: str) -> Experience:
    """A rollout of ``text``, as the host would have made it of a prompt in the data set."""
    data, tokenizer = maker.args.data, maker.tokenizer
    if data.apply_chat_template:
        messages = [{"role": "user", "content": prompt}]
        templated = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        templated = (data.input_template or "{} ").format(prompt)
    if maker.config.of_kind("hf"):
        maker.conversations.origins[templated] = prompt
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (templated, text))
    after = after if tokenizer.eos_token_id is None else [*after, tokenizer.eos_token_id]
    sequences = torch.tensor([[*before, *after]])
    action_mask = torch.zeros_like(sequences)
    action_mask[:, len(before) :] = 1
    return Experience(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        action_mask=action_mask[:, 1:],
        prompts=[templated],
        labels=[""],
        info={},
    )


def _as_response(maker: Any, prompt: str, text: str, sample: Experience) -> Response:
    query = maker.tokenizer.decode(sample.sequences[0], skip_special_tokens=False)
    return Response(query, sample.prompts[0], "", text, int(sample.action_mask.sum()))


def _tail(maker: Any, name: str, sample: Experience, response: Response) -> str:
    """The end of a text as whoever scores it sees it."""
    (own,) = (objective for objective in maker.config.objectives if objective.name == name)
    if own.kind == "hf":
        (conversation,) = maker.conversations.of([sample])
        inspection = _inspect(maker, name, conversation)
        return inspection.tail if inspection else "nothing"
    if own.kind == "rm":
        return maker.tokenizer.decode(sample.sequences[0][-TAIL:], skip_special_tokens=False)
    return response.query[-4 * TAIL :]


def _inspect(maker: Any, name: str, conversation: Any) -> Any:
    """None of a conversation that the model cannot read: its missing reward is reported, too."""
    try:
        return maker.reward_model_group.groups[name].inspect(conversation)
    except ray.exceptions.RayError:
        return None


def _mean(rewards: Sequence[float]) -> float:
    given = [reward for reward in rewards if math.isfinite(reward)]
    return sum(given) / len(given) if given else math.nan
