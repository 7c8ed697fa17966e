"""Several processes: how many there are, and that nothing which each measures for itself decides what they draft."""

from unittest.mock import create_autospec

import mlx.core as mx
import pytest
from support import make_drafter, make_model

from mlx_redrafter import DraftShape, UserError, stream_generate
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


@pytest.mark.parametrize("options", [{}, {"shape": "auto", "lookup": "off"}, {"shape": DraftShape(), "lookup": "auto"}])
def test_ranks_may_not_choose_for_themselves(pair, monkeypatch, two, options):
    """If this fails, two ranks draft differently and wait for each other for ever."""
    monkeypatch.setattr("mlx_redrafter.text.generate.number_of_ranks", lambda: 2)
    model, drafter = make_model(vocab=4096), make_drafter(vocab=4096)
    with pytest.raises(UserError, match="what each of the 2 ranks measures"):
        next(stream_generate(model, pair[2], "x", drafter, **options))
    for fine in ({"shape": DraftShape()}, {"shape": DraftShape(), "lookup": "on"}):
        assert list(stream_generate(model, pair[2], "x", drafter, max_tokens=3, **fine))
    assert list(stream_generate(model, pair[2], "x", max_tokens=3))
