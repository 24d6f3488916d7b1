"""Converting a checkpoint into one of a backbone here, and measuring what the conversion lost."""

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from acmix_mm import __version__
from acmix_mm.analysis.published import NETWORKS
from acmix_mm.backbones.resnet import STAGE_BLOCKS as RESNET_BLOCKS
from acmix_mm.backbones.resnet import ACmixBottleneck
from acmix_mm.backbones.san import STAGE_BLOCKS as SAN_BLOCKS
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
        arguments = ARCHITECTURES[found.host](found.state_dict)
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


def swin_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``ACmixSwinTransformer``."""
    embed_dims, in_channels, patch_size = state_dict['patch_embed.projection.weight'].shape[:3]
    depths = count_up(state_dict, r'stages\.{}\.blocks\.\d+\.norm1\.weight')
    tables = [state_dict[f'stages.{stage}.blocks.0.attn.w_msa.relative_position_bias_table']
              for stage in range(len(depths))]
    hidden = state_dict['stages.0.blocks.0.ffn.layers.0.0.weight'].shape[0]
    arguments = dict(
        in_channels=in_channels,
        embed_dims=embed_dims,
        patch_size=patch_size,
        window_size=(math.isqrt(tables[0].shape[0]) + 1) // 2,
        mlp_ratio=hidden / embed_dims,
        depths=depths,
        num_heads=tuple(table.shape[1] for table in tables),
        strides=(patch_size, *(2 for _ in depths[1:])),
        out_indices=tuple(range(len(depths))),
        qkv_bias='stages.0.blocks.0.attn.w_msa.qkv.bias' in state_dict,
        patch_norm='patch_embed.norm.weight' in state_dict)
    if 'absolute_pos_embed' in state_dict:
        side = math.isqrt(state_dict['absolute_pos_embed'].shape[1])
        arguments.update(use_abs_pos_embed=True, pretrain_img_size=side * patch_size)
    return arguments


def pvt_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``ACmixPyramidVisionTransformer``.

    Raises:
        ValueError: the weights are of PVT v2, whose strides the shapes do not tell.
    """
    if 'layers.0.1.0.pos_embed' not in state_dict:
        raise ValueError('it has no position embeddings, as PVT v2; name it in the init_cfg of a '
                         'backbone that has the arguments of that')
    num_layers = count_up(state_dict, r'layers\.{}\.1\.\d+\.norm1\.weight')
    patches = [state_dict[f'layers.{stage}.0.projection.weight']
               for stage in range(len(num_layers))]
    blocks = [f'layers.{stage}.1.1' for stage in range(len(num_layers))]
    cells = [state_dict.get(f'{block}.attn.sr.weight') for block in blocks]
    widths = [len(patch) for patch in patches]
    patch_sizes = tuple(patch.shape[2] for patch in patches)
    side = math.isqrt(state_dict['layers.0.1.0.pos_embed'].shape[1])
    return dict(
        pretrain_img_size=side * patch_sizes[0],
        in_channels=patches[0].shape[1],
        embed_dims=widths[0],
        num_stages=len(num_layers),
        num_layers=num_layers,
        # All published ones have one head in the first stage, and heads of equal width.
        num_heads=tuple(width // widths[0] for width in widths),
        patch_sizes=patch_sizes,
        strides=patch_sizes,
        paddings=(0,) * len(num_layers),
        sr_ratios=tuple(1 if cell is None else cell.shape[2] for cell in cells),
        out_indices=tuple(range(len(num_layers))),
        mlp_ratios=tuple(len(state_dict[f'{block}.ffn.layers.0.weight']) // width
                         for block, width in zip(blocks, widths)),
        qkv_bias='layers.0.1.1.attn.attn.in_proj_bias' in state_dict)


def resnet_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``ACmixResNet``.

    Raises:
        ValueError: the blocks are not bottlenecks.
    """
    if 'layer1.0.conv3.weight' not in state_dict:
        raise ValueError('its blocks are not the bottlenecks of ResNet-26, 38, 50 and deeper')
    blocks = count_up(state_dict, r'layer{}\.\d+\.conv1\.weight', first=1)
    depths = {known: depth for depth, known in RESNET_BLOCKS.items()}
    deep_stem = 'stem.0.weight' in state_dict
    arguments = dict(
        depth=depths.get(blocks, 50),
        in_channels=state_dict['stem.0.weight' if deep_stem else 'conv1.weight'].shape[1],
        base_channels=len(state_dict['layer1.0.conv1.weight']),
        deep_stem=deep_stem,
        avg_down='layer1.0.downsample.0.weight' not in state_dict)
    stem_channels = len(state_dict['stem.6.weight' if deep_stem else 'conv1.weight'])
    if stem_channels != arguments['base_channels']:
        arguments.update(stem_channels=stem_channels)
    if blocks not in depths:
        arguments.update(stage_blocks=blocks)
    mixed = [stage for stage in range(4) if f'layer{stage + 1}.0.conv2.fc.weight' in state_dict]
    if mixed:
        num_maps = state_dict[f'layer{mixed[0] + 1}.0.conv2.fc.weight'].shape[1]
        arguments.update(num_heads=num_maps // 3, acmix_stages=tuple(mixed))
    return arguments


def san_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``ACmixSAN``.

    Raises:
        ValueError: no SAN has so many blocks.
    """
    blocks = count_up(state_dict, r'layer{}\.\d+\.bn1\.weight')
    depths = {known: depth for depth, known in SAN_BLOCKS.items()}
    if blocks not in depths:
        raise ValueError(f'it has stages of {blocks} blocks; known are '
                         f'{", ".join(map(str, depths))}')
    base_channels, in_channels = state_dict['conv_in.weight'].shape[:2]
    return dict(depth=depths[blocks], in_channels=in_channels, base_channels=base_channels)


ARCHITECTURES = {'Swin': swin_architecture, 'PVT': pvt_architecture,
                 'ResNet': resnet_architecture, 'SAN': san_architecture}
TYPES = {'Swin': 'ACmixSwinTransformer', 'PVT': 'ACmixPyramidVisionTransformer',
         'ResNet': 'ACmixResNet', 'SAN': 'ACmixSAN'}


def count_up(state_dict: Mapping[str, Tensor], pattern: str, first: int = 0) -> tuple[int, ...]:
    """How many keys match ``pattern``, with a stage's number in its braces, stage by stage."""
    counts = []
    while found := sum(bool(re.fullmatch(pattern.format(len(counts) + first), key))
                       for key in state_dict):
        counts.append(found)
    return tuple(counts)
