"""A network that is compiled whole trains only if its gradients are those of the same network run eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_policies import TinyNetwork, encode, policy_of, prompts
from torch import Tensor
from torch.nn.functional import linear

from rlcm_fast.stages.compile_check import CompileCheck

pytestmark = pytest.mark.usefixtures("one_process")


class Network(TinyNetwork):
    """Notes whether its blocks were compiled."""

    num_compiled = 0

    def compile_repeated_blocks(self, **_: Any) -> None:
        self.num_compiled += 1


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -grad


def rounded_like_a_compiler(network: Network) -> Any:
    eager = network.forward
    return lambda *inputs, **more: (eager(*inputs, **more)[0] * (1 + 1e-6),)


def with_another_sign(network: Network) -> Any:
    eager = network.forward
    return lambda *inputs, **more: (Negated.apply(eager(*inputs, **more)[0]),)


def without_one_gradient(network: Network) -> Any:
    def forward(
        x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        text = linear(encoder_hidden_states.mean(dim=1), network.of_text.weight.detach(), network.of_text.bias)
        shift = (text + network.of_guidance(timestep_cond))[:, :, None, None]
        return ((network.of_state(x_t) + shift) * (0.5 + t[:, None, None, None].to(x_t.dtype) / 1000),)

    return forward


def with_a_nan(network: Network) -> Any:
    eager = network.forward
    return lambda *inputs, **more: (eager(*inputs, **more)[0] * torch.nan,)


def verdict(compiled: Any, dtype: torch.dtype = torch.float32) -> tuple[bool, Network, Network, str]:
    network, other = Network().to(dtype), Network().to(dtype)
    network.forward, other.forward = compiled(network), compiled(other)
    said: list[str] = []
    check = CompileCheck(policy_of(network, dtype=dtype), said.append)
    may_stay = check(encode(prompts(4)), 0, [other])
    assert all(weight.grad is None and not weight._backward_hooks for weight in network.parameters())
    return may_stay, network, other, said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_differs_by_rounding_stays_compiled(dtype: torch.dtype):
    may_stay, network, other, line = verdict(rounded_like_a_compiler, dtype)
    assert may_stay and "forward" in vars(network) and network.num_compiled == other.num_compiled == 0
    assert line.startswith("compiled in 0 s: the gradients of all 6 trained weights equal the uncompiled ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (with_another_sign, "in 6 of 7 tensors (output and gradients), most in"),
        (without_one_gradient, "in 1 of 7 tensors (output and gradients), most in of_text.weight, by inf of it"),
        (with_a_nan, "in 7 of 7 tensors (output and gradients), most in its output, by nan of it"),
    ],
)
def test_wrong_gradients_lead_to_compiled_blocks_and_one_line(broken: Any, complaint: str, dtype: torch.dtype):
    may_stay, network, other, line = verdict(broken, dtype)
    assert not may_stay
    for of_run in (network, other):
        assert "forward" not in vars(of_run) and of_run.num_compiled == 1
    assert line.startswith("engine.compile=whole differs from the uncompiled network ") and complaint in line
    assert line.endswith(": going on with engine.compile=regional") and "\n" not in line
