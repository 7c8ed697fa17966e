"""`mlx-redrafter inspect`: what directories are, what they lack, what they cost."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2_moe
from mlx_redrafter.convert.drafter import convert_drafter
from mlx_redrafter.convert.export import export
from mlx_redrafter.convert.inspection import inspect_directory
from mlx_redrafter.convert.redrafter import published_form
from mlx_redrafter.convert.target import convert_target
from support import make_drafter

from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.text.loading import EMBEDDED


def inspected(capsys, path, *flags):
    assert main(["inspect", str(path), "--json", "--bandwidth", "100", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_embedded_target(capsys):
    """If this fails, what is said of a target's size and cost is wrong."""
    found = inspected(capsys, EMBEDDED / "target")
    file = EMBEDDED / "target" / "model.safetensors"
    read = sum(value.nbytes for value in mx.load(str(file)).values())
    assert (found["kind"], found["about"], found["lacks"], found["runnable"]) == ("target", "llama", [], True)
    assert (found["files"], found["weight_bytes"]) == (1, file.stat().st_size)
    assert found["parameters"] * 2 == read == found["bytes_per_step"] == found["weight_types"]["bfloat16"]
    assert found["least_ms_per_step"] == pytest.approx(read / 100e6)
    fields = json.loads((EMBEDDED / "target" / "config.json").read_text())
    row = 2 * fields["num_key_value_heads"] * fields["head_dim"] * fields["num_hidden_layers"] * 2
    assert found["cache_bytes"] == {"1024": 1024 * row, "8192": 8192 * row}
    assert main(["inspect", str(EMBEDDED / "target")]) == 0
    out = capsys.readouterr().out
    for part in ("a target (llama)", "lacks          nothing", "12.6 million: 25.2 MB bfloat16", "(measured here)"):
        assert part in out


def test_no_weight_is_read(tmp_path):
    """If this fails, a look at a model of 40 GB takes as long as loading it."""
    shutil.copytree(EMBEDDED / "target", tmp_path / "t")
    inspect_directory(tmp_path / "t")
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    inspect_directory(tmp_path / "t")
    assert mx.get_peak_memory() - before < 100_000


def test_untied_and_quantised_targets(capsys, tmp_path):
    """If this fails, an embedding that is only looked up counts as read, or packed weights count too few numbers."""
    convert_target(str(EMBEDDED / "target"), str(tmp_path / "q"), quantize=True, q_bits=4, q_group_size=32)
    found = inspected(capsys, tmp_path / "q")
    assert found["parameters"] == inspected(capsys, EMBEDDED / "target")["parameters"]
    assert next(iter(found["weight_types"])) == "4-bit affine"
    assert sum(found["weight_types"].values()) == found["bytes_per_step"]
    untied = tmp_path / "untied"
    shutil.copytree(EMBEDDED / "target", untied, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = dict(mx.load(str(EMBEDDED / "target/model.safetensors")))
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = mx.contiguous(table)
    mx.save_safetensors(str(untied / "model.safetensors"), weights)
    fields = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(fields))
    found = inspected(capsys, untied)
    assert sum(found["weight_types"].values()) - found["bytes_per_step"] == table.nbytes


def test_experts(tmp_path, capsys):
    """If this fails, a mixture of experts is said to read all of them for each token."""
    fields = {
        "model_type": "qwen2_moe",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 50,
        "num_experts_per_tok": 2,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    model = qwen2_moe.Model(qwen2_moe.ModelArgs.from_dict(fields))
    weights = dict(tree_flatten(model.parameters()))
    folder = tmp_path / "moe"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(fields))
    found = inspected(capsys, folder)
    experts = sum(value.nbytes for name, value in weights.items() if "switch_mlp" in name)
    total = sum(value.nbytes for value in weights.values())
    embedding = weights["model.embed_tokens.weight"].nbytes
    assert found["bytes_per_step"] == total - embedding - experts * 6 // 8
    assert "experts: 2 of 8 per token" in found["remarks"]
    assert found["lacks"] == ["a tokenizer (tokenizer.json or tokenizer.model)"] and not found["runnable"]


