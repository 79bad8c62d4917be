"""Closed forms and vectorised sums against slow reference code, and the optimality conditions of ``min_norm``."""

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pama_plugin import Aggregation, aggregate
from pama_plugin.aggregation.rules.gram import gram_matrix
from pama_plugin.aggregation.rules.min_norm import min_norm_point
from pama_plugin.testing import Case, as_rewards, cases

pytestmark = pytest.mark.property


@st.composite
def gram_matrices(draw: st.DrawFn, max_objectives: int = 8) -> torch.Tensor:
    """Gram matrices of full and lower rank, with duplicates, and with objectives of very different scales."""
    size, rank = draw(st.integers(1, max_objectives)), draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows = torch.randn(size, rank, generator=generator, dtype=torch.float64) + draw(st.sampled_from([0.0, 1.0, 5.0]))
    if draw(st.booleans()):
        rows = rows[torch.randint(size, (size,), generator=generator)]
    if draw(st.booleans()):
        rows = rows * 10 ** torch.randint(-8, 9, (size, 1), generator=generator).double()
    return rows @ rows.T


@given(gram_matrices())
def test_min_norm_satisfies_its_optimality_conditions(gram_KK) -> None:
    """``(Mc)_i ≥ c'Mc`` for all i, with equality where ``c_i > 0``: necessary and sufficient for a convex problem."""
    c_K = min_norm_point(gram_KK)
    assert (c_K >= 0).all() and c_K.sum().item() == pytest.approx(1)
    slopes_K, value = gram_KK @ c_K, c_K @ gram_KK @ c_K
    slack_K = 1e-7 * (gram_KK.diagonal() * value.clamp(min=0)).sqrt() + 1e-11 * gram_KK.diagonal()
    assert (slopes_K >= value - slack_K).all()
    assert (slopes_K <= value + slack_K * 1e3)[c_K > 1e-6].all()


@given(gram_matrices(max_objectives=4))
def test_min_norm_is_no_worse_than_any_point_of_a_grid(gram_KK) -> None:
    steps = 12
    points = [c for c in itertools.product(range(steps + 1), repeat=len(gram_KK)) if sum(c) == steps]
    grid = torch.tensor(points, dtype=torch.float64) / steps
    best = torch.einsum("nk,kl,nl->n", grid, gram_KK, grid).min()
    c_K = min_norm_point(gram_KK)
    assert c_K @ gram_KK @ c_K <= best + 1e-9 * gram_KK.diagonal().min()


@pytest.mark.parametrize("weight", [1e-5, 1e-9, 1e-14, 1e9])
def test_min_norm_with_objectives_of_different_size(weight) -> None:
    """A large objective gets almost no share, and the others share as without it."""
    small = torch.tensor([[1.0, 0.2], [0.2, 2.0]], dtype=torch.float64)
    gram_KK = torch.block_diag(torch.tensor([[1 / weight**2]], dtype=torch.float64), small)
    if weight < 1:
        torch.testing.assert_close(min_norm_point(gram_KK)[1:], min_norm_point(small), rtol=1e-6, atol=1e-8)
    else:
        torch.testing.assert_close(min_norm_point(gram_KK), torch.tensor([1.0, 0, 0], dtype=torch.float64))


@pytest.mark.needs_extras
@given(gram_matrices())
def test_min_norm_agrees_with_a_quadratic_program(gram_KK) -> None:
    from qpsolvers import solve_qp

    size = len(gram_KK)
    scaled = gram_KK / gram_KK.diagonal().max() + 1e-9 * torch.eye(size)  # the solver needs a positive definite matrix
    ones = torch.ones(1, size, dtype=torch.float64)
    solution = solve_qp(
        scaled.numpy(),
        torch.zeros(size, dtype=torch.float64).numpy(),
        A=ones.numpy(),
        b=torch.ones(1, dtype=torch.float64).numpy(),
        lb=torch.zeros(size, dtype=torch.float64).numpy(),
        solver="quadprog",
    )
    other = torch.as_tensor(solution)
    c_K = min_norm_point(gram_KK)
    assert c_K @ scaled @ c_K <= other @ scaled @ other + 1e-8


