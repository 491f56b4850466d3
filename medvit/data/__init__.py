"""Scan -> batch: Hounsfield windows and CLAHE, MONAI pipelines, the manifest of cases, their splits, the cache."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
