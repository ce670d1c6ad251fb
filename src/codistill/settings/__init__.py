"""Settings of a run, recipes and presets, and the methods and data that are built from them."""
