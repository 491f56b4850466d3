from .batch import Summary as Summary
from .batch import predict_folder as predict_folder
from .choice import Wanted as Wanted
from .options import BatchOptions as BatchOptions
