"""The files of a model, compared between machines. Writing weights is tested with what is written."""

from mlx_redrafter.system.weights import digests


def test_every_file_of_a_model_is_compared(tmp_path):
    """If this fails, machines whose templates or vocabularies differ take part unnoticed."""
    (folder := tmp_path / "model").mkdir()
    names = ["chat_template.jinja", "config.json", "merges.txt", "model.safetensors", "modeling.py", "o200k.tiktoken"]
    for name in [*names, "._config.json", "README.md"]:
        (folder / name).write_text("one")
    before = digests(folder)
    assert before["model/"] == " ".join(names) and len(before) == 1 + len(names)
    for name in names:
        (folder / name).write_text("two")
        after = digests(folder)
        assert [key for key in before if after[key] != before[key]] == [f"model/{name}"]
        before = after
    (folder / names[0]).unlink()
    assert digests(folder)["model/"] == " ".join(names[1:])
