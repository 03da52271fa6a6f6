"""AdamW8bit: a torch.optim.Optimizer that calls functional.adamw_8bit_ and can exchange states with bitsandbytes.

    optimizer = AdamW8bit(unet.parameters(), lr=1e-5)

    optimizer.step()                    # updates all weights, in one launch for each kind of tensor
    for weight in unet.parameters():    # or: updates each weight in the backward pass and frees its gradient at once
        weight.register_post_accumulate_grad_hook(optimizer.step_parameter)

    theirs.load_state_dict(optimizer.bitsandbytes_state_dict())    # to bitsandbytes.optim.AdamW8bit
    optimizer.load_bitsandbytes_state_dict(theirs.state_dict())    # and back

With bfloat16 weights and gradients it needs 6 bytes per weight (2 + 2 + two states of 1), and 4 bytes if it steps in
the backward pass. It is not capturable: lr and the step count are numbers on the host, as in torch's AdamW by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlcm_fast.kernels import functional
from rlcm_fast.kernels.functional import Moments
from rlcm_fast.kernels.quantization import BLOCK, codebook, dequantize, has_memory_order_of, quantize

_WRAPPED = "__bnb_optimizer_quant_state__"  # the key under which bitsandbytes saves these states in a state_dict


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with block-wise 8-bit moments (arXiv 2110.02861) and stochastic rounding.

    Weights may be float32 or bfloat16, contiguous, channels_last or otherwise dense; they keep their dtype and layout.
    Weights of fewer than `min_8bit_size` elements have float32 moments. bfloat16 weights are rounded stochastically.
    The noise depends only on `seed`, the step and the weight's index in the optimizer, so all replicas round alike.
    With counts_lost_updates, `counts` (2,) int64 counts the weights that should have changed since you last zeroed it,
    and how many of those kept their value because of rounding.

    Raises:
        ValueError: lr, eps or weight_decay is negative, or a beta is not in [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = True,
        seed: int = 0,
        counts_lost_updates: bool = False,
    ) -> None:
        # Refuse settings that AdamW cannot use.
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must both be in [0, 1)")

        # Keep the settings that all groups share beside torch's param_groups.
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.min_8bit_size = min_8bit_size
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self.counts = (
            torch.zeros(2, dtype=torch.int64, device=self._params()[0].device) if counts_lost_updates else None
        )
        self._indices: dict[Tensor, tuple[int, int]] = {}  # the index of each weight and the index of its group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None) -> Any:
        """Update every weight that has a gradient; gradients are multiplied by grad_scale (), if you give it.

        A grad_scale that is not finite leaves the weights and moments as they are, and only counts the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for group in self.param_groups:
            weights = list(enumerate(group["params"], first))
            first += len(weights)
            self._step([(index, param) for index, param in weights if param.grad is not None], group, grad_scale)
        return loss

    def step_parameter(self, param: Tensor, grad_scale: Tensor | None = None) -> None:
        """Update this weight alone and free its gradient: a hook for the backward pass.

        The result equals that of `step`, bit for bit. Register it with torch.Tensor.register_post_accumulate_grad_hook.
        Run one backward pass per update, because every backward pass updates the weight.
        """
        if param not in self._indices:
            groups = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
            self._indices = dict(zip(self._params(), enumerate(groups)))
        if param not in self._indices:
            raise ValueError(
                f"a weight of shape {tuple(param.shape)} does not belong to this optimizer; give it to AdamW8bit"
            )
        index, group = self._indices[param]
        self._step([(index, param)], self.param_groups[group], grad_scale)
        param.grad = None

    def _step(self, weights: list[tuple[int, Tensor]], group: dict[str, Any], grad_scale: Tensor | None) -> None:
        # Sort the weights by their step count: a weight without a gradient in some update lags behind.
        by_step: dict[int, list[tuple[int, Tensor]]] = {}
        for index, param in weights:
            state = self.state[param]
            if not state:
                state.update(self.first_state(param))
            state["step"] += 1
            by_step.setdefault(state["step"], []).append((index, param))

        # Update the weights of each step count together.
        for step, pairs in by_step.items():
            params = [param for _, param in pairs]
            functional.adamw_8bit_(
                params,
                [param.grad for param in params],  # pyright: ignore[reportArgumentType]
                [_moments_of(self.state[param]) for param in params],
                [index for index, _ in pairs],
                step=step,
                **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
                seed=self.seed,
                stochastic_rounding=self.stochastic_rounding,
                grad_scale=grad_scale,
                counts=self.counts,
            )

    def first_state(self, param: Tensor) -> dict[str, Any]:
        """Returns the states of a weight before its first step: zeros."""
        is_quantized = param.numel() >= self.min_8bit_size
        dtype = torch.uint8 if is_quantized else torch.float32
        state = {"step": 0, **{name: torch.zeros_like(param, dtype=dtype) for name in ("state1", "state2")}}
        if is_quantized:
            num_blocks = -(-param.numel() // BLOCK)
            state |= {name: torch.zeros(num_blocks, device=param.device) for name in ("absmax1", "absmax2")}
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class; each state moves to the device and memory format of its weight.

        If the memory format differs from that of the saved weight, so do the blocks, and the states are quantised anew.
        """
        # torch gets no states, because it would cast them to the dtype of the weight: 4 bytes each, and other values
        super().load_state_dict({**state_dict, "state": {}})
        for param, saved in self._saved_states(state_dict):
            self.load_state(param, saved)

    @torch.no_grad()
    def load_state(self, param: Tensor, saved: Mapping[str, Any]) -> None:
        """Load the states of one weight, as `load_state_dict` does; they are copied in their own dtypes."""
        self.state[param] = {"step": int(saved["step"]), **_relaid(_moments_of(saved), param)}

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """A state_dict for bitsandbytes.optim.AdamW8bit over the same weights; channels_last states are requantised."""
        states = super().state_dict()
        stepped = [(i, param) for i, param in enumerate(self._params()) if self.state[param]]
        states["state"] = {i: self._bitsandbytes_state(param) for i, param in stepped}
        return states

    def _bitsandbytes_state(self, param: Tensor) -> dict[str, Any]:
        relaid = _relaid(_moments_of(self.state[param]), param.contiguous())
        if "absmax1" in relaid:
            relaid |= {f"qmap{i}": codebook(i == 1, param.device).clone() for i in (1, 2)}
        return {"step": self.state[param]["step"], _WRAPPED: relaid}

    @torch.no_grad()
    def load_bitsandbytes_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of bitsandbytes.optim.AdamW8bit over the same weights, which must have been contiguous.

        Raises:
            ValueError: a state belongs to a channels_last weight; where its blocks lie depends on the device.
        """
        unwrapped = {i: {**state, **state.get(_WRAPPED, {})} for i, state in state_dict["state"].items()}
        for i, state in unwrapped.items():
            if not state["state1"].is_contiguous():
                raise ValueError(
                    f"state1 of weight {i} has strides {state['state1'].stride()}: bitsandbytes' states of "
                    "channels_last weights cannot be read; make them contiguous before its first step"
                )
        groups = [{name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "params")}
                  for group in state_dict["param_groups"]]  # fmt: skip
        self.load_state_dict({"state": unwrapped, "param_groups": groups})

    def _saved_states(self, state_dict: dict[str, Any]) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        pairs = zip(saved_ids, self._params())
        return [(param, state_dict["state"][i]) for i, param in pairs if i in state_dict["state"]]

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


def _moments_of(state: Mapping[str, Any]) -> Moments:
    return Moments(state["state1"], state["state2"], state.get("absmax1"), state.get("absmax2"))


def _relaid(moments: Moments, like: Tensor) -> dict[str, Tensor]:
    """New states on the device and in the memory format of `like`; bitwise equal if they have that format already."""
    relaid = {}
    for i, is_signed in ((1, True), (2, False)):
        state, absmax = getattr(moments, f"state{i}"), getattr(moments, f"absmax{i}")
        if absmax is not None and not has_memory_order_of(state, like):
            state, absmax = quantize(_laid_out(dequantize(state, absmax, is_signed), like), is_signed)
        relaid[f"state{i}"] = _laid_out(state, like)
        if absmax is not None:
            relaid[f"absmax{i}"] = absmax.to(like.device, copy=True)
    return relaid


def _laid_out(state: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=state.dtype).copy_(state)
