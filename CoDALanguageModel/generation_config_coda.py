"""The decoding settings as transformers' class. Not here: what they are (`decoding_settings`), what they do."""

import copy
import textwrap
from typing import Any

from transformers import GenerationConfig

from .configuration_coda import token_ids
from .decoding_settings import SETTINGS, check_together, commits_are_final, refuse_in_folder, refuse_unknown
from .errors import UserError

# What transformers itself writes into a generation config.
METADATA = ("_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version")


def _arguments() -> str:
    """The table as the arguments of a docstring."""
    texts = (f"{setting.name}: {setting.says}; {setting.allowed}." for setting in SETTINGS.values())
    return "\n".join(textwrap.fill(t, 120, initial_indent=" " * 8, subsequent_indent=" " * 12) for t in texts).lstrip()


def what_is_set(config: GenerationConfig) -> dict[str, Any]:
    """The settings that a plain `GenerationConfig` holds, by name, whether they are ours or not.

    Of one that was made of a model's configuration only the token ids count.

    Raises:
        UserError: it is no `GenerationConfig`.
    """
    if not isinstance(config, GenerationConfig):
        raise UserError(f"generation_config must be a GenerationConfig or None, got {type(config).__name__}")
    settings = {key: value for key, value in config.to_diff_dict().items() if value is not None}
    return {key: value for key, value in _of_a_model(settings).items() if key not in METADATA}


def _of_a_model(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that transformers took from a model's configuration, token ids aside."""
    if not settings.get("_from_model_config"):
        return settings
    return {key: value for key, value in settings.items() if key in METADATA or key.endswith("token_id")}


class DiffusionGenerationConfig(GenerationConfig):
    """Decoding settings, saved as `generation_config.json`; unknown keys, bad values and bad combinations are errors.

    The defaults are the exact regime: every token is what the stepwise sampler gives. The cached regime (`kv_cache`,
    `suffix_window`) and the parallel one (`threshold`, `factor`, `entropy_bound`) trade exactness for speed;
    `speculate` does not.

    Args:
        {settings}

    Raises:
        UserError: an unknown key, with the nearest known one; a value out of its range; settings that exclude each
            other.
    """

    __doc__ = __doc__.format(settings=_arguments())

    def __init__(self, **kwargs):
        kwargs = _of_a_model(kwargs)
        # Settings of autoregressive decoding may stand in a file as null: they are unset.
        settings = {key: value for key, value in kwargs.items() if value is not None or key in SETTINGS}
        refuse_unknown(key for key in settings if key not in METADATA)
        for key, setting in SETTINGS.items():
            settings.setdefault(key, setting.default)
            setattr(self, key, settings[key])
        super().__init__(**settings)

    @property
    def parallel_rule(self) -> str | None:
        """The parallel rule that is set, if any."""
        rules = (name for name, setting in SETTINGS.items() if setting.regime == "parallel")
        return next((name for name in rules if getattr(self, name) is not None), None)

    @property
    def commits_are_final(self) -> bool:
        """Whether a committed token stays: not with `p2` and not with remasking."""
        return commits_are_final(vars(self))

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check every value; the arguments are transformers' and change nothing, since every fault is an error.

        Raises:
            UserError: naming the setting, the allowed values and the value got.
        """
        # A setting of autoregressive decoding that was set as an attribute would otherwise have no effect, silently.
        refuse_unknown(k for k, value in vars(self).items() if value is not None and k not in METADATA and k[0] != "_")
        for name, setting in SETTINGS.items():
            setattr(self, name, setting.checked(getattr(self, name)))
        check_together(vars(self))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that a model does not have.

        Raises:
            UserError: naming the setting, the ids that there are, and the one got.
        """
        names = ("mask_token_id", "pad_token_id", "eos_token_id")
        settings = {name: token_ids(getattr(self, name)) for name in names}
        settings |= {"suppress_tokens": self.suppress_tokens or (), "logit_bias": map(int, self.logit_bias or ())}
        for name, ids in settings.items():
            for token in ids:
                if token >= vocab_size:
                    raise UserError(f"{name} must hold token ids in [0, {vocab_size}), got {token}")

    def merged(self, overrides: dict[str, Any]) -> "DiffusionGenerationConfig":
        """A checked copy with some settings replaced.

        Raises:
            UserError: an unknown key, a bad value or a bad combination.
        """
        refuse_unknown(overrides)
        config = copy.deepcopy(self)
        for key, value in overrides.items():
            setattr(config, key, value)
        config.validate()
        return config

    @classmethod
    def from_pretrained(cls, *arguments: Any, **kwargs: Any) -> "DiffusionGenerationConfig":
        """Read the settings of a folder.

        Raises:
            UserError: they hold what is no setting, or one that no folder may have.
        """
        config = super().from_pretrained(*arguments, **kwargs)
        try:
            refuse_in_folder(vars(config[0] if isinstance(config, tuple) else config))
        except UserError as error:
            raise UserError(f"generation_config.json: {error}") from error
        return config

    def save_pretrained(self, *arguments: Any, **kwargs: Any) -> None:
        """Write the settings into a folder.

        Raises:
            UserError: a setting that no folder may have, so that it could not be read again.
        """
        refuse_in_folder(vars(self))
        super().save_pretrained(*arguments, **kwargs)

    @classmethod
    def of(cls, config: GenerationConfig) -> "DiffusionGenerationConfig":
        """Read a plain `GenerationConfig` as ours; settings that it has and we have not are errors."""
        if isinstance(config, cls):
            return config
        return cls(**{key: value for key, value in config.to_diff_dict().items() if value is not None})
