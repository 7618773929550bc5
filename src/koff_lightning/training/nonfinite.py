"""Losses and gradients that are not finite numbers never reach the weights: the run stops, or leaves the step out."""

import re
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError
from koff_lightning.training.optim import loss_scaler

_DOMAIN = re.compile(r"\.koff_([A-Za-z0-9_-]+)\.")


class NonFiniteGuard:
    """Stops a run, or leaves a step out, where a loss or gradient is infinite or not a number.

    It looks at the loss of every micro-batch and at the gradients of every optimizer step.

    All ranks see the loss of all their rows, which is finite on all or on none, and the same gradients; so all stop or
    skip together, and say the same.

    Args:
        skip: Leave out the optimizer step instead of stopping.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self._fault = ""  # what is wrong with the optimizer step under way

    def check_loss(
        self, loss: Tensor, tokens: Tensor, predicted: Tensor, domains: Sequence[str | None], step: int
    ) -> None:
        """Check the loss of a micro-batch.

        Args:
            loss: Loss of the micro-batch over all ranks, scalar, nats per token.
            tokens: Cross-entropy plus KL of each predicted token, [N], nats.
            predicted: Which tokens are predicted, bool [B, T-1].
            domains: Domain of each of the B rows.
            step: Number of optimizer steps taken before.

        Raises:
            KoffError: The loss is not finite, and such steps are not skipped.
        """
        if torch.isfinite(loss):
            return
        rows = predicted.nonzero()[:, 0][~torch.isfinite(tokens)].unique().tolist()
        mine = {domains[row] or "none" for row in rows}
        names = ", ".join(sorted(set().union(*ranks.gather(mine))))  # all are here: the loss is not finite on any
        where = f"in rows of domain {names}" if names else "by its penalty"
        self._found(f"the loss became {loss.item()} at step {step} ({where})")

    def check_gradients(self, module: LightningModule, optimizer: Optimizer, norms: Mapping[str, Tensor]) -> None:
        """Look at an optimizer step before it is taken; to skip it is to drop its gradients.

        Args:
            module: The module in training.
            optimizer: The optimizer that is about to step.
            norms: L2 norm of the gradients of each parameter group, scalars, by the group's name.

        Raises:
            KoffError: A gradient is not finite, and such steps are not skipped.
        """
        step, scaled = module.global_step, loss_scaler(module.trainer)
        if scaled:
            norms = {}  # 16-bit training finds its loss scale by overflowing, and skips such a step itself
        faulty_groups = [group for group, norm in norms.items() if not torch.isfinite(norm)]
        if faulty_groups and not self._fault:
            grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            faulty = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
            domains = ", ".join(sorted({found[1] for name in faulty if (found := _DOMAIN.search(name))}))
            whose = f" of domain {domains}" if domains else ""
            self._found(f"the gradients{whose} ({', '.join(faulty_groups)}) are not finite at step {step}")
        if self._fault:
            rank_zero_warn(f"step {step} is left out: {self._fault}")
            self._fault = ""
            optimizer.zero_grad(set_to_none=True)  # it passes over what has none

    def _found(self, fault: str) -> None:
        if not self.skip:
            raise KoffError(
                f"{fault}; what was saved stays. Lower the learning rates (model.optim), look at that text, or leave "
                "such steps out with --model.optim.on_nonfinite skip"
            )
        self._fault = self._fault or fault