def test_prefix_attention_is_read_once_per_step(tmp_path, capsys):
    """If this fails, most of what such a drafter reads is left out."""
    drafter = make_drafter(hidden=64, vocab=128, exit_dim=64, prefix_window=8, prefix_layers=2)
    drafter.save(tmp_path / "d")
    root = [
        *drafter.input_proj_context.parameters().values(),
        *(v for _, v in tree_flatten(drafter.prefix.parameters())),
    ]
    found = inspected(capsys, tmp_path / "d")
    assert found["bytes_per_step"] == 3 * drafter.bytes_per_draft_step() + sum(v.nbytes for v in root)


def test_drafters(tmp_path, capsys):
    """If this fails, the cost of a drafter is wrong, or one to convert is called ready."""
    drafter = make_drafter(hidden=64, vocab=128, exit_dim=64)
    drafter.config.target_fingerprint = {"name": "owner/model"}
    drafter.save(tmp_path / "d")
    found = inspected(capsys, tmp_path / "d")
    assert (found["kind"], found["runnable"]) == ("drafter", True)
    assert found["about"] == "for targets of hidden size 64 and vocabulary 128, made for owner/model"
    step = drafter.bytes_per_draft_step()
    context = sum(v.nbytes for _, v in tree_flatten(drafter.input_proj_context.parameters()))
    assert found["bytes_per_step"] == 3 * step + context and found["parameters"] * 4 == step + context
    apple = tmp_path / "apple"
    apple.mkdir()
    shutil.copy(tmp_path / "d" / "config.json", apple)
    mx.save_safetensors(str(apple / "model.safetensors"), published_form(drafter)[1])
    unconverted = inspected(capsys, apple)
    assert (unconverted["kind"], unconverted["runnable"]) == ("unconverted drafter", False)
    assert unconverted["lacks"][0].startswith("conversion: mlx-redrafter convert drafter")
    assert unconverted["parameters"] == found["parameters"]
    make_drafter(context_layers=(1, 4, 9)).save(tmp_path / "layers")
    assert inspected(capsys, tmp_path / "layers")["about"].endswith(", reads hidden states behind layers 1, 4, 9")
    for layers, words in ((1, ", attends to 8 tokens"), (2, ", attends to 8 tokens in 2 layers")):
        make_drafter(prefix_window=8, prefix_layers=layers).save(tmp_path / f"prefix{layers}")
        assert inspected(capsys, tmp_path / f"prefix{layers}")["about"].endswith(words)
    drafter.quantize(32, 4)
    drafter.config.target_fingerprint = None
    drafter.save(tmp_path / "q")
    quantised = inspected(capsys, tmp_path / "q")
    assert quantised["bytes_per_step"] < found["bytes_per_step"] / 3 and "4-bit affine" in quantised["weight_types"]
    assert "does not say which target" in quantised["remarks"][0]


def test_torch_files(tmp_path, capsys):
    """If this fails, a model to convert is called unknown, or PyTorch's files are unpacked to look at them."""
    torch = pytest.importorskip("torch")
    target, drafter = tmp_path / "t", tmp_path / "d"
    shutil.copytree(EMBEDDED / "target", target, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"x": torch.zeros(3)}, target / "pytorch_model.bin")
    found = inspected(capsys, target)
    assert found["kind"] == "unconverted target" and "convert target" in found["lacks"][0] and not found["runnable"]
    make_drafter().save(drafter)
    (drafter / "model.safetensors").unlink()
    (drafter / "model.pt").write_bytes(b"not looked into")
    found = inspected(capsys, drafter)
    assert found["kind"] == "unconverted drafter" and found["parameters"] and found["bytes_per_step"] is None