@given(cases())
def test_gram_is_a_mean_of_products(case: Case) -> None:
    advantages_KBA, mask_BA, present_KB, _, weights_KB = case
    weights_K = weights_KB[:, 0]
    gram_KK = gram_matrix(advantages_KBA, mask_BA, present_KB, weights_K, 1.0)
    rows = (advantages_KBA.masked_fill(~(mask_BA & present_KB.unsqueeze(-1)), 0) * weights_K[:, None, None]).double()
    for i, j in itertools.product(range(len(rows)), repeat=2):
        tokens = [(mask_BA & present_KB[k].unsqueeze(-1)).sum().clamp(min=1) for k in (i, j)]
        expected = (rows[i] * rows[j]).sum() / (tokens[0] * tokens[1]).sqrt()
        assert gram_KK[i, j].item() == pytest.approx(expected.item(), abs=1e-5)


def scores(case: Case) -> list[list[list[float]]]:
    """``Z_i[b]`` at every token, by loops; 0 for an objective that is constant within a group."""
    advantages_KBA, mask_BA, present_KB, groups_B, _ = case
    K, B, A = advantages_KBA.shape
    z = [[[0.0] * A for _ in range(B)] for _ in range(K)]
    for k in range(K):
        for group in set(groups_B.tolist()):
            rows = [b for b in range(B) if groups_B[b] == group and present_KB[k, b] and mask_BA[b].any()]
            means = [advantages_KBA[k, b][mask_BA[b]].double().mean().item() for b in rows]
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            if not rows or spread <= 1e-6 * max(map(abs, means)):
                continue
            for b, mean in zip(rows, means):
                z[k][b] = [(mean - statistics.fmean(means)) / spread] * A
    return z


def whitened(values: list[float]) -> list[float]:
    mean = statistics.fmean(values)
    spread = math.sqrt(statistics.fmean([(value - mean) ** 2 for value in values]))
    largest = max(abs(value - mean) for value in values)
    return [(value - mean) / spread if spread > 1e-6 * largest else 0.0 for value in values]


def centred(values: list[float]) -> list[float]:
    return [value - statistics.fmean(values) for value in values]


def unchanged(values: list[float]) -> list[float]:
    return values


def check_twin(rule: str, case: Case, combine, counts, then, **options) -> None:
    """The rule equals ``combine([(w, Z), …])`` per token, ``then`` over responses where ``counts``, 0 elsewhere."""
    result = aggregate(
        rule,
        case.advantages_KBA,
        case.mask_BA,
        rescale="none",
        weights=case.weights,
        present_KB=case.present_KB,
        groups_B=case.groups_B,
        active=[True] * len(case.weights_KB),
        **options,
    )
    kept = [k for k in range(len(case.weights_KB)) if not result.metrics[f"inactive/{k}"]]
    z = scores(case)
    tokens = [
        (b, t)
        for b, t in case.mask_BA.nonzero().tolist()
        if any(case.present_KB[k, b] for k in kept) and counts(b, kept, z)
    ]
    expected = torch.zeros_like(result.advantages)
    if tokens:
        raw = [combine([(case.weight(k, b), z[k][b][t]) for k in kept if case.present_KB[k, b]]) for b, t in tokens]
        for (b, t), value in zip(tokens, then(raw)):
            expected[b, t] = value
    torch.testing.assert_close(result.advantages, expected, atol=1e-4, rtol=1e-3)


def everyone(*_) -> bool:
    return True


@given(cases(), st.booleans())
def test_gdpo(case: Case, as_published: bool) -> None:
    then = whitened if as_published else unchanged
    check_twin("gdpo", case, lambda scored: sum(w * z for w, z in scored), everyone, then, whiten_sum=as_published)


