"""Pyramid Vision Transformer with ACmix in every block (arXiv 2102.12122 and 2111.14556)."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Optional, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmcv.cnn.bricks.transformer import PatchEmbed, build_dropout
from mmengine.model import ModuleList, Sequential
from mmengine.model.weight_init import (
    constant_init,
    normal_init,
    trunc_normal_,
    trunc_normal_init,
)
from mmengine.registry import MODELS
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from acmix_mm.backbones.arguments import (
    check_image_size,
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
from acmix_mm.backbones.position_tables import resize_grid
from acmix_mm.backbones.token_mixers import PATHS
from acmix_mm.checkpoints.host import HOSTS
from acmix_mm.checkpoints.loading import load_with_report, start_as_plain
from acmix_mm.checkpoints.pvt import PVTCheckpoints
from acmix_mm.checkpoints.recognition import Pretrained
from acmix_mm.layers import ReducedACmix


class PaddedPatchEmbed(PatchEmbed):
    """MMCV's ``PatchEmbed`` with zero padding at the bottom and right up to at least one patch."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        bottom, right = (max(side - 2 * padding - extent, 0) for side, padding, extent in
                         zip(self.projection.kernel_size, self.projection.padding, x.shape[2:]))
        return super().forward(F.pad(x, (0, right, 0, bottom)) if bottom or right else x)


class AbsolutePositionEmbedding(nn.Module):
    """Add a learned position embedding, interpolated to the size of the map."""

    def __init__(self, grid: tuple[int, int], embed_dims: int, drop_rate: float) -> None:
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], embed_dims))
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        return self.drop(x + resize_grid(self.pos_embed, self.grid, hw_shape, 'bilinear'))


class MixFFN(nn.Module):
    """Two 1×1 convolutions, in PVT v2 with a depth-wise 3×3 convolution between them.

    MMDetection has convolutions here instead of linear layers; names and shapes are the same.
    """

    def __init__(self, embed_dims: int, feedforward_channels: int, drop_rate: float,
                 drop_path_rate: float, use_conv: bool, act_cfg: dict) -> None:
        super().__init__()
        between = [build_activation_layer(act_cfg), nn.Dropout(drop_rate)]
        if use_conv:
            between.insert(0, nn.Conv2d(feedforward_channels, feedforward_channels, 3, padding=1,
                                        groups=feedforward_channels))
        self.layers = Sequential(
            nn.Conv2d(embed_dims, feedforward_channels, 1), *between,
            nn.Conv2d(feedforward_channels, embed_dims, 1), nn.Dropout(drop_rate))
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        out = self.layers(x.unflatten(1, hw_shape).permute(0, 3, 1, 2))
        return self.drop(out.permute(0, 2, 3, 1).flatten(1, 2))


