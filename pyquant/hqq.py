"""Half-quadratic refinement of float zero points (HQQ: Badri and Shaji, "Half-Quadratic Quantization", 2023)."""

from __future__ import annotations

import torch

# The authors' settings: the p of the l_p norm, the first penalty, its growth, the number of iterations.
LP_NORM = 0.7
BETA = 10.0
KAPPA = 1.01
ITERATIONS = 20


def refine_zeros(w: torch.Tensor, inverse_scales: torch.Tensor, zeros: torch.Tensor, levels: int) -> torch.Tensor:
    """Zero points that lower ``sum |w - (q - zero) * scale|^p``, the scales held fixed.

    Alternates a shrinkage of the error (outliers may keep theirs) and the closed-form zero point for the rest. Each
    group keeps the best zero point it saw, the initial one included, so that no group gets worse.

    Args:
        w: fp32 [groups, group_size].
        inverse_scales: fp32 [groups], 1 / scale.
        zeros: fp32 [groups], the start.
        levels: number of codes.

    Returns:
        fp32 [groups].
    """
    inverse = inverse_scales[:, None]
    scale = torch.where(inverse > 0, 1 / inverse, torch.zeros_like(inverse))
    zero = zeros[:, None].clone()
    best = zero.clone()
    best_error = torch.full_like(zero, torch.inf)
    beta = BETA
    for iteration in range(ITERATIONS + 1):
        q = torch.round(w * inverse + zero).clamp_(0, levels - 1)
        error = w - (q - zero) * scale
        lp = error.abs().pow_(LP_NORM).sum(dim=1, keepdim=True)
        better = lp < best_error
        best = torch.where(better, zero, best)
        best_error = torch.where(better, lp, best_error)
        if iteration == ITERATIONS:
            break
        # Shrinkage: the minimiser over e of |e|^p + beta/2 (e - error)^2, to first order.
        magnitude = error.abs()
        shrunk = torch.sign(error) * torch.relu(magnitude - magnitude.clamp(min=1e-30).pow(LP_NORM - 1) / beta)
        zero = (q - (w - shrunk) * inverse).mean(dim=1, keepdim=True)
        beta *= KAPPA
    return best.squeeze(1)
