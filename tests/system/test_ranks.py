"""Several processes: how many there are. That all follow the first is shown in promises/test_several_ranks.py."""

from unittest.mock import create_autospec

import mlx.core as mx
import pytest

from mlx_redrafter.system import ranks


@pytest.fixture
def two(monkeypatch):
    group = create_autospec(mx.distributed.Group, instance=True)
    group.size.return_value = 2
    monkeypatch.setattr(mx.distributed, "init", create_autospec(mx.distributed.init, return_value=group))


def test_nothing_is_started_where_nothing_launched(monkeypatch, two):
    """If this fails, every text of every single process pays for a backend."""
    for name in ranks.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    ranks.number_of_ranks.cache_clear()
    assert ranks.number_of_ranks() == 1 and not mx.distributed.init.called  # type: ignore[attr-defined]
    monkeypatch.setenv("MLX_RANK", "0")
    ranks.number_of_ranks.cache_clear()
    assert ranks.number_of_ranks() == (2 if mx.distributed.is_available() else 1)
    ranks.number_of_ranks.cache_clear()
