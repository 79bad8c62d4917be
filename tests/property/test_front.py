"""A policy on the Pareto front stays there, and before it the default is no slower than dividing by what is left was.

On a front the rewards' true values only trade against each other; what a rule leaves is then made of noise alone, and
must be as small as that. The uniform policy that every walk starts from is on the front, as any is with these rewards.
Every figure is over seeds that are fixed.
"""

import functools

import pytest
import torch
from toy import Combine, Optimizer, Walk, by, by_reward, independent, noise_like, on_the_front, to_unit_rms, train

from pama_plugin import aggregate
from pama_plugin.aggregation.rules.gram import WEIGHTINGS

pytestmark = pytest.mark.property

PAMA = by("pama")
COMBINES: dict[str, Combine] = {"pama": PAMA, "noise": noise_like(PAMA), "unit rms": to_unit_rms(PAMA)}
SGD, ADAM, ADAM_WITH_KL = Optimizer("sgd", 2.0), Optimizer("adam", 0.02), Optimizer("adam", 0.02, kl=0.1)
AROUND = 1.5  # root mean squares over 8 seeds differ by about a quarter by chance


@functools.cache
def walk(objectives: int, optimizer: Optimizer, combine: str) -> Walk:
    return train(on_the_front, COMBINES[combine], optimizer, objectives=objectives, noise=0.2, steps=300, seeds=8)


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("optimizer", [SGD, ADAM, ADAM_WITH_KL], ids=["sgd", "adam", "adam with a KL loss"])
def test_a_policy_on_the_front_stays_there(optimizer, objectives) -> None:
    """No objective drifts farther than with numbers of the same size whose signs are drawn."""
    noise = walk(objectives, optimizer, "noise").drift
    assert (walk(objectives, optimizer, "pama").drifts_K < AROUND * noise).all()


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("optimizer", [SGD, ADAM_WITH_KL], ids=["sgd", "adam with a KL loss"])
def test_dividing_by_what_is_left_makes_noise_of_full_size(optimizer, objectives) -> None:
    """The default until now: held to what noise of the size of what is really left would do, it drifts too far.

    Adam alone is left out: it divides every gradient by its running size, so that under it no constant makes a step
    smaller, and both walk as far as any noise does. A KL loss does not shrink with what is left: it keeps up what Adam
    divides by, and pulls back.
    """
    assert walk(objectives, optimizer, "unit rms").drift > AROUND * walk(objectives, optimizer, "noise").drift


@pytest.mark.parametrize("objectives", [2, 4])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_before_the_front_it_is_no_slower(optimizer, objectives) -> None:
    now, before = (
        train(independent, combine, optimizer, objectives=objectives, noise=0.0, steps=40, seeds=8).rise
        for combine in (PAMA, to_unit_rms(PAMA))
    )
    assert now > 0.95 * before > 0


# How large the combined advantages are on a front of two and of three objectives when a hundredth of the noise is left:
# "vanishes", they are as much smaller; "remains", noise is trained on as if it were a signal, or the rule trades on.
# The rules' texts say why.
ON_THE_FRONT = {
    "pama": (by("pama"), "vanishes", "vanishes"),
    "pama, Noon": (by("pama", noon=True), "vanishes", "vanishes"),
    "pama, sequence": (by("pama", level="sequence"), "vanishes", "vanishes"),
    "pama, soft": (by("pama", soft=4.0), "vanishes", "vanishes"),
    "pama, batch": (by("pama", level="batch"), "remains", "remains"),
    "linear": (by("linear"), "vanishes", "remains"),
    "min_norm": (by("min_norm"), "vanishes", "vanishes"),
    "min_norm, Noon": (by("min_norm", noon=True), "remains", "remains"),
    "morlhf": (by_reward("morlhf"), "remains", "remains"),
    "tchebycheff": (by_reward("tchebycheff"), "remains", "remains"),
    "gdpo": (by("gdpo"), "remains", "remains"),
    "gd2po": (by("gd2po"), "vanishes", "vanishes"),
    "rvpo": (by("rvpo"), "remains", "remains"),
    "gram:upgrad": (by("gram:upgrad"), "vanishes", "vanishes"),
    "gram:cagrad": (by("gram:cagrad"), "vanishes", "remains"),
    "gram:pcgrad": (by("gram:pcgrad"), "vanishes", "remains"),
    "gram:imtl_g": (by("gram:imtl_g"), "vanishes", "vanishes"),
    "gram:aligned_mtl": (by("gram:aligned_mtl"), "vanishes", "vanishes"),
}


@pytest.mark.parametrize("rule", ON_THE_FRONT)
@pytest.mark.parametrize("objectives", [2, 3])
def test_what_a_rule_leaves_on_the_front(objectives, rule) -> None:
    combine, *expected = ON_THE_FRONT[rule]
    standing = Optimizer("sgd", 0.0)
    left, with_a_hundredth_of_the_noise = (
        float(train(on_the_front, combine, standing, objectives=objectives, noise=noise, steps=4, seeds=4).rms.mean())
        for noise in (0.2, 0.002)
    )
    found = "vanishes" if with_a_hundredth_of_the_noise < left / 20 else "remains"
    assert found == expected[objectives - 2], (left, with_a_hundredth_of_the_noise)


BLOWN_UP = {"gdpo", "gd2po", "rvpo"}  # as published they whiten what they have combined


@pytest.mark.parametrize(
    "rule", ["pama", "linear", "min_norm", *(f"gram:{name}" for name in WEIGHTINGS), *sorted(BLOWN_UP)]
)
def test_what_a_group_of_responses_that_barely_agree_gets(rule) -> None:
    """Sixteen groups of four: in one all objectives agree, by a few thousandths; in all others they are opposites."""
    rows_GN = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    opposed_2B = torch.tensor([[1.0], [-1.0]]) * (rows_GN - rows_GN.mean(-1, keepdim=True)).flatten()
    opposed_2B[:, 8:12] = torch.tensor([1e-3, 2e-3, 3e-3, 4e-3])
    found = aggregate(rule, opposed_2B.unsqueeze(-1), torch.ones(64, 1), groups_B=torch.arange(64) // 4)
    largest = float(found.advantages[8:12].abs().max())
    assert (largest > 1) if rule in BLOWN_UP else (largest < 5 * 4e-3)
