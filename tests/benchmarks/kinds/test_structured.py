"""`mlx-redrafter bench structured`."""

from support.bench import bench


def test_structured(tmp_path, capsys):
    """If this fails, the drafter's share of the speed and jump-ahead's are not told apart."""
    printed, data, text = bench(tmp_path, capsys, "structured", "--num-prompts", "1", "-m", "16")
    assert list(data["kinds"]) == ["schema-heavy", "free text in JSON"]
    for kind, methods in data["kinds"].items():
        assert f"### {kind}" in text and kind in printed
        assert list(methods) == ["plain under masks", "jump-ahead", "drafts", "drafts and jump-ahead"]
        assert all(one["equal"] == one["runs"] == 1 for one in methods.values())
        assert methods["plain under masks"]["acceptance"] == 1
    heavy, free = data["kinds"].values()
    assert heavy["jump-ahead"]["acceptance"] > free["jump-ahead"]["acceptance"]
    assert heavy["drafts and jump-ahead"]["acceptance"] > heavy["drafts"]["acceptance"]