@given(cases(), st.booleans())
def test_rvpo(case: Case, whiten_sum: bool) -> None:
    def soft_minimum(scored):
        total = sum(w for w, _ in scored)
        return -math.log(sum(w / total * math.exp(-z) for w, z in scored))

    check_twin("rvpo", case, soft_minimum, everyone, whitened if whiten_sum else centred, whiten_sum=whiten_sum)


@given(cases(), st.booleans())
def test_gd2po(case: Case, as_published: bool) -> None:
    present_KB = case.present_KB

    def agrees(b: int, kept: list[int], z) -> bool:
        signs = set()
        for k in kept:
            if present_KB[k, b]:
                signs.add((z[k][b][0] > 0) - (z[k][b][0] < 0))
        return not {-1, 1} <= signs

    then = whitened if as_published else unchanged
    check_twin("gd2po", case, lambda scored: sum(w * z for w, z in scored), agrees, then, whiten_sum=as_published)


def test_gd2po_takes_what_rounding_leaves_of_a_0_for_no_sign() -> None:
    """0.2 minus the mean of 0.1, 0.2 and 0.3 is 2.8e-17 in double precision, or its negative in another order."""
    first, second = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([-1.0, 2.0, -1.0])
    found = []
    for sign in (1, -1):
        advantages_KB1 = torch.stack([sign * first, second.double()]).unsqueeze(-1)
        found.append(aggregate("gd2po", advantages_KB1, torch.ones(3, 1), groups_B=[0, 0, 0]).advantages[1].item())
    assert found[0] == pytest.approx(found[1]) and found[0] > 0.9


def kept_by(result: Aggregation, case: Case) -> list[int]:
    return [k for k in range(len(case.weights_KB)) if not result.metrics[f"inactive/{k}"]]


def call(rule: str, case: Case, **options: Any) -> Aggregation:
    same = dict(weights=case.weights, present_KB=case.present_KB, groups_B=case.groups_B)
    everything = dict(active=[True] * len(case.weights_KB), rescale="none")
    return aggregate(rule, case.advantages_KBA, case.mask_BA, **same, **everything, **options)


def rewards_of_group(case: Case, k: int, b: int) -> list[float]:
    """The rewards of objective k for the prompt of response b, of responses that have one."""
    rewards_KB = as_rewards(case)
    same = [other for other in range(len(case.groups_B)) if case.groups_B[other] == case.groups_B[b]]
    return [float(rewards_KB[k, other]) for other in same if not math.isnan(float(rewards_KB[k, other]))]


def spread_of(rewards: list[float]) -> float:
    std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    return std if rewards and std > 1e-6 * max(map(abs, rewards)) else 0.0


@given(cases())
def test_dvao(case: Case) -> None:
    result = call("dvao", case, rewards_KB=as_rewards(case))
    z, kept = scores(case), kept_by(result, case)
    for b, t in case.mask_BA.nonzero().tolist():
        present = [k for k in kept if case.present_KB[k, b]]
        raw = {k: case.weight(k, b) * spread_of(rewards_of_group(case, k, b)) for k in present}
        total = sum(raw.values())
        expected = sum(raw[k] / total * z[k][b][t] for k in present) if total else 0.0
        assert result.advantages[b, t].item() == pytest.approx(expected, abs=1e-4)


@given(cases(), st.booleans())
def test_saw(case: Case, as_published: bool) -> None:
    rewards_KB = as_rewards(case) + 3
    result = call("saw", case, rewards_KB=rewards_KB, whiten_sum=as_published)
    z, kept = scores(case), kept_by(result, case)
    variation = {}
    for k in kept:
        rewards = [value for value in rewards_KB[k].tolist() if not math.isnan(value)]
        variation[k] = statistics.stdev(rewards) / abs(statistics.fmean(rewards)) if len(rewards) > 1 else 0.0
    if not any(variation.values()):
        return
    share = {k: len(kept) * value / sum(variation.values()) for k, value in variation.items()}
    tokens = [(b, t) for b, t in case.mask_BA.nonzero().tolist() if any(case.present_KB[k, b] for k in kept)]
    raw = [sum(case.weight(k, b) * share[k] * z[k][b][t] for k in kept) for b, t in tokens]
    for (b, t), expected in zip(tokens, whitened(raw) if as_published else raw):
        assert result.advantages[b, t].item() == pytest.approx(expected, abs=1e-3)


