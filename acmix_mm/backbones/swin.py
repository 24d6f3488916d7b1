"""Swin Transformer with ACmix in every block (arXiv 2103.14030 and 2111.14556)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import FFN, PatchEmbed, PatchMerging, build_dropout
from mmengine.model import ModuleList
from mmengine.model.weight_init import constant_init, trunc_normal_, trunc_normal_init
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
    stage_count,
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
from acmix_mm.backbones.token_mixers import (
    OPERATORS,
    PATHS,
    build_mixer,
    check_one_mixer,
    has_other_names,
    mixers_of_blocks,
    pattern_type,
)
from acmix_mm.checkpoints.host import HOSTS
from acmix_mm.checkpoints.loading import load_with_report, start_as_plain
from acmix_mm.checkpoints.recognition import Pretrained
from acmix_mm.checkpoints.swin import SwinCheckpoints
from acmix_mm.layers import Linear, PatternACmix, WindowACmix
from acmix_mm.ops import linear
from acmix_mm.ops.symbolic import statically_known_true


class ShiftWindowACmix(nn.Module):
    """:class:`WindowACmix` or :class:`PatternACmix` on a token sequence, then drop path.

    MMDetection's Swin has its attention under the name ``w_msa``, too.
    """

    def __init__(self, w_msa: nn.Module, drop_path_rate: float) -> None:
        super().__init__()
        self.w_msa = w_msa
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        out = self.w_msa(x.unflatten(1, hw_shape))
        return self.drop(out.flatten(1, 2))


class ConvolutionMixer(nn.Module):
    """A convolution on a token sequence, a linear layer as after attention, then drop path.

    A convolution has no windows, so nothing is shifted.
    """

    def __init__(self, embed_dims: int, mixer: dict, drop_rate: float,
                 drop_path_rate: float) -> None:
        super().__init__()
        self.conv = build_mixer(mixer, embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(drop_rate)
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        maps = self.conv(x.unflatten(1, hw_shape).permute(0, 3, 1, 2))
        out = self.proj_drop(self.proj(maps.permute(0, 2, 3, 1)))
        return self.drop(out.flatten(1, 2))


class SwinFFN(FFN):
    """mmcv's feed-forward layers, with :class:`acmix_mm.layers.Linear`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                # They differ in the forward pass alone.
                layer.__class__ = Linear


class ACmixSwinBlock(Block):
    """x + ACmix(norm(x)), then x + FFN(norm(x)), on (batch, height · width, embed_dims).

    ``mixer`` is the config of an operator that replaces ACmix, or None.
    """

    def __init__(self, embed_dims: int, num_heads: int, feedforward_channels: int,
                 window_size: int, shift: bool, qkv_bias: bool, qk_scale: Optional[float],
                 drop_rate: float, attn_drop_rate: float, drop_path_rate: float, act_cfg: dict,
                 norm_cfg: dict, with_cp: bool, acmix: dict,
                 mixer: Optional[dict] = None) -> None:
        super().__init__(with_cp)
        self.norm1 = build_norm_layer(norm_cfg, embed_dims)[1]
        pattern = pattern_type(mixer)
        attention = dict(embed_dims=embed_dims, num_heads=num_heads, qkv_bias=qkv_bias,
                         qk_scale=qk_scale, attn_drop_rate=attn_drop_rate,
                         proj_drop_rate=drop_rate, **acmix)
        if mixer is None:
            self.attn = ShiftWindowACmix(
                WindowACmix(window_size=window_size, shift_size=window_size // 2 if shift else 0,
                            **attention), drop_path_rate)
        elif pattern is not None:
            own = {name: value for name, value in mixer.items() if name != 'type'}
            made, others = pattern.split(own)
            self.attn = ShiftWindowACmix(
                PatternACmix(pattern=made, **{**attention, **others}), drop_path_rate)
        else:
            self.attn = ConvolutionMixer(embed_dims, mixer, drop_rate, drop_path_rate)
        self.norm2 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.ffn = SwinFFN(
            embed_dims=embed_dims,
            feedforward_channels=feedforward_channels,
            ffn_drop=drop_rate,
            dropout_layer=dict(type='DropPath', drop_prob=drop_path_rate),
            act_cfg=act_cfg)

    def compute(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), hw_shape)
        return self.ffn(self.norm2(x), identity=x)


