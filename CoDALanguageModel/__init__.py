"""CoDA: a masked-diffusion language model for code, as transformers classes.

The names below load torch and transformers when they are first asked for: settings and errors need neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .configuration_coda import CoDAConfig
    from .generation_coda import DiffusionGenerationOutput
    from .generation_config_coda import DiffusionGenerationConfig
    from .infilling import InfillOutput
    from .modeling_coda import CoDALanguageModel, CoDAOutput
    from .scoring import DecodingCost

__all__ = [
    "CoDAConfig",
    "CoDALanguageModel",
    "CoDAOutput",
    "DecodingCost",
    "DiffusionGenerationConfig",
    "DiffusionGenerationOutput",
    "InfillOutput",
    "UserError",
]
_MODULES = {
    "CoDAConfig": "configuration_coda",
    "CoDALanguageModel": "modeling_coda",
    "CoDAOutput": "modeling_coda",
    "DecodingCost": "scoring",
    "DiffusionGenerationConfig": "generation_config_coda",
    "DiffusionGenerationOutput": "generation_coda",
    "InfillOutput": "infilling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
