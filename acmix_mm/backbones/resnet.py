"""ResNet with ACmix in place of a 3×3 convolution of each block.

ResNet: arXiv 1512.03385; ACmix: arXiv 2111.14556, section 5.1 and the authors' code.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional

import torch
import torch.nn.functional as F
from mmcv.cnn import build_conv_layer, build_norm_layer, build_plugin_layer
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmcv.cnn.bricks.transformer import build_dropout
from mmengine.logging import print_log
from mmengine.model import Sequential, constant_init, kaiming_init
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from acmix_mm.backbones.arguments import (
    check_options,
    check_outputs,
    check_per_stage,
    check_positive,
    check_rates,
    check_stage_indices,
)
from acmix_mm.backbones.base import (
    ACmixBackbone,
    Block,
    PaperNetwork,
    Stage,
    stochastic_depth,
)
from acmix_mm.backbones.token_mixers import (
    OPERATORS,
    PATHS,
    build_mixer,
    check_one_mixer,
    has_other_names,
    mixers_of_blocks,
    pattern_type,
)
from acmix_mm.checkpoints.convolution import RATES, replace_convolution
from acmix_mm.checkpoints.host import HOSTS
from acmix_mm.checkpoints.loading import load_with_report
from acmix_mm.checkpoints.recognition import Pretrained
from acmix_mm.checkpoints.resnet import BASIC_DEPTHS, STAGE_BLOCKS, ResNetCheckpoints
from acmix_mm.layers import ACmixConv2d

POSITIONS = ('after_conv1', 'after_conv2', 'after_conv3')


class ResidualBlock(Block):
    """Convolutions with norms, of which ``conv2`` is the token mixer, and a shortcut.

    A subclass defines the convolutions, and ends with :meth:`finish`.

    Attributes:
        expansion: channels of the output, relative to those of ``conv2``.
        norm_names: names of the norms that follow the convolutions.
        downsample: the shortcut; None for the identity.
    """

    adds_shortcut = True
    expansion: ClassVar[int]
    conv2: nn.Module

    def finish(self, widths: Sequence[int], norm_cfg: dict, drop_path_rate: float,
               downsample: Optional[nn.Module]) -> None:
        """Add what follows the convolutions.

        Args:
            widths: channels of each convolution.
            norm_cfg: config of the norm layers.
            drop_path_rate: probability to drop the residual in training.
            downsample: the shortcut; None for the identity.
        """
        # Named bn1 or gn1, by the kind of norm, as in torchvision and MMDetection.
        self.norm_names = []
        for postfix, width in enumerate(widths, start=1):
            name, norm = build_norm_layer(norm_cfg, width, postfix=postfix)
            self.norm_names.append(name)
            self.add_module(name, norm)
        self.relu = nn.ReLU(inplace=True)
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.Module:
        return getattr(self, self.norm_names[-1])

    def compute(self, x: Tensor) -> Tensor:
        return self.relu(self.add_residual(x))

    def add_residual(self, x: Tensor) -> Tensor:
        out = self.drop(self.residual(x))
        return out + (x if self.downsample is None else self.downsample(x))

    def residual(self, x: Tensor) -> Tensor:
        """The convolutions with their norms."""
        raise NotImplementedError


class ACmixBasicBlock(ResidualBlock):
    """A basic block: 3×3 convolution, ACmix or another mixer, and a shortcut.

    The first convolution has the stride and the dilation, as in MMDetection.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int, style: str,
                 downsample: Optional[nn.Module], norm_cfg: dict, drop_path_rate: float,
                 with_cp: bool, mixer: dict, conv_cfg: Optional[dict],
                 plugins: Sequence[dict]) -> None:
        super().__init__(with_cp)
        if plugins:
            raise ValueError('plugins need bottlenecks, which depths '
                             f'{" and ".join(map(str, BASIC_DEPTHS))} do not have; drop plugins.')
        self.conv1 = build_conv_layer(conv_cfg, in_channels, channels, 3, stride=stride,
                                      padding=dilation, dilation=dilation, bias=False)
        self.conv2 = build_mixer(mixer, channels)
        self.finish((channels, channels), norm_cfg, drop_path_rate, downsample)

    def residual(self, x: Tensor) -> Tensor:
        norm1, norm2 = (getattr(self, name) for name in self.norm_names)
        out = self.relu(norm1(self.conv1(x)))
        return norm2(self.conv2(out))