class SwinPatchMerging(PatchMerging):
    """mmcv's patch merging by slices of the map, where patches do not overlap.

    mmcv unfolds the map, which takes two more copies. Parameters and results are the same.
    """

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        sides = self.sampler.kernel_size
        if self.sampler.stride != sides or not isinstance(self.norm, (nn.LayerNorm, type(None))):
            return super().forward(x, input_size)
        size = tuple((extent + side - 1) // side for extent, side in zip(input_size, sides))
        bottom, right = (count * side - extent
                         for count, side, extent in zip(size, sides, input_size))
        x = x.unflatten(1, input_size)
        if not (statically_known_true(bottom == 0) and statically_known_true(right == 0)):
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        x = x.unflatten(2, (size[1], sides[1])).unflatten(1, (size[0], sides[0]))
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)
        if self.norm is not None:
            x = F.layer_norm(x, self.norm.normalized_shape, self.channels_last(self.norm.weight),
                             self.channels_last(self.norm.bias), self.norm.eps)
        return linear(x, self.channels_last(self.reduction.weight), self.reduction.bias), size

    def channels_last(self, weight: Tensor) -> Tensor:
        """Reorder a weight's last axis from (channel, position in the patch) to the opposite."""
        return weight.unflatten(-1, (self.in_channels, -1)).transpose(-1, -2).flatten(-2)


class ACmixSwinStage(nn.Module):
    """Blocks, of which every second one shifts its windows, and patch merging except in the last
    stage.
    """

    def __init__(self, drop_path_rates: Sequence[float], mixers: Sequence[Optional[dict]],
                 downsample: Optional[PatchMerging], **block: Any) -> None:
        super().__init__()
        self.blocks = ModuleList(
            ACmixSwinBlock(shift=index % 2 == 1, drop_path_rate=rate, mixer=mixer, **block)
            for index, (rate, mixer) in enumerate(zip(drop_path_rates, mixers)))
        self.downsample = downsample

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        for block in self.blocks:
            x = block(x, hw_shape)
        return x


