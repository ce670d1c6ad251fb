"""Settings and values that were removed, or that other tools have, and what to use instead."""

import re
from collections.abc import Iterable

RANKS = "torchrun --nproc-per-node N -m codistill train .."
REMOVED = {
    "kernels": "leave it out; --compile on|off says whether torch.compile is used",
    "overlap": "leave it out: students overlap wherever one run trains alone on a GPU",
    "processes": f"start one process for each device with {RANKS}",
    "max_restarts": f"give it to torchrun: {RANKS.replace('-m', '--max-restarts R -m')}",
}
"""What to do instead of each, for error lines."""
VALUES = {
    ("method.multiscale", True): "hs",
    ("method.multiscale", False): "none",
    ("method.attention", True): "cbam",
    ("method.attention", False): "none",
}
"""What to write in place of a setting's former values."""

FOREIGN = {
    "optimiser optim opt adam adamw sgd": "choose it with --optimizer: sgd or adamw",
    "sched scheduler lr_scheduler cosine": "choose it with --schedule: step or cosine",
    "lr_decay gamma lr_decay_rate": "the rate falls at --milestones",
    "warmup warmup_epochs lr_warmup_epochs": "epochs in which the rate rises: --warm-up",
    "clip_grad grad_clip clip max_grad_norm": "limit the norm of the gradients with --clip-norm",
    "ema model_ema model_ema_decay": "name the decay of the average with --ema-decay",
    "early_stopping early_stop": "stop with --patience, on images that --validation holds out",
    "initial_checkpoint init_from finetune": "start from the weights of a run with --init",
    "gpu gpus gpu_id gpu_ids cuda no_cuda use_cuda cpu accelerator": "choose it with --device, as cuda, cuda:1 or cpu",
    "workers num_workers j": "images are held in memory and no process loads them; for the CPU see --threads",
    "amp fp16 bf16 half mixed_precision use_amp autocast": "choose it with --precision",
    "dataset data_set": "name it with --data",
    "data_path data_root root": "name the place with --data-dir",
    "model models arch model_s model_name net backbone student students": "name a network for each student: --networks",
    "model_t path_t teacher_path teacher_model": "name it with --teacher",
    "temp kd_t kd_temperature": "methods have --method.temperature, and a teacher --teacher-temperature",
    "output output_dir out_dir work_dir save_dir save_path log_dir logdir exp_name": "name the run folder with --out",
    "lr_milestones steps lr_steps": "name the epochs with --milestones",
    "val_split val_size val_fraction": "hold training images out with --validation, N or as 20%",
    "manual_seed manualseed random_seed": "choose it with --seed",
    "method algorithm distill": "the method has no flag: codistill train METHOD",
    "resume continue": "an interrupted run continues with: codistill resume RUN",
    "launcher strategy distributed multiprocessing_distributed world_size local_rank": "torchrun starts the ranks",
    "config cfg": "settings are read from a file with --recipe",
    "method.no_multiscale": "write --method.multiscale none",
    "method.no_attention": "write --method.attention none",
}
"""What there is instead of settings of other tools, or forms of our own, several names a line."""
FLAGS = {
    "lr": "write learning_rate",
    "min_lr": "write min_learning_rate",
    "wd": "write weight_decay",
    "b": "write batch_size",
    "preset": "write the settings that it stands for, which codistill list shows",
}
"""What files have instead of flags."""


def instead(key: str, known: Iterable[str] | None = None) -> str | None:
    """Return the end of a line about a setting that is not there; None: it is not known from elsewhere.

    `known` are the flags that there are, for no other is worth naming; None: it stands in a file.
    """
    if key in REMOVED:
        return f"was removed: {REMOVED[key]}"
    if known is None and key in FLAGS:
        return f"is a flag: {FLAGS[key]}"
    text = next((text for names, text in FOREIGN.items() if key.lower() in names.split()), "")
    flags = re.findall(r"--[a-z.-]+[a-z]", text)
    return f"does not exist: {text}" if text and (known is None or {*flags} <= {*known}) else None
