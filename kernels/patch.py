"""Replace GroupNorm and SiLU of a diffusers model by functional.group_norm_silu, and undo it; you must opt in.

    handle = fuse_group_norm_silu(unet)    call it before DistributedDataParallel, DeepSpeed or compile wraps the model
    handle.remove()                        puts the original modules back

or `with fuse_group_norm_silu(unet): ...`. `fuse_group_norms` also swaps GroupNorms without a SiLU behind them, as a run
does with engine.group_norm=fused: no norm lays out a channels_last tensor anew.

Modules are swapped, never changed, and the new ones hold the same Parameters. So state_dict keys, optimizers, adapters
and saved files stay what they were. Hooks of the swapped modules do not run in the meantime. dispatch.py decides what
runs: on a CPU with kernels=torch, a patched model computes the same bits as the unpatched one. On other devices, and
under torch.compile, kernels=torch are operations that keep the memory format and that a compiler fuses.
"""

# N rows, C channels, H W positions, E embedding

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlcm_fast.kernels import dispatch, functional, reference


class FusedGroupNorm(nn.GroupNorm):
    """Compute GroupNorm(x) with the Parameters of `norm`, in the memory format of x."""

    silu = False

    def __init__(self, norm: nn.GroupNorm):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input (N, C, H, W), and activate it if `silu` says so."""
        arguments = (input, self.num_groups, self.weight, self.bias, self.eps, self.silu)
        # A compiler fuses plain operations with their neighbours, which it cannot do with an operator of ours.
        is_compiled = torch.compiler.is_compiling() and input.ndim == 4
        if is_compiled or not (input.device.type == "cpu" or input.ndim != 4 or dispatch.is_triton(input)):
            return reference.group_norm_silu_in_place(*arguments)
        return functional.group_norm_silu(*arguments) if input.ndim == 4 else super().forward(input)


class GroupNormSiLU(FusedGroupNorm):
    """Compute silu(GroupNorm(x)) with the Parameters of `norm`."""

    silu = True


class SiLUOfEmbedding(nn.Module):
    """SiLU for the time embedding (N, E) alone: a block also calls it after its norms, which now include SiLU."""

    def forward(self, input: Tensor) -> Tensor:
        return input if input.ndim == 4 else F.silu(input)


class Handle:
    """Handle of one patch; `remove()` or the end of a `with` block undoes the patch."""

    def __init__(self, swaps: list[tuple[nn.Module, str, nn.Module]]):
        self._originals = [(owner, name, owner.get_submodule(name)) for owner, name, _ in swaps]
        for owner, name, module in swaps:
            setattr(owner, name, module)

    def remove(self) -> None:
        """Put the original modules back, with the current Parameters. A second call does nothing."""
        for owner, name, original in self._originals:
            patched = owner.get_submodule(name)
            if isinstance(patched, FusedGroupNorm):  # load_state_dict(assign=True) replaces Parameters, for example
                original.weight, original.bias = patched.weight, patched.bias
            setattr(owner, name, original.train(patched.training))
        self._originals = []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def fuse_group_norm_silu(model: nn.Module) -> Handle:
    """Swap GroupNorm and SiLU in every ResnetBlock2D, and before the last convolution of a UNet or a VAE.

    A block stays unchanged if its activation is not SiLU, or if its norms have no weights. It also stays if its
    time_embedding_norm is not "default", because then it computes something between norm and activation.

    Raises:
        ValueError: there is nothing to swap, or the model is already patched.
    """
    named = f"model={type(model).__name__}"
    swaps = _pairs_in(model, named)
    if not swaps:
        raise ValueError(
            f"{named} has no GroupNorm followed by SiLU in a diffusers ResnetBlock2D, UNet2DConditionModel, Encoder or "
            "Decoder; give the unet or the vae of a Stable Diffusion pipeline"
        )
    return Handle(swaps)


def fuse_group_norms(model: nn.Module) -> Handle:
    """Swap GroupNorms with their SiLU where `fuse_group_norm_silu` does, and all other GroupNorms that have weights."""
    pairs = _pairs_in(model, f"model={type(model).__name__}")
    done = {owner.get_submodule(name) for owner, name, _ in pairs}
    alone = [
        (owner, name, FusedGroupNorm(norm))
        for owner in model.modules()
        for name, norm in owner.named_children()
        if isinstance(norm, nn.GroupNorm) and _is_plain(norm) and norm not in done
    ]
    return Handle([*pairs, *alone])


def _pairs_in(model: nn.Module, named: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """Swaps of GroupNorms and SiLUs that follow them; raises ValueError if the model is already patched."""
    if any(isinstance(module, FusedGroupNorm) for module in model.modules()):
        raise ValueError(f"{named} is already patched; call remove() of the first handle before you patch it again")
    return [swap for module in model.modules() for swap in _swaps_in(module)]


def _swaps_in(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Owner, attribute and replacement of each module to swap right below `module`."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D

    # Skip subclasses, because their forward may call the modules in another order.
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
