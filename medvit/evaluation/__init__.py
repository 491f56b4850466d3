"""Predictions -> tables and pictures: how good, how sure, for whom.

Vocabulary. A *predictions frame* has one row per case (`medvit.evaluation.predictions`). The *positive class* is the
last `p_<class>` column of two; with more classes every figure is the mean of one-vs-rest figures. A *weighted
statistic* takes how often each case was drawn, `weights` (D, n), and returns D values: with weights of one it is the
point, with resampled patients it is the interval (`medvit.evaluation.bootstrap`). A *cell* is the positives or the
negatives of one group; a rate of an empty cell is NaN, never 0. *Equalized odds* holds when true and false positive
rates are equal in all groups (`medvit.evaluation.fairness`). `write_report` in `medvit.evaluation.report` puts all of
it on one page.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
