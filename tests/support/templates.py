"""A chat template, and the embedded tokenizer under any template."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_redrafter.text.loading import EMBEDDED
from mlx_redrafter.training.text.rendering import Renderer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def renderer_of(template, ends=("<|im_end|>",)):
    tokenizer = load_tokenizer(EMBEDDED / "target")
    if "<|im_end|>" in (template or ""):
        tokenizer._tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token_ids = {tokenizer.convert_tokens_to_ids(end) for end in ends}
    tokenizer.chat_template = template
    tokenizer.has_chat_template = template is not None
    return Renderer(tokenizer)
