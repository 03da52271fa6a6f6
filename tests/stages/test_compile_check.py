"""A network that is compiled whole trains only if its gradients are those of the same network run eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_policies import TinyNetwork, encode, policy_of, prompts
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.functional import linear

from rlcm_fast.stages.compile_check import CompileCheck, NotCompiled

pytestmark = pytest.mark.usefixtures("one_process")


class Network(TinyNetwork):
    """Notes whether its blocks were compiled."""

    num_compiled = 0
    compiled_blocks: Any = None  # what they are compiled to

    def compile_repeated_blocks(self, **_: Any) -> None:
        self.num_compiled += 1
        if self.compiled_blocks is not None:
            self._compiled_call_impl = self.compiled_blocks


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


def raising(error: Exception) -> Any:
    def forward(*_: Any, **__: Any) -> Any:
        raise error

    return forward


def verdict(compiled: Any, dtype: torch.dtype = torch.float32) -> tuple[str, Network, Network, str]:
    network, other = Network().to(dtype), Network().to(dtype)
    network.forward, other.forward = compiled(network), compiled(other)
    said: list[str] = []
    check = CompileCheck(policy_of(network, dtype=dtype), said.append)
    mode = check(encode(prompts(4)), 0, [other])
    assert all(weight.grad is None and not weight._backward_hooks for weight in network.parameters())
    return mode, network, other, said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_differs_by_rounding_stays_compiled(dtype: torch.dtype):
    mode, network, other, line = verdict(rounded_like_a_compiler, dtype)
    assert mode == "whole" and "forward" in vars(network) and network.num_compiled == other.num_compiled == 0
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
    mode, network, other, line = verdict(broken, dtype)
    assert mode == "regional"
    for of_run in (network, other):
        assert "forward" not in vars(of_run) and of_run.num_compiled == 1
    assert line.startswith("engine.compile=whole differs from the uncompiled network ") and complaint in line
    assert line.endswith(": going on with engine.compile=regional") and "\n" not in line


def verdict_of_auto(whole: Any, blocks: Any = None, mode: str = "whole") -> tuple[str, Network, list[str]]:
    """What becomes of engine.compile=auto if the network and its blocks are compiled to these functions."""
    network, said = Network(), list[str]()
    network.compiled_blocks = blocks
    if mode == "whole":
        network.forward = whole
    else:
        network.compile_repeated_blocks()
    check = CompileCheck(policy_of(network), said.append, mode=mode, is_auto=True)
    return check(encode(prompts(4)), 0, sampled=encode(prompts(3))), network, said


NO_COMPILER, NO_ROOM = RuntimeError("Failed to find\na C compiler"), torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("error", [NO_COMPILER, NO_ROOM, TorchDynamoException("a graph break")])
def test_auto_goes_on_with_compiled_blocks_where_the_whole_network_cannot_be_compiled(error: Exception):
    mode, network, said = verdict_of_auto(raising(error))
    assert mode == "regional" and network.num_compiled == 1 and "forward" not in vars(network)
    assert said[0].startswith(f"engine.compile=whole does not work ({type(error).__name__}: ")
    assert said[0].endswith("): going on with engine.compile=regional") and "\n" not in said[0]
    assert len(said) == 2 and said[1].startswith("compiled in 0 s: ")


def test_auto_goes_on_uncompiled_where_blocks_cannot_be_compiled_either():
    mode, network, said = verdict_of_auto(raising(NO_COMPILER), raising(NO_ROOM))
    assert mode == "off" and [line.rsplit("=", 1)[1] for line in said] == ["regional", "off"]
    assert "_compiled_call_impl" not in vars(network)
    mode, network, said = verdict_of_auto(None, raising(NO_ROOM), "regional")
    assert mode == "off" and "_compiled_call_impl" not in vars(network)
    assert said == ["engine.compile=regional does not work (OutOfMemoryError: CUDA out of memory): going on with "
                    "engine.compile=off"]  # fmt: skip


def test_auto_compares_compiled_blocks_as_well():
    mode, network, said = verdict_of_auto(raising(NO_COMPILER), with_another_sign(Network()))
    assert mode == "off" and "_compiled_call_impl" not in vars(network)
    assert said[1].startswith("engine.compile=regional differs from the uncompiled network in ")


def test_auto_tries_a_pass_of_a_rollout_too():
    network = Network()
    eager = network.forward

    def only_with_gradients(*inputs: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            raise NO_COMPILER
        return eager(*inputs, **more)

    network.forward = only_with_gradients
    said: list[str] = []
    check = CompileCheck(policy_of(network), said.append, is_auto=True)
    assert check(encode(prompts(4)), 0, sampled=encode(prompts(3))) == "regional"
    assert said[0].startswith("engine.compile=whole does not work (RuntimeError: Failed to find a C compiler)")


def test_what_was_asked_for_by_name_and_cannot_be_compiled_ends_the_run_with_the_way_out():
    with pytest.raises(NotCompiled, match=r"engine\.compile=whole does not work \(.*a graph break\); set engine\.comp"):
        verdict(lambda network: raising(TorchDynamoException("a graph break")))
    with pytest.raises(torch.OutOfMemoryError):
        verdict(lambda network: raising(NO_ROOM))