class ACmixBottleneck(ResidualBlock):
    """A bottleneck: 1×1 convolution, ACmix or another mixer, 1×1 convolution, and a shortcut.

    Attributes:
        plugin_names: names of the plugins by position.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int, style: str,
                 downsample: Optional[nn.Module], norm_cfg: dict, drop_path_rate: float,
                 with_cp: bool, mixer: dict, conv_cfg: Optional[dict],
                 plugins: Sequence[dict]) -> None:
        super().__init__(with_cp)
        out_channels = channels * self.expansion
        first_stride, second_stride = (1, stride) if style == 'pytorch' else (stride, 1)
        self.conv1 = build_conv_layer(conv_cfg, in_channels, channels, kernel_size=1,
                                      stride=first_stride, bias=False)
        self.conv2 = build_mixer(mixer, channels, second_stride, dilation)
        self.conv3 = build_conv_layer(conv_cfg, channels, out_channels, kernel_size=1, bias=False)
        widths = (channels, channels, out_channels)
        self.finish(widths, norm_cfg, drop_path_rate, downsample)
        self.plugin_names: dict[str, list[str]] = {position: [] for position in POSITIONS}
        for plugin in plugins:
            width = widths[POSITIONS.index(plugin['position'])]
            self.add_plugin(plugin['position'], plugin['cfg'], width)

    def add_plugin(self, position: str, cfg: dict, channels: int) -> None:
        """Build a plugin after those that the position already has."""
        options = dict(cfg)
        name, layer = build_plugin_layer(options, options.pop('postfix', ''), in_channels=channels)
        if hasattr(self, name):
            raise ValueError(f'Two plugins of a block have the name {name!r}; give each a '
                             'different postfix, as in cfg=dict(type=..., postfix=1).')
        self.add_module(name, layer)
        self.plugin_names[position].append(name)

    def plug(self, position: str, x: Tensor) -> Tensor:
        """Apply the plugins of a position, one after the other."""
        for name in self.plugin_names[position]:
            x = getattr(self, name)(x)
        return x

    def residual(self, x: Tensor) -> Tensor:
        norm1, norm2, norm3 = (getattr(self, name) for name in self.norm_names)
        out = self.plug('after_conv1', self.relu(norm1(self.conv1(x))))
        out = self.plug('after_conv2', self.relu(norm2(self.conv2(out))))
        return self.plug('after_conv3', norm3(self.conv3(out)))


@MODELS.register_module()
class ACmixResNet(ACmixBackbone):
    """ResNet whose blocks mix local attention with convolution.

    The arguments are those of MMDetection's and MMSegmentation's ``ResNet``, with MMDetection's
    defaults, and ``stage_blocks``, ``num_heads``, ``attn_kernel_size``, ``drop_path_rate``,
    ``mix``, ``acmix_cfg``, ``acmix_stages`` and ``mixer``. Parameters have the names of the
    authors' code.

    ACmix replaces the 3×3 convolution of a bottleneck, as in the paper, and the second 3×3
    convolution of a basic block. The paper has no network with basic blocks, so the latter is our
    choice. The second convolution corresponds to that of a bottleneck: it has as many input as
    output channels and follows a norm and a ReLU, so weights of plain networks are approximated in
    the same way. The first one remains, because it has the stride, for which ACmix would compute
    its projections at four times as many positions.

    Args:
        depth: 18 or 34, with basic blocks, or 26, 38, 50, 101 or 152, with bottlenecks; selects
            the kind and the number of blocks of each stage.
        in_channels: channels of the image.
        stem_channels: channels of the stem; ``base_channels`` if None.
        base_channels: channels of the 3×3 convolutions of the first stage; each stage doubles
            them.
        num_stages: number of stages to build, 1 to 4.
        strides: stride of each stage.
        dilations: dilation of each stage.
        out_indices: indices of the stages that give an output.
        style: ``'pytorch'`` puts the stride of a bottleneck on ACmix, ``'caffe'`` on the first
            1×1 convolution.
        deep_stem: use three 3×3 convolutions instead of the stem's 7×7 convolution.
        avg_down: use average pooling instead of strides in the shortcuts.
        frozen_stages: freeze the stem (0) and that many stages; -1 freezes nothing.
        norm_cfg: config of the norm layers.
        norm_eval: keep the running statistics of batch norms fixed in training.
        with_cp: recompute the blocks in the backward pass to save memory.
        zero_init_residual: initialise the last norm of each block to zero.
        pretrained: deprecated in favour of ``init_cfg``; path or URL of a checkpoint.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with an ACmix-ResNet of the authors
            or a plain ResNet (torchvision, timm, MMDetection), or None. When loading a plain
            ResNet, each convolution that ACmix replaces is approximated by a convolution path, with
            rate1 = 0, and the log reports the error. Layers without a suitable path
            (``mix='attn'``, or an ``acmix_cfg`` with shared or fixed shifts or without rates) and
            the norms that follow them keep their initial values.
        stage_blocks: number of blocks of each stage; overrides ``depth``.
        num_heads: attention heads of every ACmix layer.
        attn_kernel_size: side of the attention window.
        drop_path_rate: stochastic depth rate of the last block; the rate rises linearly from 0.
        mix: ``'acmix'`` for both paths, ``'attn'`` or ``'conv'`` for one of them alone.
        acmix_cfg: further arguments of the ACmix layers: ``combine``, ``shift`` and
            ``shift_groups``; see :class:`acmix_mm.layers.ACmixConv2d`.
        acmix_stages: indices of the stages that use ACmix; the others keep 3×3 convolutions.
        mixer: config of an OpenMMLab convolution type that replaces ACmix and gets its stride and
            dilation: ``dict(type='Involution', kernel_size=7)``. ``kernel_size`` defaults to 3,
            and ``bias`` to False. From a checkpoint with another mixer, or of a plain ResNet,
            everything but the mixers and the norms that follow them is loaded. The types
            ``GlobalAttention``, ``GlobalACmix``, ``RandomAttention`` and ``BigBirdAttention`` have
            the ``num_heads`` of the backbone and a bias by default, as ACmix has.
        last_mixer: the same for the last block of each stage alone, also that of a stage with one
            block; the types above have the options of ``acmix_cfg``, too, by default.
        multi_grid: dilation of each block of the last stage, instead of its number in
            ``dilations``; as in MMSegmentation.
        contract_dilation: halve the dilation of the first block of each stage that has one; as in
            MMSegmentation.
        conv_cfg: config of all convolutions that ACmix or ``mixer`` does not replace; None for
            ``nn.Conv2d``.
        dcn: config of a deformable convolution that replaces the 3×3 convolutions of the
            bottlenecks in some stages, which ``acmix_stages`` must not contain.
        stage_with_dcn: for each stage, whether to use ``dcn``.
        plugins: modules to insert in the bottlenecks, as in MMDetection: dicts with ``cfg``,
            ``position`` (``'after_conv1'``, ``'after_conv2'`` or ``'after_conv3'``) and optionally
            ``stages``, for each stage whether to insert the module. Those of one position apply one
            after the other. A checkpoint without them leaves them at their initial values.

    Raises:
        ValueError: an argument is invalid, or two options replace the same convolution.
        CheckpointError: in ``init_weights``, the checkpoint cannot be read or does not fit.
    """

    checkpoints = HOSTS[ResNetCheckpoints.host]
    mixers: ClassVar = {'conv': dict(acmix_stages=()), **PATHS, **OPERATORS}
    plain_arguments: ClassVar = dict(acmix_stages=())
    width_argument = 'base_channels'
    blocks_argument = 'stage_blocks'
    paper_networks = (
        PaperNetwork('ACmix-ResNet-26', 'acmix_resnet26', dict(depth=26), 10.6, 2.3, 10.49),
        PaperNetwork('ACmix-ResNet-38', 'acmix_resnet38', dict(depth=38), 14.6, 2.9, 14.41),
        PaperNetwork('ACmix-ResNet-50', 'acmix_resnet50', dict(depth=50), 18.6, 3.6, 18.33),
    )
    counts_elementwise = True
    timm_cfg: ClassVar = dict(first_conv='conv1', crop_pct=0.875, interpolation='bilinear')

    def __init__(self,
                 depth: int,
                 in_channels: int = 3,
                 stem_channels: Optional[int] = None,
                 base_channels: int = 64,
                 num_stages: int = 4,
                 strides: Sequence[int] = (1, 2, 2, 2),
                 dilations: Sequence[int] = (1, 1, 1, 1),
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 style: str = 'pytorch',
                 deep_stem: bool = False,
                 avg_down: bool = False,
                 frozen_stages: int = -1,
                 norm_cfg: dict = dict(type='BN', requires_grad=True),
                 norm_eval: bool = True,
                 with_cp: bool = False,
                 zero_init_residual: bool = True,
                 pretrained: Optional[str] = None,
                 init_cfg: Optional[dict] = None,
                 stage_blocks: Optional[Sequence[int]] = None,
                 num_heads: int = 4,
                 attn_kernel_size: int = 7,
                 drop_path_rate: float = 0.,
                 mix: str = 'acmix',
                 acmix_cfg: Optional[dict] = None,
                 acmix_stages: Sequence[int] = (0, 1, 2, 3),
                 mixer: Optional[dict] = None,
                 last_mixer: Optional[dict] = None,
                 multi_grid: Optional[Sequence[int]] = None,
                 contract_dilation: bool = False,
                 conv_cfg: Optional[dict] = None,
                 dcn: Optional[dict] = None,
                 stage_with_dcn: Sequence[bool] = (False, False, False, False),
                 plugins: Optional[Sequence[dict]] = None) -> None:
        if depth not in STAGE_BLOCKS:
            raise ValueError(f'depth must be one of {", ".join(map(str, STAGE_BLOCKS))}, got '
                             f'{depth}; for other depths set stage_blocks.')
        if num_stages not in range(1, 5):
            raise ValueError(f'num_stages must be 1 to 4, got {num_stages!r}.')
        check_per_stage(num_stages, strides=strides, dilations=dilations)
        check_positive(in_channels=in_channels, base_channels=base_channels, num_heads=num_heads,
                       attn_kernel_size=attn_kernel_size)
        check_outputs(out_indices, frozen_stages, num_stages)
        check_rates(drop_path_rate=drop_path_rate)
        check_options(acmix_cfg)
        check_acmix_stages(acmix_stages, num_stages)
        if style not in ('pytorch', 'caffe'):
            raise ValueError(f"style must be 'pytorch' or 'caffe', got {style!r}.")
        check_one_mixer(mixer, mix, acmix_cfg)
        dcn_stages = [] if dcn is None else [
            stage for stage, uses_dcn in enumerate(stage_with_dcn) if uses_dcn]
        if dcn is not None:
            check_dcn(dcn_stages, stage_with_dcn, num_stages, depth, conv_cfg, acmix_stages,
                      'ACmix' if mixer is None else 'mixer')
        check_plugins(plugins or (), num_stages)
        super().__init__(init_cfg, pretrained)
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.zero_init_residual = zero_init_residual
        self.mixer = mixer
        self.last_mixer = last_mixer
        self.deep_stem = deep_stem

        channels = stem_channels or base_channels
        if deep_stem:
            self.stem = deep_stem_layers(in_channels, channels, conv_cfg, norm_cfg)
        else:
            self.conv1 = build_conv_layer(conv_cfg, in_channels, channels, 7, stride=2, padding=3,
                                          bias=False)
            self.norm_name, norm = build_norm_layer(norm_cfg, channels, postfix=1)
            self.add_module(self.norm_name, norm)
            self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        # ACmix computes in channels_last, but not all layers of other kinds respect strides.
        has_others = not (conv_cfg is None and dcn is None and plugins is None)
        self.memory_format = torch.contiguous_format if has_others else torch.channels_last

        attention = dict(bias=True, num_heads=num_heads, **(acmix_cfg or {}))
        if mixer is None:
            mixer = dict(type='ACmix', attn_kernel_size=attn_kernel_size, mix=mix, **attention)
        stage_blocks = self.stage_blocks_of(
            dict(depth=depth, num_stages=num_stages, stage_blocks=stage_blocks))
        check_per_stage(num_stages, stage_blocks=stage_blocks)
        if multi_grid is not None and len(multi_grid) < stage_blocks[-1]:
            raise ValueError('multi_grid needs one dilation for each of the '
                             f'{stage_blocks[-1]} blocks of the last stage, got '
                             f'{tuple(multi_grid)}.')
        dcn = dict(dcn or {})
        falls_back = dcn.pop('fallback_on_stride', False)
        drop_path_rates = stochastic_depth(drop_path_rate, stage_blocks)
        block_type = ACmixBasicBlock if depth in BASIC_DEPTHS else ACmixBottleneck
        mixers = mixers_of_blocks(stage_blocks, mixer, last_mixer)
        reduction = 4
        self.layers = []
        for stage, blocks in enumerate(stage_blocks):
            width = base_channels * 2**stage
            out_channels = width * block_type.expansion
            is_last = stage == len(stage_blocks) - 1
            block_dilations = dilations_of_blocks(
                dilations[stage], blocks, multi_grid if is_last else None, contract_dilation)
            stage_plugins = [plugin for plugin in plugins or ()
                             if plugin.get('stages') is None or plugin['stages'][stage]]
            plain = conv_cfg or dict(type='Conv2d')
            stage_layers = []
            for block in range(blocks):
                stride = strides[stage] if block == 0 else 1
                shortcut = None
                if stride != 1 or channels != out_channels:
                    shortcut = downsampling(channels, out_channels, stride, avg_down, conv_cfg,
                                            norm_cfg)
                block_mixer = dcn if stage in dcn_stages else plain
                if stage in acmix_stages:
                    block_mixer = mixers[stage][block]
                    if pattern_type(block_mixer):
                        block_mixer = {**attention, **block_mixer}
                # MMDetection falls back once: it removes this option from dcn when it reads it.
                keeps_plain = falls_back and block == 0 and stage in dcn_stages[:1]
                stage_layers.append(block_type(
                    channels, width, stride, block_dilations[block], style, shortcut, norm_cfg,
                    drop_path_rates[stage][block], with_cp,
                    plain if keeps_plain else block_mixer, conv_cfg, stage_plugins))
                channels = out_channels
            name = f'layer{stage + 1}'
            self.add_module(name, Sequential(*stage_layers))
            self.layers.append(name)
            reduction *= strides[stage]
            self.stage_info.append(Stage(channels, reduction, name))
        check_eps(self)
        self.freeze_stages()

    @classmethod
    def stage_blocks_of(cls, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        blocks = arguments['stage_blocks'] or STAGE_BLOCKS[arguments['depth']]
        return tuple(blocks)[:arguments['num_stages']]

    @classmethod
    def width_step(cls, arguments: Mapping[str, Any]) -> int:
        mixers = (arguments['mixer'], arguments['last_mixer'])
        has_heads = arguments['acmix_stages'] and (
            arguments['mixer'] is None or any(map(pattern_type, mixers)))
        return arguments['num_heads'] if has_heads else 1

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> tuple[Tensor, ...]:
        if self.deep_stem:
            x = self.stem(x)
        else:
            x = self.relu(getattr(self, self.norm_name)(self.conv1(x)))
        x = self.maxpool(x).contiguous(memory_format=self.memory_format)
        maps = []
        for stage, name in enumerate(self.layers[:max(indices) + 1]):
            x = getattr(self, name)(x)
            if stage in indices:
                # Not all readers of the outputs respect strides.
                maps.append(x.contiguous())
        return tuple(maps)

    def frozen_modules(self) -> list[nn.Module]:
        frozen = []
        if self.frozen_stages >= 0:
            frozen = [self.stem] if self.deep_stem else [self.conv1, getattr(self, self.norm_name)]
        return frozen + [getattr(self, name) for name in self.layers[:max(self.frozen_stages, 0)]]

    def init_from_scratch(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                kaiming_init(module)
            elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
                constant_init(module, 1)
        # Plugins and deformable convolutions have their own initialisation.
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                for module in block.children():
                    if hasattr(module, 'init_weights'):
                        module.init_weights()
        if self.zero_init_residual:
            for module in self.modules():
                if isinstance(module, ResidualBlock):
                    constant_init(module.last_norm, 0)

    def load_pretrained(self, found: Pretrained) -> None:
        state_dict = dict(found.state_dict)
        last = [getattr(self, name)[-1].conv2 for name in self.layers if self.last_mixer]

        def may_be_replaced(layer: nn.Module) -> bool:
            if hasattr(layer, 'conv_offset'):
                return False
            if self.mixer is None and isinstance(layer, ACmixConv2d):
                return not found.is_acmix
            return self.mixer is not None or any(layer is each for each in last)

        replaced = {
            name: block for name, block in self.named_modules()
            if isinstance(block, ResidualBlock) and may_be_replaced(block.conv2)
            and has_other_names(block.conv2, f'{name}.conv2.', state_dict)}
        for name, block in replaced.items():
            key = f'{name}.conv2.weight'
            if isinstance(block.conv1, ConvWS2d) and key in state_dict:
                state_dict[key] = standardise(state_dict[key], block.conv1.eps)
        errors = {
            name: replace_convolution(state_dict, name, block.norm_names, block.conv2.num_heads,
                                      [rate for rate in RATES if hasattr(block.conv2, rate)])
            for name, block in replaced.items()
            if self.mixer is None and isinstance(block.conv2, ACmixConv2d)
            and block.conv2.can_stand_in}
        # The weights of another mixer, and of the norm that follows it, are of no use.
        unlike = '|'.join(rf'^{name}\.(conv2|{block.norm_names[1]})\.'
                          for name, block in replaced.items() if name not in errors)
        load_with_report(
            self, found.with_state_dict(state_dict),
            may_lack='|'.join([r'num_batches_tracked$', *([r'\.conv_p\.'] if errors else ()),
                               *self.additions()]),
            # Convolutions of Caffe have biases. The norm after them has its own, and MMDetection's
            # ResNet drops them, too.
            may_drop=r'^(fc|head)\.|^(layer\d\.\d+\.)?(conv\d|downsample\.0)\.bias$',
            leave=unlike)
        if errors:
            print_log('  Each convolution that ACmix replaces is approximated by a convolution '
                      'path, with rate1 = 0. Expected error, relative to the standard deviation of '
                      'its outputs:\n    ' +
                      ', '.join(f'{name} {error:.0%}' for name, error in errors.items()),
                      logger='current')

    def additions(self) -> list[str]:
        """Patterns of keys that a plain ResNet with the same stages does not have."""
        plugins = [rf'^{name}\.{plugin}\.' for name, block in self.named_modules()
                   if isinstance(block, ACmixBottleneck)
                   for plugins in block.plugin_names.values() for plugin in plugins]
        # Offsets of deformable convolutions, and statistics of mmcv's ConvAWS2d.
        return [r'\.conv2\.conv_offset\.', r'\.weight_(gamma|beta)$', *plugins]

    def replaced_convolutions(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        return {name: (block.conv2, getattr(block, block.norm_names[1]))
                for name, block in self.named_modules() if isinstance(block, ResidualBlock)}

    def remove_stages(self, first: int) -> None:
        for name in self.layers[first:]:
            delattr(self, name)
        self.layers = self.layers[:first]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r'^(?:stem|conv1|bn1|gn1)\.',
                    blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')


@MODELS.register_module()
class ACmixResNetV1c(ACmixResNet):
    """ACmix-ResNet with a stem of three 3×3 convolutions (ResNet-C, arXiv 1812.01187).

    Args:
        depth: as in :class:`ACmixResNet`.
        arguments: all arguments of :class:`ACmixResNet` except ``deep_stem`` and ``avg_down``.
    """

    fixed_arguments: ClassVar = dict(deep_stem=True, avg_down=False)

    def __init__(self, depth: int, **arguments: Any) -> None:
        super().__init__(depth, **self.fixed_arguments, **arguments)


@MODELS.register_module()
class ACmixResNetV1d(ACmixResNet):
    """ACmix-ResNet-C with average pooling in the shortcuts (ResNet-D, arXiv 1812.01187).

    Args:
        depth: as in :class:`ACmixResNet`.
        arguments: all arguments of :class:`ACmixResNet` except ``deep_stem`` and ``avg_down``.
    """

    fixed_arguments: ClassVar = dict(deep_stem=True, avg_down=True)

    def __init__(self, depth: int, **arguments: Any) -> None:
        super().__init__(depth, **self.fixed_arguments, **arguments)


def check_acmix_stages(acmix_stages: Sequence[int], num_stages: int) -> None:
    """Check that ``acmix_stages`` is empty, or that one of its stages is built.

    The default names all four stages, of which fewer may be built.

    Raises:
        ValueError: it has other numbers than 0 to 3, or none of its stages is built.
    """
    check_stage_indices(4, acmix_stages=acmix_stages)
    if acmix_stages and min(acmix_stages) >= num_stages:
        raise ValueError(f'acmix_stages must contain a stage below num_stages={num_stages}, or be '
                         f'empty, got {tuple(acmix_stages)}.')


def dilations_of_blocks(dilation: int, blocks: int, multi_grid: Optional[Sequence[int]],
                        contract_dilation: bool) -> list[int]:
    """The dilation of each block of a stage."""
    if multi_grid is not None:
        return list(multi_grid[:blocks])
    first = dilation // 2 if contract_dilation and dilation > 1 else dilation
    return [first] + [dilation] * (blocks - 1)


def check_dcn(dcn_stages: Sequence[int], stage_with_dcn: Sequence[bool], num_stages: int,
              depth: int, conv_cfg: Optional[dict], acmix_stages: Sequence[int],
              other: str) -> None:
    """Raise ValueError if the stages of ``dcn`` are invalid, or another option replaces the same
    convolutions.

    Args:
        dcn_stages: the stages that ``stage_with_dcn`` selects.
        stage_with_dcn: see :class:`ACmixResNet`, as the following arguments.
        num_stages: the number of stages.
        depth: the depth.
        conv_cfg: config of the convolutions.
        acmix_stages: stages that use ACmix or ``mixer``.
        other: ``'ACmix'`` or ``'mixer'``.
    """
    if len(stage_with_dcn) != num_stages:
        raise ValueError(f'stage_with_dcn needs one bool for each of {num_stages} stages, got '
                         f'{len(stage_with_dcn)}.')
    if dcn_stages and depth in BASIC_DEPTHS:
        raise ValueError(f'dcn needs bottlenecks, which depth {depth} does not have; drop dcn and '
                         'stage_with_dcn.')
    if dcn_stages and conv_cfg is not None:
        raise ValueError('dcn and conv_cfg both replace the 3×3 convolutions of the stages '
                         f'{", ".join(map(str, dcn_stages))}; drop one of the two.')
    shared = sorted({*dcn_stages} & {*acmix_stages})
    if shared:
        rest = tuple(stage for stage in acmix_stages if stage not in shared)
        raise ValueError(f'dcn and {other} both replace the 3×3 convolutions of the stages '
                         f'{", ".join(map(str, shared))}; drop dcn and stage_with_dcn, or set '
                         f'acmix_stages={rest}.')


def check_plugins(plugins: Sequence[dict], num_stages: int) -> None:
    """Raise ValueError if the position or the stages of a plugin are invalid."""
    for plugin in plugins:
        if plugin['position'] not in POSITIONS:
            raise ValueError(f'The position of a plugin must be one of {", ".join(POSITIONS)}, got '
                             f'{plugin["position"]!r}.')
        stages = plugin.get('stages')
        if stages is not None and len(stages) != num_stages:
            raise ValueError(f'The stages of a plugin need one bool for each of {num_stages} '
                             f'stages, got {len(stages)}.')


def check_eps(network: nn.Module) -> None:
    """Raise ValueError if this version of torch rejects the ``eps`` of a batch norm.

    Some configs of MMDetection have batch norms with ``eps=0``, which torch 2.10 and later reject;
    2.15 does in training mode only.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.eps <= 0:
            try:
                F.batch_norm(torch.ones(1, 1), torch.zeros(1), torch.ones(1), eps=module.eps)
            except ValueError as error:
                raise ValueError(f'This version of torch rejects eps={module.eps} of norm_cfg '
                                 f'({error}); drop eps, or set a positive number.') from error