def test_medusa_heads(tmp_path, capsys):
    """If this fails, heads that `--draft` takes are reported as a target, or published ones as ready for use."""
    mx.random.seed(0)
    heads = MedusaHeads(MedusaConfig(97, 32, 4, 2))
    heads.save(tmp_path / "heads")
    found = inspected(capsys, tmp_path / "heads")
    assert found["kind"] == "drafter" and found["runnable"], found["lacks"]
    assert found["about"] == "for targets of hidden size 32 and vocabulary 97"
    assert found["bytes_per_step"] == sum(value.nbytes for _, value in tree_flatten(heads.parameters()))
    export(str(tmp_path / "heads"), str(tmp_path / "published"))
    found = inspected(capsys, tmp_path / "published")
    assert found["kind"] == "unconverted drafter" and "convert drafter" in found["lacks"][-1]


def test_medusa_heads_there_and_back(tmp_path):
    """If this fails, heads cannot be exported, or not bit for bit."""
    mx.random.seed(0)
    heads = MedusaHeads(MedusaConfig(97, 32, 4, 2, medusa_choices=((0,), (0, 1))))
    heads.save(tmp_path / "heads")
    export(str(tmp_path / "heads"), str(tmp_path / "published"))
    assert {path.name for path in (tmp_path / "published").iterdir()} == {"config.json", "medusa_lm_head.safetensors"}
    names = mx.load(str(tmp_path / "published" / "medusa_lm_head.safetensors")).keys()
    assert {"0.0.linear.weight", "0.1.linear.bias", "3.2.weight"} <= names and len(names) == 4 * 5
    again = open_drafter(convert_drafter(str(tmp_path / "published"), str(tmp_path / "back")))
    assert again.config == heads.config
    expected = dict(tree_flatten(heads.parameters()))
    assert all(mx.array_equal(value, expected[name]) for name, value in tree_flatten(again.parameters()))


def test_adapters(tmp_path, capsys):
    settings = {"rank": 8, "scale": 20.0, "dropout": 0.0}  # mlx-lm reads all three
    fields = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": settings, "model": "owner/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    found = inspected(capsys, tmp_path)
    assert found["kind"] == "adapter" and "adapters.safetensors: no such file" in found["lacks"][0]
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"a": mx.zeros((4, 8))})
    found = inspected(capsys, tmp_path)
    assert found["about"] == "lora, rank 8, 4 layers, for owner/model" and found["runnable"]
    assert (found["parameters"], found["bytes_per_step"]) == (32, 128)


def shards(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')


def edit(folder, **changes):
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


@pytest.mark.parametrize(
    "damage, kind, message",
    [
        (lambda f: (f / "config.json").unlink(), "unknown", "config.json: no such file"),
        (lambda f: edit(f, model_type=None), "unknown", "key 'model_type' is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "target", "no weights; expected model.safetensors"),
        (shards, "target", "model-2.safetensors: no such file, though"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "target", "not a safetensors file"),
        (lambda f: edit(f, model_type="novel"), "target", "a form that mlx-lm can load: Model type novel"),
        (lambda f: edit(f, hidden_size=100), "target", "a form that mlx-lm can load: Expected shape"),
        (lambda f: (f / "tokenizer.json").unlink(), "target", "a tokenizer (tokenizer.json or tokenizer.model)"),
        (lambda f: edit(f, model_type="recurrent_drafting_drafter"), "drafter", "key 'exit_dim' is missing"),
    ],
)
def test_what_is_lacking(tmp_path, capsys, damage, kind, message):
    """If this fails, `inspect` ends in a traceback for exactly the directories it is for."""
    folder = tmp_path / "t"
    shutil.copytree(EMBEDDED / "target", folder)
    damage(folder)
    found = inspected(capsys, folder)
    assert found["kind"] == kind and not found["runnable"]
    assert any(message in line for line in found["lacks"]), found["lacks"]
    assert main(["inspect", str(folder)]) == 0
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["/no/such/place"], "/no/such/place: no such directory"),
        ([__file__], "is a file, expected a directory"),
    ],
)
def test_mistakes(capsys, argv, message):
    assert main(["inspect", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "-1", "nan", "fast"])
def test_bandwidth(capsys, value):
    """If this fails, a step costs nothing, or less than that."""
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(EMBEDDED / "target"), "--bandwidth", value])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "--bandwidth is " in err and err.count("\n") == 1
