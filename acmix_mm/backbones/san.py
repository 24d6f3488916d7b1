"""SAN, the self-attention network, with ACmix in every block (arXiv 2004.13621 and 2111.14556)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional

from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import build_dropout
from mmengine.model import Sequential
from mmengine.registry import MODELS
from torch import Tensor, nn

from acmix_mm.backbones.arguments import (
    check_options,
    check_outputs,
    check_per_stage,
    check_positive,
    check_rates,
)
from acmix_mm.backbones.base import (
    WITH_PREVIOUS,
    ACmixBackbone,
    Block,
    PaperNetwork,
    Stage,
    stochastic_depth,
)
from acmix_mm.backbones.token_mixers import PATHS
from acmix_mm.checkpoints.host import HOSTS
from acmix_mm.checkpoints.loading import load_with_report, start_as_plain
from acmix_mm.checkpoints.recognition import Pretrained
from acmix_mm.checkpoints.san import STAGE_BLOCKS, SANCheckpoints
from acmix_mm.layers import PatchwiseACmix

# Side of the attention window in each stage.
STAGE_KERNELS = (3, 7, 7, 7, 7)
# Channels of each stage, relative to the first.
STAGE_EXPANSIONS = (1, 4, 8, 16, 32)
# Divides the width of the first stage, so that its layers have a multiple of 8 output channels.
WIDTH_STEP = 32


class ACmixSANBlock(Block):
    """x + linear(relu(norm(ACmix(relu(norm(x)))))), all on (batch, channels, height, width)."""

    adds_shortcut = True

    def __init__(self, channels: int, kernel_size: int, norm_cfg: dict, drop_path_rate: float,
                 with_cp: bool, acmix: dict) -> None:
        super().__init__(with_cp)
        mid_channels = channels // 4
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

    def compute(self, x: Tensor) -> Tensor:
        out = self.sam(self.relu(self.bn1(x)))
        return x + self.drop(self.conv(self.relu(self.bn2(out))))


@MODELS.register_module()
class ACmixSAN(ACmixBackbone):
    """SAN (patch-wise self-attention) whose blocks mix attention with convolution.

    Parameters have the names of the SAN authors' code; what ACmix adds under ``sam`` has the names
    of the ACmix authors' code. Images can have any size from 1×1 up: pooling rounds odd sizes up,
    so the outputs have ⌈H / stride⌉ by ⌈W / stride⌉ positions at strides 2, 4, 8, 16 and 32.

    The authors' code for SAN is unpublished. Queries and keys have a quarter of the channels of
    the values, so all three are cut into pieces as wide as the queries, six for the fc layer and
    four for the output. The table compares this with the alternatives, at 224×224 with a classifier
    of 1000 classes. Multiply-adds are counted as the tool of SAN's authors does (including norms,
    ReLUs, pooling and biases, which reproduces their published counts for plain SAN), and fc and
    shifts as two steps, as the authors of ACmix count in Swin:

    ==================================  ===============  ===============  ===============
    variant                             SAN-10           SAN-15           SAN-19
    ==================================  ===============  ===============  ===============
    plain SAN                           11.84M  1.865G   16.18M  2.583G   20.52M  3.259G
    **pieces as wide as the queries**   11.99M  1.962G   16.41M  2.735G   20.83M  3.446G
    the same, pieces of one channel     12.02M  1.962G   16.45M  2.735G   20.88M  3.446G
    q and k repeated to v's width       11.99M  1.976G   16.41M  2.756G   20.83M  3.473G
    q and k projected to v's width      12.28M  2.031G   16.87M  2.838G   21.46M  3.581G
    two sets of shift kernels           12.15M  2.046G   16.65M  2.865G   21.14M  3.607G
    published                           12.1M   1.9G     16.6M   2.7G     21.2M   3.4G
    ==================================  ===============  ===============  ===============

    The variant in bold is implemented. It runs fc and shifts as one convolution, which takes
    1.922G, 2.671G and 3.368G and matches the published multiply-adds; in two steps SAN-10 would
    round to 2.0G. Its parameters are 0.1M, 0.2M and 0.4M below the published ones, and no variant
    matches both counts. (The published parameters of the ACmix-ResNets exceed those of the authors'
    own code by nearly as much: 0.1M, 0.2M and 0.3M.) The choice of this variant is ours.

    Args:
        depth: 10, 15 or 19; selects the number of blocks of each stage.
        in_channels: channels of the image.
        base_channels: channels of the stem and the first stage, a multiple of 32.
        out_indices: indices of the stages that give an output; stage 0 has stride 2.
        frozen_stages: freeze the stem (0) and that many stages; -1 freezes nothing.
        norm_cfg: config of the batch norms.
        norm_eval: keep the running statistics of batch norms fixed in training.
        drop_path_rate: stochastic depth rate of the last block; the rate rises linearly from 0.
        with_cp: recompute the blocks in the backward pass to save memory.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with an ACmix-SAN of this class or a
            plain, patch-wise SAN of the SAN authors, or None. A plain SAN is loaded with rate1 = 1
            and rate2 = 0, so that at first the network computes what the plain one did.
        mix: ``'acmix'`` for both paths, ``'attn'`` or ``'conv'`` for one of them alone.
        acmix_cfg: further arguments of the ACmix layers: ``combine``, ``shift`` and
            ``shift_groups``; see :class:`acmix_mm.layers.PatchwiseACmix`.
        stage_blocks: number of blocks of each of the five stages; overrides ``depth``.

    Raises:
        ValueError: an argument is invalid.
        CheckpointError: in ``init_weights``, the checkpoint cannot be read or does not fit.
    """

    checkpoints = HOSTS[SANCheckpoints.host]
    mixers = PATHS
    plain_arguments: ClassVar = dict(mix='attn')
    width_argument = 'base_channels'
    blocks_argument = 'stage_blocks'
    paper_networks = (
        PaperNetwork('ACmix-SAN-10', 'acmix_san10', dict(depth=10), 12.1, 1.9),
        PaperNetwork('ACmix-SAN-15', 'acmix_san15', dict(depth=15), 16.6, 2.7),
        PaperNetwork('ACmix-SAN-19', 'acmix_san19', dict(depth=19), 21.2, 3.4),
    )
    counts_elementwise = True
    timm_cfg: ClassVar = dict(first_conv='conv_in', crop_pct=0.875, interpolation='bilinear')

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
                             f'{depth}; for other depths set stage_blocks.')
        stage_blocks = self.stage_blocks_of(dict(depth=depth, stage_blocks=stage_blocks))
        check_per_stage(len(STAGE_KERNELS), stage_blocks=stage_blocks)
        check_positive(in_channels=in_channels, base_channels=base_channels)
        check_outputs(out_indices, frozen_stages, len(STAGE_KERNELS))
        check_rates(drop_path_rate=drop_path_rate)
        check_options(acmix_cfg)
        if base_channels % WIDTH_STEP:
            raise ValueError(f'base_channels must be a multiple of {WIDTH_STEP}, got '
                             f'{base_channels}.')
        super().__init__(init_cfg)
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.mix = mix

        self.conv_in = nn.Conv2d(in_channels, base_channels, 1, bias=False)
        self.bn_in = build_norm_layer(norm_cfg, base_channels)[1]
        drop_path_rates = stochastic_depth(drop_path_rate, stage_blocks)
        width = base_channels
        for stage, kernel_size in enumerate(STAGE_KERNELS):
            channels = base_channels * STAGE_EXPANSIONS[stage]
            self.add_module(f'conv{stage}', nn.Conv2d(width, channels, 1, bias=False))
            self.add_module(f'bn{stage}', build_norm_layer(norm_cfg, channels)[1])
            self.add_module(f'layer{stage}', Sequential(*(
                ACmixSANBlock(channels, kernel_size, norm_cfg, rate, with_cp,
                              dict(mix=mix, **(acmix_cfg or {})))
                for rate in drop_path_rates[stage])))
            self.stage_info.append(Stage(channels, 2**(stage + 1), f'layer{stage}'))
            width = channels
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.freeze_stages()

    @classmethod
    def stage_blocks_of(cls, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(arguments['stage_blocks'] or STAGE_BLOCKS[arguments['depth']])

    @classmethod
    def width_step(cls, arguments: Mapping[str, Any]) -> int:
        return WIDTH_STEP

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> tuple[Tensor, ...]:
        x = self.relu(self.bn_in(self.conv_in(x)))
        maps = []
        for stage in range(max(indices) + 1):
            conv, layer, norm = self.parts(stage)
            x = self.relu(norm(layer(conv(self.pool(x)))))
            if stage in indices:
                maps.append(x)
        return tuple(maps)

    def parts(self, stage: int) -> list[nn.Module]:
        """The transition into a stage, its blocks, and the norm that follows them."""
        return [getattr(self, f'{name}{stage}') for name in ('conv', 'layer', 'bn')]

    def frozen_modules(self) -> list[nn.Module]:
        frozen = [self.conv_in, self.bn_in] if self.frozen_stages >= 0 else []
        return frozen + [part for stage in range(self.frozen_stages) for part in self.parts(stage)]

    def init_from_scratch(self) -> None:
        """Keep the initial values: SAN uses PyTorch's default initialisation."""

    def load_pretrained(self, found: Pretrained) -> None:
        convolution_path = r'|\.sam\.(fc\.|dep_conv\.|rate[12]$)'
        load_with_report(
            self, found,
            may_lack=r'num_batches_tracked$' + ('' if found.is_acmix else convolution_path),
            may_drop=r'^(fc|head)\.' + (r'|\.conv_w\.' if self.mix == 'conv' else ''))
        if not found.is_acmix and self.mix == 'acmix':
            start_as_plain(self, self.checkpoints.host)

    def remove_stages(self, first: int) -> None:
        for stage in range(first, len(self.stage_info)):
            for name in ('conv', 'layer', 'bn'):
                delattr(self, f'{name}{stage}')

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r'^(?:conv|bn)_in',
            blocks=r'^(?:conv|layer|bn)(\d+)' if coarse else [
                (r'^conv(\d+)', (0,)),
                (r'^layer(\d+)\.(\d+)', None),
                (r'^bn(\d+)', WITH_PREVIOUS)])
