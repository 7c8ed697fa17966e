"""Loads targets and their drafters for the server; a drafter changes without its target.

Knows nothing of requests.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import pathlib
from typing import Any

import mlx.core as mx
from mlx_lm.server import ModelProvider, load_processor

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.shape import AUTO, OFF, DraftShape
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.server.answers import NoSuchModel
from mlx_redrafter.system.hub import snapshot_of
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.verification import NONE
from mlx_redrafter.text.checks import check_adapter, read_config
from mlx_redrafter.text.loading import (
    MTP,
    NO_DRAFTER,
    find_drafter,
    find_target,
    fit_drafter,
    load,
    open_draft,
    own_drafter,
)
from mlx_redrafter.tuning.session import session_for, verifier_for

DEFAULT = "default_model"  # mlx_lm.server's word for what the command line names
MOST_DRAFTERS = 4  # that stay in memory beside a target


class Provider(ModelProvider):
    """mlx_lm's, but that drafters come from our loader, and are changed without loading the target again.

    Args:
        args: the flags of `serve`.

    Attributes:
        name: what clients call the target of the command line.
        target: the current one.
        drafter: the current one; None for none.
        shape, lookup: what is drafted where a request does not say it.
    """

    target: Any
    model: Any
    tokenizer: Any
    processor: Any
    model_key: Any  # of what depends on the target, as cached prompts do

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self._split: str | None = args.split
        self.shape: DraftShape | str = args.shape
        self.lookup: str | None = args.lookup
        self.drafter: Drafter | None = None
        self._drafters: collections.OrderedDict[str, Drafter] = collections.OrderedDict()
        self.name = public_name(args.model)
        self._model_map[self.name] = args.model
        draft = args.draft
        if draft is None and (own := own_drafter(args.model)) is not None:
            draft = str(own)
        self._draft_model_map: dict[str, str | None] = {DEFAULT: draft}
        if draft is not None:
            self._draft_model_map[public_name(draft)] = draft

    def reset(self) -> None:
        super().reset()
        self.drafter = None
        self._drafters.clear()
        self.target = None

    def known(self, model: str, adapter: str | None, draft: str | None) -> tuple[str, str] | None:
        """What every process calls a model and a drafter; None where one of them would have to be loaded."""
        drafts = {self._draft_model_map[DEFAULT]: DEFAULT, NO_DRAFTER: NO_DRAFTER, None: NO_DRAFTER}
        name = drafts.get(draft if draft is None else self._draft_model_map.get(draft, draft))
        own = adapter is None and self._model_map.get(model, model) == self.cli_args.model
        return (DEFAULT, name) if own and name is not None else None

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Loads what is not loaded yet, and makes it the current one.

        Args:
            model_path, adapter_path, draft_model_path: names of the command line's, directories, or Hub ids.

        Raises:
            NoSuchModel: one of them cannot be loaded, or does not fit the others.
        """
        model = self._model_map.get(model_path, model_path)
        own = model == self.cli_args.model
        adapter = adapter_path or (self.cli_args.adapter_path if own else None)
        draft = None if draft_model_path is None else self._draft_model_map.get(draft_model_path, draft_model_path)
        if draft_model_path == DEFAULT and not own:
            draft = None  # the command line's drafter is for its target
        try:
            self._take(model, adapter, None if draft == NO_DRAFTER else draft, own)
        except (UserError, OSError, ValueError) as error:  # of a name that cannot be one, too
            raise NoSuchModel(one_line(error)) from error
        self.target = Target.of(self.model)
        return self.model, self.tokenizer

    def _take(self, model: str, adapter: str | None, draft: str | None, own: bool) -> None:
        other = self.model_key != (model, adapter, None)
        # What is not open yet is looked at before the current target goes; another target has a layer of its own.
        if draft == MTP and (other or draft not in self._drafters):
            open_draft(draft, self._target_folder(model, own))
        elif draft is not None and draft not in self._drafters:
            read_config(find_drafter(draft))
        if other:
            self._load_target(model, adapter, draft, own)
        self.drafter = None if draft is None else self._open_drafter(draft)
        self._prepare()
        self.is_batchable = self._can_batch()

    def _load_target(self, model: str, adapter: str | None, draft: str | None, own: bool) -> None:
        config = read_config(self._target_folder(model, own))  # before the current one goes
        if adapter is not None:
            check_adapter(snapshot_of(pathlib.Path(adapter).expanduser()))
        self.reset()
        gc.collect()
        mx.clear_cache()
        args = self.cli_args
        together = draft is not None and self._split is not None  # a drafter is compared with a whole target
        loaded, drafter, tokenizer = load(
            model,
            draft if together else NO_DRAFTER,
            gguf=args.gguf if own else None,
            adapter_path=adapter,
            dtype=args.dtype if own else None,
            tokenizer_config={key: value for key, value in self._tokenizer_config.items() if own},
            # What was trusted is the model of the command line, not one that a request names.
            trust_remote_code=args.trust_remote_code and own,
            split=self._split,
        )
        if args.use_default_chat_template and not tokenizer.has_chat_template:
            raise UserError("--use-default-chat-template: this tokenizer has no chat template of its own")
        self.model, self.tokenizer, self.model_key = loaded, tokenizer, (model, adapter, None)
        self.processor = load_processor(loaded, config)
        if draft is not None and drafter is not None:
            self._drafters[draft] = drafter

    def _target_folder(self, model: str, own: bool) -> pathlib.Path:
        return find_target(model, "--model", self.cli_args.gguf if own else None)

    def _open_drafter(self, name: str) -> Drafter:
        """The drafter of a name, fitted to the target; the last few stay in memory."""
        if name not in self._drafters:
            model = self.model_key[0]
            drafter = open_draft(name, self._target_folder(model, model == self.cli_args.model))
            fit_drafter(drafter, self.model, self.tokenizer, name)
            self._drafters[name] = drafter
            if len(self._drafters) > MOST_DRAFTERS:
                self._drafters.popitem(last=False)
        self._drafters.move_to_end(name)
        return self._drafters[name]

    def _prepare(self) -> None:
        """Checks and measures now what the first text would have to wait for."""
        by_default = AUTO if self.drafter is not None and self.shape == AUTO else OFF
        if self.drafter is None and (self.lookup or by_default) == OFF:
            return
        verifier = verifier_for(self.model, self.drafter)
        if verifier.capability != NONE and (self.shape == AUTO or (self.lookup or by_default) != OFF):
            session_for(verifier, self.drafter)

    def _can_batch(self) -> bool:
        """Whether texts can be written together: quantised caches are for one."""
        if self.cli_args.kv_bits is not None or self.cli_args.decode_concurrency == 1:
            return False
        return verifier_for(self.model, self.drafter).capability != NONE

    def shape_for(self, num_draft_tokens: int | None) -> DraftShape | str:
        """The shape of a request that asks for so many draft tokens a step, 1 or more; None keeps the server's."""
        if num_draft_tokens is None or self.drafter is None:
            return self.shape
        if isinstance(shape := self.shape, DraftShape) and shape.beam_width > 1:
            most = shape.beam_width * (shape.beam_length - 1)
            return dataclasses.replace(shape, num_draft_tokens=min(num_draft_tokens, most))
        length = min(num_draft_tokens, self.drafter.deepest)
        return DraftShape(1, length + 1, length)


def public_name(path_or_repo: str) -> str:
    """What a model is called in answers: its Hub id, or the last part of its path."""
    folder = pathlib.Path(path_or_repo).expanduser()
    return folder.resolve().name if folder.exists() else path_or_repo
