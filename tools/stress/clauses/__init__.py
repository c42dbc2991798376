"""The clauses, by what they are about. Importing a module registers its clauses."""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Register every clause there is."""
    for module in sorted(one.name for one in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")
