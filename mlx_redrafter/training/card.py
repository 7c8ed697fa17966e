"""The model card of a drafter: what it is, what it learned from, how well it drafts, and the command."""

from __future__ import annotations

import shlex
from typing import Any

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.system import hub
from mlx_redrafter.training.drafters.base import Method

NOT_SHOWN = ("out", "resume", "upload_repo", "run", "command")


def command_line(arguments: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The command that trains the same drafter; flags at their defaults are left out."""
    words = ["mlx-redrafter", "train"]
    for name, value in arguments.items():
        if name in NOT_SHOWN or value == defaults.get(name):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    return shlex.join([*words, "--out", "OUT"])


def model_card(
    name: str,
    method: Method,
    drafter: Drafter,
    command: str,
    text: str,
    result: dict[str, Any],
) -> str:
    """README.md for the Hub and for people.

    Args:
        name: the target's.
        method: the kind of drafter.
        drafter: the finished one, tied if its config says so.
        command: from `command_line`.
        text: what it learned from, in a few words.
        result: the figures of the run, as in result.json.
    """
    quantization = drafter.config.quantization
    bits = f"{quantization['bits']} bits" if quantization else result["dtype"]
    rows = {
        "target": name,
        "architecture": method.architecture(drafter, result["coverage"]),
        "size": f"{result['bytes'] / 1e6:.1f} MB, {bits}; {result['bytes_per_draft_step'] / 1e6:.1f} MB read per"
        " draft step",
        "text": text,
        "objective": result["objective"],
        "training": f"{result['updates']:,} updates of {result['batch_size']} texts,"
        f" {result['tokens_per_second']:.0f} tokens per second, {result['prefill_ratio']:.2f} of the target's own"
        " reading speed",
        "mean acceptance length": f"{result['mean_acceptance_length']:.2f} ({result['measured']})",
        "command": f"`{command}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    words = (
        f"# {method.title} for {name}\n\n"
        "Drafts for its target, which writes the same text in fewer passes, with\n"
        "[mlx-redrafter](https://arxiv.org/abs/2403.09919); of no use to another model.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f'    mlx-redrafter generate --model {shlex.quote(name)} --draft THIS_DIRECTORY -p "..."\n'
    )
    return str(hub.model_card(words, ["mlx", method.name, "speculative-decoding"]))
