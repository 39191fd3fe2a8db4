"""The decoding settings, in one validated place. Not here: what they do (`generation_coda`, `sampling`, `cache`)."""

import copy
import difflib
import math
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

from .sampling import ALGORITHMS

KV_CACHES = ("none", "prefix", "dual")
PARALLEL_RULES = ("threshold", "factor", "entropy_bound")
LARGEST_INTEGER = 2**31 - 1
"""Of every setting that counts something: arithmetic on the device has 64 bits."""

LEAST_RANDOMNESS = 1e-6
"""A temperature below this is 0: dividing by it would exceed float32, and it means the most probable choice."""

OPTIONAL_INTEGERS = {"block_length": 1, "top_k": 1, "refresh_interval": 1, "refresh_window": 0, "suffix_window": 0}
"""Settings that may be None, with their least value."""

DEFAULTS: dict[str, Any] = {
    # how much, and in which order
    "max_new_tokens": 128,
    "steps": 128,
    "alg": "entropy",
    "alg_temp": None,
    "block_length": None,
    "eps": 1e-3,
    # which tokens
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "do_sample": None,
    "seed": 0,
    "logit_bias": None,
    "repetition_penalty": None,
    "suppress_tokens": None,
    "stop_strings": None,
    "num_return_sequences": 1,
    # at which cost
    "eos_early_stop": True,
    "kv_cache": "none",
    "refresh_interval": None,
    "refresh_window": None,
    "cache_drift": None,
    "drift_interval": 4,
    "threshold": None,
    "factor": None,
    "entropy_bound": None,
    "suffix_window": None,
    "speculate": 0,
    "near_tie": 1e-5,
    "remask": None,
    "eta": None,
    # what comes back
    "output_history": False,
    "output_scores": False,
    "return_dict_in_generate": False,
    # token ids; None means the model's
    "mask_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_token_ids": None,
}
# What transformers itself writes into a generation config.
METADATA = ("_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version")


