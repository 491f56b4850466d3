"""A bundle at work outside the laboratory: batch inference over an export, with a ledger that survives interruption."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
