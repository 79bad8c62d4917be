"""The gradient probe against gradients taken token by token, with the host's own policy class."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.contract


@pytest.fixture
def rank():
    """A policy actor with dropout, whose engine must not be called."""
    from openrlhf.models import Actor
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.3)
    actor = Actor(GPT2LMHeadModel(config))
    actor.packing_samples = False  # which it reads of the flags when it loads the model itself
    engine = nn.Module()
    engine.module = actor.model
    actor.model = engine
    return SimpleNamespace(actor=actor)


def make_part(rows: int, advantages: int, seed: int):
    from pama_plugin.host.actors.gradients import Part

    generator = torch.Generator().manual_seed(seed)
    action_mask = (torch.rand(rows, 9, generator=generator) < 0.7).long()
    return Part(
        torch.randint(2, 40, (rows, 12), generator=generator),
        torch.ones(rows, 12, dtype=torch.long),
        action_mask,
        torch.randn(advantages, rows, 9, generator=generator),
    )


def without_dropout(rank) -> None:
    for module in rank.actor.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def test_cosines_equal_those_of_gradients_taken_token_by_token(rank) -> None:
    from pama_plugin.host.actors.gradients import cosines_on_rank

    without_dropout(rank)
    parts = [make_part(2, 4, seed=1), make_part(1, 4, seed=2)]
    found = cosines_on_rank(rank, parts)

    actor = copy.deepcopy(rank.actor)
    actor.model = actor.model.module
    totals = [0.0] * 4
    for part in parts:
        log_probs = actor(part.sequences, part.action_mask, attention_mask=part.attention_mask)
        for row, token in part.action_mask.nonzero().tolist():
            grads = torch.autograd.grad(log_probs[row, token], list(actor.parameters()), retain_graph=True)
            flat = torch.cat([grad.flatten() for grad in grads]).double()
            totals = [total + flat * part.advantages_JbA[j, row, token] for j, total in enumerate(totals)]
    expected = [torch.cosine_similarity(totals[0], own, dim=0).item() for own in totals[1:]]
    assert found == pytest.approx(expected, abs=1e-5) and len(set(found)) == 3


def test_the_same_advantages_agree_in_spite_of_dropout_and_opposite_ones_disagree(rank) -> None:
    from pama_plugin.host.actors.gradients import cosines_on_rank

    part = make_part(3, 1, seed=3)
    rows = torch.cat([part.advantages_JbA, 2 * part.advantages_JbA, -part.advantages_JbA, 0 * part.advantages_JbA])
    *cosines, nothing = cosines_on_rank(rank, [part._replace(advantages_JbA=rows)])
    assert cosines == pytest.approx([1, -1], abs=1e-6) and math.isnan(nothing)


def test_the_policy_is_left_as_it_was(rank) -> None:
    from pama_plugin.host.actors.gradients import cosines_on_rank

    engine, state = rank.actor.model, copy.deepcopy(rank.actor.state_dict())
    for mask in (None, 1):  # no failure leaves it half changed either
        part = make_part(2, 3, seed=4)
        before = torch.random.get_rng_state()
        if mask is None:
            with pytest.raises((RuntimeError, IndexError)):
                cosines_on_rank(rank, [part._replace(advantages_JbA=part.advantages_JbA[..., :2])])
        else:
            cosines_on_rank(rank, [part])
        assert rank.actor.model is engine
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(parameter.grad is None for parameter in rank.actor.parameters())
        assert all(torch.equal(state[key], value) for key, value in rank.actor.state_dict().items())


def test_a_policy_that_reads_images_is_refused(rank) -> None:
    from pama_plugin.errors import PamaError
    from pama_plugin.host.actors.gradients import cosines_on_rank

    rank.actor.is_vlm = True
    with pytest.raises(PamaError, match="images"):
        cosines_on_rank(rank, [make_part(1, 2, seed=5)])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([4] * 8, [0, 2, 4, 6]), ([3, 2], [0, 1]), ([32, 32, 5], [0]), ([1, 16], [0, 1]), ([4] * 7, [0, 1, 3, 5])],
)
def test_micro_batches_are_spread_over_the_rollout(sizes, expected, groups) -> None:
    """Which ones, and that each comes with its own advantages, cut to what the policy trains on at once."""
    import ray
    from openrlhf.trainer.ppo_utils.experience import Experience

    from pama_plugin.host.actors.gradients import gradient_cosines

    experiences = [
        Experience(
            sequences=torch.full((size, 5), index),
            attention_mask=torch.ones(size, 5, dtype=torch.long),
            action_mask=torch.ones(size, 3 + index % 2, dtype=torch.long),
        )
        for index, size in enumerate(sizes)
    ]
    owner_B = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    seen = []

    def call(_, parts):
        seen.extend(parts)
        return ray.put([0.5, math.nan])

    group = SimpleNamespace(_actor_handlers=[SimpleNamespace(__ray_call__=SimpleNamespace(remote=call))] * 2)
    advantages = owner_B.float()[None, :, None].expand(2, -1, 4)
    cosines = gradient_cosines(
        group, experiences, advantages, advantages[0], 2, mean_per_response=False, all_ranks=False
    )
    assert cosines[0] == 0.5 and math.isnan(cosines[1])
    assert sorted({int(part.sequences[0, 0]) for part in seen}) == expected
    assert sum(len(part.sequences) for part in seen) == sum(sizes[index] for index in expected)
    for part in seen:
        assert len(part.sequences) <= 2 and part.advantages_JbA.shape == (3, *part.action_mask.shape)
        assert (part.advantages_JbA == part.sequences[0, 0]).all()


def test_a_loss_that_is_a_mean_of_means_counts_every_response_once(groups) -> None:
    import ray
    from openrlhf.trainer.ppo_utils.experience import Experience

    from pama_plugin.host.actors.gradients import gradient_cosines

    action_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    columns = {"sequences": torch.ones(2, 5), "attention_mask": torch.ones(2, 5), "action_mask": action_mask}
    seen = []

    def call(_, parts):
        seen.extend(parts)
        return ray.put([1.0])

    group = SimpleNamespace(_actor_handlers=[SimpleNamespace(__ray_call__=SimpleNamespace(remote=call))])
    ones = torch.ones(1, 2, 4)
    gradient_cosines(group, [Experience(**columns)], ones, ones[0], 2, mean_per_response=True, all_ranks=False)
    assert seen[0].advantages_JbA[0].tolist() == [[0.25] * 4, [0.5] * 4]