@given(cases())
def test_ctwa(case: Case) -> None:
    """The sum with the weights of the last step, and the weights of the next."""
    K = len(case.weights_KB)
    memory_K = [{"log_weight": 0.1 * k, "correlation": 0.05 * k} for k in range(K)]
    result = call("ctwa", case, memory_K=memory_K, target=0.3, rate=0.2, smoothing=0.25)
    kept = kept_by(result, case)
    for b, t in case.mask_BA.nonzero().tolist():
        present = [k for k in kept if case.present_KB[k, b]]
        expected = sum(
            case.weight(k, b) * math.exp(0.1 * (k - (K - 1))) * case.advantages_KBA[k, b, t].item() for k in present
        )
        assert result.advantages[b, t].item() == pytest.approx(expected, abs=1e-4)
    z = scores(case)
    combined = case.but(
        advantages_KBA=result.advantages.unsqueeze(0),
        present_KB=case.present_KB.any(0, keepdim=True),
        weights_KB=torch.ones(1, 1),
    )
    (own,) = scores(combined)
    for k in range(K):
        before = memory_K[k]
        if k not in kept:
            assert result.memory_K[k] == pytest.approx(before)
            continue
        rows = [b for b in range(len(case.mask_BA)) if case.present_KB[k, b] and case.mask_BA[b].any()]
        products = sum(z[k][b][0] * own[b][0] for b in rows)
        lengths = math.sqrt(sum(z[k][b][0] ** 2 for b in rows) * sum(own[b][0] ** 2 for b in rows))
        mean = 0.75 * before["correlation"] + 0.25 * (products / lengths if lengths else 0.0)
        assert result.memory_K[k]["correlation"] == pytest.approx(mean, abs=1e-3)
        expected = before["log_weight"] + 0.2 * max(0.3 - mean, 0.0)
        assert result.memory_K[k]["log_weight"] == pytest.approx(expected, abs=1e-3)


@given(cases())
def test_pareto_rank(case: Case) -> None:
    """By peeling off the responses that none of those left dominates, layer by layer."""
    rewards_KB = as_rewards(case)
    result = call("pareto_rank", case, rewards_KB=rewards_KB)
    kept = kept_by(result, case)
    for group in set(case.groups_B.tolist()):
        members = [b for b in range(len(case.groups_B)) if case.groups_B[b] == group and case.mask_BA[b].any()]
        applying = [k for k in kept if not rewards_KB[k, members].isnan().all()]
        rewards = {b: [float(rewards_KB[k, b]) for k in applying] for b in members}
        left = [b for b in members if applying and not any(map(math.isnan, rewards[b]))]
        ranks, rank = {}, 0
        while left:
            front = [b for b in left if not any(dominates(rewards[other], rewards[b]) for other in left)]
            ranks |= dict.fromkeys(front, rank)
            left, rank = [b for b in left if b not in front], rank + 1
        for b, rank in ranks.items():
            expected = statistics.fmean(ranks.values()) - rank
            found = result.advantages[b][case.mask_BA[b]]
            torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-5, rtol=0)


def dominates(one: list[float], other: list[float]) -> bool:
    return all(a >= b for a, b in zip(one, other)) and one != other


