"""The gradient probe against gradients taken token by token, with the host's own policy class."""

import copy
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


def make_part(rows: int, advantages: int, seed: int, block: int = 0):
    from pama_plugin.host.actors.gradients import Part

    generator = torch.Generator().manual_seed(seed)
    action_mask = (torch.rand(rows, 11, generator=generator) < 0.7).long()
    return Part(
        block,
        torch.randint(2, 40, (rows, 12), generator=generator),
        torch.ones(rows, 12, dtype=torch.long),
        action_mask,
        torch.randn(advantages, rows, 11, generator=generator),
    )


def without_dropout(rank) -> None:
    for module in rank.actor.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def test_products_equal_those_of_gradients_taken_token_by_token(rank) -> None:
    from pama_plugin.host.actors.gradients import products_on_rank

    without_dropout(rank)
    parts = [make_part(2, 3, seed=1), make_part(1, 3, seed=2), make_part(2, 3, seed=3, block=1)]
    found = products_on_rank(rank, parts)

    actor = copy.deepcopy(rank.actor)
    actor.model = actor.model.module
    totals = [[0.0] * 3 for _ in range(2)]
    for part in parts:
        log_probs = actor(part.sequences, part.action_mask, attention_mask=part.attention_mask)
        for row, token in part.action_mask.nonzero().tolist():
            grads = torch.autograd.grad(log_probs[row, token], list(actor.parameters()), retain_graph=True)
            flat = torch.cat([grad.flatten() for grad in grads]).double()
            own = totals[part.block]
            own[:] = [total + flat * part.advantages_JbA[j, row, token] for j, total in enumerate(own)]
    gradients = torch.stack([torch.stack(own) for own in totals])
    expected = torch.einsum("aiw,bjw->aibj", gradients, gradients)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_same_responses_have_the_same_dropout(rank) -> None:
    from pama_plugin.host.actors.gradients import products_on_rank

    part = make_part(3, 1, seed=3)
    rows = torch.cat([part.advantages_JbA, 2 * part.advantages_JbA, 0 * part.advantages_JbA])
    products = products_on_rank(rank, [part._replace(advantages_JbA=rows)])[0, :, 0]
    square = float(products[0, 0])
    expected = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]) * square
    torch.testing.assert_close(products, expected, rtol=1e-5, atol=1e-6)


def test_the_policy_is_left_as_it_was(rank) -> None:
    from pama_plugin.host.actors.gradients import products_on_rank

    engine, state = rank.actor.model, copy.deepcopy(rank.actor.state_dict())
    for mask in (None, 1):  # no failure leaves it half changed either
        part = make_part(2, 3, seed=4)
        before = torch.random.get_rng_state()
        if mask is None:
            with pytest.raises((RuntimeError, IndexError)):
                products_on_rank(rank, [part._replace(advantages_JbA=part.advantages_JbA[..., :2])])
        else:
            products_on_rank(rank, [part])
        assert rank.actor.model is engine
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(parameter.grad is None for parameter in rank.actor.parameters())
        assert all(torch.equal(state[key], value) for key, value in rank.actor.state_dict().items())


def test_a_policy_that_reads_images_is_refused(rank) -> None:
    from pama_plugin.errors import PamaError
    from pama_plugin.host.actors.gradients import products_on_rank

    rank.actor.is_vlm = True
    with pytest.raises(PamaError, match="images"):
        products_on_rank(rank, [make_part(1, 2, seed=5)])


@pytest.mark.parametrize(
    ("prompts", "responses", "size", "expected"),
    [
        (64, 4, 4, [[4 * block] for block in range(16)]),  # sixteen blocks of one prompt have 64 responses
        (32, 4, 16, [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19], [24, 25, 26, 27]]),  # as many as fit
        (8, 1, 16, [[0, 1], [2, 3], [4, 5], [6, 7]]),  # four blocks, however small the rollout
        (16, 8, 2, [[2 * block] for block in range(8)]),  # a prompt is not divided
        (4, 2, 4, [[0], [1], [2], [3]]),  # all of a small rollout
        (3, 4, 4, [[0], [1], [2]]),
    ],
)
def test_blocks_have_whole_prompts_from_all_over_the_rollout(prompts, responses, size, expected) -> None:
    from pama_plugin.host.actors.gradients import choose_blocks

    rows_GN = torch.randperm(prompts * responses).reshape(prompts, responses)
    found = [sorted(rows.tolist()) for rows in choose_blocks(rows_GN, size)]
    assert found == [sorted(rows_GN[block].flatten().tolist()) for block in expected]


@pytest.mark.parametrize("mean_per_response", [False, True])
def test_each_response_comes_with_its_own_advantages(mean_per_response, groups) -> None:
    """In forward passes of at most two responses, with the weight that it has in the loss."""
    import ray
    from openrlhf.trainer.ppo_utils.experience import Experience

    from pama_plugin.host.actors.gradients import gradient_products

    lengths = [3, 5, 3, 4]
    experiences = [
        Experience(
            sequences=torch.full((2, length + 1), index + 1),
            attention_mask=torch.ones(2, length + 1, dtype=torch.long),
            action_mask=torch.ones(2, length, dtype=torch.long),
        )
        for index, length in enumerate(lengths)
    ]
    seen = []

    def call(_, parts):
        seen.extend(parts)
        return ray.put(torch.zeros(2, 2, 2, 2))

    group = SimpleNamespace(_actor_handlers=[SimpleNamespace(__ray_call__=SimpleNamespace(remote=call))] * 2)
    advantages_1BA = torch.arange(1.0, 5).repeat_interleave(2)[None, :, None].expand(1, -1, 5)
    rows_GN = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 7]])  # one response of each micro-batch to each prompt
    gradient_products(
        group,
        experiences,
        advantages_1BA,
        10 * advantages_1BA[0],
        rows_GN,
        2,
        mean_per_response=mean_per_response,
        all_ranks=False,
    )
    assert [part.block for part in seen] == [0, 0, 1, 1] and all(len(part.sequences) == 2 for part in seen)
    for part in seen:
        for sequence, mask, advantages_JA in zip(part.sequences, part.action_mask, part.advantages_JbA.unbind(1)):
            index = int(sequence[0])
            length = lengths[index - 1]
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            each = 1 / (4 * length) if mean_per_response else 1 / sum(lengths)
            expected = torch.tensor([10.0, 1.0])[:, None] * index * each * mask
            torch.testing.assert_close(advantages_JA, expected)
