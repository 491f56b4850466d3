"""Identifiers that leave the DICOM files: hashes under a key of the site.

One site's runs join on them, nobody else's do. The key is `MEDVIT_SITE_KEY`, else a file that is made on first use in
the user's configuration folder and readable by that user alone.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from functools import cache
from pathlib import Path

import platformdirs


def site_key_path() -> Path:
    """Where the key lives when the environment does not give it."""
    return Path(platformdirs.user_config_dir("medvit")) / "site.key"


def site_key() -> bytes:
    """The site's key, made on first use."""
    from_environment = os.environ.get("MEDVIT_SITE_KEY")
    return from_environment.encode() if from_environment else _stored_key(site_key_path())


@cache
def _stored_key(path: Path) -> bytes:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # another process was first
            return path.read_bytes()
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(secrets.token_hex(32).encode())
    return path.read_bytes()


def pseudonym(kind: str, *identifiers: str) -> str:
    """16 hexadecimal digits for what the identifiers name; `kind` keeps patients and cases apart."""
    message = "\0".join((kind, *identifiers)).encode()
    return hmac.new(site_key(), message, hashlib.sha256).hexdigest()[:16]
