"""The decoding settings, one entry each.

The configuration class and its checks, the server's environment variables and request fields, `coda_eval`'s names, the
shell's flags and the tables in the READMEs (`tools.tables`) are made from the table. Free of torch, so that a wrong
setting is told before anything is loaded. Not here: what a setting does (`generation_coda` and below).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError, did_you_mean

LARGEST_INTEGER = 2**31 - 1
"""Of every setting that counts something: arithmetic on the device has 64 bits."""

NUM_BEST = 20
"""Most probable tokens that are kept beside one committed, where they are."""

LEAST_RANDOMNESS = 1e-6
"""A temperature below this is 0: dividing by it would exceed float32, and it means the most probable choice."""

APPROXIMATE = ("cached", "parallel")
"""Regimes whose tokens may differ from those of the stepwise sampler."""

DOORS = ("server", "evaluation", "shell", "folder")
"""Where a setting may come in from, besides Python; `folder` is the generation_config.json of a model."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One decoding setting."""

    name: str
    kind: type
    """int, float, bool, str, list or dict."""

    default: Any
    says: str
    """One sentence: what it does."""

    regime: str = "exact"
    """What the decoding becomes when it is not the default: `exact`, `lossless`, `cached`, `parallel`, `remasking`."""

    exact: tuple[Any, ...] = ()
    """Values of an approximate regime that change no token, besides the default."""

    optional: bool = False
    """Whether it may be None; the text `none` then means that at every door."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    takes_back: tuple[str, ...] = ()
    """Choices that mask committed tokens again."""

    words: str = ""
    """What may be given, where kind, bounds and choices do not say it; `holds` then decides."""

    holds: Callable[[Any], bool] | None = None

    rounds_to_zero: bool = False
    """Whether less than `LEAST_RANDOMNESS` becomes 0."""

    api: str = ""
    """Name of the request's field, and in capitals of the environment variable, where it is another one."""

    served: Any = None
    """The server's own default, where it is another one."""

    withheld: Mapping[str, str] = field(default_factory=dict)
    """{door: reason} for each of `DOORS` at which it is not offered."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "api", self.api or self.name)

    @property
    def served_default(self) -> Any:
        """What holds at a server whose operator and model folder say nothing."""
        return self.default if self.served is None else self.served

    def is_approximate(self, value: Any) -> bool:
        """Whether tokens may differ from the stepwise sampler's with this value."""
        return self.regime in APPROXIMATE and value != self.default and value not in self.exact

    @property
    def allowed(self) -> str:
        """What may be given, as error messages and tables say it."""
        if self.words:
            words = self.words
        elif self.choices:
            words = f"one of {', '.join(self.choices)}" if len(self.choices) > 1 else repr(self.choices[0])
        elif self.kind is bool:
            words = "true, false" if self.optional else "true or false"
        elif self.kind is int:
            words = f"an integer >= {self.least}"
        elif self.most is None and self.below is None:
            words = f"a number > {self.above}" if self.least is None else f"a number >= {self.least}"
        else:
            low = f"({self.above}" if self.least is None else f"[{_number(self.least)}"
            high = f"{_number(self.most)}]" if self.below is None else f"{self.below})"
            words = f"{'in' if self.most != 1e6 else 'a number in'} {low}, {high}"
        return f"{words} or None" if self.optional else words

    def checked(self, value: Any) -> Any:
        """The value that holds.

        Raises:
            UserError: naming the setting, the allowed values and the value got.
        """
        if value is None and self.optional:
            return value
        if self.holds is not None:
            is_right = self.holds(value)
        elif self.choices:
            is_right = isinstance(value, str) and value in self.choices
        elif self.kind in (int, float):
            is_number = isinstance(value, int if self.kind is int else (int, float)) and not isinstance(value, bool)
            is_right = is_number and self._in_bounds(value)
        else:
            is_right = isinstance(value, self.kind)
        if not is_right:
            raise UserError(f"{self.name} must be {self.allowed}, got {value!r}")
        if self.kind is int and self.holds is None and value > LARGEST_INTEGER:
            raise UserError(f"{self.name} must be at most {LARGEST_INTEGER}, got {value!r}")
        return 0.0 if self.rounds_to_zero and value < LEAST_RANDOMNESS else value

    def _in_bounds(self, value: float) -> bool:
        low = -math.inf if self.above is None else math.nextafter(self.above, math.inf)
        low = low if self.least is None else self.least
        high = self.most if self.most is not None else math.inf if self.below is None else self.below - 1e-9
        return low <= value <= high

    def read(self, value: Any) -> Any:
        """A value as command lines and the environment write it: `none` is None where that may be."""
        is_none = self.optional and isinstance(value, str) and value.lower() in ("none", "null")
        return None if is_none else value


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_INTEGER