class ACmixPVTBlock(Block):
    """x + ACmix(norm(x)), then x + FFN(norm(x)), on (batch, height · width, embed_dims)."""

    def __init__(self, embed_dims: int, num_heads: int, feedforward_channels: int, drop_rate: float,
                 attn_drop_rate: float, drop_path_rate: float, qkv_bias: bool, act_cfg: dict,
                 norm_cfg: dict, sr_ratio: int, use_conv_ffn: bool, with_cp: bool,
                 acmix: dict) -> None:
        super().__init__(with_cp)
        self.norm1 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.attn = ReducedACmix(
            embed_dims=embed_dims,
            num_heads=num_heads,
            sr_ratio=sr_ratio,
            qkv_bias=qkv_bias,
            attn_drop_rate=attn_drop_rate,
            proj_drop_rate=drop_rate,
            norm=lambda channels: build_norm_layer(norm_cfg, channels)[1],
            **acmix)
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))
        self.norm2 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.ffn = MixFFN(embed_dims, feedforward_channels, drop_rate, drop_path_rate,
                          use_conv_ffn, act_cfg)

    def compute(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        mixed = self.attn(self.norm1(x).unflatten(1, hw_shape))
        x = x + self.drop(mixed.flatten(1, 2))
        return x + self.ffn(self.norm2(x), hw_shape)


@MODELS.register_module()
class ACmixPyramidVisionTransformer(ACmixBackbone):
    """Pyramid Vision Transformer (PVT v1) whose blocks mix attention with convolution.

    The arguments are those of MMDetection's ``PyramidVisionTransformer``, with ``with_cp``, ``mix``
    and ``acmix_cfg``. Parameters have MMDetection's names; what ACmix adds under ``attn`` has the
    names of the authors' code. As in MMDetection, a stage covers whole patches and drops the
    remaining rows and columns at the bottom and right; maps smaller than a patch are padded to one.

    The authors' code for PVT is unpublished. They publish 13M parameters and 2.0G multiply-adds for
    PVT-Tiny, and 25M and 3.9G for PVT-Small, at 224×224 with a classifier of 1000 classes. The
    table compares variants, counted as the authors count in Swin (9 multiply-adds for each pixel
    and channel of queries, keys and values in the fc layer, 81 for the shifts) and as PVT's authors
    do (including the matrix products of attention, which reproduces the published 1.9G and 3.8G of
    plain PVT):

    ====================================================  ===============  ===============
    keys and values of the convolution path               PVT-Tiny         PVT-Small
    ====================================================  ===============  ===============
    plain PVT                                             13.23M  1.926G   24.48M  3.806G
    **reduced ones, repeated over their cells**           13.40M  1.998G   24.82M  3.941G
    the same, the fc after repeating them                 13.40M  2.010G   24.82M  3.963G
    projected from the full map, by the same weights      13.40M  2.193G   24.82M  4.384G
    projected from the full map, by separate weights      13.89M  2.193G   26.21M  4.384G
    values only, projected from the full map, no keys     13.39M  2.095G   24.82M  4.160G
    none: queries only                                    13.39M  1.996G   24.82M  3.937G
    the whole path on the reduced map                     13.40M  1.937G   24.82M  3.828G
    ====================================================  ===============  ===============

    The variant in bold is implemented: with queries, keys and values on the full map, it is the one
    that matches the published counts. (The fc layer is linear, so the next row computes the same.
    The implementation runs fc and shifts as one convolution where that is cheaper, which takes
    1.972G and 3.906G.) Whether the authors did so is unknown; the choice of this variant is ours.

    Args:
        pretrain_img_size: image size in pixels that the position embeddings are made for; they are
            interpolated to other sizes.
        in_channels: channels of the image.
        embed_dims: channels of each attention head; a stage has ``embed_dims · num_heads``.
        num_stages: number of stages to build.
        num_layers: number of blocks of each stage.
        num_heads: attention heads of each stage.
        patch_sizes: side of the patches that each stage embeds, in positions of its input.
        strides: stride of these patches.
        paddings: zero padding of the input of each stage.
        sr_ratios: side of the cells that keys and values of each stage are reduced to.
        out_indices: indices of the stages that give an output.
        mlp_ratios: hidden channels of the feed-forward layers, relative to their input.
        qkv_bias: whether the projections of attention have a bias.
        drop_rate: dropout rate after the embedding, after ACmix, and in the feed-forward layers.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; the rate rises linearly from 0.
        use_abs_pos_embed: whether to add position embeddings.
        norm_after_stage: whether a norm follows each stage.
        use_conv_ffn: whether the feed-forward layers have a depth-wise 3×3 convolution.
        act_cfg: config of the activation of the feed-forward layers.
        norm_cfg: config of all norms.
        with_cp: recompute the blocks in the backward pass to save memory.
        pretrained: deprecated in favour of ``init_cfg``; path or URL of a checkpoint.
        convert_weights: accepted for configs that state that their checkpoint has the names of
            PVT's authors; names are recognised from the keys in any case.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with an ACmix-PVT of this class or a
            plain PVT (PVT's authors, MMDetection), or None. A plain PVT is loaded with rate1 = 1
            and rate2 = 0, so that at first the network computes what the plain one did.
        mix: ``'acmix'`` for both paths, ``'attn'`` or ``'conv'`` for one of them alone.
        acmix_cfg: further arguments of the ACmix layers: ``combine``, ``shift`` and
            ``shift_groups``; see :class:`acmix_mm.layers.ReducedACmix`.

    Raises:
        ValueError: an argument is invalid.
        CheckpointError: in ``init_weights``, the checkpoint cannot be read or does not fit.
    """

    checkpoints = HOSTS[PVTCheckpoints.host]
    mixers = PATHS
    plain_arguments: ClassVar = dict(mix='attn')
    # The channels of an attention head; the number of heads is fixed.
    width_argument = 'embed_dims'
    blocks_argument = 'num_layers'
    paper_networks = (
        PaperNetwork('ACmix-PVT-T', 'acmix_pvt_tiny', dict(num_layers=(2, 2, 2, 2)), 13, 2.0),
        PaperNetwork('ACmix-PVT-S', 'acmix_pvt_small', dict(num_layers=(3, 4, 6, 3)), 25, 3.9),
    )
    classifier_norm = True
    timm_arguments: ClassVar = dict(img_size='pretrain_img_size', proj_drop_rate='drop_rate')
    timm_cfg: ClassVar = dict(
        first_conv='layers.0.0.projection', crop_pct=0.9, interpolation='bicubic')
    position_tables = ('pos_embed',)
    fx_leaves = (PatchEmbed, AbsolutePositionEmbedding)

    def __init__(self,
                 pretrain_img_size: Union[int, tuple[int, ...]] = 224,
                 in_channels: int = 3,
                 embed_dims: int = 64,
                 num_stages: int = 4,
                 num_layers: Sequence[int] = [3, 4, 6, 3],
                 num_heads: Sequence[int] = [1, 2, 5, 8],
                 patch_sizes: Sequence[int] = [4, 2, 2, 2],
                 strides: Sequence[int] = [4, 2, 2, 2],
                 paddings: Sequence[int] = [0, 0, 0, 0],
                 sr_ratios: Sequence[int] = [8, 4, 2, 1],
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 mlp_ratios: Sequence[int] = [8, 8, 4, 4],
                 qkv_bias: bool = True,
                 drop_rate: float = 0.,
                 attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0.1,
                 use_abs_pos_embed: bool = True,
                 norm_after_stage: bool = False,
                 use_conv_ffn: bool = False,
                 act_cfg: dict = dict(type='GELU'),
                 norm_cfg: dict = dict(type='LN', eps=1e-6),
                 with_cp: bool = False,
                 pretrained: Optional[str] = None,
                 convert_weights: bool = True,
                 init_cfg: Optional[dict] = None,
                 mix: str = 'acmix',
                 acmix_cfg: Optional[dict] = None) -> None:
        check_positive(in_channels=in_channels, embed_dims=embed_dims, num_stages=num_stages)
        check_per_stage(num_stages, num_layers=num_layers, num_heads=num_heads,
                        patch_sizes=patch_sizes, strides=strides, sr_ratios=sr_ratios,
                        mlp_ratios=mlp_ratios)
        check_outputs(out_indices, self.frozen_stages, num_stages)
        check_rates(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate,
                    drop_path_rate=drop_path_rate)
        check_image_size('pretrain_img_size', pretrain_img_size)
        check_options(acmix_cfg)
        super().__init__(init_cfg, pretrained)
        self.out_indices = out_indices
        self.mix = mix

        grid = to_2tuple(pretrain_img_size)
        reduction = 1
        self.layers = ModuleList()
        for stage, drop_path_rates in enumerate(stochastic_depth(drop_path_rate, num_layers)):
            channels = embed_dims * num_heads[stage]
            patch_embed = PaddedPatchEmbed(
                in_channels=in_channels,
                embed_dims=channels,
                kernel_size=patch_sizes[stage],
                stride=strides[stage],
                padding=paddings[stage],
                norm_cfg=norm_cfg)
            blocks = ModuleList()
            if use_abs_pos_embed:
                grid = tuple(extent // patch_sizes[stage] for extent in grid)
                blocks.append(AbsolutePositionEmbedding(grid, channels, drop_rate))
            for rate in drop_path_rates:
                blocks.append(ACmixPVTBlock(
                    embed_dims=channels,
                    num_heads=num_heads[stage],
                    feedforward_channels=mlp_ratios[stage] * channels,
                    drop_rate=drop_rate,
                    attn_drop_rate=attn_drop_rate,
                    drop_path_rate=rate,
                    qkv_bias=qkv_bias,
                    act_cfg=act_cfg,
                    norm_cfg=norm_cfg,
                    sr_ratio=sr_ratios[stage],
                    use_conv_ffn=use_conv_ffn,
                    with_cp=with_cp,
                    acmix=dict(mix=mix, **(acmix_cfg or {}))))
            norm = build_norm_layer(norm_cfg, channels)[1] if norm_after_stage else nn.Identity()
            self.layers.append(ModuleList([patch_embed, blocks, norm]))
            reduction *= strides[stage]
            self.stage_info.append(Stage(channels, reduction, f'layers.{stage}'))
            in_channels = channels

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        maps = []
        for index in range(max(indices) + 1):
            patch_embed, blocks, norm = self.layers[index]
            x, hw_shape = patch_embed(x)
            for block in blocks:
                x = block(x, hw_shape)
            x = norm(x).unflatten(1, hw_shape).permute(0, 3, 1, 2)
            if index in indices:
                maps.append(x.contiguous())
        return maps

    def init_from_scratch(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=0.02, bias=0.)
            elif isinstance(module, nn.LayerNorm):
                constant_init(module, 1.0)
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                normal_init(module, 0, math.sqrt(2 / fan_out))
            elif isinstance(module, AbsolutePositionEmbedding):
                trunc_normal_(module.pos_embed, std=0.02)

    def load_pretrained(self, found: Pretrained) -> None:
        is_acmix, state_dict = found.is_acmix, dict(found.state_dict)
        for name, module in self.named_modules():
            key = f'{name}.pos_embed'
            if isinstance(module, AbsolutePositionEmbedding) and key in state_dict:
                state_dict[key] = fit_position_table(state_dict[key], module.grid)

        convolution_path = r'\.attn\.(fc\.|dep_conv\.|rate[12]$)'
        load_with_report(
            self, found.with_state_dict(state_dict),
            may_lack=r'^layers\.\d\.2\.' if is_acmix else rf'^layers\.\d\.2\.|{convolution_path}',
            may_drop=r'^(head|norm)\.|^cls_token$|^layers\.\d\.2\.' + (
                r'|\.out_proj\.' if self.mix == 'conv' else ''))
        if not is_acmix and self.mix == 'acmix':
            start_as_plain(self, self.checkpoints.host)

    def remove_stages(self, first: int) -> None:
        self.layers = self.layers[:first]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r'^layers\.0\.(?:0\.|1\.0\.pos_embed)',
            blocks=r'^layers\.(\d+)' if coarse else [
                (r'^layers\.(\d+)\.0\.', (0,)),
                (r'^layers\.(\d+)\.1\.(\d+)', None),
                (r'^(?:layers\.\d+\.2|norm)\.', WITH_PREVIOUS)])


@MODELS.register_module()
class ACmixPyramidVisionTransformerV2(ACmixPyramidVisionTransformer):
    """ACmix in PVT v2 (arXiv 2106.13797), whose patches overlap.

    The paper has no PVT v2.

    Args:
        arguments: all arguments of :class:`ACmixPyramidVisionTransformer` except ``patch_sizes``,
            ``paddings``, ``use_abs_pos_embed``, ``norm_after_stage`` and ``use_conv_ffn``.
    """

    fixed_arguments: ClassVar = dict(patch_sizes=(7, 3, 3, 3), paddings=(3, 1, 1, 1),
                                     use_abs_pos_embed=False, norm_after_stage=True,
                                     use_conv_ffn=True)

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**self.fixed_arguments, **arguments)


def fit_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize the position table of another, square image size, without a class token's row."""
    area = grid[0] * grid[1]
    if table.shape[1] == area:
        return table
    side = math.isqrt(table.shape[1])
    has_class_token = side**2 + 1 == table.shape[1]
    if side**2 + has_class_token != table.shape[1]:
        return table
    return resize_grid(table[:, int(has_class_token):], (side, side), grid, 'bilinear')
