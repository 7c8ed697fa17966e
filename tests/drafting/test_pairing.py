"""A drafter for another target is refused."""

import pytest
from support import make_drafter
from support.medusa import make_heads

from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target


@pytest.mark.parametrize(
    "make, change, message",
    [
        (make_drafter, {"hidden": 48}, "hidden_size is 48, but the target's is 32"),
        (make_drafter, {"vocab": 96}, "vocab_size is 96, but the target's is 97"),
        (make_heads, {"hidden": 48}, "hidden_size is 48, but the target's is 32"),
    ],
)
def test_a_drafter_of_another_model(small_model, make, change, message):
    with pytest.raises(UserError, match=message):
        check_pair(Target(small_model), make(**change))
