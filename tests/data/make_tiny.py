"""Trains the target in tests/data/tiny on stories from a grammar: no text of others, small, and sure of itself.

python tests/data/make_tiny.py OUT takes some minutes on one core. It is here to say what the weights are;
weights made anew would be others.
"""

from __future__ import annotations

import json
import pathlib
import random
import sys

import mlx_redrafter  # isort: skip # noqa: F401 (before mlx: it puts OpenBLAS in front of MLX's BLAS)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
STEPS, BATCH, LENGTH = 500, 16, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 512,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
    "torch_dtype": "float32",
}  # fmt: skip
WORDS = {
    "opening": "Once upon a time there was {who}.|There was {who} who lived near the {place}.|"
    "One day, {who} went to the {place}.|The little {animal} was {mood} because it had lost a {thing}.",
    "middle": "{name} had a {colour} {thing} and liked to {act} with it.|"
    "Every day the {animal} went to the {place} to {act}.|"
    '"Can I {act} with you?" asked {name}.|'
    '"Yes, but do not forget the {thing}," said the {animal}.|'
    "They looked for the {thing} in the {place}, and then in the {place} behind it.|"
    "It was a {colour} morning, and the {animal} wanted to {act} until the evening.|"
    "{name} was {mood} and began to {act}, and the {animal} was {mood} too.",
    "end": "In the end they were {mood} and went home.|So {name} and the {animal} were friends for ever.|"
    "And the {thing} was never lost again.",
    "who": "a girl named {name}|a boy named {name}|a big {animal}|a small {animal}|the old man with a {animal}",
    "name": "Tim|Lily|Anna|Ben|Mia|Sam|Tom|Sue", "animal": "dog|cat|bird|bear|fox|frog|duck|mouse",
    "place": "garden|river|forest|house|school|hill|lake|market",
    "thing": "ball|book|boat|hat|flower|box|drum|kite",
    "act": "play|sing|run|jump|read|swim|dance|build a tower", "mood": "happy|sad|tired|proud|afraid|kind",
    "colour": "red|blue|green|bright|yellow|small",
}  # fmt: skip


def story(rng: random.Random) -> str:
    def filled(name: str) -> str:
        text = rng.choice(WORDS[name].split("|"))
        while "{" in text:
            before, _, after = text.partition("{")
            key, _, after = after.partition("}")
            text = before + filled(key) + after
        return text

    parts = ["opening", *["middle"] * rng.randint(3, 6), "end"]
    return "".join(filled(part) + rng.choice((" ", " ", " ", "\n")) for part in parts).strip() + "\n"


def train_tokenizer(texts: list[str], more_letters: int = 0) -> Tokenizer:
    """SentencePiece's manner: a space is a piece, and stands before the first word. Other letters fill it up."""
    tok = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁?[A-Za-z]+|▁?[^▁\sA-Za-z]|▁+|\s"), "isolated")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    letters = [*map(chr, range(33, 127)), "▁", "\n", "\t", *map(chr, range(0xC0, 0xC0 + more_letters))]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[UNKNOWN, BEGIN, END], initial_alphabet=letters,
        max_token_length=7,
    )  # fmt: skip
    tok.train_from_iterator(texts, trainer)
    if missing := CONFIG["vocab_size"] - tok.get_vocab_size():
        return train_tokenizer(texts, missing)
    tok.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return tok


def main(out: pathlib.Path) -> None:
    rng = random.Random(0)
    texts = [story(rng) for _ in range(20_000)]
    tok = train_tokenizer(texts)
    assert tok.get_vocab_size() == CONFIG["vocab_size"]
    data = np.concatenate([np.array([*tok.encode(text).ids, 2], np.int32) for text in texts])
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(CONFIG))
    rate = optim.join_schedules(
        [optim.linear_schedule(0, 4e-3, 100), optim.cosine_decay(4e-3, STEPS - 100, 1e-4)], [100]
    )
    optimizer = optim.AdamW(rate, weight_decay=0.01)

    def loss_of(model, rows):
        return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")

    step = nn.value_and_grad(model, loss_of)
    for i in range(STEPS):
        starts = [rng.randrange(len(data) - LENGTH - 1) for _ in range(BATCH)]
        loss, grads = step(model, mx.array(np.stack([data[s : s + LENGTH + 1] for s in starts])))
        optimizer.update(model, grads)
        mx.eval(loss, model.parameters(), optimizer.state)
        if i % 50 == 0 or i == STEPS - 1:
            print(i, round(loss.item(), 3), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    facts = {
        "config": CONFIG,
        "generation_config": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN,
            "clean_up_tokenization_spaces": False, "model_max_length": 512,
        },
        "tokenizer": json.loads(tok.to_str()),
    }  # fmt: skip
    for name, fields in facts.items():
        (out / f"{name}.json").write_text(json.dumps(fields, ensure_ascii=False, indent=None) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
