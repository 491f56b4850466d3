from .calibration import fit_temperature as fit_temperature
from .metrics import macro_auroc as macro_auroc
from .metrics import operating_point as operating_point
from .predictions import read_predictions as read_predictions
from .predictions import write_predictions as write_predictions
from .report import Report as Report
from .report import write_report as write_report