def _are_seeds(value: Any) -> bool:
    seeds = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)


def _are_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) and text for text in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_token_id, value))


def _are_ends(value: Any) -> bool:
    return _is_token_id(value) or _are_token_ids(value)


def _is_bias(value: Any) -> bool:
    if not isinstance(value, dict):
        raise UserError(f"logit_bias must map token ids to numbers, got {value!r}")
    for token, number in value.items():
        if not _is_token_id(int(token) if isinstance(token, str) and token.isdecimal() else token):  # JSON's keys
            raise UserError(f"logit_bias must map token ids (integers >= 0) to numbers, got {token!r}")
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not (-1e6 <= number <= 1e6 or number == -math.inf):
            raise UserError(f"logit_bias must hold numbers in [-1e6, 1e6] or -inf, got {number!r} for {token!r}")
    return True


def _number(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


_TOKEN = "a token id (an integer >= 0)"
_REMASKS = ("conf",)
_ONE_ANSWER = "it is said of one answer, and not of all that a model gives"
_FOLDER = {"server": "a fact of the model's folder"}
_RESULT = dict.fromkeys(DOORS, "what comes back is for the program to decide")

# fmt: off
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in (
    # how much, and in which order
    Setting(
        name="max_new_tokens", kind=int, default=128, least=0, api="max_tokens", served=256,
        says="masks appended to each row: the longest answer; 0 fills only the masks that are in the input",
    ),
    Setting(
        name="steps", kind=int, default=128, least=1,
        says="denoising steps per row, at least the number of blocks; fewer are faster, and steps that would commit "
        "nothing (more than one per token, or 512 if that is more) cost nothing",
    ),
    Setting(
        name="alg", kind=str, default="entropy", choices=("origin", "maskgit_plus", "topk_margin", "entropy", "p2"),
        takes_back=("p2",), says="order in which tokens are committed",
    ),
    Setting(
        name="alg_temp", kind=float, default=None, optional=True, least=0, most=1e6, rounds_to_zero=True, served=0.1,
        says="randomness of that order; 0, or less than 1e-6, takes the most confident first",
    ),
    Setting(
        name="block_length", kind=int, default=None, optional=True, least=1, served=32,
        says="tokens per block, decoded from left to right; none makes the whole answer one block, or takes the blocks "
        "of a block-causal model, of which a length given must be a part",
    ),
    Setting(
        name="schedule", kind=str, default="published", choices=("published", "even"),
        says="tokens per step: `published` rounds down what the times of the published sampler ask for and commits the "
        "rest at the last step, so that with a step per token some commit none; `even` shares the tokens out evenly",
    ),
    Setting(
        name="eps", kind=float, default=1e-3, above=0, below=1, says="last time of the `published` schedule",
    ),
    # which tokens
    Setting(
        name="temperature", kind=float, default=0.0, least=0, most=1e6, rounds_to_zero=True,
        says="randomness of the tokens; 0, or less than 1e-6, takes the most probable one",
    ),
    Setting(
        name="top_p", kind=float, default=None, optional=True, above=0, most=1,
        says="probability mass of the nucleus to draw from; none for all",
    ),
    Setting(
        name="top_k", kind=int, default=None, optional=True, least=1,
        says="number of tokens to draw from; none for all",
    ),
    Setting(
        name="do_sample", kind=bool, default=None, optional=True, withheld={"server": "temperature 0 says the same"},
        says="false means temperature 0; none and true leave the temperature as it is",
    ),
    Setting(
        name="seed", kind=int, default=0, words="an integer >= 0 or a list of them, one per row", holds=_are_seeds,
        says="start of a row's draws, which depend on nothing else",
    ),
    Setting(
        name="logit_bias", kind=dict, default=None, optional=True, words="a map of token ids to numbers",
        holds=_is_bias, says="numbers added to the logits of tokens",
    ),
    Setting(
        name="repetition_penalty", kind=float, default=None, optional=True, least=1e-6, most=1e6,
        says="divides the scores of tokens that stand in the row already",
    ),
    Setting(
        name="presence_penalty", kind=float, default=0.0, least=-2, most=2,
        says="taken from the logits of tokens that stand in the gaps or the answer already, on whichever side",
    ),
    Setting(
        name="frequency_penalty", kind=float, default=0.0, least=-2, most=2,
        says="the same, as many times as the token stands there",
    ),
    Setting(
        name="suppress_tokens", kind=list, default=None, optional=True, words="a list of token ids (integers >= 0)",
        holds=_are_token_ids, says="ids that never come out",
    ),
    Setting(
        name="stop_strings", kind=list, default=None, optional=True, words="a list of non-empty strings",
        holds=_are_strings, withheld={"server": "the field is `stop`", "evaluation": "the task's `until` says it"},
        says="texts that end a row; `diffusion_generate` then needs the tokenizer",
    ),
    Setting(
        name="regex", kind=str, default=None, optional=True, words="a regular expression", holds=_is_text,
        withheld={"server": "the field is `guided_regex`", "folder": _ONE_ANSWER},
        says="the whole answer, or all from the first gap to the last, matches it; `diffusion_generate` then needs the "
        "tokenizer, as with `json_schema`",
    ),
    Setting(
        name="json_schema", kind=dict, default=None, optional=True, words="a JSON schema (an object)",
        withheld={"server": "the field is `response_format`", "folder": _ONE_ANSWER},
        says="it is one line of JSON that is valid by this schema; what of a schema is kept stands in `json_schema.py`",
    ),
    Setting(
        name="num_return_sequences", kind=int, default=1, least=1,
        withheld={"server": "the field is `n`", "evaluation": "`repeats` says it", "shell": "one answer is shown"}
        | {"folder": _ONE_ANSWER},
        says="answers per row, drawn with the seeds `seed`, `seed + 1`, ...",
    ),
    # at which cost
    Setting(
        name="eos_early_stop", kind=bool, default=True, withheld={"server": "an answer is sent when it has ended"},
        says="stop a row when an end token is committed and no mask is left of it; the text is the same",
    ),
    Setting(
        name="kv_cache", kind=str, default="auto", choices=("auto", "none", "exact", "prefix", "dual"),
        regime="cached", exact=("none", "exact"),
        says="`exact` keeps keys and values of finished blocks, which change no more in a block-causal model; in one "
        "with full attention `prefix` keeps those left of the block and `dual` on both sides; `none` computes all "
        "anew; `auto` is `exact` or `none`, after the model",
    ),
    Setting(
        name="refresh_interval", kind=int, default=None, optional=True, least=1, regime="cached",
        says="refresh the cache at every n-th step of a block; none only at its first",
    ),
    Setting(
        name="refresh_window", kind=int, default=None, optional=True, least=0, regime="cached",
        says="a refresh computes anew the block and this many tokens on both sides of it (dInfer's vicinity refresh), "
        "so that the cost of a block does not grow with the text; none, and a row's first pass, compute everything",
    ),
    Setting(
        name="cache_drift", kind=float, default=None, optional=True, least=0, regime="cached",
        says="budget in nats: at every `drift_interval`-th step the cached distributions are compared with fresh ones, "
        "and where the mean KL over the masked tokens is above it the cache is refreshed",
    ),
    Setting(
        name="drift_interval", kind=int, default=4, least=1, regime="cached", says="steps between two comparisons",
    ),
    Setting(
        name="suffix_window", kind=int, default=None, optional=True, least=0, regime="cached",
        says="forget the masks that lie more than this many masked tokens behind the block",
    ),
    Setting(
        name="threshold", kind=float, default=None, optional=True, above=0, most=1, regime="parallel",
        says="also commit tokens whose probability is at least this; like the two rules below it judges by the "
        "model's own distribution, before temperature and filters, which make any token look certain",
    ),
    Setting(
        name="factor", kind=float, default=None, optional=True, above=0, regime="parallel",
        says="also commit the n most probable tokens while the n-th has at least 1 - factor / (n + 1)",
    ),
    Setting(
        name="entropy_bound", kind=float, default=None, optional=True, least=0, regime="parallel",
        says="also commit the most certain tokens while their entropies without the largest sum to at most this many "
        "nats",
    ),
    Setting(
        name="speculate", kind=int, default=0, least=0, regime="lossless",
        says="draft this many steps ahead and verify them in one pass; the tokens are those of the stepwise sampler",
    ),
    Setting(
        name="near_tie", kind=float, default=1e-5, least=0, most=1, regime="lossless",
        says="with `speculate`, a choice that an error of this many nats in the logits could change is computed again "
        "with the row alone; the default suits float32, and bfloat16 needs about 0.05",
    ),
    Setting(
        name="remask", kind=str, default=None, optional=True, choices=_REMASKS, takes_back=_REMASKS,
        regime="remasking",
        says="`conf` masks doubtful tokens again while decoding (ReMDM); none never does",
    ),
    Setting(
        name="eta", kind=float, default=None, optional=True, above=0, most=1, regime="remasking",
        says="strength of the remasking; none is 1",
    ),
    # what comes back
    Setting(
        name="output_history", kind=bool, default=False, withheld=_RESULT,
        says="also return the canvas after each forward pass",
    ),
    Setting(
        name="output_scores", kind=bool, default=False, withheld=_RESULT,
        says="also return each token's log-probability when committed, and the step of its commit",
    ),
    Setting(
        name="return_dict_in_generate", kind=bool, default=False, withheld=_RESULT,
        says="return a `DiffusionGenerationOutput` instead of the sequences",
    ),
    # token ids; None means the model's
    Setting(
        name="mask_token_id", kind=int, default=None, optional=True, words=_TOKEN, holds=_is_token_id, withheld=_FOLDER,
        says="id of the mask token; none is the model's, as for the ids below",
    ),
    Setting(
        name="pad_token_id", kind=int, default=None, optional=True, words=_TOKEN, holds=_is_token_id, withheld=_FOLDER,
        says="fills a row behind its end token",
    ),
    Setting(
        name="bos_token_id", kind=int, default=None, optional=True, words=_TOKEN, holds=_is_token_id, withheld=_FOLDER,
        says="kept for transformers; not used",
    ),
    Setting(
        name="eos_token_id", kind=list, default=None, optional=True, holds=_are_ends, withheld=_FOLDER,
        words="a token id or a list of token ids (integers >= 0)", says="id or ids that end an answer",
    ),
    Setting(
        name="num_token_ids", kind=int, default=None, optional=True, least=1, withheld=_FOLDER,
        says="ids from this one on are never sampled",
    ),
)}
# fmt: on
"""The table, by name."""

