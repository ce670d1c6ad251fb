"""Settings that were removed, and what to use instead."""

RANKS = "torchrun --nproc-per-node N -m codistill train .."
REMOVED = {
    "kernels": "leave it out; --compile on|off says whether torch.compile is used",
    "overlap": "leave it out: students overlap wherever one run trains alone on a GPU",
    "processes": f"start one process for each device with {RANKS}",
    "max_restarts": f"give it to torchrun: {RANKS.replace('-m', '--max-restarts R -m')}",
}
"""What to do instead of each, for error lines."""
