"""The toy host: residual blocks of one operator, in stages of half the size and twice the width."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional

from mmengine.registry import MODELS
from torch import Tensor, nn
from toy_host.checkpoints import ToyCheckpoints
from toy_host.layer import GlobalACmix

from acmix_mm.backbones.base import ACmixBackbone, Block, PaperNetwork, Stage
from acmix_mm.backbones.token_mixers import PATHS
from acmix_mm.checkpoints.host import HOSTS
from acmix_mm.checkpoints.loading import load_with_report, start_as_plain
from acmix_mm.checkpoints.recognition import Pretrained


class ToyBlock(Block):
    """x + ACmix(norm(x)), on (batch, channels, height, width)."""

    adds_shortcut = True

    def __init__(self, channels: int, num_heads: int, mix: str) -> None:
        super().__init__(with_cp=False)
        self.norm = nn.BatchNorm2d(channels)
        self.mixer = GlobalACmix(channels, num_heads, mix)

    def compute(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


@MODELS.register_module()
class ACmixToyNet(ACmixBackbone):
    """The toy host with ACmix.

    Args:
        in_channels: channels of the image.
        embed_dims: channels of the first stage; each stage doubles them.
        depths: number of blocks in each stage.
        num_heads: attention heads of every layer.
        out_indices: stages that give an output.
        frozen_stages: freeze that many stages.
        mix: ``'acmix'``, ``'attn'`` or ``'conv'``.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` or None.
    """

    checkpoints = HOSTS[ToyCheckpoints.host]
    mixers = PATHS
    plain_arguments: ClassVar = dict(mix='attn')
    width_argument = 'embed_dims'
    blocks_argument = 'depths'
    paper_networks = (PaperNetwork('ACmix-Toy-T', 'acmix_toy_tiny', dict(depths=(1, 1)), 0.1, 0.1),)
    timm_cfg: ClassVar = dict(first_conv='toy_transitions.0', crop_pct=0.9, interpolation='bicubic')

    def __init__(self, in_channels: int = 3, embed_dims: int = 16, depths: Sequence[int] = (1, 1),
                 num_heads: int = 2, out_indices: Sequence[int] = (0, 1), frozen_stages: int = -1,
                 mix: str = 'acmix', init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg)
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.mix = mix
        self.toy_transitions, self.toy_stages = nn.ModuleList(), nn.ModuleList()
        for stage, depth in enumerate(depths):
            kernel_size, stride = (7, 4) if stage == 0 else (3, 2)
            channels = embed_dims * 2**stage
            self.toy_transitions.append(nn.Conv2d(in_channels, channels, kernel_size, stride,
                                                  padding=kernel_size // 2))
            self.toy_stages.append(nn.Sequential(
                *(ToyBlock(channels, num_heads, mix) for _ in range(depth))))
            self.stage_info.append(Stage(channels, 4 * 2**stage, f'toy_stages.{stage}'))
            in_channels = channels
        self.freeze_stages()

    @classmethod
    def width_step(cls, arguments: Mapping[str, Any]) -> int:
        return arguments['num_heads']

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        maps = []
        for stage in range(max(indices) + 1):
            x = self.toy_stages[stage](self.toy_transitions[stage](x))
            if stage in indices:
                maps.append(x)
        return maps

    def frozen_modules(self) -> list[nn.Module]:
        stages = max(self.frozen_stages, 0)
        return [*self.toy_transitions[:stages], *self.toy_stages[:stages]]

    def init_from_scratch(self) -> None:
        """Keep PyTorch's own initialisation."""

    def load_pretrained(self, found: Pretrained) -> None:
        load_with_report(
            self, found,
            may_lack='^$' if found.is_acmix else r'\.mixer\.(fc\.|dep_conv\.|rate[12]$)',
            may_drop=r'^head\.')
        if not found.is_acmix and self.mix == 'acmix':
            start_as_plain(self, 'Toy')

    def remove_stages(self, first: int) -> None:
        self.toy_stages = self.toy_stages[:first]
        self.toy_transitions = self.toy_transitions[:first]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r'^toy_transitions\.0', blocks=r'^toy_stages\.(\d+)')