def standardise(kernel: Tensor, eps: float) -> Tensor:
    """The kernel that mmcv's ``ConvWS2d`` convolves with (arXiv 1903.10520).

    Args:
        kernel: the parameter, (out_channels, in_channels, k, k).
        eps: small number that is added to the standard deviation.
    """
    std, mean = torch.std_mean(kernel, dim=(1, 2, 3), keepdim=True)
    return (kernel - mean) / (std + eps)


def deep_stem_layers(in_channels: int, channels: int, conv_cfg: Optional[dict],
                     norm_cfg: dict) -> nn.Sequential:
    """Three 3×3 convolutions, the first with stride 2 (ResNet-C, arXiv 1812.01187)."""
    layers = []
    for width, stride in ((channels // 2, 2), (channels // 2, 1), (channels, 1)):
        layers += [build_conv_layer(conv_cfg, in_channels, width, 3, stride=stride, padding=1,
                                    bias=False),
                   build_norm_layer(norm_cfg, width)[1], nn.ReLU(inplace=True)]
        in_channels = width
    return nn.Sequential(*layers)


def downsampling(in_channels: int, out_channels: int, stride: int, avg_down: bool,
                 conv_cfg: Optional[dict], norm_cfg: dict) -> nn.Sequential:
    """The shortcut of a block that changes the size or the channels of the map."""
    layers = []
    if avg_down:
        layers.append(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
        stride = 1
    layers.append(build_conv_layer(conv_cfg, in_channels, out_channels, kernel_size=1,
                                   stride=stride, bias=False))
    return nn.Sequential(*layers, build_norm_layer(norm_cfg, out_channels)[1])
