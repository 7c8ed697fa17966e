"""What tests of training share."""

import pytest

from mlx_redrafter.training import report


@pytest.fixture(scope="package", autouse=True)
def hurried():
    """The target's reading speed is measured on one pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SECONDS", 0.0)
        yield
