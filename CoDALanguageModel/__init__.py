"""CoDA: a masked-diffusion language model for code, as transformers classes.

The names below load torch and transformers when they are first asked for: settings and errors need neither.
"""

import importlib
from typing import Any

from .errors import UserError as UserError

_NAMES = {
    "canvas_view": ("CanvasStep", "CanvasStreamer"),
    "configuration_coda": ("CoDAConfig",),
    "cost": ("DecodingCost",),
    "decoder": ("Decoding", "Progress"),
    "generation_coda": ("DiffusionGenerationOutput",),
    "generation_config_coda": ("DiffusionGenerationConfig",),
    "infilling": ("InfillOutput",),
    "modeling_coda": ("CoDALanguageModel", "CoDAOutput"),
    "row": ("DecodingStalled", "Evidence", "Request", "Row"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_MODULES, "UserError"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
