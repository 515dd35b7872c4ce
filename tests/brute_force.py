"""The definition in float64, by bisection."""

import torch


def brute_force(theta, log_q, labels, alpha):
    """Posterior and loss by bisection on the edge of the support, in float64."""
    k = 1 / (alpha - 1)
    low = (theta - torch.exp(log_q * (1 - alpha)) * k).amax(1, keepdim=True)
    high = theta.amax(1, keepdim=True)

    def posterior(edge):
        log_u = ((theta - edge) / k).clamp(min=0).log()
        return torch.exp(log_q + k * log_u)

    for _ in range(90):
        middle = (low + high) / 2
        above = posterior(middle).sum(1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    p = posterior(low)
    p = p / p.sum(1, keepdim=True)
    own = torch.arange(len(labels)), labels
    ratio = torch.where(p > 0, (alpha - 1) * (p.log() - log_q), 0.0).exp()  # (p / q)^(alpha - 1)
    alone = torch.exp(log_q[own] * (1 - alpha))
    loss = (p * (theta - theta[own][:, None])).sum(1)
    loss += (alone - torch.where(p > 0, p * ratio, 0.0).sum(1)) / (alpha * (alpha - 1))
    return p, loss
