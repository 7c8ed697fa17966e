"""A target with recurrent states beside attention, as files, with a drafter that knows nothing."""

import json
import shutil

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_redrafter.benchmarks.architectures import small_models

from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import EMBEDDED

VOCABULARY = 4096  # of the embedded target, whose tokenizer it has


def write_pair(module, folder, monkeypatch):
    """The flags that name the pair of a small instance of a module."""
    monkeypatch.setitem(small_models.CONFIGS["common"], "vocab_size", VOCABULARY)
    model = small_models.build(module)
    target, drafter = folder / "target", folder / "drafter"
    shutil.copytree(EMBEDDED / "target", target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (target / "config.json").write_text(json.dumps(small_models.config(module)))
    mx.save_safetensors(str(target / "model.safetensors"), dict(tree_flatten(model.parameters())))
    small_models.random_drafter(Target(model)).save(drafter)
    return ["--model", str(target), "--draft", str(drafter)]
