"""Medusa heads as published become ours."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_redrafter.convert.drafter import convert_drafter
from support.medusa import make_heads

import mlx_redrafter
from mlx_redrafter import UserError
from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.medusa import MedusaHeads


def published(folder, heads, kind="safetensors", prefix="", **config):
    """The files of FasterDecoding's checkpoints: a sequence for each head."""
    weights = {}
    for h, head in enumerate(heads.heads):
        for i, block in enumerate(head.blocks):
            weights |= {f"{prefix}{h}.{i}.linear.{name}": block.linear[name] for name in ("weight", "bias")}
        weights[f"{prefix}{h}.{len(head.blocks)}.weight"] = head.lm_head.weight
    folder.mkdir()
    if kind == "safetensors":
        mx.save_safetensors(str(folder / "medusa_lm_head.safetensors"), weights)
    else:
        torch = pytest.importorskip("torch")
        state = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
        torch.save(state, folder / "medusa_lm_head.pt")
    fields = {"medusa_num_heads": len(heads.heads), "medusa_num_layers": heads.config.medusa_num_layers}
    fields |= {"base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "transformers_version": "4.34.1"} | config
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize("kind, prefix", [("safetensors", ""), ("safetensors", "medusa_head."), ("pt", "")])
def test_published_checkpoints(tmp_path, kind, prefix):
    """If this fails, published heads cannot be read, or their layers change places."""
    heads = make_heads(layers=2)
    source = published(tmp_path / "hf", heads, kind, prefix)
    with pytest.raises(UserError, match="Medusa heads as published; run `mlx-redrafter convert drafter`"):
        open_drafter(source)
    found = open_drafter(convert_drafter(source, str(tmp_path / "mlx")))
    assert found.config == heads.config
    for (name, value), (_, expected) in zip(tree_flatten(found.parameters()), tree_flatten(heads.parameters())):
        assert mx.array_equal(value, expected), name
    again = open_drafter(
        convert_drafter(str(tmp_path / "mlx"), str(tmp_path / "again"), quantize=True, q_group_size=32)
    )
    assert again.config.quantization == {"group_size": 32, "bits": 4}


def test_fewer_heads_than_there_are(tmp_path):
    source = published(tmp_path / "hf", make_heads(heads=5), medusa_num_heads=2)
    assert len(open_drafter(convert_drafter(source, str(tmp_path / "mlx"))).heads) == 2


@pytest.mark.parametrize(
    "config, message",
    [
        ({"medusa_num_layers": 2}, "no output layer was found after 2 residual blocks"),
        ({"medusa_num_heads": 9}, "tensor 'heads.4.blocks.0.linear.weight' is missing"),
        ({"medusa_num_heads": "4"}, "medusa_num_heads is '4'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config(tmp_path, config, message):
    source = published(tmp_path / "hf", make_heads(), **config)
    with pytest.raises(UserError, match=message):
        convert_drafter(source, str(tmp_path / "mlx"))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_tensor_of_no_head(tmp_path):
    source = published(tmp_path / "hf", make_heads())
    file = f"{source}/medusa_lm_head.safetensors"
    mx.save_safetensors(file, {**mx.load(file), "0.0.norm.weight": mx.ones((3,))})
    with pytest.raises(UserError, match=r"tensor .0\.0\.norm\.weight. does not belong to Medusa heads"):
        convert_drafter(source, str(tmp_path / "mlx"))
    (tmp_path / "hf" / "medusa_lm_head.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights; expected medusa_lm_head.safetensors or medusa_lm_head.pt"):
        convert_drafter(source, str(tmp_path / "mlx"))


def test_from_the_shell(tmp_path, capsys, pair):
    """If this fails, --draft does not see that it was given Medusa heads."""
    source = published(tmp_path / "hf", make_heads(vocab=4096, hidden=384, heads=3))
    out = str(tmp_path / "mlx")
    assert main(["convert", "drafter", "--hf-path", source, "--mlx-path", out]) == 0
    assert "hidden size 384 and vocabulary 4096" in capsys.readouterr().out
    texts = []
    for flags in (["--draft", "none"], ["--draft", out, "--beam-width", "4"], ["--draft", out, "--lookup", "on"]):
        assert main(["generate", "-p", "import os", "-m", "12", "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        texts.append(found["tokens"])
    assert found["method"] == "medusa"
    assert texts[0] == texts[1] == texts[2]


def test_the_target_is_noted(tmp_path, stories):
    """If this fails, heads made for one model are used with another and nobody is told."""
    source = published(tmp_path / "hf", make_heads(vocab=512, hidden=64))
    found = open_drafter(convert_drafter(source, str(tmp_path / "mlx"), target=str(stories)))
    assert found.config.target_fingerprint
    _, drafter, _ = mlx_redrafter.load(str(stories), str(tmp_path / "mlx"))
    assert isinstance(drafter, MedusaHeads)
