"""Checks every reward on known pairs before the first step, and rewards and sampler on the first rollout."""

import itertools
import math
from collections.abc import Sequence

import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience as HostExperience
from openrlhf.utils.logging_utils import init_logger

from pama_plugin.batch.advice import advise
from pama_plugin.batch.behaviour import SAME_MODEL, divergence
from pama_plugin.batch.keys import SAMPLED
from pama_plugin.batch.table import RewardTable
from pama_plugin.errors import PamaError, ProbeError
from pama_plugin.host.actors.collector import RewardCollector
from pama_plugin.host.protocols import Experience
from pama_plugin.rewards import Response
from pama_plugin.rewards.probes import PAIRS, Finding, judge
from pama_plugin.settings.objective import Objective
from pama_plugin.settings.run import PamaConfig

logger = init_logger(__name__)

TAIL = 16  # tokens to show from the end of a text
INSPECTED = 8  # responses of the first rollout to check for truncation


def probe_pairs(collector: RewardCollector) -> None:
    """Score the built-in pairs in the same way as rollouts, and print the mean rewards of every objective.

    Args:
        collector: has the models, and the vLLM engines, the first of which scores the rollout's objectives.

    Raises:
        ProbeError: with ``--pama.probe strict``, if a reward is certainly broken.
    """
    pairs = [pair for pairs in PAIRS.values() for pair in pairs]
    texts = [(pair.prompt, pair.good) for pair in pairs] + [(pair.prompt, pair.bad) for pair in pairs]
    samples = [_as_sample(collector, prompt, text) for prompt, text in texts]
    responses = [_as_response(collector, *text, sample) for text, sample in zip(texts, samples)]
    rewards = {name: column.tolist() for name, column in collector.score_with_models(samples).items()}
    skipped = {}
    for objective in collector.config.objectives:
        if objective.reward_kind.scored_in == "agent":
            skipped[objective.name] = "the agent scores it"
        elif objective.reward_kind.reads_labels and collector.args.data.label_key:
            skipped[objective.name] = "it may read the labels of the data set"
        elif getattr(objective.settings, "columns", ()):
            skipped[objective.name] = "it reads columns of the data set"
    asked = [objective.name for objective in collector.config.scored_in("rollout") if objective.name not in skipped]
    rewards |= ray.get(collector.vllm_engines[0].score_texts.remote(responses, asked))

    lines = [f"PAMA probe: {len(pairs)} pairs of a good and a bad response"]
    findings = {}
    for objective in collector.config.objectives:
        name = objective.name
        if name in skipped:
            lines.append(f"{name}: not probed, {skipped[name]}")
            continue
        good, bad = rewards[name][: len(pairs)], rewards[name][len(pairs) :]
        findings[name] = judge(good, bad, aspect=objective.probe, **_judged_as(objective))
        tail = _tail(collector, objective, samples[0], responses[0])
        lines.append(f"{name}: good {_mean(good):g}, bad {_mean(bad):g} on average; it sees {tail!r}")
    print("\n".join(lines), flush=True)
    _report(collector.config, findings, "the probe")


def probe_rollout(
    collector: RewardCollector, table: RewardTable, experiences: list[Experience], unseen: set[str]
) -> None:
    """Check the first rollout batch for constant rewards, failures, and responses truncated by a maximum length.

    Args:
        collector: has the models.
        table: the rewards.
        experiences: the responses.
        unseen: names of the objectives to check. Those that apply to the batch are removed.

    Raises:
        ProbeError: with ``--pama.probe strict``, if a reward is certainly broken.
    """
    findings = {}
    first = len(unseen) == len(collector.config.objectives)
    for objective in [each for each in collector.config.objectives if each.name in unseen]:
        applies_B = table.applies_to(objective.name)
        if not applies_B.any():
            continue
        unseen.remove(objective.name)
        rewards = table.row(objective.name)[applies_B].tolist()
        findings[objective.name] = judge(rewards, [], aspect=None, **_judged_as(objective))
        if objective.reward_kind.scored_in == "replicas":
            applying = itertools.compress(collector.conversations.of(experiences), applies_B.tolist())
            conversations = list(itertools.islice(applying, INSPECTED))
            inspected = [collector.groups[objective.name].inspect(conversation) for conversation in conversations]
            cut = [inspection for inspection in inspected if inspection and inspection.truncated_response]
            if cut:
                text = (
                    f"truncates {len(cut)} of {len(inspected)} responses to max_length; it sees the end {cut[0].tail!r}"
                )
                findings[objective.name].append(Finding(text, True))
    _report(collector.config, findings, "the first rollout")
    for sentence in advise(collector.config, table) if first else ():
        logger.warning(f"PAMA: {sentence}")


