"""The loss of the PAMA paper, K surrogates with coefficients, against OpenRLHF's loss with the combined advantages.

For ``A ≥ 0``:  ``min(uA, clip(u)A) = A · min(u, clip(u))``, linear in A, hence
``Σ_i c_i L(max(A_i, 0)) = L(Σ_i c_i max(A_i, 0)) = L(s*)``.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import advantages

from pama_plugin import aggregate

pytestmark = [pytest.mark.property, pytest.mark.needs_extras]

CLIP = 0.2


def paper_loss(log_probs, old_log_probs, advantages_KBA, mask_BA):
    """Eq. 5 per objective, combined with c of Theorem 1 at every token: 1 for the objective with the least A⁺."""
    ratio = (log_probs - old_log_probs).exp()
    positive_KBA = advantages_KBA.nan_to_num().clamp(min=0)
    surrogates_KBA = torch.min(ratio * positive_KBA, ratio.clamp(1 - CLIP, 1 + CLIP) * positive_KBA)
    coefficients_KBA = torch.nn.functional.one_hot(positive_KBA.argmin(0), len(advantages_KBA)).movedim(-1, 0)
    return -((coefficients_KBA * surrogates_KBA).sum(0) * mask_BA).sum() / mask_BA.sum()


@given(advantages(min_objectives=2), st.floats(0, 1))
@settings(max_examples=50)
def test_gradient_equals_that_of_the_hosts_policy_loss(case, spread) -> None:
    from openrlhf.models import PolicyLoss  # slow to import, so only here

    advantages_KBA, mask_BA = case
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(mask_BA.shape, generator=generator) - 0.5
    drift = spread * torch.randn(mask_BA.shape, generator=generator)  # tokens on both sides of the clip, and at u = 1
    gradients = []
    result = aggregate("pama", advantages_KBA, mask_BA, noon=True, rescale="none")
    live_KBA = advantages_KBA[[not result.metrics[f"inactive/{k}"] for k in range(len(advantages_KBA))]]
    for loss in (
        lambda log_probs: paper_loss(log_probs, old, live_KBA, mask_BA),
        lambda log_probs: PolicyLoss(CLIP, CLIP)(log_probs, old, result.advantages, action_mask=mask_BA)[0],
    ):
        log_probs = (old + drift).requires_grad_()
        loss(log_probs).backward()
        gradients.append(log_probs.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_clip_is_exercised() -> None:
    """Without clipped tokens the test above would be vacuous: one token of each kind, by hand."""
    from openrlhf.models import PolicyLoss

    mask_BA = torch.ones(1, 3, dtype=torch.bool)
    advantages_KBA = torch.tensor([[[1.0, 0.8, 1.0]], [[2.0, 2.0, 0.5]]])
    log_probs = torch.log(torch.tensor([[1.5, 0.5, 1.0]])).requires_grad_()
    result = aggregate("pama", advantages_KBA, mask_BA, noon=True, rescale="none")
    loss = PolicyLoss(CLIP, CLIP)(log_probs, torch.zeros(1, 3), result.advantages, action_mask=mask_BA)[0]
    loss.backward()
    # d/dlogp of -u·s*/3: no gradient above the clip (u = 1.5); a gradient below it (u = .5), because A > 0
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, -0.5 * 0.8 / 3, -0.5 / 3]]))
