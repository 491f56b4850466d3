"""medvit turns a hospital's CT folder into a Vision Transformer classifier one can trust.

The layers, upper may use lower (checked by import-linter):

    cli          one thin module per command
    deployment   a bundle run over an export, or served
    evaluation   predictions -> tables, pictures, report      | training   objective -> weights
    inference    a bundle and scans -> predictions            | objectives the ways to learn
    models       slices -> features -> logits (timm's one door)
    data         Scan -> batch (MONAI's one door)
    io           files -> Scan (numpy only)
    config, records   what flows between them
"""

import lazy_loader as _lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