TOKEN_IDS = tuple(name for name, setting in SETTINGS.items() if setting.withheld is _FOLDER)
"""Settings that are facts of a model."""


def offered(door: str) -> list[Setting]:
    """Settings that may be given at one of `DOORS`."""
    return [setting for setting in SETTINGS.values() if door not in setting.withheld]


def refuse_unknown(keys: Iterable[str], door: str | None = None) -> None:
    """Raise for the first key that is no decoding setting, naming the nearest one that is, or not one of this door.

    Raises:
        UserError: says which, and what is known or why it is withheld.
    """
    for key in keys:
        if key not in SETTINGS:
            hint = did_you_mean(key, SETTINGS)
            raise UserError(f"unknown generation setting {key!r}{hint} (known: {', '.join(sorted(SETTINGS))})")
        if door in SETTINGS[key].withheld:
            raise UserError(f"{key} cannot be set here: {SETTINGS[key].withheld[door]}")


def refuse_in_folder(values: Mapping[str, Any]) -> None:
    """Refuse what the settings of a folder may not hold, so that they mean the same to everyone who reads them.

    Args:
        values: settings; a saved file holds all of them, most as their default.

    Raises:
        UserError: naming the setting and the reason.
    """
    refuse_unknown((k for k, v in values.items() if k in SETTINGS and v != SETTINGS[k].default), "folder")
    if isinstance(values.get("seed"), (list, tuple)):
        raise UserError(f"seed must be one integer here: a list has one for each row of a call, got {values['seed']!r}")


