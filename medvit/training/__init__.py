"""Objective -> weights: one loop for every technique, its checkpoints, and the experiment around it (folds, refit)."""
