"""Where medvit keeps what it need not compute twice. Caches hold pixels and headers, so they are PHI."""

from __future__ import annotations

import os
from pathlib import Path

from medvit.data.pseudonym import pseudonym


def shared_cache() -> Path | None:
    """The folder that all runs share: MEDVIT_CACHE, where set."""
    folder = os.environ.get("MEDVIT_CACHE")
    return Path(folder) if folder else None


def default_cache_dir(run: Path) -> Path:
    """MEDVIT_CACHE where set, else a folder of the run."""
    return shared_cache() or run / "cache"


def index_path(folder: Path) -> Path | None:
    """Where the headers of a folder are remembered: under MEDVIT_CACHE, else nowhere.

    Headers hold names and ids, and a run is handed on; so they are never kept in a run.
    """
    cache = shared_cache()
    return cache / f"{pseudonym('index', str(folder.absolute()))}.index.sqlite" if cache else None