def check_together(values: Mapping[str, Any]) -> None:
    """Refuse settings that exclude each other.

    Args:
        values: all settings, each of which may hold by itself.

    Raises:
        UserError: naming both.
    """
    rules = [name for name, setting in SETTINGS.items() if setting.regime == "parallel" and values[name] is not None]
    if len(rules) > 1:
        every = ", ".join(name for name, setting in SETTINGS.items() if setting.regime == "parallel")
        raise UserError(f"set at most one of {every}, got {' and '.join(rules)}")
    alg = f"alg {values['alg']!r}" if values["alg"] in SETTINGS["alg"].takes_back else ""
    if alg and values["remask"] is not None:
        raise UserError(f"remask cannot be used with {alg}, which masks tokens again by itself")
    for name in (*rules, *(["speculate"] if values["speculate"] else [])):
        if not commits_are_final(values):
            cause = alg or "remask"
            raise UserError(f"{name} cannot be used with {cause}: it needs commits that are final")
    if values["speculate"] and SETTINGS["kv_cache"].is_approximate(values["kv_cache"]):
        raise UserError(f"speculate is lossless and kv_cache={values['kv_cache']!r} is not: use one of them")
    for name in ("refresh_interval", "refresh_window", "cache_drift"):
        if values[name] is not None and not SETTINGS["kv_cache"].is_approximate(values["kv_cache"]):
            raise UserError(f"{name} needs kv_cache 'prefix' or 'dual', got {values['kv_cache']!r}")
    shapes = [name for name in ("regex", "json_schema") if values[name] is not None]
    if len(shapes) > 1:
        raise UserError("regex and json_schema exclude each other: set one of them")
    if shapes and values["speculate"]:
        raise UserError(
            f"speculate cannot be used with {shapes[0]}: what is allowed at a position depends on what a step commits "
            "at others, so that it cannot be told how near a draft is to another choice"
        )
    if shapes and values["stop_strings"]:
        raise UserError(f"stop_strings cannot be used with {shapes[0]}: an answer that is cut would not match")
    if values["suffix_window"] is not None and values["block_length"] is None:
        raise UserError("suffix_window needs block_length: it counts from the end of the block")
    if values["eta"] is not None and values["remask"] is None:
        raise UserError(f"eta needs remask: {SETTINGS['remask'].allowed}")