@pytest.mark.needs_extras
@given(cases(min_objectives=2, complete=True), st.floats(0.1, 1))
def test_balance_divides_the_advantages_by_a_power_of_their_size(case: Case, balance: float) -> None:
    result = call("gram:upgrad", case, balance=balance)
    rows = case.advantages_KBA.masked_fill(~case.mask_BA, 0)
    rms_K11 = (rows.square().sum((1, 2), keepdim=True) / case.mask_BA.sum()).sqrt()
    active_K11 = torch.tensor([not result.metrics[f"inactive/{k}"] for k in range(len(rows))])[:, None, None]
    divided = torch.where(rms_K11 > 0, rows / torch.where(rms_K11 > 0, rms_K11, 1) ** balance, 0)
    same = dict(weights=case.weights, rescale="none", active=active_K11.flatten())
    expected = aggregate("gram:upgrad", divided, case.mask_BA, **same)
    torch.testing.assert_close(result.advantages, expected.advantages, atol=1e-3, rtol=1e-2)


@given(cases(tokens=1, complete=True), st.sampled_from([None, 0.5]), st.sampled_from([0.0, 0.3]))
def test_tchebycheff(case: Case, smooth, augment) -> None:
    rewards_KB1, mask_B1, present_KB, _, weights_KB = case
    options = dict(ideal=[0.5] * len(weights_KB), smooth=smooth, augment=augment)
    result = aggregate("tchebycheff", rewards_KB1, mask_B1, weights=case.weights, **options)
    kept = [k for k in range(len(weights_KB)) if not result.metrics[f"inactive/{k}"]]
    for b in mask_B1.flatten().nonzero().flatten().tolist():
        pairs = [(case.weight(k, b), rewards_KB1[k, b, 0].item()) for k in kept]
        behind = [w * (0.5 - r) for w, r in pairs]
        worst = max(behind) if smooth is None else smooth * math.log(sum(math.exp(x / smooth) for x in behind))
        expected = -worst + augment * sum(w * r for w, r in pairs)
        assert result.advantages[b].item() == pytest.approx(expected, abs=1e-4)


def test_the_default_ideal_of_tchebycheff_is_the_best_reward_of_the_batch() -> None:
    rewards_KB1 = torch.tensor([[[1.0], [3.0]], [[5.0], [4.0]]])
    assert aggregate("tchebycheff", rewards_KB1, torch.ones(2, 1)).advantages.flatten().tolist() == [-2.0, -1.0]


@given(cases(complete=True), st.floats(0.1, 50))
def test_soft_pama(case: Case, soft: float) -> None:
    """The value at each token is a softmax mean, between the minimum and the mean of the positive parts."""
    advantages_KBA, mask_BA, _, _, _ = case
    arguments = dict(active=[True] * len(advantages_KBA))
    values = aggregate("pama", advantages_KBA, mask_BA, noon=True, rescale="none", soft=soft, **arguments)
    kept = [not values.metrics[f"inactive/{k}"] for k in range(len(advantages_KBA))]
    for b, t in mask_BA.nonzero().tolist():
        a = [max(x, 0.0) for x in advantages_KBA[kept, b, t].tolist()]
        rms = math.sqrt(statistics.fmean([x * x for x in a])) or 1.0
        weights = [math.exp(-soft * x / rms) for x in a]
        expected = sum(w * x for w, x in zip(weights, a)) / sum(weights)
        assert values.advantages[b, t].item() == pytest.approx(expected, abs=1e-4)
        assert min(a) - 1e-5 <= expected <= statistics.fmean(a) + 1e-5


@given(cases())
def test_leak_is_between_noon_and_signed(case: Case) -> None:
    arguments = (case.advantages_KBA, case.mask_BA)
    same = dict(present_KB=case.present_KB, weights=case.weights, rescale="none")
    leaky = {leak: aggregate("pama", *arguments, noon=True, leak=leak, **same).advantages for leak in (0.0, 0.5, 1.0)}
    assert torch.equal(leaky[0.0], aggregate("pama", *arguments, noon=True, **same).advantages)
    assert torch.equal(leaky[1.0], aggregate("pama", *arguments, noon=False, **same).advantages)
    torch.testing.assert_close(leaky[0.5], torch.where(leaky[1.0] < 0, 0.5 * leaky[1.0], leaky[1.0]))


