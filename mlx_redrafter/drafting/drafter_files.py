"""What all kinds of drafters have in common: their two files, checked key by key, and quantisation.

Knows nothing of how a drafter computes.
"""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json, replace_file, write_json
from mlx_redrafter.system.weights import tensors

C = TypeVar("C", bound="HeadConfig")
D = TypeVar("D", bound="DrafterBase")
Embedder = Callable[[mx.array], mx.array]  # the target's embedding: (..., hidden_size) for ids of any shape


def read_fields(folder: pathlib.Path) -> dict[str, Any]:
    """The parsed config.json of a drafter. Raises UserError where there is none, naming what is there in its place."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file, expected a drafter's directory")
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(
                f"{folder}: is an adapter, not a drafter; use it with --model TARGET --adapter-path {folder}"
            )
        if any(folder.glob("*.gguf")):
            raise UserError(f"{folder}: holds a GGUF file, a model, not a drafter; use it with --model {folder}")
    return read_json(folder / "config.json")


def whole_number(fields: dict[str, Any], key: str, least: int, source: str) -> int:
    """A key of a config.json. Raises UserError where it is missing or not a whole number from `least` on."""
    if key not in fields:
        raise UserError(f"{source}: key {key!r} is missing")
    value = fields[key]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**24:
        raise UserError(f"{source}: {key} is {value!r}, expected a whole number from {least} to {2**24 - 1}")
    return value


def true_or_false(fields: dict[str, Any], key: str, usual: bool, source: str) -> bool:
    """A key of a config.json, `usual` where it is missing. Raises UserError where it is something else."""
    value = fields.get(key, usual)
    if not isinstance(value, bool):
        raise UserError(f"{source}: {key} is {value!r}, expected true or false")
    return value


def read_draft_vocab_size(fields: dict[str, Any], vocab_size: int, source: str) -> int | None:
    """The key "draft_vocab_size" of a config.json, if it is there. Raises UserError unless it is a number of tokens."""
    reduced = fields.get("draft_vocab_size")
    if reduced is not None and (type(reduced) is not int or not 1 <= reduced <= vocab_size):
        expected = f"a whole number from 1 to vocab_size, {vocab_size}"
        raise UserError(f"{source}: draft_vocab_size is {reduced!r}, expected {expected}")
    return reduced


@dataclasses.dataclass(kw_only=True)
class HeadConfig(abc.ABC):
    """What the configs of all heads have in common.

    Attributes:
        quantization: {"group_size": int, "bits": int} of a quantised drafter, else None.
        target_fingerprint: which target it was made for; see fingerprint.py.
        right_by_depth: shares of right drafts at depth 1, 2, ... where all before were right, as training
            measured them; a first guess for whoever chooses how much to draft.
    """

    quantization: dict[str, int] | None = None
    target_fingerprint: dict[str, Any] | None = None
    right_by_depth: tuple[float, ...] = ()
    model_type: ClassVar[str]
    said: ClassVar[tuple[str, ...]] = ()  # keys that are there whatever their value is

    @property
    def scored(self) -> int:
        """Tokens that the head scores: the draft vocabulary, or all."""
        config: Any = self
        return getattr(config, "draft_vocab_size", None) or config.vocab_size

    @abc.abstractmethod
    def widths(self) -> dict[str, int]:
        """Of the matrices that quantisation splits into groups."""

    def with_notes(self: C, fields: dict[str, Any], source: str) -> C:
        """Itself with what conversion and training noted in a config.json: the keys that all heads share.

        Raises:
            UserError: a value of another type or range, a quantisation that mlx does not have, or one that does not
                fit the widths, all of which have to be quantised.
        """
        target, found = fields.get("target_fingerprint"), fields.get("right_by_depth", [])
        if target is not None and not isinstance(target, dict):
            raise UserError(f"{source}: target_fingerprint is {target!r}, expected an object")
        if not isinstance(found, list) or not all(type(share) in (int, float) and 0 <= share <= 1 for share in found):
            raise UserError(f"{source}: right_by_depth is {found!r}, expected a list of shares from 0 to 1")
        self.target_fingerprint, self.right_by_depth = target, tuple(found)
        if (given := fields.get("quantization")) is not None:
            if not (isinstance(given, dict) and all(isinstance(given.get(k), int) for k in ("group_size", "bits"))):
                raise UserError(f"{source}: quantization is {given!r}, expected group_size and bits")
            try:
                check_quantization(given["bits"], given["group_size"])
                check_widths(self.widths(), given["group_size"])
            except UserError as error:
                raise UserError(f"{source}: quantization: {error}") from error
            self.quantization = given
        return self

    def to_dict(self) -> dict[str, Any]:
        """The keys of a config.json; what is not used, or is as usual, is not said, but for some."""
        fields = {"model_type": self.model_type, **dataclasses.asdict(self)}
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        used = {name for name, value in fields.items() if value and value != usual.get(name)}
        return {name: value for name, value in fields.items() if name in used or name in self.said}


def check_quantization(bits: int, group_size: int) -> None:
    """Raises UserError unless mlx has an affine quantisation of this kind."""
    if bits not in (2, 3, 4, 5, 6, 8):
        raise UserError(f"--q-bits is {bits}, expected 2, 3, 4, 5, 6 or 8")
    if group_size not in (32, 64, 128):
        raise UserError(f"--q-group-size is {group_size}, expected 32, 64 or 128")


def check_widths(widths: dict[str, int], group_size: int) -> None:
    """Raises UserError unless matrices of these widths can be quantised in groups of this size."""
    for name, width in widths.items():
        if width % group_size:
            raise UserError(f"--q-group-size is {group_size}, which does not divide the drafter's {name} {width}")


class DrafterBase(nn.Module):
    """A drafter of any kind.

    Attributes:
        config: with `widths()`, `to_dict()` and `quantization`.
        method: the name that statistics give to decoding with it.
        deepest: draft tokens in a row that it can propose.
        context_layers: the target's layers whose hidden states it reads, as `Target.forward` takes them.
    """

    config: Any
    method: str
    deepest: int
    context_layers: tuple[int, ...] = ()

    @property
    def widest(self) -> int:
        """Beams that it can draft."""
        widest: int = self.config.scored
        return widest

    def take(self, name: str, module: Any) -> None:
        """Keeps a module of the target's, which is no item of this one: its weights are no parameters here."""
        object.__setattr__(self, name, module)

    def is_quantizable(self, path: str, module: nn.Module) -> bool:
        """Whether a module's matrix is one that quantisation takes."""
        return hasattr(module, "to_quantized")

    def quantize(self, group_size: int = 64, bits: int = 4) -> None:
        """Quantises all matrices in place with mlx's affine scheme and notes it in the config.

        Raises:
            UserError: a width that the group size does not divide, or a scheme mlx does not have.
        """
        check_quantization(bits, group_size)
        check_widths(self.config.widths(), group_size)
        nn.quantize(self, group_size, bits, class_predicate=self.is_quantizable)
        self.config.quantization = {"group_size": group_size, "bits": bits}

    def dequantize(self) -> None:
        """Makes quantised matrices whole again, in place; the rounding stays."""
        if self.config.quantization is not None:
            dequantize_model(self)
            self.config.quantization = None

    def fill(self: D, weights: dict[str, mx.array], source: str) -> D:
        """Itself with its weights, quantised as the config says and frozen; every name and shape is checked.

        Raises:
            UserError: naming the first tensor that is missing, unknown or of another shape, or a vocab_map that
                holds no ids of the target.
        """
        if self.config.quantization is not None:
            sizes = self.config.quantization["group_size"], self.config.quantization["bits"]
            nn.quantize(self, *sizes, class_predicate=self.is_quantizable)
        expected = tensors(self)
        for name, value in expected.items():
            if name not in weights:
                raise UserError(f"{source}: tensor {name!r} is missing")
            if weights[name].shape != value.shape:
                raise UserError(f"{source}: tensor {name!r} has shape {weights[name].shape}, expected {value.shape}")
        if unknown := sorted(set(weights) - set(expected)):
            raise UserError(f"{source}: tensor {unknown[0]!r} does not belong to a drafter of this config")
        self.load_weights(list(weights.items()))
        self.freeze()
        if (ids := weights.get("vocab_map")) is not None and not (
            ids.dtype == mx.int32 and mx.all((ids >= 0) & (ids < self.config.vocab_size)).item()
        ):
            raise UserError(f"{source}: tensor 'vocab_map' has to hold int32 token ids below {self.config.vocab_size}")
        return self

    def save(self, path: str | pathlib.Path) -> None:
        """Writes config.json and model.safetensors into a directory, each whole or not at all.

        Raises:
            UserError: the place cannot be written.
        """
        folder = pathlib.Path(path)
        with replace_file(folder / "model.safetensors") as file:
            mx.save_safetensors(str(file), tensors(self), metadata={"format": "mlx"})
        write_json(folder / "config.json", self.config.to_dict())


