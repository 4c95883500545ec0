"""One thread, assertions on, and hypothesis without deadlines: timings are no test's business."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FNRL_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("fnrl", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("fnrl")
