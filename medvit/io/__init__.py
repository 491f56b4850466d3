"""Files -> Scan. Never torch or monai: reading must start fast and live in small worker processes.

`scan_folder` groups a folder into series and accounts for every file; `read` turns one series into Hounsfield units
with geometry. What is not understood is set aside with a reason code, never guessed.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