class DiffusionGenerationConfig(GenerationConfig):
    """Decoding settings, saved as `generation_config.json`; unknown keys, bad values and bad combinations are errors.

    The defaults are the exact regime: every token is what the stepwise sampler gives. The cached regime (`kv_cache`,
    `suffix_window`) and the parallel one (`threshold`, `factor`, `entropy_bound`) trade exactness for speed;
    `speculate` does not.

    Args:
        max_new_tokens: masks appended to each row; 0 fills only the masks that are in the input.
        steps: denoising steps per row, at least the number of blocks; steps that would commit nothing cost nothing,
            and more than one per token (or 512, if that is more) are that many.
        alg: order of the commits: `origin`, `maskgit_plus`, `topk_margin`, `entropy` or `p2`.
        alg_temp: randomness of that order; None or 0 takes the most confident first. Below 1e-6 it becomes 0.
        block_length: decode this many masked tokens at a time from left to right; None all at once.
        eps: last time of the schedule, in (0, 1).
        temperature: 0 takes the most probable token, otherwise tokens are sampled. Below 1e-6 it becomes 0.
        top_p: mass of the nucleus to sample from, in (0, 1]; None for all.
        top_k: number of tokens to sample from; None for all.
        do_sample: False means temperature 0; None and True leave the temperature as it is.
        seed: one int for every row, or a list with one per row. A row's draws depend on its seed alone.
        logit_bias: {token id: number added to its logit}.
        repetition_penalty: divides the scores of tokens that stand in the row already (transformers' processor).
        suppress_tokens: ids that never come out.
        stop_strings: texts that end a row; `diffusion_generate` then needs the tokenizer.
        num_return_sequences: answers per row, drawn with the seeds `seed`, `seed + 1`, ...
        eos_early_stop: stop a row when an end token is committed and no mask is left of it. The text is the same.
        kv_cache: `prefix` keeps keys and values left of the block, `dual` on both sides, `none` computes all anew.
        refresh_interval: refresh the cache at every n-th step of a block; None only at its first.
        refresh_window: a refresh computes anew the block and this many tokens on both sides of it, and keeps the rest
            of the cache (dInfer's vicinity refresh), so that the cost of a block does not grow with the text; None
            computes everything. The first pass of a row always does.
        cache_drift: budget in nats: at every `drift_interval`-th step the cached distributions are compared with
            fresh ones, and where the mean KL over the masked tokens is above the budget the cache is refreshed.
        drift_interval: steps between two comparisons.
        threshold: also commit tokens whose probability is at least this. Like the two rules below it judges by the
            model's own distribution, before temperature and filters, which make any token look certain.
        factor: also commit the n most probable tokens while the n-th has at least 1 - factor / (n + 1).
        entropy_bound: also commit the most certain tokens while their entropies without the largest sum to at most
            this many nats.
        suffix_window: forget the masks that lie more than this many masked tokens behind the block.
        speculate: draft this many steps ahead and verify them in one pass; the tokens are those of the stepwise
            sampler.
        near_tie: with `speculate`, a choice that an error of this many nats in the logits could change is computed
            again with the row alone. The default suits float32; bfloat16 needs about 0.05.
        remask: `conf` masks doubtful tokens again while decoding (ReMDM); None never does.
        eta: strength of the remasking, in (0, 1]; by default 1.
        output_history: also return the canvas after each forward pass.
        output_scores: also return each token's log-probability when committed, and the step of its commit.
        return_dict_in_generate: return a `DiffusionGenerationOutput` instead of the sequences.
        mask_token_id: id of the mask token; by default the model's, as for the ids below.
        pad_token_id: fills a row behind its end token.
        bos_token_id: kept for transformers; not used.
        eos_token_id: id or ids that end an answer.
        num_token_ids: ids from this one on are never sampled.

    Raises:
        ValueError: an unknown key, with the nearest known one; a value out of its range; settings that exclude each
            other.
    """

    def __init__(self, **kwargs):
        if kwargs.get("_from_model_config"):
            kwargs = {key: value for key, value in kwargs.items() if key in METADATA or key.endswith("token_id")}
        # Settings of autoregressive decoding may stand in a file as null: they are unset.
        settings = {key: value for key, value in kwargs.items() if value is not None or key in DEFAULTS}
        refuse_unknown(key for key in settings if key not in METADATA)
        for key, default in DEFAULTS.items():
            settings.setdefault(key, default)
            setattr(self, key, settings[key])
        super().__init__(**settings)

    @property
    def parallel_rule(self) -> str | None:
        """The parallel rule that is set, if any."""
        return next((name for name in PARALLEL_RULES if getattr(self, name) is not None), None)

    @property
    def commits_are_final(self) -> bool:
        """Whether a committed token stays: not with `p2` and not with remasking."""
        return self.alg != "p2" and self.remask is None

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check every value; the arguments are transformers' and change nothing, since every fault is an error.

        Raises:
            ValueError: naming the setting, the allowed values and the value got.
        """
        # A setting of autoregressive decoding that was set as an attribute would otherwise have no effect, silently.
        refuse_unknown(k for k, value in vars(self).items() if value is not None and k not in METADATA and k[0] != "_")
        self._check_numbers()
        self._check_choices()
        self._check_combinations()

    def _check_numbers(self) -> None:
        tiny = math.ulp(0.0)
        integers = {"max_new_tokens": 0, "steps": 1, "drift_interval": 1, "speculate": 0, "num_return_sequences": 1}
        for name, low in integers.items():
            self._check_number(name, low, math.inf, f"an integer >= {low}", integer=True)
        for name, low in OPTIONAL_INTEGERS.items():
            if getattr(self, name) is not None:
                self._check_number(name, low, math.inf, f"an integer >= {low} or None", integer=True)
        self._check_number("temperature", 0, 1e6, "a number in [0, 1e6]")
        self._check_number("eps", tiny, 1 - 1e-9, "in (0, 1)")
        self._check_number("near_tie", 0, 1, "in [0, 1]")
        ranges = {
            "top_p": (tiny, 1, "in (0, 1]"),
            "alg_temp": (0, 1e6, "a number in [0, 1e6]"),
            "repetition_penalty": (1e-6, 1e6, "a number in [1e-6, 1e6]"),
            "cache_drift": (0, math.inf, "a number >= 0"),
            "threshold": (tiny, 1, "in (0, 1]"),
            "factor": (tiny, math.inf, "a number > 0"),
            "entropy_bound": (0, math.inf, "a number >= 0"),
            "eta": (tiny, 1, "in (0, 1]"),
        }
        for name, (low, high, allowed) in ranges.items():
            if getattr(self, name) is not None:
                self._check_number(name, low, high, f"{allowed} or None")
        for name in ("temperature", "alg_temp"):
            value = getattr(self, name)
            if value is not None and value < LEAST_RANDOMNESS:
                setattr(self, name, 0.0)

    def _check_number(self, name: str, low: float, high: float, allowed: str, *, integer: bool = False) -> None:
        value = getattr(self, name)
        right_type = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
        if not right_type or not low <= value <= high:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
        if integer and value > LARGEST_INTEGER:
            raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, got {value!r}")

    def _check_choices(self) -> None:
        if self.alg not in ALGORITHMS:
            raise ValueError(f"alg must be one of {', '.join(ALGORITHMS)}, got {self.alg!r}")
        if self.kv_cache not in KV_CACHES:
            raise ValueError(f"kv_cache must be one of {', '.join(KV_CACHES)}, got {self.kv_cache!r}")
        if self.remask not in (None, "conf"):
            raise ValueError(f"remask must be 'conf' or None, got {self.remask!r}")
        for name in ("eos_early_stop", "output_history", "output_scores", "return_dict_in_generate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.do_sample not in (None, True, False):
            raise ValueError(f"do_sample must be true, false or None, got {self.do_sample!r}")
        seeds = self.seed if isinstance(self.seed, (list, tuple)) else [self.seed]
        if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
            raise ValueError(f"seed must be an integer >= 0 or a list of them, one per row, got {self.seed!r}")
        strings = self.stop_strings
        if strings is not None and (isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings)):
            raise ValueError(f"stop_strings must be a list of non-empty strings or None, got {strings!r}")
        if self.logit_bias is not None and not isinstance(self.logit_bias, dict):
            raise ValueError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        for token, value in (self.logit_bias or {}).items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not (-1e6 <= value <= 1e6 or value == -math.inf):
                raise ValueError(f"logit_bias must hold numbers in [-1e6, 1e6] or -inf, got {value!r} for {token!r}")

    def _check_combinations(self) -> None:
        rules = [name for name in PARALLEL_RULES if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ValueError(f"set at most one of {', '.join(PARALLEL_RULES)}, got {' and '.join(rules)}")
        if self.alg == "p2" and self.remask is not None:
            raise ValueError("remask cannot be used with alg 'p2', which masks tokens again by itself")
        for name in (*rules, *(["speculate"] if self.speculate else [])):
            if not self.commits_are_final:
                cause = "alg 'p2'" if self.alg == "p2" else "remask"
                raise ValueError(f"{name} cannot be used with {cause}: it needs commits that are final")
        if self.speculate and self.kv_cache != "none":
            raise ValueError(f"speculate is lossless and kv_cache={self.kv_cache!r} is not: use one of them")
        for name in ("refresh_interval", "refresh_window", "cache_drift"):
            if getattr(self, name) is not None and self.kv_cache == "none":
                raise ValueError(f"{name} needs kv_cache 'prefix' or 'dual', got 'none'")
        if self.suffix_window is not None and self.block_length is None:
            raise ValueError("suffix_window needs block_length: it counts from the end of the block")
        if self.eta is not None and self.remask is None:
            raise ValueError("eta needs remask='conf'")

    def merged(self, overrides: dict[str, Any]) -> "DiffusionGenerationConfig":
        """A checked copy with some settings replaced.

        Raises:
            ValueError: an unknown key, a bad value or a bad combination.
        """
        refuse_unknown(overrides)
        config = copy.deepcopy(self)
        for key, value in overrides.items():
            setattr(config, key, value)
        config.validate()
        return config

    @classmethod
    def of(cls, config: GenerationConfig) -> "DiffusionGenerationConfig":
        """Read a plain `GenerationConfig` as ours; settings that it has and we have not are errors."""
        if isinstance(config, cls):
            return config
        return cls(**{key: value for key, value in config.to_diff_dict().items() if value is not None})


def refuse_unknown(keys: Iterable[str]) -> None:
    """Raise for the first key that is no decoding setting, naming the nearest one that is."""
    for key in keys:
        if key not in DEFAULTS:
            near = difflib.get_close_matches(key, DEFAULTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown generation setting {key!r}{hint} (known: {', '.join(sorted(DEFAULTS))})")
