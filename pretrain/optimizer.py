"""Optimizers for pretraining: AdamW, and Muon for the matrices with AdamW for the rest."""

from collections import defaultdict

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pretrain.hardware import supports_bf16

OPTIMIZERS = ("adamw", "muon")


def make_optimizer(
    name: str,
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Make an optimizer with its parameter groups.

    Weight decay acts on matrices only: not on biases, norms and embeddings.

    Args:
        name: "adamw" or "muon".
        learning_rate: of both; Muon's updates are scaled to the size of AdamW's.

    Raises:
        ValueError: the name is not known.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer '{name}' is not one of {', '.join(OPTIMIZERS)}")
    matrices = [
        module.weight
        for key, module in model.named_modules()
        if isinstance(module, Conv1D | nn.Linear)
        and module.weight.requires_grad
        and not key.endswith("lm_head")
    ]
    inner = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in inner]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "use_muon": name == "muon"},
        {"params": others, "weight_decay": 0.0, "use_muon": False},
    ]
    if name == "muon":
        return Muon(groups, lr=learning_rate, betas=betas, eps=eps)
    for group in groups:
        del group["use_muon"]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups with `use_muon`, AdamW for the others.

    A matrix's momentum is replaced by the nearest orthogonal matrix, so that every direction of
    the update counts alike. The update is scaled by 0.2 sqrt(max(rows, columns)), the size of an
    AdamW update (Liu et al. 2025), so that one learning rate serves both. `torch.optim.Muon` knows
    matrices only, and always computes in bf16, which few CPUs have.

    Args:
        params: groups; each may set `use_muon`, `lr`, `weight_decay`.
        momentum: of Muon, Nesterov's form.
        betas: of AdamW.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0):
        defaults = dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults | {"use_muon": False})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            update = self._muon_updates if group["use_muon"] else self._adam_updates
            for parameter, change in zip(trained, update(trained, group), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(change, alpha=-group["lr"])
        return loss

    def _muon_updates(self, parameters: list[torch.Tensor], group: dict) -> list[torch.Tensor]:
        """The change of each matrix; those of one shape are orthogonalized in one batch."""
        changes = [torch.empty(0)] * len(parameters)
        by_shape = defaultdict(list)
        for index, parameter in enumerate(parameters):
            by_shape[parameter.shape].append(index)
        for shape, indices in by_shape.items():
            directions = torch.stack([self._direction(parameters[i], group) for i in indices])
            scaled = orthogonalize(directions) * (0.2 * max(shape) ** 0.5)
            for index, change in zip(indices, scaled, strict=True):
                changes[index] = change
        return changes

    def _direction(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(state["momentum"], group["momentum"])

    def _adam_updates(self, parameters: list[torch.Tensor], group: dict) -> list[torch.Tensor]:
        return [self._adam_update(parameter, group) for parameter in parameters]

    def _adam_update(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        state["mean"].lerp_(parameter.grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        scale = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return state["mean"] / (1 - beta1**step) / scale


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly, by a quintic Newton-Schulz iteration.

    Singular values land between about 0.7 and 1.2, which is all that Muon needs.

    Args:
        matrices: (..., rows, columns).
        steps: iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's coefficients: steepest slope at zero
    x = matrices.bfloat16() if supports_bf16() else matrices
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)
