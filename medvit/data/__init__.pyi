from . import intensity as intensity
from .manifest import Manifest as Manifest
from .manifest import build_manifest as build_manifest
