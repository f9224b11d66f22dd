"""PPO's mathematics on numbers written out by hand."""

import math

import pytest
import torch

from rlhf.ppo_math import (
    compute_gae,
    compute_rewards,
    ends_with_eos,
    explained_variance,
    masked_whiten,
    policy_loss,
    update_kl_coef,
    value_loss,
)


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0, 99.0], [3.0, 99.0, 99.0, 99.0]])
    values = torch.tensor([[0.5, 1.0, 1.5, 99.0], [1.0, 99.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    advantages, returns = compute_gae(rewards, values, mask, gamma=0.9, lam=0.5)
    # delta: 2 - 1.5 = 0.5; 0 + 0.9 * 1.5 - 1 = 0.35; 1 + 0.9 * 1 - 0.5 = 1.4
    # A: 0.5; 0.35 + 0.45 * 0.5 = 0.575; 1.4 + 0.45 * 0.575 = 1.65875
    expected = torch.tensor([[1.65875, 0.575, 0.5, 0.0], [2.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(advantages, expected)
    expected = torch.tensor([[2.15875, 1.575, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(returns, expected)


def test_gae_with_lambda_one_is_the_discounted_return():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.3, -0.7, 0.1]])
    _, returns = compute_gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 4.0, 4.0]]))


def test_rewards_put_the_score_on_the_last_real_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    logps = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    ref_logps = torch.tensor([[-2.0, -1.0, -9.0], [-1.0, -3.0, -1.0]])
    rewards = compute_rewards(torch.tensor([5.0, -1.0]), logps - ref_logps, mask, kl_coef=0.1)
    expected = torch.tensor([[-0.1, 0.1 + 5.0, 0.0], [0.0, -0.2, -1.0]])
    torch.testing.assert_close(rewards, expected)


def test_end_token_is_looked_for_at_the_last_real_token():
    ids = torch.tensor([[7, 2, 0], [7, 8, 9], [2, 8, 0], [3, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    assert ends_with_eos(ids, mask, [2, 3]).tolist() == [True, False, False, True]


def test_whitening_ignores_padding():
    x = torch.tensor([[1.0, 3.0, 1000.0], [5.0, -1000.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    white = masked_whiten(x, mask)  # of 1, 3, 5, 7: mean 4, variance 5
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 0.0, 3.0]]) / math.sqrt(5.0)
    torch.testing.assert_close(white, expected)


def test_whitening_with_two_processes_is_whitening_of_all():
    x, mask = torch.randn(4, 5), (torch.rand(4, 5) > 0.3).float()
    halves = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    everything = masked_whiten(x, mask)
    # Replay the two sums over processes that each half asks for.
    mean = (x * mask).sum() / mask.sum()
    sums = [torch.stack([(x * mask).sum(), mask.sum()]), ((x - mean) ** 2 * mask).sum()]
    for half, (part, part_mask) in enumerate(halves):
        answers = iter(sums)
        white = masked_whiten(part, part_mask, lambda _, answers=answers: next(answers))
        torch.testing.assert_close(white, everything[2 * half : 2 * half + 2])


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask).item() == pytest.approx(1.0)
    constant = torch.tensor([[7.0, 7.0, 7.0, 0.0]])
    assert explained_variance(constant, returns, mask).item() == pytest.approx(0.0)
    values = torch.tensor([[1.0, 2.0, 2.0, 0.0]])  # errors 0, 0, 1: variance 2/9 of 2/3
    assert explained_variance(values, returns, mask).item() == pytest.approx(2 / 3)


def test_losses_clip_on_the_pessimistic_side():
    old = torch.zeros(4)
    logps = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5]))
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, ratio, clipped = policy_loss(logps, old, advantages, low=0.2, high=0.3)
    torch.testing.assert_close(ratio, torch.tensor([1.5, 1.5, 0.5, 0.5]))
    torch.testing.assert_close(loss, torch.tensor([-1.3, 1.5, -0.5, 0.8]))
    assert clipped.tolist() == [True, False, False, True]
    values, returns = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([1.0, 0.0, 1.0])
    loss, clipped = value_loss(values, torch.zeros(3), returns, cliprange=0.2)
    torch.testing.assert_close(loss, 0.5 * torch.tensor([0.64, 1.0, 0.81]))
    assert clipped.tolist() == [True, False, False]


def test_kl_controller_moves_the_right_way_and_is_bounded():
    assert update_kl_coef(0.1, kl=6.0, target=6.0) == pytest.approx(0.1)
    assert update_kl_coef(0.1, kl=6.6, target=6.0) == pytest.approx(0.101)
    assert update_kl_coef(0.1, kl=600.0, target=6.0) == pytest.approx(0.102)
    assert update_kl_coef(0.1, kl=-600.0, target=6.0) == pytest.approx(0.098)
