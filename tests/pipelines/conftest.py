"""The tiny cut models of `tests/saving` and the small routers of `tests/routers` serve here as well."""

from __future__ import annotations

import sys
from pathlib import Path

for _folder in ("saving", "routers"):
    sys.path.insert(0, str(Path(__file__).parent.parent / _folder))
