"""What everything else stands on: errors, registries, devices, signals, files, the console."""
