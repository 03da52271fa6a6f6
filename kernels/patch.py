"""Opt-in: GroupNorm and SiLU of a diffusers model become functional.group_norm_silu, and go back.

    handle = fuse_group_norm_silu(unet)      before the model is wrapped (DistributedDataParallel, DeepSpeed, compile)
    handle.remove()                          the modules that were there are there again

or `with fuse_group_norm_silu(unet): ...`. Modules are swapped, never changed, and the new ones hold the same
Parameters: the keys of a state_dict, optimisers, adapters and saved files are what they were. Hooks of the swapped
modules do not run meanwhile. dispatch.py decides what runs: with kernels=torch a patched model is the unpatched one,
bit for bit.
"""

# N rows, C channels, H W positions, E embedding

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rlcm_fast.kernels import functional


class GroupNormSiLU(nn.GroupNorm):
    """silu(GroupNorm(x)) with the Parameters of `norm`."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """input (N, C, H, W)."""
        return functional.group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)


class SiLUOfEmbedding(nn.Module):
    """What a block calls after its norms, which have done it now, and on the embedding (N, E) of the time."""

    def forward(self, input: Tensor) -> Tensor:
        return input if input.ndim == 4 else F.silu(input)


class Handle:
    """Takes one patch back, on `remove()` or at the end of a `with` block."""

    def __init__(self, swaps: list[tuple[nn.Module, str, nn.Module]]):
        self._originals = [(owner, name, owner.get_submodule(name)) for owner, name, _ in swaps]
        for owner, name, module in swaps:
            setattr(owner, name, module)

    def remove(self) -> None:
        """Puts back the very modules that were there, with the Parameters that are there now. Again: does nothing."""
        for owner, name, original in self._originals:
            patched = owner.get_submodule(name)
            if isinstance(patched, GroupNormSiLU):  # load_state_dict(assign=True), say, replaces Parameters
                original.weight, original.bias = patched.weight, patched.bias
            setattr(owner, name, original.train(patched.training))
        self._originals = []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def fuse_group_norm_silu(model: nn.Module) -> Handle:
    """Swaps GroupNorm and SiLU in every ResnetBlock2D, and before the last convolution of a UNet or a VAE.

    A block stays as it is if its activation is another, if its norms have no weights, or if its time_embedding_norm is
    not "default": then it computes something between the two.

    Raises:
        ValueError: there is nothing to swap, or the model is patched already.
    """
    named = f"model={type(model).__name__}"
    if any(isinstance(module, GroupNormSiLU) for module in model.modules()):
        raise ValueError(f"{named} is patched already; call remove() of the first handle before")
    swaps = [swap for module in model.modules() for swap in _swaps_in(module)]
    if not swaps:
        raise ValueError(
            f"{named} has no GroupNorm followed by SiLU in a diffusers ResnetBlock2D, UNet2DConditionModel, Encoder or "
            "Decoder; give the unet or the vae of a Stable Diffusion pipeline"
        )
    return Handle(swaps)


def _swaps_in(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Owner, attribute and replacement of the modules right below `module`."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D

    # No subclasses: their forward may call the modules in another order.
    if type(module) is ResnetBlock2D and module.time_embedding_norm == "default":
        norms, activation, rest = ("norm1", "norm2"), "nonlinearity", SiLUOfEmbedding()
    elif type(module) in (UNet2DConditionModel, Encoder, Decoder):
        norms, activation, rest = ("conv_norm_out",), "conv_act", nn.Identity()
    else:
        return []
    found = {name: getattr(module, name) for name in norms}
    if type(getattr(module, activation)) is not nn.SiLU or not all(_is_plain(norm) for norm in found.values()):
        return []
    return [*((module, name, GroupNormSiLU(norm)) for name, norm in found.items()), (module, activation, rest)]


def _is_plain(norm: nn.Module | None) -> bool:
    return type(norm) is nn.GroupNorm and norm.affine
