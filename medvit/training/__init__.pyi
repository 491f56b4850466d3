from .experiment import Experiment as Experiment
from .experiment import Judge as Judge
from .experiment import Result as Result
from .grid import sweep as sweep
from .loop import fit as fit
from .material import Reporter as Reporter
