from .inference import Judged as Judged
from .inference import Model as Model
from .inference import load_bundle as load_bundle
from .records import Case as Case
from .records import MedvitError as MedvitError
from .records import Prediction as Prediction
from .records import Preprocessing as Preprocessing
from .records import ReasonCode as ReasonCode
from .records import Scan as Scan
from .records import ScanError as ScanError

__version__: str
