"""Converting a checkpoint into one of a backbone here, and measuring what the conversion lost."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from acmix_mm import __version__
from acmix_mm.analysis.published import NETWORKS
from acmix_mm.backbones.resnet import ACmixBottleneck
from acmix_mm.checkpoints.host import HOSTS
from acmix_mm.checkpoints.recognition import Pretrained, read_pretrained
from acmix_mm.datasets.shapes import draw
from acmix_mm.engine.cli import file_to_write
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import CheckpointError, UsageError

# The paper's networks by name, as in "swin-t".
ARCHS = {network.name.removeprefix('ACmix-').lower(): network.backbone for network in NETWORKS}
# What turns a backbone into its plain host.
PLAIN = {'Swin': dict(mix='attn'), 'PVT': dict(mix='attn'), 'SAN': dict(mix='attn'),
         'ResNet': dict(acmix_stages=())}
SUFFIXES = ('.pth', '.safetensors')


def convert(source: str, destination: str, arch: Optional[str] = None) -> str:
    """Convert a checkpoint into weights of the ACmix backbone of its host, and write them.

    They are what ``init_cfg=dict(type='Pretrained', checkpoint=source)`` gives that backbone: for a
    plain host, a start that computes what the host did, or for ResNet nearly so.

    Args:
        source: as :func:`acmix_mm.checkpoints.reading.read_checkpoint` takes.
        destination: a ``.pth`` file, which also says where the weights come from and which backbone
            they fit, or a ``.safetensors`` file; written whole or not at all.
        arch: one of ``ARCHS``, for weights of that network alone; if None the network's sizes are
            read off the weights.

    Returns:
        A report: the backbone as a config names it, and for weights of a plain host how much its
        features change.

    Raises:
        UsageError: the destination cannot be written.
        CheckpointError: the source cannot be read, or does not fit.
    """
    target = file_to_write(destination)
    if target.suffix not in SUFFIXES:
        raise UsageError(f'Weights are written as {" or ".join(SUFFIXES)}; {destination} is '
                         'neither.')
    found = read_pretrained(source)
    if arch is None:
        backbone = architecture(found)
    else:
        backbone = {key: value for key, value in ARCHS[arch].items() if key != 'out_indices'}
    model = MODELS.build(backbone).eval()
    check_host(found, backbone, arch)
    model.load_pretrained(found)
    own = model.state_dict()
    write_weights(target, own, dict(
        source=source, recognised=str(found), backbone=backbone, acmix_mm_version=__version__))
    lines = [f'{destination} starts this backbone:', f'  {in_config(backbone, destination)}']
    if not found.is_acmix:
        plain = MODELS.build({**backbone, **PLAIN[found.host]}).eval()
        # Tables that were interpolated have the sizes of the converted ones.
        weights = {key: value for key, value in found.state_dict.items()
                   if key not in own or value.shape == own[key].shape}
        plain.load_state_dict({key: weights.get(key, own.get(key)) for key in plain.state_dict()})
        lines += differences(plain, model)
    return '\n'.join(lines)


def check_host(found: Pretrained, backbone: Mapping[str, Any], arch: Optional[str]) -> None:
    """Raise CheckpointError unless weights are of the host that a backbone has."""
    if backbone['type'] != TYPES[found.host]:
        raise CheckpointError(f'The checkpoint {found.source} is of a {found.host} ({found}), and '
                              f'--arch asks for {arch}.')


def in_config(backbone: Mapping[str, Any], checkpoint: str) -> str:
    """A backbone and its checkpoint, as a config names them."""
    arguments = ', '.join(f'{key}={value!r}' for key, value in backbone.items())
    return f"dict({arguments}, init_cfg=dict(type='Pretrained', checkpoint={checkpoint!r}))"


def write_weights(target: Path, state_dict: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Write weights and what is said of them.

    Raises:
        UsageError: the file system does not take them.
    """
    with atomic_write(target) as beside:
        if target.suffix == '.safetensors':
            from safetensors.torch import save_file
            save_file({key: value.contiguous() for key, value in state_dict.items()}, beside,
                      metadata={key: str(value) for key, value in meta.items()})
        else:
            torch.save(dict(meta=meta, state_dict=dict(state_dict)), beside)


@torch.no_grad()
def differences(plain: nn.Module, model: nn.Module) -> list[str]:
    """What the features of a converted backbone differ by from its plain host's, as text.

    On one generated picture: of every output, and for ResNet of every 3×3 convolution and the norm
    behind it on the plain network's own inputs. In the root mean square, relative to the plain
    network's variation.
    """
    picture = draw(224, np.random.default_rng(0))[0]
    image = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    image = (image - 114) / 58
    blocks = [(name, block, model.get_submodule(name)) for name, block in plain.named_modules()
              if isinstance(block, ACmixBottleneck)]
    inputs: dict[str, Tensor] = {}
    hooks = [block.conv2.register_forward_pre_hook(
        lambda _, arguments, name=name: inputs.update({name: arguments[0]}))
        for name, block, _ in blocks]
    expected = plain(image)
    for hook in hooks:
        hook.remove()
    outputs = [relative_difference(ours, theirs) for ours, theirs in zip(model(image), expected)]
    lines = ['Difference of the outputs from the plain network, on one generated picture: ' +
             ', '.join(f'{value:.1e}' for value in outputs)]
    if blocks:
        lines.append('Of each 3×3 convolution, on the inputs of the plain network:')
        layers = []
        for name, theirs, ours in blocks:
            made, wanted = (getattr(block, block.norm_names[1])(block.conv2(inputs[name]))
                            for block in (ours, theirs))
            layers.append(f'{name} {relative_difference(made, wanted):.0%}')
        lines.append('  ' + ', '.join(layers))
    return lines


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of a difference over the standard deviation of what is expected."""
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()


def architecture(found: Pretrained) -> dict[str, Any]:
    """The config of a backbone, its type and what is not default, read off weights.

    Raises:
        CheckpointError: the weights lack what would tell, or no backbone has their sizes.
    """
    try:
        arguments = HOSTS[found.host].backbone_arguments(found.state_dict)
    except KeyError as error:
        raise CheckpointError(f'The checkpoint {found.source} ({found}) is incomplete: it lacks '
                              f'{error}.') from error
    except ValueError as error:
        raise CheckpointError(f'The checkpoint {found.source} ({found}) does not say which '
                              f'backbone it fits: {error}.') from error
    backbone = TYPES[found.host]
    defaults = inspect.signature(MODELS.get(backbone)).parameters
    told = {key: value for key, value in arguments.items()
            if as_tuple(value) != as_tuple(defaults[key].default)}
    return dict(type=backbone, **told)


def as_tuple(value: Any) -> Any:
    """A list as a tuple: in arguments they mean the same."""
    return tuple(value) if isinstance(value, list) else value


TYPES = {'Swin': 'ACmixSwinTransformer', 'PVT': 'ACmixPyramidVisionTransformer',
         'ResNet': 'ACmixResNet', 'SAN': 'ACmixSAN'}
