"""Engines that run the commands of a sweep: this machine, SLURM, Ray."""
