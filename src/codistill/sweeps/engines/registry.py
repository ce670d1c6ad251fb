"""The engines by the names that `--executor` takes."""

from codistill.sweeps.engines.engine import Engine
from codistill.sweeps.engines.local import Local
from codistill.sweeps.engines.ray import Ray
from codistill.sweeps.engines.slurm import Slurm

ENGINES: dict[str, type[Engine]] = {"local": Local, "slurm": Slurm, "ray": Ray}