class ScoringDrafter(DrafterBase):
    """A drafter with one output layer, of its own or the target's, for all tokens or some of them.

    Attributes:
        config: also with `scored`, `draft_vocab_size` and `tie_output`.
        lm_head: O, (..., width) -> (..., scored); the target's, once it is taken, with `tie_output`.
        unread: how the names of weights begin that a draft step does not read.
    """

    lm_head: Any
    unread: tuple[str, ...]

    def add_output_layer(self, width: int) -> None:
        """Adds what scores features of this width, and the ids of what is scored where that is not all."""
        if not self.config.tie_output:
            self.lm_head = nn.Linear(width, self.config.scored, bias=False)
        if self.config.draft_vocab_size is not None:
            self.vocab_map = mx.arange(self.config.draft_vocab_size, dtype=mx.int32)
            self.freeze(keys=["vocab_map"], recurse=False)

    def unfreeze(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As nn.Module's, but the vocabulary map holds ids and never learns."""
        super().unfreeze(*args, **kwargs)
        if "vocab_map" in self:
            self.freeze(keys=["vocab_map"], recurse=False)
        return self

    def bytes_per_draft_step(self) -> int:
        """Bytes of weights that one draft step reads, the target's rows of a tied layer included."""
        tied = tensors(self.lm_head) if self.config.tie_output and hasattr(self, "lm_head") else {}
        own = {name: value for name, value in tensors(self).items() if not name.startswith(self.unread)}
        return sum(value.nbytes for value in (*own.values(), *tied.values()))