def check_sampler(experiences: list[Experience]) -> None:
    """Compare what vLLM and the policy think of vLLM's samples, and drop the column with it.

    Raises:
        PamaError: vLLM samples from another model than the one that is trained.
    """
    sampled_B = torch.cat([experience.info.pop(SAMPLED) for experience in experiences]).double()
    masks = [experience.action_mask.bool() for experience in experiences]
    kept = [experience.action_log_probs.double().masked_fill(~mask, 0) for experience, mask in zip(experiences, masks)]
    policy_B, tokens_B = (torch.cat([each.sum(1) for each in parts]) for parts in (kept, masks))
    gap = divergence(sampled_B, policy_B, tokens_B)
    if not gap <= SAME_MODEL:  # or NaN
        raise PamaError(
            "vLLM must sample from the policy that is trained, found a divergence of "
            f"{gap:.3g} nats per token between them, more than {SAME_MODEL}: vLLM has other weights, or another "
            "precision"
        )


def _judged_as(objective: Objective) -> dict[str, bool]:
    tolerant = objective.on_failure.action != "fail"
    return {"learned": objective.reward_kind.learned, "tolerant": tolerant, "abstains": objective.abstain}


def _report(config: PamaConfig, findings: dict[str, list[Finding]], where: str) -> None:
    broken = []
    for name, listed in findings.items():
        for finding in listed:
            logger.warning(f"PAMA: in {where} objective {name!r} {finding.text}")
            if finding.certain:
                broken.append(f"{name!r} {finding.text}")
    if broken and config.probe == "strict":
        raise ProbeError(f"--pama.probe strict: in {where} {'; '.join(broken)}")


def _as_sample(collector: RewardCollector, prompt: str, text: str) -> Experience:
    """Build the rollout that OpenRLHF would make of a data-set prompt with the response ``text``."""
    data, tokenizer = collector.args.data, collector.tokenizer
    if data.apply_chat_template:
        messages = [{"role": "user", "content": prompt}]
        templated = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        templated = (data.input_template or "{} ").format(prompt)
    if collector.config.scored_in("replicas"):
        collector.conversations.origins[templated] = prompt
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (templated, text))
    after = after if tokenizer.eos_token_id is None else [*after, tokenizer.eos_token_id]
    sequences = torch.tensor([[*before, *after]])
    action_mask = torch.zeros_like(sequences)
    action_mask[:, len(before) :] = 1
    return HostExperience(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        action_mask=action_mask[:, 1:],
        prompts=[templated],
        labels=[""],
        info={},
    )


def _as_response(collector: RewardCollector, prompt: str, text: str, sample: Experience) -> Response:
    query = collector.tokenizer.decode(sample.sequences[0], skip_special_tokens=False)
    return Response(query, sample.prompts[0], "", text, int(sample.action_mask.sum()))


def _tail(collector: RewardCollector, objective: Objective, sample: Experience, response: Response) -> str:
    """The end of a text, as the objective's reward reads it."""
    if objective.reward_kind.scored_in == "replicas":
        (conversation,) = collector.conversations.of([sample])
        inspection = collector.groups[objective.name].inspect(conversation)
        return inspection.tail if inspection else "nothing"
    if objective.reward_kind.scored_in == "ranks":
        return str(collector.tokenizer.decode(sample.sequences[0][-TAIL:], skip_special_tokens=False))
    return response.query[-4 * TAIL :]


def _mean(rewards: Sequence[float]) -> float:
    finite = [reward for reward in rewards if math.isfinite(reward)]
    return sum(finite) / len(finite) if finite else math.nan
