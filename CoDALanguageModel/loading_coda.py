"""Checkpoints that are loaded as they are: a head that is or is not the embedding, and no gap in the weights.

Not here: whether the files are whole (`weight_files`), other families (`conversion`).
"""

import json
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging

from .errors import UserError
from .run_files import refuse_no_model
from .weight_files import check_weights

logger = logging.get_logger(__name__)

EMBEDDING_WEIGHT, HEAD_WEIGHT = "model.embed_tokens.weight", "lm_head.weight"


class StrictLoading:
    """Stands before `PreTrainedModel` among the bases of a model class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, but follow the weights and accept no gaps.

        A head that differs from the embedding stays untied whatever the config says, and an absent head is the
        embedding. Missing, unexpected or misshapen weights are errors.

        Raises:
            UserError: the folder does not exist, its files are broken (see `weight_files.check_weights`), or the
                weights do not fit the configuration.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        # Without a folder the weights are given.
        path = None if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)
        if path is None and (kwargs.get("config") is None or kwargs.get("state_dict") is None):
            raise UserError("from_pretrained(None) reads no folder: give config and state_dict")
        if path is not None:
            refuse_no_model(path, bare=True)
        if kwargs.get("state_dict") is None and Path(path).is_dir():
            check_weights(Path(path, kwargs.get("subfolder") or ""), kwargs.get("gguf_file"))
        # Not CoDAConfig: transformers may import a folder's configuration apart from its model, as another class.
        if not isinstance(kwargs.get("config"), PreTrainedConfig):
            source = kwargs.pop("config", None) or path
            # The configuration has a dtype too and would keep the argument for itself.
            dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, unused = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
            kwargs = {**_hub_arguments(kwargs), **unused, **dtype, "config": config}
        if not kwargs.get("gguf_file"):
            says, given = kwargs["config"].tie_word_embeddings, kwargs.get("state_dict")
            if given is None:
                tied = _checkpoint_is_tied(path, says, _hub_arguments(kwargs))
            else:
                tied = _is_tied(given, given.__getitem__, says)
            if tied != says:
                logger.info("tie_word_embeddings is %s in the weights of %s; the config is corrected", tied, path)
                kwargs["config"].tie_word_embeddings = tied
        # A misshapen weight is reported below by its name, as the others are.
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            path, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        faults = {name: sorted(map(str, info.get(name) or ())) for name in ("missing_keys", "unexpected_keys")}
        if not allow_mismatch:
            faults["mismatched_keys"] = [
                f"{key} {tuple(found)} instead of {tuple(wanted)}"
                for key, found, wanted in sorted(info.get("mismatched_keys") or ())
            ]
        if any(faults.values()):
            report = "; ".join(
                f"{len(keys)} {name.replace('_', ' ')}: {keys[:5]}" for name, keys in faults.items() if keys
            )
            raise UserError(f"the weights of {path!r} do not fit its configuration: {report}")
        return (model, info) if wants_info else model


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say where on the Hub a file is."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def _checkpoint_is_tied(path: str, default: bool, hub_arguments: dict[str, Any]) -> bool:
    """Whether head and embedding are one in a safetensors checkpoint; `default` where the weights do not tell."""

    def find(name: str) -> str | None:
        found = cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_arguments,
        )
        return found if found is None or Path(found).is_file() else None

    index, single = find("model.safetensors.index.json"), find("model.safetensors")
    if single is not None:
        with safe_open(single, framework="pt") as file:
            where = dict.fromkeys(file.keys(), single)
    elif index is not None:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        where = {key: find(weight_map[key]) for key in (HEAD_WEIGHT, EMBEDDING_WEIGHT) if key in weight_map}
    else:
        return default

    def read(key: str) -> Tensor:
        with safe_open(where[key], framework="pt") as file:
            return file.get_tensor(key)

    return _is_tied(where, read, default)


def _is_tied(names: Container[str], read: Callable[[str], Tensor], default: bool) -> bool:
    """Whether head and embedding are one among the weights of some names; two that are equal are what `default` says.

    Args:
        names: of the weights.
        read: gives the weight of a name.
        default: what the configuration says.
    """
    if HEAD_WEIGHT not in names:
        return True
    if EMBEDDING_WEIGHT not in names or not default:
        return False
    return torch.equal(read(HEAD_WEIGHT), read(EMBEDDING_WEIGHT))
