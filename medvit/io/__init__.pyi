from .folder import FileEntry as FileEntry
from .folder import Inventory as Inventory
from .folder import Series as Series
from .folder import scan_folder as scan_folder
from .geometry import reorient_lps as reorient_lps
from .reader import read as read
from .reader import read_files as read_files
