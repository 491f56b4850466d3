"""Identifiers that leave the DICOM files: hashes under a key of the site.

One site's runs join on them, nobody else's do. The key is `MEDVIT_SITE_KEY`, else a file that is made on first use in
the user's configuration folder and readable by that user alone.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import platformdirs

from medvit.records import UsageError


def site_key_path() -> Path:
    """Where the key lives when the environment does not give it."""
    return Path(platformdirs.user_config_dir("medvit")) / "site.key"


def site_key() -> bytes:
    """The site's key, made on first use.

    Raises:
        UsageError: the file of the key is empty: anybody could make such hashes.
    """
    from_environment = os.environ.get("MEDVIT_SITE_KEY")
    return from_environment.encode() if from_environment else _stored_key(site_key_path())


@cache
def _stored_key(path: Path) -> bytes:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent) as draft:  # readable by its owner alone
            draft.write(secrets.token_hex(32).encode())
            draft.flush()
            with suppress(FileExistsError):  # another process was first
                os.link(draft.name, path)  # whole or not there: half a key would hash like none
    if not (key := path.read_bytes()):
        raise UsageError(f"{path}: the site's key is empty. Restore it, or remove the file and begin with a new key.")
    return key


def pseudonym(kind: str, *identifiers: str) -> str:
    """16 hexadecimal digits for what the identifiers name; `kind` keeps patients and cases apart."""
    message = "\0".join((kind, *identifiers)).encode("utf-8", "surrogateescape")  # a path need not be text
    return hmac.new(site_key(), message, hashlib.sha256).hexdigest()[:16]
