"""Joins the processes of a run."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it, DeepSpeed warns that it guesses
import deepspeed
from deepspeed.utils import logger as deepspeed_logger

from rlcm_fast import quiet


def init_processes() -> torch.device:
    """Joins the run's processes (gloo on CPU, NCCL on GPUs) and returns this one's device.

    DeepSpeed's shared-memory collective is switched off, because gloo carries these messages as well. On a CPU the
    first use would compile it, which takes 26 s and needs a compiler and ninja on your machine.
    """
    if not quiet.is_debug():
        deepspeed_logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", deepspeed.comm.get_local_rank())
    torch.cuda.set_device(device)
    return device


def set_deterministic() -> None:
    """Makes torch use deterministic algorithms alone in this process; an operation that has none raises an error.

    Call it before cuBLAS is first used, which reads its workspace setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
