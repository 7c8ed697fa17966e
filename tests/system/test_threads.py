"""Things that have one user at a time."""

import pytest

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.threads import InUse


def test_things_in_use():
    """If this fails, two write into one thing, or a thing that nobody uses any more is refused."""
    used, thing = InUse(), object()
    with used.alone([thing], "no"):
        with pytest.raises(UserError, match="no"), used.alone([thing], "no"):
            pass
        with used.alone([object()], "no"):
            pass
    with used.alone([thing], "no"):
        pass
