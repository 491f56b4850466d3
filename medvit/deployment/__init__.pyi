from .batch import Summary as Summary
from .batch import predict_folder as predict_folder
