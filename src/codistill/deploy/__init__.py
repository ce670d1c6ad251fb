"""Predictors outside their training."""
