"""SAN, the self-attention network, with ACmix in every block (arXiv 2004.13621 and 2111.14556)."""

from collections.abc import Sequence
from typing import Optional

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import build_dropout
from mmengine.logging import print_log
from mmengine.model import BaseModule, Sequential
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute

from acmix_mm.checkpoints.loading import load_with_report, pretrained_init_cfg, start_as_plain
from acmix_mm.checkpoints.recognition import Pretrained, read_pretrained
from acmix_mm.checkpoints.san import STAGE_BLOCKS
from acmix_mm.layers import PatchwiseACmix

# Side of attention's neighbourhood in each stage.
STAGE_KERNELS = (3, 7, 7, 7, 7)
# Channels of a stage over those of its first stage's.
STAGE_EXPANSIONS = (1, 4, 8, 16, 32)


class ACmixSANBlock(nn.Module):
    """x + linear(relu(norm(ACmix(relu(norm(x)))))), all on (batch, channels, height, width)."""

    def __init__(self, channels: int, kernel_size: int, norm_cfg: dict, drop_path_rate: float,
                 with_cp: bool, acmix: dict) -> None:
        super().__init__()
        mid_channels = channels // 4
        self.with_cp = with_cp
        self.bn1 = build_norm_layer(norm_cfg, channels)[1]
        self.sam = PatchwiseACmix(
            in_channels=channels,
            rel_channels=channels // 16,
            out_channels=mid_channels,
            kernel_size=kernel_size,
            norm=lambda width: build_norm_layer(norm_cfg, width)[1],
            **acmix)
        self.bn2 = build_norm_layer(norm_cfg, mid_channels)[1]
        self.conv = nn.Conv2d(mid_channels, channels, 1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return recompute(self.add_residual, x, use_reentrant=False)
        return self.add_residual(x)

    def add_residual(self, x: Tensor) -> Tensor:
        out = self.sam(self.relu(self.bn1(x)))
        return x + self.drop(self.conv(self.relu(self.bn2(out))))


@MODELS.register_module()
class ACmixSAN(BaseModule):
    """SAN (patch-wise self-attention) whose blocks mix attention with convolution.

    Parameter names are the SAN authors', with the ACmix authors' for what ACmix adds under
    ``sam``. Images of any size from 1×1 up: where a map has odd extents, pooling rounds up, and
    the outputs have ⌈H / stride⌉ by ⌈W / stride⌉ positions at strides 2, 4, 8, 16, 32.

    The authors' code for SAN is unpublished. Queries and keys have a quarter of the channels of
    values, so they are cut into pieces as wide as the queries, six for the fc and four for the
    output. At 224×224 with a 1000-class head, multiply-adds as the SAN authors' tool counts them
    (norms, ReLUs, pooling and biases included, which gives the plain network its published
    figures), and fc and shifts as two steps, as ACmix's authors count in their Swin:

    ==================================  ===============  ===============  ===============
    form                                SAN-10           SAN-15           SAN-19
    ==================================  ===============  ===============  ===============
    plain SAN                           11.84M  1.865G   16.18M  2.583G   20.52M  3.259G
    **pieces as wide as the queries**   11.99M  1.962G   16.41M  2.735G   20.83M  3.446G
    the same, pieces of one channel     12.02M  1.962G   16.45M  2.735G   20.88M  3.446G
    q and k repeated to v's width       11.99M  1.976G   16.41M  2.756G   20.83M  3.473G
    q and k projected to v's width      12.28M  2.031G   16.87M  2.838G   21.46M  3.581G
    two sets of shift kernels           12.15M  2.046G   16.65M  2.865G   21.14M  3.607G
    published                           12.1M   1.9G     16.6M   2.7G     21.2M   3.4G
    ==================================  ===============  ===============  ===============

    The bold form is built. As it runs here, fc and shifts as one convolution, it takes 1.922G,
    2.671G and 3.368G, the published multiply-adds; in two steps SAN-10 would take 2.0G. Its
    parameters lie 0.1M, 0.2M and 0.4M below the published ones, and no form counted gives both.
    (The published parameters of the ACmix ResNets exceed what the authors' own code for them
    counts by nearly as much, 0.1M, 0.2M and 0.3M.) The choice is this project's.

    Args:
        depth: 10, 15 or 19: which ``stage_blocks`` to take.
        in_channels: channels of the image.
        base_channels: channels of the stem and the first stage, a multiple of 32.
        out_indices: stages that give an output; stage 0 has stride 2.
        frozen_stages: freeze the stem (0) and that many stages; -1 freezes nothing.
        norm_cfg: batch norms.
        norm_eval: keep the running statistics of batch norms fixed in training.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        with_cp: recompute the blocks in the backward pass to save memory.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with an ACmix-SAN of this class, or
            the SAN authors' plain, patch-wise SAN, or None. A plain SAN starts with rate1 = 1 and
            rate2 = 0: the network computes at first what the plain one did.
        mix: ``'acmix'``, or ``'attn'`` or ``'conv'`` to leave out the other path altogether.
        acmix_cfg: further options of the ACmix layers, of ``combine``, ``shift`` and
            ``shift_groups``; see :class:`acmix_mm.layers.PatchwiseACmix`.
        stage_blocks: blocks of each of the five stages, in place of what ``depth`` says.

    Raises:
        ValueError: an argument is outside of what is said above.
        CheckpointError: in ``init_weights``, the checkpoint cannot be read or does not fit.
    """

    def __init__(self,
                 depth: int,
                 in_channels: int = 3,
                 base_channels: int = 64,
                 out_indices: Sequence[int] = (1, 2, 3, 4),
                 frozen_stages: int = -1,
                 norm_cfg: dict = dict(type='BN', requires_grad=True),
                 norm_eval: bool = False,
                 drop_path_rate: float = 0.,
                 with_cp: bool = False,
                 init_cfg: Optional[dict] = None,
                 mix: str = 'acmix',
                 acmix_cfg: Optional[dict] = None,
                 stage_blocks: Optional[Sequence[int]] = None) -> None:
        if depth not in STAGE_BLOCKS:
            raise ValueError(f'depth must be one of {", ".join(map(str, STAGE_BLOCKS))}, got '
                             f'{depth}; other depths go by stage_blocks.')
        stage_blocks = tuple(stage_blocks or STAGE_BLOCKS[depth])
        if len(stage_blocks) != len(STAGE_KERNELS):
            raise ValueError(f'stage_blocks needs one number for each of the {len(STAGE_KERNELS)} '
                             f'stages, got {stage_blocks}.')
        if base_channels % 32:
            raise ValueError(f'base_channels must be a multiple of 32, got {base_channels}.')
        if not 0 <= min(out_indices) <= max(out_indices) < len(STAGE_KERNELS):
            raise ValueError(f'out_indices must lie in [0, {len(STAGE_KERNELS)}), got '
                             f'{tuple(out_indices)}.')
        super().__init__(init_cfg=pretrained_init_cfg(init_cfg, None))
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.mix = mix

        self.conv_in = nn.Conv2d(in_channels, base_channels, 1, bias=False)
        self.bn_in = build_norm_layer(norm_cfg, base_channels)[1]
        rates = torch.linspace(0, drop_path_rate, sum(stage_blocks), device='cpu').tolist()
        width = base_channels
        for stage, blocks in enumerate(stage_blocks):
            channels = base_channels * STAGE_EXPANSIONS[stage]
            self.add_module(f'conv{stage}', nn.Conv2d(width, channels, 1, bias=False))
            self.add_module(f'bn{stage}', build_norm_layer(norm_cfg, channels)[1])
            self.add_module(f'layer{stage}', Sequential(*(
                ACmixSANBlock(channels, STAGE_KERNELS[stage], norm_cfg, rates.pop(0), with_cp,
                              dict(mix=mix, **(acmix_cfg or {})))
                for _ in range(blocks))))
            width = channels
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images (batch, in_channels, H, W) to one (batch, channels, h, w) per out index."""
        return tuple(self.forward_stages(x, self.out_indices))

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps (batch, channels, h, w) behind the stages ``indices``, in ascending order.

        Later stages do not run.
        """
        x = self.relu(self.bn_in(self.conv_in(x)))
        maps = []
        for stage in range(max(indices) + 1):
            conv, layer, norm = self.parts(stage)
            x = self.relu(norm(layer(conv(self.pool(x)))))
            if stage in indices:
                maps.append(x)
        return maps

    def parts(self, stage: int) -> list[nn.Module]:
        """The transition into a stage, its blocks, and the norm behind them."""
        return [getattr(self, f'{name}{stage}') for name in ('conv', 'layer', 'bn')]

    def train(self, mode: bool = True) -> 'ACmixSAN':
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
        frozen = [self.conv_in, self.bn_in] if self.frozen_stages >= 0 else []
        for stage in range(self.frozen_stages):
            frozen += self.parts(stage)
        for module in frozen:
            module.eval().requires_grad_(False)

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, or initialise as SAN does."""
        if self.init_cfg is not None:
            self.load_pretrained(read_pretrained(self.init_cfg['checkpoint'], 'SAN'))
            return
        print_log(f'{type(self).__name__} starts from scratch: no checkpoint in init_cfg.',
                  logger='current')
        self.init_from_scratch()

    def init_from_scratch(self) -> None:
        """Leave all layers as they started: PyTorch's own initialisation is SAN's."""

    def load_pretrained(self, found: Pretrained) -> None:
        """Load an ACmix-SAN checkpoint, or a plain SAN's.

        Raises:
            CheckpointError: they do not fit.
        """
        mixing = r'|\.sam\.(fc\.|dep_conv\.|rate[12]$)'
        load_with_report(
            self, found.state_dict, source=found.source,
            recognised=str(found),
            may_lack=r'num_batches_tracked$' + ('' if found.is_acmix else mixing),
            may_drop=r'^(fc|head)\.' + (r'|\.conv_w\.' if self.mix == 'conv' else ''))
        if not found.is_acmix and self.mix == 'acmix':
            start_as_plain(self, 'SAN')
