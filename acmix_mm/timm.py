"""The backbones as timm models: importing this module registers them with timm.

Each model is the OpenMMLab backbone itself with a classifier behind its last stage. Parameters
have the backbone's names, and ``head.fc`` is added (in PVT a last ``norm``, too), so that what
timm's scripts train goes into a detector through ``init_cfg``.

``timm.create_model`` takes ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate`` (in front
of the classifier), ``drop_path_rate``, and every other argument of the backbone under its own name.
No weights are published: ``pretrained=True`` fails as it does in timm.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any, Optional, Union

from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import PatchEmbed, PatchMerging
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from acmix_mm.backbones import (
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
)
from acmix_mm.backbones.base import norm_channels
from acmix_mm.backbones.pvt import AbsolutePositionEmbedding
from acmix_mm.layers import (
    ACmixConv2d,
    Involution2d,
    PatchwiseACmix,
    ReducedACmix,
    WindowACmix,
)

# torch.fx takes these whole: what they do depends on the size of the map.
for each in (ACmixConv2d, Involution2d, PatchwiseACmix, ReducedACmix, WindowACmix,
             AbsolutePositionEmbedding, PatchEmbed, PatchMerging, DropPath):
    register_notrace_module(each)

# Rates and position tables; biases and norms are spared by timm itself.
NO_WEIGHT_DECAY = ('rate1', 'rate2', 'relative_position_bias_table', 'absolute_pos_embed',
                   'pos_embed')
# The suffix by which timm puts a match into the group before it.
PREVIOUS = (99999,)


class Classifier(nn.Module):
    """What timm asks of a model, in front of a backbone in the order of bases.

    Stages have the indices that the backbone's ``out_indices`` have, and so have ``features_only``
    and :meth:`forward_intermediates`, whose maps are the backbone's own outputs: channels first,
    and for Swin before the output norms, which a classifier does not have (the last stage's comes
    with ``norm=True``).

    Attributes:
        feature_info: channels, stride and module of each stage.
        num_features: channels of the last stage.
        last_stage: index of the last stage; lower after :meth:`prune_intermediate_layers`.
        last_norm: name of the norm behind it, or None.
    """

    def add_classifier(self, channels: Sequence[int], strides: Sequence[int],
                       modules: Sequence[str], *, num_classes: int, in_chans: int,
                       global_pool: str, drop_rate: float, device: Any, dtype: Any,
                       last_norm: Optional[str] = None) -> None:
        """Complete a backbone, at the end of its constructor, and initialise all.

        Args:
            channels: of each stage.
            strides: of each stage over the one before.
            modules: names of the stages.
            num_classes: classes; 0 for none, and pooled features come out.
            in_chans: channels of the image.
            global_pool: timm's name of the pooling, or ``''`` for none.
            drop_rate: dropout in front of the classifier.
            device: where the parameters go.
            dtype: what they are cast to.
            last_norm: name of the norm behind the last stage, or None.
        """
        self.feature_info = [
            dict(num_chs=width, reduction=reduction, module=module)
            for width, reduction, module in zip(channels, accumulate(strides, mul), modules)]
        self.in_chans = in_chans
        self.last_stage = len(self.feature_info) - 1
        self.last_norm = last_norm
        self.num_features = channels[-1]
        self.add_head(num_classes, global_pool, drop_rate)
        self.init_from_scratch()
        self.to(device=device, dtype=dtype)

    def add_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Set ``head``, in place of the one that was there."""
        self.num_classes = num_classes
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool,
                                   drop_rate=drop_rate)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def get_classifier(self) -> nn.Module:
        """The linear layer; an identity where there are no classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, and the pooling where one is named."""
        like = next(self.parameters())
        if global_pool is None:
            global_pool = self.head.global_pool.pool_type
        self.add_head(num_classes, global_pool, self.head.drop.p)
        self.head.to(like).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, in_chans, H, W) to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the normed map of the last stage, (batch, num_features, h, w)."""
        return self.norm_features(self.forward_stages(x, (self.last_stage,))[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map what :meth:`forward_features` gives to logits, or to pooled features."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(self, x: Tensor, indices: Union[int, Sequence[int], None] = None,
                              norm: bool = False, stop_early: bool = False,
                              output_fmt: str = 'NCHW', intermediates_only: bool = False,
                              ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """The maps (batch, channels, h, w) behind some stages, and the last features.

        Args:
            x: images (batch, in_chans, H, W).
            indices: stages, negative ones from the end; that many last ones if int; all if None.
            norm: whether the last stage's map passes the norm behind it.
            stop_early: leave out the stages behind the last one asked for.
            output_fmt: ``'NCHW'``.
            intermediates_only: return the maps alone.

        Raises:
            ValueError: another ``output_fmt`` is asked for.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"Maps come channels first, output_fmt='NCHW'; got {output_fmt!r}.")
        indices, last = feature_take_indices(self.last_stage + 1, indices)
        if not (stop_early or intermediates_only):
            last = self.last_stage
        maps = dict(zip(sorted({*indices, last}), self.forward_stages(x, (*indices, last))))
        features = maps[last]
        if last == self.last_stage:
            features = self.norm_features(features)
            if norm:
                maps[last] = features
        intermediates = [maps[index] for index in sorted(set(indices))]
        return intermediates if intermediates_only else (features, intermediates)

    def norm_features(self, x: Tensor) -> Tensor:
        """Apply the norm behind the last stage to its map, where the host has one."""
        return x if self.last_norm is None else norm_channels(getattr(self, self.last_norm), x)

    def prune_intermediate_layers(self, indices: Union[int, Sequence[int]] = 1,
                                  prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Remove what the maps of some stages do not need, and say which stages these are.

        Args:
            indices: as in :meth:`forward_intermediates`.
            prune_norm: whether the norm behind the last stage goes, too.
            prune_head: whether the classifier goes, too.
        """
        indices, last = feature_take_indices(self.last_stage + 1, indices)
        is_shorter = last < self.last_stage
        if is_shorter:
            self.remove_stages(last + 1)
            self.last_stage = last
            self.num_features = self.feature_info[last]['num_chs']
        if self.last_norm is not None and (prune_norm or is_shorter):
            delattr(self, self.last_norm)
            self.last_norm = None
        if prune_head or is_shorter:
            self.reset_classifier(0, '')
        return indices

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory, or stop doing so."""
        for module in self.modules():
            if hasattr(module, 'with_cp'):
                module.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to spare: rates and position tables."""
        return {name for name, _ in self.named_parameters()
                if name.rpartition('.')[2] in NO_WEIGHT_DECAY}


class ACmixSwinClassifier(Classifier, ACmixSwinTransformer):
    """:class:`ACmixSwinTransformer` with a classifier behind the norm of its last stage.

    ``img_size`` is the backbone's ``pretrain_img_size``; images of other sizes pass as well.
    ``proj_drop_rate`` is the backbone's ``drop_rate``. Other arguments are the backbone's.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = 'avg',
                 drop_rate: float = 0., proj_drop_rate: float = 0.,
                 img_size: Union[int, Sequence[int]] = 224, depths: Sequence[int] = (2, 2, 6, 2),
                 strides: Sequence[int] = (4, 2, 2, 2), device: Any = None, dtype: Any = None,
                 **backbone: Any) -> None:
        last = len(depths) - 1
        super().__init__(in_channels=in_chans, pretrain_img_size=img_size, depths=depths,
                         strides=strides, drop_rate=proj_drop_rate, out_indices=(last,),
                         init_cfg=None, **backbone)
        self.add_classifier(
            [each.channels for each in self.stage_info], strides,
            [each.module for each in self.stage_info],
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool,
            drop_rate=drop_rate, device=device, dtype=dtype, last_norm=f'norm{last}')

    def remove_stages(self, first: int) -> None:
        """Remove the stages from ``first`` on."""
        self.stages = self.stages[:first]
        self.stages[-1].downsample = None

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise rates: by stage, or by block."""
        return dict(
            stem=r'^(?:patch_embed|absolute_pos_embed)',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.downsample', PREVIOUS),
                (r'^norm', PREVIOUS)])


class ACmixResNetClassifier(Classifier, ACmixResNet):
    """:class:`ACmixResNet` with a classifier. Other arguments are the backbone's."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = 'avg',
                 drop_rate: float = 0., strides: Sequence[int] = (1, 2, 2, 2), device: Any = None,
                 dtype: Any = None, **backbone: Any) -> None:
        super().__init__(in_channels=in_chans, strides=strides, out_indices=(len(strides) - 1,),
                         norm_eval=False, init_cfg=None, **backbone)
        channels = [getattr(self, name)[-1].conv3.out_channels for name in self.layers]
        self.add_classifier(
            channels, (4 * strides[0], *strides[1:]), self.layers, num_classes=num_classes,
            in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, device=device,
            dtype=dtype)

    def remove_stages(self, first: int) -> None:
        """Remove the stages from ``first`` on."""
        for name in self.layers[first:]:
            delattr(self, name)
        self.layers = self.layers[:first]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise rates: by stage, or by block."""
        return dict(stem=r'^(?:stem|conv1|bn1|gn1)\.',
                    blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')


class ACmixPVTClassifier(Classifier, ACmixPyramidVisionTransformer):
    """:class:`ACmixPyramidVisionTransformer` with a last norm and a classifier.

    Features are averaged; there is no class token. ``img_size`` is the backbone's
    ``pretrain_img_size``; images of other sizes pass as well. ``proj_drop_rate`` is the backbone's
    ``drop_rate``. Other arguments are the backbone's.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = 'avg',
                 drop_rate: float = 0., proj_drop_rate: float = 0.,
                 img_size: Union[int, Sequence[int]] = 224, num_stages: int = 4,
                 device: Any = None, dtype: Any = None, **backbone: Any) -> None:
        super().__init__(in_channels=in_chans, pretrain_img_size=img_size, num_stages=num_stages,
                         drop_rate=proj_drop_rate, out_indices=(num_stages - 1,), init_cfg=None,
                         **backbone)
        embeddings = [layer[0].projection for layer in self.layers]
        channels = [embedding.out_channels for embedding in embeddings]
        self.norm = nn.LayerNorm(channels[-1], eps=1e-6)
        self.add_classifier(
            channels, [embedding.stride[0] for embedding in embeddings],
            [f'layers.{stage}' for stage in range(num_stages)], num_classes=num_classes,
            in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, device=device,
            dtype=dtype, last_norm='norm')

    def remove_stages(self, first: int) -> None:
        """Remove the stages from ``first`` on."""
        self.layers = self.layers[:first]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise rates: by stage, or by block."""
        return dict(
            stem=r'^layers\.0\.(?:0\.|1\.0\.pos_embed)',
            blocks=r'^layers\.(\d+)' if coarse else [
                (r'^layers\.(\d+)\.0\.', (0,)),
                (r'^layers\.(\d+)\.1\.(\d+)', None),
                (r'^(?:layers\.\d+\.2|norm)\.', PREVIOUS)])


class ACmixSANClassifier(Classifier, ACmixSAN):
    """:class:`ACmixSAN` with a classifier. Other arguments are the backbone's.

    It has five stages, at strides 2 to 32; ``features_only`` gives the last four unless
    ``out_indices`` says otherwise.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = 'avg',
                 drop_rate: float = 0., device: Any = None, dtype: Any = None,
                 **backbone: Any) -> None:
        super().__init__(in_channels=in_chans, out_indices=(4,), norm_eval=False, init_cfg=None,
                         **backbone)
        stages = range(5)
        self.add_classifier(
            [self.parts(stage)[0].out_channels for stage in stages], [2 for _ in stages],
            [f'layer{stage}' for stage in stages], num_classes=num_classes, in_chans=in_chans,
            global_pool=global_pool, drop_rate=drop_rate, device=device, dtype=dtype)

    def remove_stages(self, first: int) -> None:
        """Remove the stages from ``first`` on."""
        for stage in range(first, self.last_stage + 1):
            for name in ('conv', 'layer', 'bn'):
                delattr(self, f'{name}{stage}')

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise rates: by stage, or by block."""
        return dict(
            stem=r'^(?:conv|bn)_in',
            blocks=r'^(?:conv|layer|bn)(\d+)' if coarse else [
                (r'^conv(\d+)', (0,)),
                (r'^layer(\d+)\.(\d+)', None),
                (r'^bn(\d+)', PREVIOUS)])



def cfg(first_conv: str, crop_pct: float, interpolation: str) -> dict[str, Any]:
    """What timm keeps of a model beside its weights; preparation of images as for its own host."""
    return dict(num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=crop_pct,
                interpolation=interpolation, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
                first_conv=first_conv, classifier='head.fc')


SWIN = cfg('patch_embed.projection', 0.9, 'bicubic')
RESNET = cfg('conv1', 0.875, 'bilinear')
PVT = cfg('layers.0.0.projection', 0.9, 'bicubic')
SAN = cfg('conv_in', 0.875, 'bilinear')

default_cfgs = generate_default_cfgs({
    'acmix_swin_tiny_patch4_window7_224': SWIN,
    'acmix_swin_small_patch4_window7_224': SWIN,
    'acmix_resnet26': RESNET,
    'acmix_resnet38': RESNET,
    'acmix_resnet50': RESNET,
    'acmix_pvt_tiny': PVT,
    'acmix_pvt_small': PVT,
    'acmix_san10': SAN,
    'acmix_san15': SAN,
    'acmix_san19': SAN,
})


def create(model_cls: type[Classifier], variant: str, pretrained: bool,
           **kwargs: Any) -> nn.Module:
    """Build a model as timm does, or with ``features_only`` what gives its last four maps.

    Raises:
        ValueError: ``feature_cls`` is not timm's ``'getter'``; other extractors cut the model up.
    """
    if kwargs.get('feature_cls', 'getter') not in ('getter', FeatureGetterNet):
        raise ValueError("Maps come from forward_intermediates: feature_cls must be 'getter' or be "
                         f'left out, got {kwargs["feature_cls"]!r}.')
    return build_model_with_cfg(model_cls, variant, pretrained,
                                feature_cfg=dict(feature_cls='getter', out_indices=4), **kwargs)


@register_model
def acmix_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-Swin-T."""
    return create(ACmixSwinClassifier, 'acmix_swin_tiny_patch4_window7_224', pretrained, **kwargs)


