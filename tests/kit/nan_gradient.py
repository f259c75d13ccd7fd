"""Gradients that become NaN in one step while every loss stays what it is; used in and outside the tests' process."""

import torch

from cogtrain.model.objective import Objective
from cogtrain.trainer import trainer


class _Nan(torch.autograd.Function):
    """Gives what it is given; its gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def make_gradients_nan(setattr=setattr):
    """Returns ``at(step)``, after which the gradients of that step are NaN; None: of none.

    Args:
        setattr: pytest's, to undo it.
    """
    wanted, now = [None], [0]
    rate, losses = trainer.learning_rate, Objective.losses

    def watched_rate(step, *rest):
        now[0] = step
        return rate(step, *rest)

    def spoilt_losses(self, transformer, batch, dtype):
        found = losses(self, transformer, batch, dtype)
        return _Nan.apply(found) if transformer.training and now[0] in (wanted[0] or ()) else found

    setattr(trainer, "learning_rate", watched_rate)
    setattr(Objective, "losses", spoilt_losses)

    def at(steps):
        wanted[0] = steps

    return at
