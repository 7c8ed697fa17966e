"""Says what a directory is, what it lacks and what it would cost to run; no weight is read for it.

Knows nothing of how that is printed. mlx builds graphs lazily, so a model of mapped weights
has sizes without having contents, and a prompt that nobody evaluates leaves caches of the right shapes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import get_total_parameters
from mlx_redrafter.convert.drafter import read_drafter
from mlx_redrafter.convert.medusa import published_files
from mlx_redrafter.convert.redrafter import is_converted, read_config
from mlx_redrafter.convert.source import weight_files

from mlx_redrafter.drafting.cached.eagle import MODEL_TYPE as EAGLE
from mlx_redrafter.drafting.cached.head import ContextReader
from mlx_redrafter.drafting.cached.mtp import MODEL_TYPE as LAYER
from mlx_redrafter.drafting.cached.mtp import MtpHead
from mlx_redrafter.drafting.cached.mtp_weights import places
from mlx_redrafter.drafting.kinds import Drafter, is_eagle
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.files import read_json
from mlx_redrafter.system.weights import read_weights, tensors, type_name, weights
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.checks import check_adapter, has_chat_template, is_drafter
from mlx_redrafter.text.loading import open_model

TARGET, DRAFTER, ADAPTER, UNKNOWN = "target", "drafter", "adapter", "unknown"
TORCH_TARGET, HF_DRAFTER = "unconverted target", "unconverted drafter"
CACHE_LENGTHS = (1024, 8192)  # tokens
DRAFT_STEPS = 3  # of the default chain
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
# What models call the experts that one token uses, in the order to look.
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclasses.dataclass
class Inspection:
    """What was found.

    Attributes:
        kind: one of the words above.
        about: model type, or what else it says of itself, for people.
        lacks: what has to be there before it can be used, for people; empty where nothing.
        remarks: what is good to know.
        files, weight_bytes: weight files and their size on disk.
        parameters: numbers in the weights, however they are packed; None if not known.
        weight_types: bytes by type, "4-bit affine" for quantised ones.
        bytes_per_step: weights that one step of decoding reads: for a target one pass, of
            experts those that a token uses; for a drafter the drafts of one step.
        step: how they are counted, for people.
        cache_bytes: of the target's KV cache or state at so many tokens, in the type it
            comes in.
        runnable: whether `--model`, `--draft` or `--adapter-path` takes it as it is.
    """

    path: str
    kind: str = UNKNOWN
    about: str = ""
    lacks: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)
    files: int = 0
    weight_bytes: int = 0
    parameters: int | None = None
    weight_types: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes_per_step: int | None = None
    step: str = ""
    cache_bytes: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def runnable(self) -> bool:
        return self.kind in (TARGET, DRAFTER, ADAPTER) and not self.lacks


def inspect_directory(folder: pathlib.Path, trust_remote_code: bool = False) -> Inspection:
    """Looks at a directory. What is wrong with it is said in `lacks`, not raised."""
    found = Inspection(str(folder))
    if (folder / "adapter_config.json").exists() or (folder / "adapters.safetensors").exists():
        return _inspect_adapter(folder, found)
    try:
        fields = read_json(folder / "config.json")
    except UserError as error:
        found.lacks.append(str(error))
        return found
    files: list[pathlib.Path] = []
    try:
        files = published_files(folder) or weight_files(folder)
        found.files, found.weight_bytes = len(files), sum(file.stat().st_size for file in files)
    except UserError as error:
        found.lacks.append(str(error))
    if is_drafter(fields):
        _inspect_drafter(folder, found, files)
    elif "model_type" in fields:
        found.about = str(fields["model_type"])
        _inspect_target(folder, found, files, trust_remote_code)
    else:
        found.lacks.append(f"{folder / 'config.json'}: key 'model_type' is missing")
    return found


def _inspect_adapter(folder: pathlib.Path, found: Inspection) -> Inspection:
    found.kind, found.step = ADAPTER, "on top of the target's"
    found.remarks.append("needs the target it was trained on: --model TARGET --adapter-path PATH")
    try:
        fields = check_adapter(folder)
        rank = (fields.get("lora_parameters") or {}).get("rank")
        layers, model = fields.get("num_layers"), fields.get("model")
        parts = [
            str(fields.get("fine_tune_type", "lora")),
            "" if rank is None else f"rank {rank}",
            "" if layers is None else f"{layers} layers",
            "" if model is None else f"for {model}",
        ]
        found.about = ", ".join(filter(None, parts))
        file = folder / "adapters.safetensors"
        arrays = read_weights([file])
        found.files, found.weight_bytes = 1, file.stat().st_size
        found.parameters = sum(value.size for value in arrays.values())
        found.weight_types = _types(arrays)
        found.bytes_per_step = sum(found.weight_types.values())
    except UserError as error:
        found.lacks.append(str(error))
    return found


def _inspect_drafter(folder: pathlib.Path, found: Inspection, files: list[pathlib.Path]) -> None:
    fields, torch = read_json(folder / "config.json"), _has_torch(files)
    recurrent = not is_eagle(fields) and "medusa_num_heads" not in fields and fields.get("model_type") != LAYER
    published = fields.get("model_type") != EAGLE if is_eagle(fields) else bool(published_files(folder))
    found.kind = HF_DRAFTER if torch or published else DRAFTER
    try:
        config: Any = read_config(folder) if recurrent else None
        if files and not torch:
            with tempfile.TemporaryDirectory() as scratch:
                head = read_drafter(folder, pathlib.Path(scratch))
                _weigh_drafter(found, head)
                config = head.config
            if recurrent and not is_converted(read_weights(files)):
                found.kind = HF_DRAFTER
        elif config is not None:
            found.parameters = get_total_parameters(RecurrentDrafter(config))
        if config is not None:
            if fields.get("model_type") == LAYER:
                found.about = f"multi-token-prediction layer of a {config.model['model_type']} model, "
            found.about += f"for targets of hidden size {config.hidden_size} and vocabulary {config.vocab_size}"
            if layers := getattr(config, "context_layers", ()):
                found.about += f", reads hidden states behind layers {', '.join(map(str, layers))}"
            if window := getattr(config, "prefix_window", 0):
                found.about += f", attends to {window} tokens"
                found.about += f" in {config.prefix_layers} layers" if config.prefix_layers > 1 else ""
            if config.target_fingerprint:
                found.about += f", made for {config.target_fingerprint.get('name', 'a target of unknown name')}"
            else:
                found.remarks.append("does not say which target it was made for; `convert drafter --target` notes it")
            if getattr(config, "tie_output", False):
                found.remarks.append("its output layer is the target's, whose bytes come on top")
    except UserError as error:
        if str(error) not in found.lacks:
            found.lacks.append(str(error))
    if found.kind == HF_DRAFTER:
        found.lacks.append("conversion: mlx-redrafter convert drafter --hf-path PATH --mlx-path NEW")


def _has_torch(files: list[pathlib.Path]) -> bool:
    return any(file.suffix != ".safetensors" for file in files)


def _weigh_drafter(found: Inspection, head: Drafter) -> None:
    found.parameters, found.weight_types = get_total_parameters(head), _types(head)
    if isinstance(head, RecurrentDrafter):
        root = sum(v.nbytes for name, v in tensors(head).items() if name.startswith(head.at_the_root))
        found.bytes_per_step = DRAFT_STEPS * head.bytes_per_draft_step() + root
        found.step = f"for a chain of {DRAFT_STEPS} drafts"
    elif isinstance(head, MtpHead):
        found.bytes_per_step = DRAFT_STEPS * _bytes_per_pass(head, head.config.model, found)
        found.step = f"for a chain of {DRAFT_STEPS} drafts"
    else:
        levels = DRAFT_STEPS if isinstance(head, ContextReader) else 1
        found.bytes_per_step = levels * head.bytes_per_draft_step()
        found.step = f"for a chain of {DRAFT_STEPS} drafts" if levels > 1 else ""


def _inspect_target(
    folder: pathlib.Path, found: Inspection, files: list[pathlib.Path], trust_remote_code: bool
) -> None:
    torch = _has_torch(files)
    found.kind = TORCH_TARGET if torch else TARGET
    if not any(True for pattern in _TOKENIZERS for _ in folder.glob(pattern)):
        found.lacks.append("a tokenizer (tokenizer.json or tokenizer.model)")
    if torch:
        found.lacks.append("conversion: mlx-redrafter convert target --hf-path PATH --mlx-path NEW")
    try:
        if not found.lacks and not has_chat_template(folder):
            found.remarks.append("no chat template: it continues text")
        if torch or not files:
            return
        model, config = open_model(folder, trust_remote_code)
    except UserError as error:
        found.lacks.append(str(error).replace(f"{folder}: mlx-lm cannot load it", "a form that mlx-lm can load"))
        return
    found.parameters, found.weight_types = get_total_parameters(model), _types(model)
    found.bytes_per_step = _bytes_per_pass(model, config, found)
    for length in CACHE_LENGTHS:
        try:
            cache = make_prompt_cache(model)
            model(mx.zeros((1, length), mx.int32), cache=cache)
            found.cache_bytes[length] = sum(layer.nbytes for layer in cache)
        except Exception as error:  # of a model's own code; the rest of the report stands
            found.remarks.append(f"cache at {length} tokens: not known ({one_line(error)})")
    if places(folder):
        found.remarks.append("has a multi-token-prediction layer that drafts for it: --draft mtp")
    if missing := Target.of(model).missing:
        found.remarks.append(f"nothing can be drafted for it: {missing}")


def _bytes_per_pass(model: nn.Module, config: dict[str, Any], found: Inspection) -> int:
    """Weights that one pass over one token reads."""
    total, modules = weights(model)[1], model.modules()
    tables = [module for module in modules if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))]
    if tables:
        table = max(tables, key=lambda module: weights(module)[1])
        linear = [module.weight for module in modules if isinstance(module, (nn.Linear, nn.QuantizedLinear))]
        if any(weight.shape[0] == table.weight.shape[0] for weight in linear):
            total -= weights(table)[1]  # or the table is the output layer, too, and read whole
    experts = [module for module in modules if isinstance(module, (SwitchLinear, QuantizedSwitchLinear))]
    if experts:
        places = (config, config.get("text_config") or {})
        values = [place.get(key) for key in _ACTIVE_EXPERTS for place in places]
        active = next((value for value in values if isinstance(value, int)), None)
        if active is None:
            found.remarks.append("how many experts a token uses is not known; all are counted")
        else:
            total -= sum(weights(m)[1] * (m.weight.shape[0] - active) // m.weight.shape[0] for m in experts)
            found.remarks.append(f"experts: {active} of {experts[0].weight.shape[0]} per token")
    return total


def _types(model: nn.Module | dict[str, mx.array]) -> dict[str, int]:
    """Bytes by type of weights, the largest first."""
    counts: Counter[str] = Counter()
    packed: set[str] = set()
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if "scales" in module:
                packed.add(name)
                settings: Any = module
                counts[f"{settings.bits}-bit {settings.mode}"] += weights(module)[1]
        model = tensors(model)
    for name, value in model.items():
        if name.rpartition(".")[0] not in packed:
            counts[type_name(value)] += value.nbytes
    return dict(counts.most_common())