def test_rescale_does_not_amplify_rounding() -> None:
    """If all rewards are constant, all objectives are inactive and kept, and rounding errors stay small."""
    noise = 1e-6 * torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    result = aggregate("pama", noise, torch.ones(8, 4), active=[False, False])
    assert 0 < result.metrics["rms"] < 3e-6


@given(cases(min_objectives=2))
def test_lagrangian(case: Case) -> None:
    K = len(case.weights_KB)
    duals = dict(violations_K=[None] * (K - 1) + [-0.4], memory_K=[{}] * (K - 1) + [{"integral": 2.0}])
    same = dict(weights=case.weights, active=[True] * K, rescale="none", rate=0.5, proportional=1.5)
    result = aggregate("lagrangian", case.advantages_KBA, case.mask_BA, **same, **duals)
    integral = 2.0 - 0.5 * 0.4
    multiplier = integral - 1.5 * 0.4
    assert result.memory_K[:-1] == ({},) * (K - 1)
    assert result.memory_K[-1] == {"integral": pytest.approx(integral), "multiplier": pytest.approx(multiplier)}
    kept_K = torch.tensor([not result.metrics[f"inactive/{k}"] for k in range(K)])
    w, A = (case.weights_KB * kept_K.unsqueeze(-1)).unsqueeze(-1), case.advantages_KBA
    main = (w[:-1] * A[:-1]).sum(0) / w[:-1].sum(0).clamp(min=1e-30)
    expected = (main + multiplier * w[-1] * A[-1]) / (1 + multiplier)
    torch.testing.assert_close(result.advantages, expected.masked_fill(~case.mask_BA, 0), atol=1e-5, rtol=1e-4)


def next_integral(now: float, violation: float, **options: float) -> float:
    duals = dict(violations_K=[None, violation], memory_K=[{}, {"integral": now}])
    result = aggregate("lagrangian", torch.randn(2, 3, 4), torch.ones(3, 4), **duals, **options)
    assert 0 <= result.memory_K[1]["multiplier"] <= options.get("ceiling", 10.0)
    return result.memory_K[1]["integral"]


def test_a_multiplier_stays_within_its_bounds_whatever_an_outlier_does() -> None:
    assert next_integral(1.0, 1e6) == pytest.approx(2.0) and next_integral(1.0, -1e6) == 0.0
    assert next_integral(1.0, 1e6, ceiling=1.5) == 1.5 and next_integral(1.0, 0.0) == 1.0


def test_a_multiplier_recovers_from_slack_as_fast_as_it_fell() -> None:
    """In log λ, as in Safe RLHF, a step is proportional to λ²: after a hundred steps of slack it needs thousands."""
    integral = 1.0
    for violation in [-1.0] * 100 + [1.0] * 10:
        integral = next_integral(integral, violation)
    assert integral == pytest.approx(1.0)


def test_a_constraint_that_all_responses_violate_alike_raises_its_multiplier() -> None:
    """Its rewards are constant, so it is inactive, and only its multiplier changes."""
    advantages_KBA = torch.stack([torch.randn(3, 4), torch.zeros(3, 4)])
    duals = dict(violations_K=[None, 1.0], memory_K=[{}, {"integral": 1.0}])
    result = aggregate("lagrangian", advantages_KBA, torch.ones(3, 4), active=[True, False], **duals)
    assert result.memory_K[1] == {"integral": pytest.approx(1.1), "multiplier": pytest.approx(3.1)}
    torch.testing.assert_close(result.advantages, advantages_KBA[0])


@pytest.mark.parametrize(("violations", "constraints"), [([None, None], 0), ([0.1, 0.1], 2)])
def test_lagrangian_needs_both_kinds(violations, constraints) -> None:
    duals = dict(violations_K=violations)
    with pytest.raises(ValueError, match=f"lagrangian .*one constraint and one objective.* found {constraints}"):
        aggregate("lagrangian", torch.ones(2, 1, 1), torch.ones(1, 1), **duals)
