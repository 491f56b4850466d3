from .folder import scan_folder as scan_folder
from .geometry import reorient_lps as reorient_lps
from .inventory import FileEntry as FileEntry
from .inventory import Inventory as Inventory
from .inventory import Series as Series
from .reader import read as read
from .reader import read_files as read_files
