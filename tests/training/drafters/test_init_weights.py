"""The head that training starts from."""

import mlx.core as mx
import pytest
from support import make_model

from mlx_redrafter.drafting.redrafter import DrafterConfig
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.drafters.init_weights import FROM_TARGET, TIED, new_drafter


@pytest.mark.parametrize("exit_dim, output", [(32, FROM_TARGET), (32, TIED), (20, FROM_TARGET), (64, FROM_TARGET)])
def test_several_layers_begin_as_the_last_alone(exit_dim, output):
    """If this fails, a head of several layers starts far from the target's scores, and learns them first."""
    target = Target(make_model())

    def projection(layers):
        config = DrafterConfig(97, 32, exit_dim, 1, tie_output=output == TIED, context_layers=layers)
        return new_drafter(target, config, 0, output).input_proj_context.weight

    several = projection((1, 2))
    expected = projection(()) if exit_dim != 64 else mx.eye(64, 32)
    assert mx.array_equal(several[:, 32:], expected) and not several[:, :32].any().item()
    assert projection((1,)).abs().min().item() > 0 if exit_dim != 64 else True  # nothing to begin with
