"""What the metrics raise beside the package's own errors: about images, weights and missing packages."""

from __future__ import annotations

import importlib
from types import ModuleType

from genprune.errors import GenpruneError


class BadImages(GenpruneError):
    """Images, latents or features have the wrong shape, dtype or range, or there are too few of them."""


class MissingWeights(GenpruneError):
    """An extractor's weights are not on this machine and could not be fetched, or cannot be read safely."""


def need(module: str, package: str | None = None, install: str = "genprune[bench]") -> ModuleType:
    """Import an optional package, or raise `ModuleNotFoundError` with the command that installs it.

    Args:
        module: what is imported, e.g. `open_clip`.
        package: its name on PyPI where that differs, e.g. `open-clip-torch`.
        install: what `pip install` is to be given.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"the package '{package or module}' is needed here and is not installed. "
            f"Install it with: pip install {install}",
            name=error.name,
        ) from error
