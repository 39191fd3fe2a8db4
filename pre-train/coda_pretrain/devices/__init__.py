"""What differs between plain torch devices and torch_xla, behind one seam (`backend.Backend`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from CoDALanguageModel.errors import UserError

if TYPE_CHECKING:
    from .backend import Backend
    from .config import HardwareConfig


def create_backend(config: HardwareConfig) -> Backend:
    """The backend that `hardware.backend` names. Only the chosen one is imported, so plain torch needs no torch_xla.

    Raises:
        UserError: its devices are absent or do not fit the mesh, or torch_xla is not installed.
    """
    if config.backend == "xla":
        try:
            from .xla_backend import XlaBackend
        except ModuleNotFoundError as error:
            raise UserError(
                f"hardware.backend 'xla' needs the package {error.name}, which is not installed; "
                "run: bash setup_env.sh --all"
            ) from error
        return XlaBackend(config)
    from .torch_backend import TorchBackend

    return TorchBackend(config)
