"""Train a small Llama on the source of the running Python's standard library.

The text is on every machine that has Python, so the model can be rebuilt anywhere
without a download. One file in twenty, by hash of its path, is held out.

    python -m mlx_redrafter.training.embedded_target OUT --minutes 80              # from nothing
    python -m mlx_redrafter.training.embedded_target OUT --minutes 120 --init OLD  # go on from weights
    python -m mlx_redrafter.training.embedded_target OUT --minutes 120 --resume    # from OUT's checkpoint

The learning rate warms up, stays, and falls over the last fifth of the budget, so a run
can be followed by another. A checkpoint is written every ten minutes and on SIGTERM.
Needs torch (extra `torch`); transformers and tokenizers come with mlx-lm.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import time

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlx_redrafter.embedded.corpus import stdlib_files

EOS = "<|endoftext|>"


def train_tokenizer(texts, vocab):
    """Byte-level BPE that keeps a line break and its indentation in one token."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n *| ?\w+| ?[^\s\w]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return tok


def save_checkpoint(path, model, opt, step, seen):
    tmp = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": step, "seen": seen}, tmp)
    os.replace(tmp, path)


def save_model(out, model, tok, facts):
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=EOS, bos_token=EOS)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=pathlib.Path)
    for flag, default in (
        ("hidden", 384), ("layers", 7), ("heads", 6), ("kv-heads", 2), ("ffn", 1024),
        ("vocab", 4096), ("seq", 512), ("batch", 8),
    ):  # fmt: skip
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--minutes", type=float, default=80)
    p.add_argument("--decay", type=float, default=0.2, help="share of the budget over which the rate falls")
    p.add_argument("--init", type=pathlib.Path, help="directory of weights and tokenizer to go on from")
    p.add_argument("--tokenizer", type=pathlib.Path, help="tokenizer.json to use instead of training one")
    p.add_argument("--resume", action="store_true")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    random.seed(0)

    files = list(stdlib_files())
    train = [t for _, t, held, test in files if not held for _ in range(1 if test else 2)]
    valid = [t for _, t, held, test in files if held and not test]
    known = a.tokenizer or (a.out / "tokenizer.json" if a.resume else a.init and a.init / "tokenizer.json")
    tok = Tokenizer.from_file(str(known)) if known else train_tokenizer(train, a.vocab)
    tok.save(str(a.out / "tokenizer.json"))
    eos = tok.token_to_id(EOS)
    random.shuffle(train)

    def stream(texts):
        return np.concatenate([np.array([eos, *e.ids], np.int32) for e in tok.encode_batch(texts)])

    data, held = stream(train), stream(valid)
    if a.init:
        model = LlamaForCausalLM.from_pretrained(a.init, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=a.vocab,
                hidden_size=a.hidden,
                intermediate_size=a.ffn,
                num_hidden_layers=a.layers,
                num_attention_heads=a.heads,
                num_key_value_heads=a.kv_heads,
                max_position_embeddings=2048,
                rope_theta=10000.0,
                tie_word_embeddings=True,
                rms_norm_eps=1e-5,
                bos_token_id=eos,
                eos_token_id=eos,
            )
        )
    model.to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.1)
    step = seen = 0
    checkpoint = a.out / "checkpoint.pt"
    if a.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step, seen = state["step"], state["seen"]
    n = sum(q.numel() for q in model.parameters())
    print(f"{n / 1e6:.2f}M parameters, {len(data) / 1e6:.2f}M tokens, held out {len(held) / 1e6:.2f}M", flush=True)

    chunks = (len(data) - 1) // a.seq

    shuffles = {}

    def chunk(index):
        epoch, i = divmod(index, chunks)
        if epoch not in shuffles:
            shuffles[epoch] = np.random.default_rng(epoch).permutation(chunks)
        at = shuffles[epoch][i] * a.seq
        return data[at : at + a.seq + 1]

    def batch(step):
        rows = [chunk(step * a.batch + j) for j in range(a.batch)]
        return torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)

    def loss_of(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=x[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    start = saved = time.time()
    begun, avg, budget = step, None, a.minutes * 60
    while not stop and (elapsed := time.time() - start) < budget:
        left = (1 - elapsed / budget) / a.decay
        for group in opt.param_groups:
            group["lr"] = a.lr * min(1, (step - begun + 1) / 100) * min(1, 0.02 + left)
        loss = loss_of(batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + a.batch * a.seq
        avg = loss.item() if avg is None else 0.98 * avg + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{elapsed / 60:6.1f} min  step {step}  {seen / 1e6:.2f}M tokens  loss {avg:.3f}", flush=True)
        if time.time() - saved > 600:
            save_checkpoint(checkpoint, model, opt, step, seen)
            saved = time.time()
    save_checkpoint(checkpoint, model, opt, step, seen)

    model.eval()
    with torch.no_grad():
        v = torch.from_numpy(held[: len(held) // (a.seq + 1) * (a.seq + 1)].reshape(-1, a.seq + 1).astype(np.int64))
        losses = [loss_of(v[i : i + 8].to(device)).item() for i in range(0, min(len(v), 128), 8)]
    held_loss = float(np.mean(losses))
    print(f"held-out loss {held_loss:.3f} nats per token after {seen / 1e6:.2f}M tokens", flush=True)
    save_model(a.out, model, tok, {"parameters": n, "tokens": seen, "steps": step, "held_out_loss": held_loss})


if __name__ == "__main__":
    main()
