"""How good predictors are."""
