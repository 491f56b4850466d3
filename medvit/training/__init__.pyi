from .experiment import Experiment as Experiment
from .experiment import Judge as Judge
from .experiment import Reporter as Reporter
from .experiment import Result as Result
from .loop import fit as fit
