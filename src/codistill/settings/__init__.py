"""What a run is: settings, recipes, presets, and how they are built."""
