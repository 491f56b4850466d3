"""Objective -> weights: one loop for every technique, its checkpoints, and the experiment around it (folds, refit)."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
