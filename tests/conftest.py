"""One thread for tiny models: journals name the thread count, and more threads only cost time."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
