"""ResNet with ACmix in the place of the bottlenecks' 3×3 convolutions.

ResNet: arXiv 1512.03385; ACmix: arXiv 2111.14556, section 5.1 and the authors' code.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import build_dropout
from mmengine.logging import print_log
from mmengine.model import BaseModule, Sequential, constant_init, kaiming_init
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute

from acmix_mm.backbones.mixer import build_mixer, check_one_mixer, has_other_names
from acmix_mm.checkpoints.convolution import RATES, replace_convolution
from acmix_mm.checkpoints.loading import load_with_report, pretrained_init_cfg
from acmix_mm.checkpoints.recognition import Pretrained, read_pretrained
from acmix_mm.checkpoints.resnet import STAGE_BLOCKS


class ACmixBottleneck(nn.Module):
    """1×1 convolution, ACmix (or another mixer), 1×1 convolution, around a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int, style: str,
                 downsample: Optional[nn.Module], norm_cfg: dict, drop_path_rate: float,
                 with_cp: bool, mixer: dict) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        first_stride, second_stride = (1, stride) if style == 'pytorch' else (stride, 1)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride=first_stride, bias=False)
        self.conv2 = build_mixer(mixer, channels, second_stride, dilation)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        # Named for their kind, bn1 or gn1, as in torchvision and MMDetection.
        self.norm_names = []
        for postfix, width in enumerate((channels, channels, out_channels), start=1):
            name, norm = build_norm_layer(norm_cfg, width, postfix=postfix)
            self.norm_names.append(name)
            self.add_module(name, norm)
        self.relu = nn.ReLU(inplace=True)
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))
        self.downsample = downsample
        self.with_cp = with_cp

    @property
    def last_norm(self) -> nn.Module:
        return getattr(self, self.norm_names[-1])

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            out = recompute(self.add_residual, x, use_reentrant=False)
        else:
            out = self.add_residual(x)
        return self.relu(out)

    def add_residual(self, x: Tensor) -> Tensor:
        norm1, norm2, norm3 = (getattr(self, name) for name in self.norm_names)
        out = self.relu(norm1(self.conv1(x)))
        out = self.relu(norm2(self.conv2(out)))
        out = self.drop(norm3(self.conv3(out)))
        return out + (x if self.downsample is None else self.downsample(x))


