"""Rope inside a verification: a position per row, and tables that all layers share."""

import mlx.core as mx
import pytest

from mlx_redrafter.target.rope import positions_per_row

OFFSETS = {"number": 7, "first": mx.array([7], mx.int32), "rows": mx.array([[7, 8, 8, 9, 9]], mx.int32)}
OPTIONS = {
    "plain": {"traditional": False, "base": 10000.0, "scale": 1.0},
    "traditional": {"traditional": True, "base": 10000.0, "scale": 1.0},
    "scaled": {"traditional": False, "base": 500.0, "scale": 0.25},
    "frequencies": {"traditional": False, "base": None, "scale": 1.0, "freqs": mx.arange(1, 9).astype(mx.float32) * 3},
}


def one_by_one(a, dims, offset, options):
    """Every row of a (1, heads, rows, width) turned alone."""
    first = offset if isinstance(offset, int) else offset.reshape(-1)[0].item()
    at = [first + i for i in range(a.shape[-2])]
    if isinstance(offset, mx.array) and offset.ndim == 2:
        at = offset[0].tolist()
    turned = [mx.fast.rope(a[..., i : i + 1, :], dims, offset=int(p), **options) for i, p in enumerate(at)]
    return mx.concatenate(turned, axis=-2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dims", [16, 8], ids=["whole", "part"])
def test_rope_is_that_of_each_row_alone(dims, options, offset, dtype):
    """If this fails, nodes of a tree stand where they do not."""
    if dims == 8 and "freqs" in options:
        options = {**options, "freqs": options["freqs"][:4]}
    if dims == 16 and "freqs" in options:
        options = {**options, "freqs": options["freqs"][:8]}
    a, b = (mx.random.normal((1, heads, 5, 16), key=mx.random.key(heads)).astype(dtype) for heads in (4, 2))
    expected = [one_by_one(x, dims, offset, options) for x in (a, b, a)]
    with positions_per_row():
        found = [mx.fast.rope(x, dims, offset=offset, **options) for x in (a, b, a)]
    tolerance = 2e-6 if dtype == mx.float32 else 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert mx.abs(one - other).max().item() <= tolerance


def test_offsets_are_told_apart():
    """If this fails, one layer's positions are used for another's."""
    a = mx.random.normal((1, 2, 5, 16), key=mx.random.key(1))
    options = OPTIONS["plain"]
    other = OFFSETS["rows"] + 3
    expected = one_by_one(a, 16, OFFSETS["rows"], options), one_by_one(a, 16, other, options)
    with positions_per_row():
        found = [mx.fast.rope(a, 16, offset=at, **options) for at in (OFFSETS["rows"], other)]
    assert all(mx.allclose(x, y, atol=2e-6) for x, y in zip(found, expected, strict=True))
