"""Run folders: the whole truth of one training."""
