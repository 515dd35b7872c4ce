"""Schedules against the formulas of the published recipes."""

import math

import pytest

from speechbrain_qmargin import make_loss
from speechbrain_qmargin.loss.base import value_of
from speechbrain_qmargin.training.schedules import (
    loss_schedule,
    polynomial_decay,
    warmup_exponential,
)


def test_margin_and_learning_rate_are_wespeakers_iteration_by_iteration():
    per_epoch, epochs, warmup = 7, 50, 6
    margin = loss_schedule(margin=(20, 40))["margin"]
    # MarginScheduler: increase_start_epoch 20, fix_start_epoch 40, both counted from 1
    start, end = (20 - 1) * per_epoch, (40 - 1) * per_epoch
    for iteration in range(epochs * per_epoch):
        time = iteration / per_epoch
        wanted = 0.0 if iteration < start else 0.2
        if start < iteration < end:
            ratio = math.exp((iteration - start) / (end - start) * math.log(1e-3))
            wanted = 0.2 * (1 - ratio)
        elif iteration == start:
            wanted = 0.0
        assert margin(time, 0.2) == pytest.approx(wanted, abs=1e-12)
        # ExponentialDecrease with warm_from_zero
        decay = 0.1 * math.exp(iteration / (epochs * per_epoch) * math.log(5e-5 / 0.1))
        ramp = min(1.0, iteration / (warmup * per_epoch))
        rate = warmup_exponential(time, peak=0.1, final=5e-5, epochs=epochs, warmup_epochs=warmup)
        assert rate == pytest.approx(ramp * decay, rel=1e-12)


def test_a_polynomial_decay_is_arcface_torchs_and_ends_at_zero():
    """PolyScheduler: a ramp over the warmup's steps, then the power of what is left."""
    total, warmup = 40, 4
    for step in range(total + 3):
        wanted = 0.1 * step / warmup
        if step >= warmup:
            wanted = 0.1 * (1 - min(1, (step - warmup) / (total - warmup))) ** 2
        settings = dict(epochs=total / 8, warmup_epochs=warmup / 8, power=2)
        assert polynomial_decay(step / 8, peak=0.1, **settings) == pytest.approx(wanted, abs=1e-15)


def test_changes_without_an_end_are_refused():
    with pytest.raises(ValueError, match="margin_until_epoch: 0 is before margin_from_epoch: 20"):
        loss_schedule(margin=(20, 0))
    with pytest.raises(ValueError, match="alpha_until_epoch: alpha_initial wants an epoch"):
        loss_schedule(alpha=(1.0, 0))
    with pytest.raises(ValueError, match="scale_until_epoch: 5 wants scale_initial"):
        loss_schedule(scale=(None, 5))
    step = loss_schedule(margin=(20, 20))["margin"]
    assert [step(time, 0.2) for time in (18.9, 19, 30)] == [0, 0.2, 0.2]


@pytest.mark.parametrize("margin", [(0, 0), (0, 1), (1, 1)])
def test_a_margin_that_is_full_throughout_is_no_schedule(margin):
    """A loss with margins of other names, or with none, trains with it."""
    assert loss_schedule(margin=margin) == {}


def test_what_a_schedule_cannot_change_is_named_with_the_way_out():
    for loss in (make_loss("magface"), make_loss("combined")):
        with pytest.raises(ValueError, match=r"no margin .*--margin_until_epoch 0"):
            value_of(loss, "margin")
    with pytest.raises(ValueError, match=r"ArcFaceLoss has no alpha .*--alpha_initial null"):
        value_of(make_loss("arcface"), "alpha")