def commits_are_final(values: Mapping[str, Any]) -> bool:
    """Whether a committed token stays: not with `p2` and not with remasking."""
    alg, remask = SETTINGS["alg"], SETTINGS["remask"]
    return values["alg"] not in alg.takes_back and values["remask"] not in remask.takes_back


class DecodingSettings:
    """The settings of one answer: all of the table, checked, frozen and hashable. Each is an attribute.

    Args:
        **given: settings that are not the table's default.

    Raises:
        UserError: an unknown name, a bad value or a bad combination.
    """

    def __init__(self, **given: Any) -> None:
        refuse_unknown(given)
        values = {name: given.get(name, setting.default) for name, setting in SETTINGS.items()}
        vars(self).update({name: SETTINGS[name].checked(value) for name, value in values.items()})
        check_together(vars(self))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"decoding settings are frozen: {name} cannot be set")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DecodingSettings) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(value for value in vars(self).values() if not isinstance(value, (dict, list))))

    def __repr__(self) -> str:
        chosen = (f"{k}={v!r}" for k, v in vars(self).items() if v != SETTINGS[k].default)
        return f"DecodingSettings({', '.join(chosen)})"

    @property
    def commits_are_final(self) -> bool:
        """Whether a committed token stays."""
        return commits_are_final(vars(self))

    @property
    def approximate(self) -> list[str]:
        """Names of those that are set and may change tokens for speed."""
        return [k for k, v in vars(self).items() if SETTINGS[k].is_approximate(v)]

    def overrides(self) -> dict[str, Any]:
        """What `diffusion_generate` is to be told: everything but the token ids, which are the model's."""
        return {name: value for name, value in vars(self).items() if name not in TOKEN_IDS}


def parse_settings(pairs: list[str], door: str = "shell") -> dict[str, Any]:
    """Decoding settings from `key=value` words; values are JSON, or text where they are not or the setting is one.

    Raises:
        UserError: a word has no value, or names no setting of the door.
    """
    settings = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise UserError(f"settings are given as key=value, got {pair!r}")
        refuse_unknown([key], door)
        text = SETTINGS[key].read(value)
        try:
            parsed = json.loads(value)
        except ValueError:  # also of an integer of thousands of digits
            parsed = text
        settings[key] = text if SETTINGS[key].kind is str and not isinstance(parsed, str) else parsed
    return settings
