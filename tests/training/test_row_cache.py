"""Records on disk: whole or not at all."""

from mlx_redrafter.training.row_cache import RowCache


def test_row_cache_keeps_whole_records_only(tmp_path):
    """If this fails, a killed run learns from half a record when it goes on."""
    cache = RowCache(tmp_path, 4, budget=11)
    for row in (7, 3, 5):
        cache.put(row, bytes([row] * 4))
    assert cache.get(7) == b"\7" * 4 and cache.get(5) is None  # 11 bytes have room for two
    cache.close()
    with (tmp_path / "records.bin").open("ab") as file:
        file.write(b"\x09\x09")  # killed in the middle of a record
    with (tmp_path / "index.bin").open("ab") as file:
        file.write(b"\x09")
    again = RowCache(tmp_path, 4, budget=100)
    assert again.get(9) is None and again.get(3) == b"\3" * 4
    again.put(9, b"\x09" * 4)
    assert again.get(9) == b"\x09" * 4 and again.get(7) == b"\7" * 4


def test_row_cache_on_a_full_disk(tmp_path):
    """If this fails, a full disk ends a run that could go on without the cache."""
    cache = RowCache(tmp_path, 4, budget=100)
    cache.put(1, b"aaaa")
    real = cache._records

    class Full:
        def write(self, data):
            real.write(data[:2])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(real, name)

    cache._records = Full()
    cache.put(2, b"bbbb")
    cache._records = real
    assert cache.get(2) is None and cache.get(1) == b"aaaa"
    cache.close()
    assert RowCache(tmp_path, 4, 100).get(1) == b"aaaa" and (tmp_path / "records.bin").stat().st_size == 4
