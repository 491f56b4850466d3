from .audit import Audit as Audit
from .audit_check import Verdict as Verdict
from .audit_check import verify as verify
from .audit_line import Head as Head
from .batch import Summary as Summary
from .batch import predict_folder as predict_folder
from .choice import Wanted as Wanted
from .options import BatchOptions as BatchOptions
