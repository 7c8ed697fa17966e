"""A small model that says what it is told to: every token has one successor, whatever came before."""

from __future__ import annotations

import itertools
import json
import pathlib

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from support import make_drafter

END = "<|end|>"
SCRIPTS = {
    "<greet>": ["Hel", "lo wor", "ld, good", " bye", " now"],
    "<call>": ["Let me see.", "<tool_call>", '{"name": "add", "arguments": {"a": 1}}', "</tool_call>"],
    "<ponder>": ["<think>", *(f"hm{n} " for n in range(30)), "</think>", "So."],
    "<long>": [f"{n} " for n in range(400)],
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> tool_call.name #}"


def make_parrot(folder: pathlib.Path, scripts: dict[str, list[str]] = SCRIPTS) -> pathlib.Path:
    """Writes a target and, in its folder `drafter`, a drafter of random weights.

    Args:
        scripts: what it says after a prompt that ends with the key, piece by piece, each a token; a piece stands
            in one script only, and the last is followed by the end of the text.
    """
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(bytes_to_unicode().values())}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=END, chat_template=TEMPLATE)
    tokenizer.add_tokens([piece for cue, pieces in scripts.items() for piece in (cue, *pieces)])
    tokenizer.save_pretrained(folder)
    size = -(-len(tokenizer) // 8) * 8
    shape = {
        "model_type": "llama",
        "hidden_size": size,
        "num_hidden_layers": 2,
        "intermediate_size": 8,
        "vocab_size": size,
    }
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5}
    shape |= {"max_position_embeddings": 512, "tie_word_embeddings": False, "eos_token_id": tokenizer.eos_token_id}
    model = Model(ModelArgs.from_dict(shape))
    model.update(tree_map(mx.zeros_like, model.parameters()))
    model.model.norm.weight = mx.ones(size)
    model.model.embed_tokens.weight = mx.eye(size)
    successor = [tokenizer.eos_token_id] * size
    for cue, pieces in scripts.items():
        chain = tokenizer.convert_tokens_to_ids([cue, *pieces, END])
        for before, after in itertools.pairwise(chain):
            successor[before] = after
    rows = mx.zeros((size, size))
    rows[mx.array(successor), mx.arange(size)] = 1.0
    model.lm_head.weight = rows
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(shape))
    make_drafter(size, size).save(folder / "drafter")
    return folder
