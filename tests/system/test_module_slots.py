"""Stand-ins: in their slots while it lasts, for the thread that put them there and for no other."""

import threading

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_redrafter.system.module_slots import StandIn, slots, standing_in


class Counting(StandIn):
    calls = 0

    def call(self, x):
        self.calls += 1
        return self.module(x) + 100


def test_only_the_thread_that_put_it_there_meets_a_stand_in():
    """If this fails, a thread that uses the model meanwhile is given what was meant for another one."""
    model, found = nn.Sequential(nn.Identity(), nn.ReLU()), []
    stand_ins = [(slot, Counting(slot.module)) for slot in slots(model)]
    x = mx.array([1.0])
    with standing_in(stand_ins):
        thread = threading.Thread(target=lambda: found.append(model(x).item()))
        thread.start()
        thread.join()
        assert model(x).item() == 201 and [one.calls for _, one in stand_ins] == [1, 1]
    assert found == [1] and model(x).item() == 1


def test_modules_hang_again_after_an_error():
    """If this fails, a model stays changed by a call that failed, for as long as it lives."""
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    before = [slot.module for slot in slots(model)]
    with pytest.raises(ValueError), standing_in([(slot, Counting(slot.module)) for slot in slots(model)]):
        raise ValueError
    assert all(slot.module is module for slot, module in zip(slots(model), before, strict=True))
