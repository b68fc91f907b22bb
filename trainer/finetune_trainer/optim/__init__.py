"""Optimizers, learning-rate schedules, loss scaling and the moving average of weights."""