@MODELS.register_module()
class ACmixSwinTransformer(ACmixBackbone):
    """Swin Transformer whose blocks mix windowed attention with convolution.

    The arguments are those of MMDetection's and MMSegmentation's ``SwinTransformer``, with ``mix``,
    ``acmix_cfg`` and ``mixer``. Parameters have MMDetection's names; what ACmix adds under
    ``attn.w_msa`` has the names of the authors' code. Images can have any size from 1×1 up.

    Args:
        pretrain_img_size: image size in pixels that the absolute position embedding is made for;
            it is interpolated to other sizes.
        in_channels: channels of the image.
        embed_dims: channels of the first stage; each stage doubles them.
        patch_size: side of a patch in pixels; equals ``strides[0]``.
        window_size: side of a window in patches.
        mlp_ratio: hidden channels of the feed-forward layers, relative to their input.
        depths: number of blocks of each stage.
        num_heads: attention heads of each stage.
        strides: strides of the patch embedding and of the patch mergings.
        out_indices: indices of the stages that give an output.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: scale of the attention logits; ``head_dims ** -0.5`` if None.
        patch_norm: whether patch embedding and patch merging have a norm.
        drop_rate: dropout rate after the embedding, after ACmix, and in the feed-forward layers.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; the rate rises linearly from 0.
        use_abs_pos_embed: whether to add an absolute position embedding.
        act_cfg: config of the activation of the feed-forward layers.
        norm_cfg: config of the norms of the blocks and of the outputs.
        with_cp: recompute the blocks in the backward pass to save memory.
        pretrained: deprecated in favour of ``init_cfg``; path or URL of a checkpoint.
        convert_weights: accepted for configs that state that their checkpoint has Microsoft's
            names; names are recognised from the keys in any case.
        frozen_stages: freeze the patch embedding (0) and that many stages; -1 freezes nothing.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with an ACmix-Swin of the authors or a
            plain Swin (Microsoft, timm, MMDetection), or None. A plain Swin is loaded with
            rate1 = 1 and rate2 = 0, so that at first the network computes what the plain one did.
        mix: ``'acmix'`` for both paths, ``'attn'`` or ``'conv'`` for one of them alone.
        acmix_cfg: further arguments of the ACmix layers: ``combine``, ``shift`` and
            ``shift_groups``; see :class:`acmix_mm.layers.WindowACmix`.
        mixer: config of an OpenMMLab convolution type that replaces ACmix and its shifted windows:
            ``dict(type='Involution', kernel_size=7)``. Its input is channels first, and a linear
            layer follows it, as after attention. ``kernel_size`` defaults to 3, and ``bias`` to
            False. From a checkpoint with another mixer, or of a plain Swin, everything but the
            mixers is loaded. The types ``GlobalAttention``, ``GlobalACmix``, ``RandomAttention``
            and ``BigBirdAttention`` replace the windows alone, and load the host's projections; see
            :class:`acmix_mm.layers.PatternACmix` for their position term.
        last_mixer: the same for the last block of each stage alone, also that of a stage with one
            block; the types above have the options of ``acmix_cfg`` by default.

    Raises:
        ValueError: an argument is invalid.
        CheckpointError: in ``init_weights``, the checkpoint cannot be read or does not fit.
    """

    checkpoints = HOSTS[SwinCheckpoints.host]
    mixers: ClassVar = {
        'conv': dict(mixer=dict(type='Conv2d', kernel_size=3)), **PATHS, **OPERATORS}
    plain_arguments: ClassVar = dict(mix='attn')
    width_argument = 'embed_dims'
    blocks_argument = 'depths'
    paper_networks = (
        PaperNetwork('ACmix-Swin-T', 'acmix_swin_tiny_patch4_window7_224',
                     dict(depths=(2, 2, 6, 2)), 30, 4.6, 28.65),
        PaperNetwork('ACmix-Swin-S', 'acmix_swin_small_patch4_window7_224',
                     dict(depths=(2, 2, 18, 2)), 51, 9.0, 50.35),
    )
    output_norm = 'norm{}'
    timm_arguments: ClassVar = dict(img_size='pretrain_img_size', proj_drop_rate='drop_rate')
    timm_cfg: ClassVar = dict(
        first_conv='patch_embed.projection', crop_pct=0.9, interpolation='bicubic')
    position_tables = ('relative_position_bias_table', 'absolute_pos_embed')
    fx_leaves = (PatchEmbed, SwinPatchMerging, Linear)

    def __init__(self,
                 pretrain_img_size: Union[int, Sequence[int]] = 224,
                 in_channels: int = 3,
                 embed_dims: int = 96,
                 patch_size: int = 4,
                 window_size: int = 7,
                 mlp_ratio: float = 4,
                 depths: Sequence[int] = (2, 2, 6, 2),
                 num_heads: Sequence[int] = (3, 6, 12, 24),
                 strides: Sequence[int] = (4, 2, 2, 2),
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 qkv_bias: bool = True,
                 qk_scale: Optional[float] = None,
                 patch_norm: bool = True,
                 drop_rate: float = 0.,
                 attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0.1,
                 use_abs_pos_embed: bool = False,
                 act_cfg: dict = dict(type='GELU'),
                 norm_cfg: dict = dict(type='LN'),
                 with_cp: bool = False,
                 pretrained: Optional[str] = None,
                 convert_weights: bool = False,
                 frozen_stages: int = -1,
                 init_cfg: Optional[dict] = None,
                 mix: str = 'acmix',
                 acmix_cfg: Optional[dict] = None,
                 mixer: Optional[dict] = None,
                 last_mixer: Optional[dict] = None) -> None:
        check_positive(in_channels=in_channels, embed_dims=embed_dims, patch_size=patch_size,
                       window_size=window_size)
        num_stages = stage_count('depths', depths)
        check_per_stage(num_stages, depths=depths, num_heads=num_heads, strides=strides)
        check_outputs(out_indices, frozen_stages, num_stages)
        check_rates(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate,
                    drop_path_rate=drop_path_rate)
        check_image_size('pretrain_img_size', pretrain_img_size)
        check_options(acmix_cfg)
        if strides[0] != patch_size:
            raise ValueError('Patches do not overlap: patch_size must equal strides[0], got '
                             f'{patch_size} and {strides[0]}.')
        check_one_mixer(mixer, mix, acmix_cfg)
        super().__init__(init_cfg, pretrained)
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.mix = mix
        self.mixer = mixer
        merging_norm_cfg = norm_cfg if patch_norm else None

        self.patch_embed = PatchEmbed(
            in_channels=in_channels,
            embed_dims=embed_dims,
            kernel_size=patch_size,
            stride=strides[0],
            norm_cfg=merging_norm_cfg)
        if use_abs_pos_embed:
            height, width = to_2tuple(pretrain_img_size)
            self.patch_grid = (height // patch_size, width // patch_size)
            self.absolute_pos_embed = nn.Parameter(
                torch.zeros(1, self.patch_grid[0] * self.patch_grid[1], embed_dims))
        else:
            self.absolute_pos_embed = None
        self.drop_after_pos = nn.Dropout(drop_rate)

        mixers = mixers_of_blocks(depths, mixer, last_mixer)
        self.stages = ModuleList()
        channels, reduction = embed_dims, 1
        for stage, drop_path_rates in enumerate(stochastic_depth(drop_path_rate, depths)):
            is_last = stage == num_stages - 1
            reduction *= strides[stage]
            self.stages.append(ACmixSwinStage(
                drop_path_rates=drop_path_rates,
                mixers=mixers[stage],
                downsample=None if is_last else SwinPatchMerging(
                    in_channels=channels,
                    out_channels=2 * channels,
                    stride=strides[stage + 1],
                    norm_cfg=merging_norm_cfg),
                embed_dims=channels,
                num_heads=num_heads[stage],
                feedforward_channels=int(mlp_ratio * channels),
                window_size=window_size,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
                act_cfg=act_cfg,
                norm_cfg=norm_cfg,
                with_cp=with_cp,
                acmix=dict(mix=mix, **(acmix_cfg or {}))))
            self.stage_info.append(Stage(channels, reduction, f'stages.{stage}'))
            channels *= 2
        for index in out_indices:
            self.add_module(f'norm{index}',
                            build_norm_layer(norm_cfg, self.stage_info[index].channels)[1])
        self.freeze_stages()

    @classmethod
    def width_step(cls, arguments: Mapping[str, Any]) -> int:
        # Each stage has twice the width of the one before, divided into its own number of heads.
        return next(width for width in itertools.count(1)
                    if all(width * 2**stage % heads == 0
                           for stage, heads in enumerate(arguments['num_heads'])))

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        x, hw_shape = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + self.position_embedding(hw_shape)
        x = self.drop_after_pos(x)

        maps, last = [], max(indices)
        for index in range(last + 1):
            stage = self.stages[index]
            x = stage(x, hw_shape)
            if index in indices:
                maps.append(x.unflatten(1, hw_shape).permute(0, 3, 1, 2))
            if index < last:
                x, hw_shape = stage.downsample(x, hw_shape)
        return maps

    def position_embedding(self, hw_shape: tuple[int, int]) -> Tensor:
        """The absolute position embedding of a grid of patches, (1, height · width, channels)."""
        return resize_grid(self.absolute_pos_embed, self.patch_grid, hw_shape, 'bicubic')

    def frozen_modules(self) -> list[Union[nn.Module, nn.Parameter]]:
        frozen = []
        if self.frozen_stages >= 0:
            frozen += [self.patch_embed, self.drop_after_pos]
            if self.absolute_pos_embed is not None:
                frozen.append(self.absolute_pos_embed)
        for index in range(self.frozen_stages):
            frozen.append(self.stages[index])
            if index in self.out_indices:
                frozen.append(getattr(self, f'norm{index}'))
        return frozen

    def init_from_scratch(self) -> None:
        if self.absolute_pos_embed is not None:
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=0.02, bias=0.)
            elif isinstance(module, nn.LayerNorm):
                constant_init(module, 1.0)
            elif isinstance(module, (WindowACmix, PatternACmix)):
                module.reset_parameters()

    def load_pretrained(self, found: Pretrained) -> None:
        is_acmix, state_dict = found.is_acmix, dict(found.state_dict)
        layers = {name: layer for name, layer in self.named_modules()
                  if isinstance(layer, (WindowACmix, PatternACmix))}
        if is_acmix:
            state_dict = fold_rates(state_dict, {name: layer.mix for name, layer in layers.items()})
        self.fit_position_tables(state_dict)

        convolution_path = r'(fc\.|dep_conv\.|rate[12]$)'
        unused = {'attn': convolution_path,
                  'conv': r'(proj\.|relative_position_bias_table$|rate[12]$)'}
        paths = [rf'^{name}\.{unused[layer.mix]}' for name, layer in layers.items()
                 if layer.mix in unused]
        # The position terms of windows and of patterns of the whole map have nothing in common.
        positions = [rf'^{name}\.(conv_p\.|relative_position_bias_table$)'
                     for name, layer in layers.items() if isinstance(layer, PatternACmix)]
        replaced = [
            name for name, mixer in self.named_modules()
            if (isinstance(mixer, ConvolutionMixer)
                and has_other_names(mixer, f'{name}.', state_dict))
            or (isinstance(mixer, PatternACmix) and f'{name}.qkv.weight' not in state_dict)]
        optional = [r'^norm\d\.', '^absolute_pos_embed$', *positions]
        if not is_acmix:
            optional.append(rf'\.w_msa\.{convolution_path}')
        load_with_report(
            self, found.with_state_dict(state_dict),
            may_lack='|'.join(optional),
            may_drop='|'.join([r'^head\.', r'^norm\d?\.', 'attn_mask$', 'relative_position_index$',
                               *paths, *positions]),
            leave='|'.join(rf'^{name}\.' for name in replaced))
        if not is_acmix and self.mix == 'acmix' and self.mixer is None:
            start_as_plain(self, self.checkpoints.host)

    def fit_position_tables(self, state_dict: dict[str, Tensor]) -> None:
        """Resize position tables of other window or image sizes, in place."""
        own = self.state_dict()
        state_dict.update({key: value for key, value in own.items()
                           if key.endswith('relative_position_index')})
        for key, table in state_dict.items():
            if key not in own or table.shape == own[key].shape:
                continue
            if key.endswith('relative_position_bias_table'):
                old, new = (int(rows.shape[0]**0.5) for rows in (table, own[key]))
                state_dict[key] = resize_grid(table[None], (old, old), (new, new), 'bicubic')[0]
            elif key == 'absolute_pos_embed':
                side = int(table.shape[1]**0.5)
                state_dict[key] = resize_grid(table, (side, side), self.patch_grid, 'bicubic')

    def remove_stages(self, first: int) -> None:
        self.stages = self.stages[:first]
        self.stages[-1].downsample = None

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r'^(?:patch_embed|absolute_pos_embed)',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.downsample', WITH_PREVIOUS),
                (r'^norm', WITH_PREVIOUS)])


def fold_rates(state_dict: dict[str, Tensor], mixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Multiply the weights of the last linear layer of a path by the path's rate.

    Args:
        state_dict: weights of a network with both paths.
        mixes: the paths that each layer keeps, by its name; those with both are left as they are.
    """
    folded = dict(state_dict)
    for layer, mix in mixes.items():
        rate = state_dict.get(f'{layer}.rate1')
        if rate is None or mix == 'acmix':
            continue
        if mix == 'conv':
            # With combine='convex' the rate of the convolution path is 1 - rate1.
            rate = state_dict.get(f'{layer}.rate2', 1 - rate)
        for name in {'attn': ('proj.weight', 'proj.bias'), 'conv': ('dep_conv.weight',)}[mix]:
            if f'{layer}.{name}' in state_dict:
                folded[f'{layer}.{name}'] = state_dict[f'{layer}.{name}'] * rate
    return folded
