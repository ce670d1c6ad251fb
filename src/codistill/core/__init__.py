"""Errors, registries, devices, signals, files and the console."""
