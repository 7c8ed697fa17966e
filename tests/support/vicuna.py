"""A model in Vicuna's shape, random and small, with the one tokenizer that it came with."""

import json
import pathlib
import shutil

import mlx.core as mx

from mlx_redrafter.system.weights import read_weights

HIDDEN, LAYERS, VOCAB = 64, 3, 300
TEXT = "Hello, world. It is a naïve café, 12345 of them; import os and go on.\n"


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """A tokenizer.model as Llama's was trained: byte fallback, nothing normalised, digits one by one."""
    import sentencepiece

    (folder / "text.txt").write_text((pathlib.Path(__file__).parents[2] / "CONTRIBUTING.md").read_text() + 20 * TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB + 100,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def write_vicuna(folder, tokenizer_model, hidden=HIDDEN, layers=LAYERS, inner=96, shards=3, **config_changes):
    """Vicuna's shape: Llama in float16 shards with an index, and a SentencePiece tokenizer alone."""
    import sentencepiece

    vocab = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model)).vocab_size()
    folder.mkdir(parents=True)
    shutil.copy(tokenizer_model, folder)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(fields | config_changes))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    mx.random.seed(3)
    draw = mx.random.normal if hidden == HIDDEN else mx.ones  # the large ones are only weighed
    weights = {name: (0.2 * draw(shape)).astype(mx.float16) for name, shape in shapes.items()}
    weight_map, names = {}, list(weights)
    per_shard = -(-len(names) // shards)
    for i in range(shards):
        part = {name: weights[name] for name in names[i * per_shard : (i + 1) * per_shard]}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(folder / file), part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tensors(folder):
    return read_weights(sorted(folder.glob("*.safetensors")))
