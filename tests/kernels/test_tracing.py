"""A traced function holds our operators as single nodes, forward and backward."""

# N rows, C H W latent

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import run
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.kernels.kernel_operations import OPERATIONS

OPERATORS = {
    "gaussian_log_prob forward": ["gaussian_log_prob"],
    "gaussian_log_prob forward+backward": ["gaussian_log_prob", "row_gradient"],
    "gaussian_step noise": ["gaussian_step"],
    "gaussian_step seeds": ["gaussian_step"],
    "clipped_ratio_loss forward+backward": ["clipped_ratio_loss"],
    "policy_loss forward+backward": ["policy_loss", "row_gradient"],
    "policy_loss on-policy forward+backward": ["policy_loss", "row_gradient"],
    "rebel_residual": ["rebel_residual"],
}


def operators_in(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> list[str]:
    """Names of rlcm_fast's operators in the graph that torch.fx traces, in order."""
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    targets = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [target.overloadpacket.__name__ for target in targets if target.namespace == "rlcm_fast"]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_trace_holds_the_operators(name: str):
    operation = next(each for each in OPERATIONS if each.name == name)
    inputs = operation.inputs(2, (3, 4, 5), torch.bfloat16, torch.device("cpu"))
    assert operators_in(lambda *traced: run(operation, "triton", traced), inputs) == OPERATORS[name]