@register_model
def acmix_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-Swin-S."""
    kwargs = {'depths': (2, 2, 18, 2), **kwargs}
    return create(ACmixSwinClassifier, 'acmix_swin_small_patch4_window7_224', pretrained, **kwargs)


@register_model
def acmix_resnet26(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-ResNet-26."""
    kwargs = {'depth': 26, **kwargs}
    return create(ACmixResNetClassifier, 'acmix_resnet26', pretrained, **kwargs)


@register_model
def acmix_resnet38(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-ResNet-38."""
    kwargs = {'depth': 38, **kwargs}
    return create(ACmixResNetClassifier, 'acmix_resnet38', pretrained, **kwargs)


@register_model
def acmix_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-ResNet-50."""
    kwargs = {'depth': 50, **kwargs}
    return create(ACmixResNetClassifier, 'acmix_resnet50', pretrained, **kwargs)


@register_model
def acmix_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-PVT-T."""
    kwargs = {'num_layers': (2, 2, 2, 2), **kwargs}
    return create(ACmixPVTClassifier, 'acmix_pvt_tiny', pretrained, **kwargs)


@register_model
def acmix_pvt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-PVT-S."""
    return create(ACmixPVTClassifier, 'acmix_pvt_small', pretrained, **kwargs)


@register_model
def acmix_san10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-SAN-10."""
    kwargs = {'depth': 10, **kwargs}
    return create(ACmixSANClassifier, 'acmix_san10', pretrained, **kwargs)


@register_model
def acmix_san15(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-SAN-15."""
    kwargs = {'depth': 15, **kwargs}
    return create(ACmixSANClassifier, 'acmix_san15', pretrained, **kwargs)


@register_model
def acmix_san19(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ACmix-SAN-19."""
    kwargs = {'depth': 19, **kwargs}
    return create(ACmixSANClassifier, 'acmix_san19', pretrained, **kwargs)