@MODELS.register_module()
class ACmixResNet(BaseModule):
    """ResNet whose bottlenecks mix local attention with convolution.

    Takes the arguments of MMDetection's ``ResNet`` that are listed here, with the same meaning,
    and ``stage_blocks``, ``num_heads``, ``attn_kernel_size``, ``drop_path_rate``, ``mix``,
    ``acmix_stages``, ``mixer``. Parameter names are those of the authors' code. ``conv_cfg``,
    ``dcn`` and ``plugins`` are not taken: they are about the convolutions that ACmix replaces.

    Args:
        depth: 26, 38 or 50: which ``stage_blocks`` to take.
        in_channels: channels of the image.
        stem_channels: channels of the stem; ``base_channels`` if None.
        base_channels: bottleneck channels of the first stage; each stage doubles them.
        num_stages: how many of the four stages to build.
        strides: stride of each stage.
        dilations: dilation of each stage.
        out_indices: stages that give an output.
        style: ``'pytorch'`` puts the stride on ACmix, ``'caffe'`` on the first 1×1 convolution.
        deep_stem: three 3×3 convolutions in place of the stem's 7×7.
        avg_down: average pooling in place of the stride in the shortcuts.
        frozen_stages: freeze the stem (0) and that many stages; -1 freezes nothing.
        norm_cfg: norm layers.
        norm_eval: keep the running statistics of batch norms fixed in training.
        with_cp: recompute the blocks in the backward pass to save memory.
        zero_init_residual: start the last norm of each block at zero.
        pretrained: deprecated in favour of ``init_cfg``; path or URL of a checkpoint.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with the authors' ACmix-ResNet, or a
            plain ResNet's (torchvision, timm, MMDetection), or None. Of a plain ResNet each 3×3
            convolution becomes the nearest convolution path, with rate1 = 0; that is no exact
            copy, and the log says what is lost. Where the layers have no such path (``mix='attn'``,
            or an ``acmix_cfg`` of shared or fixed shifts, or without rates) they are dropped, and
            the norms behind them.
        stage_blocks: blocks of each stage, in place of what ``depth`` says.
        num_heads: attention heads of every ACmix layer.
        attn_kernel_size: side of attention's neighbourhood.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        mix: ``'acmix'``, or ``'attn'`` or ``'conv'`` to leave out the other path altogether.
        acmix_cfg: further options of the ACmix layers, of ``combine``, ``shift`` and
            ``shift_groups``; see :class:`acmix_mm.layers.ACmixConv2d`.
        acmix_stages: stages that use ACmix; the others keep their 3×3 convolutions.
        mixer: an OpenMMLab convolution type in the place of ACmix, with the stride and dilation of
            ACmix: ``dict(type='Involution', kernel_size=7)``. Where it does not say, its
            ``kernel_size`` is 3, and ``bias`` is False. Of a checkpoint with another mixer, or of
            a plain ResNet, all else is loaded, but for the norms behind the mixers.

    Raises:
        ValueError: an argument is outside of what is said above.
        CheckpointError: in ``init_weights``, the checkpoint cannot be read or does not fit.
    """

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
                 mixer: Optional[dict] = None) -> None:
        if depth not in STAGE_BLOCKS:
            raise ValueError(f'depth must be one of {", ".join(map(str, STAGE_BLOCKS))}, got '
                             f'{depth}; other depths go by stage_blocks.')
        if not 1 <= num_stages <= 4 or not len(strides) == len(dilations) == num_stages:
            raise ValueError('strides and dilations need one number for each of 1 to 4 stages, got '
                             f'{len(strides)} and {len(dilations)} for num_stages={num_stages}.')
        if max(out_indices) >= num_stages:
            raise ValueError(f'out_indices must lie below num_stages={num_stages}, got '
                             f'{tuple(out_indices)}.')
        if style not in ('pytorch', 'caffe'):
            raise ValueError(f"style must be 'pytorch' or 'caffe', got {style!r}.")
        check_one_mixer(mixer, mix, acmix_cfg)
        super().__init__(init_cfg=pretrained_init_cfg(init_cfg, pretrained))
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.zero_init_residual = zero_init_residual
        self.mixer = mixer
        self.deep_stem = deep_stem

        channels = stem_channels or base_channels
        if deep_stem:
            self.stem = deep_stem_layers(in_channels, channels, norm_cfg)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
            self.norm_name, norm = build_norm_layer(norm_cfg, channels, postfix=1)
            self.add_module(self.norm_name, norm)
            self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        if mixer is None:
            mixer = dict(type='ACmix', bias=True, num_heads=num_heads,
                         attn_kernel_size=attn_kernel_size, mix=mix, **(acmix_cfg or {}))
        stage_blocks = tuple(stage_blocks or STAGE_BLOCKS[depth])[:num_stages]
        rates = torch.linspace(0, drop_path_rate, sum(stage_blocks), device='cpu').tolist()
        self.layers = []
        for stage, blocks in enumerate(stage_blocks):
            width = base_channels * 2**stage
            out_channels = width * ACmixBottleneck.expansion
            stage_layers = []
            for block in range(blocks):
                stride = strides[stage] if block == 0 else 1
                shortcut = None
                if stride != 1 or channels != out_channels:
                    shortcut = downsampling(channels, out_channels, stride, avg_down, norm_cfg)
                stage_layers.append(ACmixBottleneck(
                    channels, width, stride, dilations[stage], style, shortcut, norm_cfg,
                    rates.pop(0), with_cp,
                    mixer if stage in acmix_stages else dict(type='Conv2d')))
                channels = out_channels
            self.layers.append(f'layer{stage + 1}')
            self.add_module(self.layers[-1], Sequential(*stage_layers))
        self.freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images (batch, in_channels, H, W) to one (batch, channels, h, w) per out index."""
        return tuple(self.forward_stages(x, self.out_indices))

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps (batch, channels, h, w) behind the stages ``indices``, in ascending order.

        Later stages do not run.
        """
        if self.deep_stem:
            x = self.stem(x)
        else:
            x = self.relu(getattr(self, self.norm_name)(self.conv1(x)))
        # ACmix computes in this format; what reads the outputs may not look at strides.
        x = self.maxpool(x).contiguous(memory_format=torch.channels_last)
        maps = []
        for stage, name in enumerate(self.layers[:max(indices) + 1]):
            x = getattr(self, name)(x)
            if stage in indices:
                maps.append(x.contiguous())
        return maps

    def train(self, mode: bool = True) -> 'ACmixResNet':
        """Switch the mode; frozen stages, and batch norms under norm_eval, stay in evaluation."""
        super().train(mode)
        self.freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def freeze_stages(self) -> None:
        """Stop gradients and training behaviour in what ``frozen_stages`` covers."""
        frozen = []
        if self.frozen_stages >= 0:
            frozen = [self.stem] if self.deep_stem else [self.conv1, getattr(self, self.norm_name)]
        frozen += [getattr(self, name) for name in self.layers[:max(self.frozen_stages, 0)]]
        for module in frozen:
            module.eval().requires_grad_(False)

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, or initialise as ResNet does."""
        if self.init_cfg is not None:
            self.load_pretrained(read_pretrained(self.init_cfg['checkpoint'], 'ResNet'))
            return
        print_log(f'{type(self).__name__} starts from scratch: no checkpoint in init_cfg.',
                  logger='current')
        self.init_from_scratch()

    def init_from_scratch(self) -> None:
        """Initialise as ResNet does.

        Shift kernels and rates keep what their layers started them with.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                kaiming_init(module)
            elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
                constant_init(module, 1)
        if self.zero_init_residual:
            for module in self.modules():
                if isinstance(module, ACmixBottleneck):
                    constant_init(module.last_norm, 0)

    def load_pretrained(self, found: Pretrained) -> None:
        """Load an ACmix-ResNet checkpoint, or a plain ResNet's.

        Raises:
            CheckpointError: they do not fit.
        """
        state_dict = dict(found.state_dict)
        replaced = {} if found.is_acmix and self.mixer is None else {
            name: block for name, block in self.named_modules()
            if isinstance(block, ACmixBottleneck)
            and (self.mixer is not None or not isinstance(block.conv2, nn.Conv2d))
            and has_other_names(block.conv2, f'{name}.conv2.', state_dict)}
        errors = {
            name: replace_convolution(state_dict, name, block.norm_names, block.conv2.num_heads,
                                      [rate for rate in RATES if hasattr(block.conv2, rate)])
            for name, block in replaced.items()
            if self.mixer is None and block.conv2.can_stand_in}
        # What another mixer, and the norm behind it, learned says nothing of this one.
        unlike = '|'.join(rf'^{name}\.(conv2|{block.norm_names[1]})\.'
                          for name, block in replaced.items() if name not in errors)
        load_with_report(
            self, state_dict, source=found.source,
            recognised=str(found),
            may_lack=r'num_batches_tracked$' + (r'|\.conv_p\.' if errors else ''),
            may_drop=r'^(fc|head)\.',
            leave=unlike)
        if errors:
            print_log('  3×3 convolutions became the nearest convolution paths, with rate1 = 0. '
                      'Expected error, of the standard deviation of their outputs:\n    ' +
                      ', '.join(f'{name} {error:.0%}' for name, error in errors.items()),
                      logger='current')


def deep_stem_layers(in_channels: int, channels: int, norm_cfg: dict) -> nn.Sequential:
    """Three 3×3 convolutions, the first with stride 2 (ResNet-C, arXiv 1812.01187)."""
    layers = []
    for width, stride in ((channels // 2, 2), (channels // 2, 1), (channels, 1)):
        layers += [nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False),
                   build_norm_layer(norm_cfg, width)[1], nn.ReLU(inplace=True)]
        in_channels = width
    return nn.Sequential(*layers)


def downsampling(in_channels: int, out_channels: int, stride: int, avg_down: bool,
                 norm_cfg: dict) -> nn.Sequential:
    """The shortcut of a block that changes size or channels."""
    layers = []
    if avg_down:
        layers.append(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
        stride = 1
    layers.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))
    return nn.Sequential(*layers, build_norm_layer(norm_cfg, out_channels)[1])
