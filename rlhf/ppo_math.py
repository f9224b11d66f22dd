"""PPO's mathematics, without a trainer (Schulman et al. 2017, arXiv:1707.06347).

Shapes: B answers, T answer tokens (padded right). `mask` (B, T) is 1 on the tokens that the policy
wrote, the end token included, and 0 on padding.
"""

import torch


def masked_mean_var(x, mask, reduce=lambda t: t) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population variance of `x` where `mask` is 1; `reduce` adds up over processes."""
    total, count = reduce(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]))
    mean = total / count.clamp(min=1)
    return mean, reduce(((x - mean) ** 2 * mask).sum()) / count.clamp(min=1)


def masked_whiten(x, mask, reduce=lambda t: t) -> torch.Tensor:
    """`x` (B, T) shifted and scaled to mean 0 and variance 1 under `mask`, and 0 outside of it."""
    mean, var = masked_mean_var(x, mask, reduce)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def explained_variance(values, returns, mask, reduce=lambda t: t) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    variances = [masked_mean_var(x, mask, reduce)[1] for x in (returns - values, returns)]
    return 1 - variances[0] / variances[1].clamp(min=1e-8)


def ends_with_eos(completion_ids, mask, eos_token_ids: list[int]) -> torch.Tensor:
    """Whether the last real token of each answer (B, T) is an end token, (B,) bool."""
    last_ids = completion_ids.gather(1, mask.sum(dim=1, keepdim=True).long() - 1).squeeze(1)
    return torch.isin(last_ids, torch.tensor(eos_token_ids, device=last_ids.device))


def compute_rewards(scores, kl, mask, kl_coef: float) -> torch.Tensor:
    """The reward of each token (B, T), Ziegler et al. 2019, eq. 2: every token pays `kl_coef` times
    its `kl` (B, T), log pi_old - log pi_ref; the last real one earns the answer's score (B,)."""
    last = mask.sum(dim=1, keepdim=True).long() - 1
    return (-kl_coef * kl * mask).scatter_add(1, last, scores.to(kl.dtype).unsqueeze(1))


def compute_gae(rewards, values, mask, gamma: float, lam: float):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438).

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}

    All (B, T), `values[:, t]` from before token t is written. Beyond the last real token value and
    advantage are 0. Returns advantages and returns (advantages + values, the critic's target).
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def policy_loss(logps, old_logps, advantages, low: float, high: float):
    """Clipped surrogate (Schulman et al. 2017, eq. 7): loss, ratio, clipped or not, each (B, T)."""
    ratio = torch.exp(logps - old_logps)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.max(unclipped, clipped), ratio, clipped > unclipped


def value_loss(values, old_values, returns, cliprange: float):
    """Half the squared error, of the value kept near the old one if worse; and whether it was."""
    near_old = old_values + (values - old_values).clamp(-cliprange, cliprange)
    error, clipped_error = (values - returns) ** 2, (near_old - returns) ** 2
    return 0.5 * torch.max(error, clipped_error), clipped_error > error


def update_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The proportional controller of Ziegler et al. 2019, section 2.2; KL in nats an answer."""
    return kl_coef * (1 + 0.1 * max(-0.2, min(0.2, kl / target - 1)))
