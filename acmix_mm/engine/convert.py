"""Convert checkpoints into weights of the ACmix backbones, and measure the loss of conversion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from acmix_mm import __version__
from acmix_mm.backbones.base import BACKBONES, ACmixBackbone
from acmix_mm.checkpoints.reading import check_finite
from acmix_mm.checkpoints.recognition import Pretrained, read_pretrained
from acmix_mm.datasets.shapes import draw
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import CheckpointError, UsageError
from acmix_mm.utils.output_paths import file_to_write

# The networks of the paper by short name, as in 'swin-t': the host and the backbone's arguments.
ARCHS = {network.name.removeprefix('ACmix-').lower(): (host, network.arguments)
         for host, backbone in BACKBONES.items() for network in backbone.paper_networks}
SUFFIXES = ('.pth', '.safetensors')


def convert(source: str, destination: str, arch: Optional[str] = None) -> str:
    """Convert a checkpoint into weights of its host's ACmix backbone, and write them to a file.

    The weights are those that the backbone loads with ``init_cfg=dict(type='Pretrained',
    checkpoint=source)``. From a plain host, they give the same features; in ResNet, nearly the
    same.

    Args:
        source: see :func:`acmix_mm.checkpoints.reading.read_checkpoint`.
        destination: the ``.pth`` or ``.safetensors`` file to write. Its metadata has the source and
            the config of the backbone. If the conversion fails, nothing is written.
        arch: the network to build, a key of ``ARCHS``; weights of any other are refused. If None,
            the architecture is inferred from the weights.

    Returns:
        A report: the backbone as written in a config and, for a plain host, by how much its
        features change.

    Raises:
        UsageError: the destination cannot be written.
        CheckpointError: the source cannot be read, does not fit, or has weights that are NaN or
            infinite.
    """
    target = file_to_write(destination)
    if target.suffix not in SUFFIXES:
        raise UsageError(f'Weights are written as {" or ".join(SUFFIXES)}; {destination} is '
                         'neither.')
    found = read_pretrained(source)
    check_finite(found.state_dict, source)
    arguments = infer_arguments(found) if arch is None else arguments_of(arch, found)
    network = BACKBONES[found.host]
    model = network(**arguments).eval()
    model.load_pretrained(found)
    own = model.state_dict()
    backbone = dict(type=network.__name__, **arguments)
    write_weights(target, own, dict(
        source=source, recognised=str(found), backbone=backbone, acmix_mm_version=__version__))
    lines = [f'{destination} initialises this backbone:',
             f'  {format_config(backbone, destination)}']
    if not found.is_acmix:
        plain = network(**{**arguments, **network.plain_arguments}).eval()
        # Position tables that were resized keep their new size.
        weights = {key: value for key, value in found.state_dict.items()
                   if key not in own or value.shape == own[key].shape}
        plain.load_state_dict({key: weights.get(key, own.get(key)) for key in plain.state_dict()})
        lines += differences(plain, model)
    return '\n'.join(lines)


def arguments_of(arch: str, found: Pretrained) -> Mapping[str, Any]:
    """The arguments of a network of the paper.

    Raises:
        CheckpointError: the checkpoint is of another host.
    """
    host, arguments = ARCHS[arch]
    if host != found.host:
        raise CheckpointError(f'The checkpoint {found.source} is of a {found.host} ({found}), but '
                              f'--arch asks for {arch}.')
    return arguments


def infer_arguments(found: Pretrained) -> dict[str, Any]:
    """Infer the arguments of a backbone, other than defaults, from the shapes of its weights.

    Raises:
        CheckpointError: weights are missing, or they do not determine a backbone.
    """
    network = BACKBONES[found.host]
    try:
        arguments = network.checkpoints.backbone_arguments(found.state_dict)
    except KeyError as error:
        raise CheckpointError(f'The checkpoint {found.source} ({found}) is incomplete: it lacks '
                              f'{error}.') from error
    except ValueError as error:
        raise CheckpointError(f'The checkpoint {found.source} ({found}) does not determine which '
                              f'backbone it fits: {error}.') from error
    defaults = network.arguments({})
    return {name: value for name, value in arguments.items()
            if as_tuple(value) != as_tuple(defaults[name])}


def as_tuple(value: Any) -> Any:
    """Convert a list to a tuple; in arguments they are equivalent."""
    return tuple(value) if isinstance(value, list) else value


def format_config(backbone: Mapping[str, Any], checkpoint: str) -> str:
    """Format a backbone and its checkpoint as in a config file."""
    arguments = ', '.join(f'{key}={value!r}' for key, value in backbone.items())
    return f"dict({arguments}, init_cfg=dict(type='Pretrained', checkpoint={checkpoint!r}))"


def write_weights(target: Path, state_dict: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Write weights with their metadata.

    Raises:
        UsageError: the file cannot be written.
    """
    with atomic_write(target) as temporary:
        if target.suffix == '.safetensors':
            from safetensors.torch import save_file
            save_file({key: value.contiguous() for key, value in state_dict.items()}, temporary,
                      metadata={key: str(value) for key, value in meta.items()})
        else:
            torch.save(dict(meta=meta, state_dict=dict(state_dict)), temporary)


@torch.no_grad()
def differences(plain: ACmixBackbone, model: ACmixBackbone) -> list[str]:
    """Measure how much the features of a converted backbone differ from those of its plain host.

    On one generated image, for each output, and for each convolution that ACmix replaced followed
    by its norm, on the inputs that it has in the plain network. Differences are root mean squares,
    relative to the standard deviation in the plain network.

    Returns:
        Lines of text.
    """
    drawn = draw(224, np.random.default_rng(0))[0]
    image = torch.from_numpy(drawn[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    image = (image - 114) / 58
    convolutions = plain.replaced_convolutions()
    inputs: dict[str, Tensor] = {}
    hooks = [convolution.register_forward_pre_hook(
        lambda _, arguments, name=name: inputs.update({name: arguments[0]}))
        for name, (convolution, _) in convolutions.items()]
    expected = plain(image)
    for hook in hooks:
        hook.remove()
    outputs = [relative_difference(ours, theirs) for ours, theirs in zip(model(image), expected)]
    lines = ['Difference of the outputs from the plain network, on one generated image: ' +
             ', '.join(f'{value:.1e}' for value in outputs)]
    if convolutions:
        approximations = model.replaced_convolutions()
        by_block = []
        for name, x in inputs.items():
            wanted, made = (norm(layer(x))
                            for layer, norm in (convolutions[name], approximations[name]))
            by_block.append(f'{name} {relative_difference(made, wanted):.0%}')
        lines += ['Difference of each 3×3 convolution, on the inputs of the plain network:',
                  '  ' + ', '.join(by_block)]
    return lines


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to the standard deviation of ``expected``."""
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()
