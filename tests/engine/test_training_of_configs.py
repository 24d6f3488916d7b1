"""The configs of YOLOX, RTMDet, Mask2Former and DINO, trained and tested with the tools."""

from typing import NamedTuple

import mmdet.models.backbones.swin as mmdet_swin
import pytest
import torch
from helpers import ROOT
from helpers.tools import FAST, as_options, call_tool, logged, logged_metric, own_visualizer

CLASSES = ['circle', 'square', 'triangle']
SWIN = dict(embed_dims=24, depths=(1, 1, 1, 1), num_heads=(3, 3, 6, 12))
SMALL_SWIN = as_options({f'model.backbone.{key}': value for key, value in SWIN.items()})
MAPS = [24, 48, 96, 192]


class Case(NamedTuple):
    """A config, and options that make its images and its model small.

    Attributes:
        config: its name.
        metrics: metrics that its evaluation logs.
        checkpoint: the checkpoint of the last iteration.
        options: config options.
        classes: classes of the dataset.
    """

    config: str
    metrics: list[str]
    checkpoint: str
    options: list[str]
    classes: list[str] = CLASSES


def sizes(split, **transforms):
    """Options for transforms of a pipeline, as ``_INDEX_ARGUMENT='(64,64)'``."""
    return [f'{split}_dataloader.dataset.pipeline.{index}.{argument}={value}'
            for key, value in transforms.items() for _, index, argument in [key.split('_', 2)]]


SQUARE = '(64,64)'
YOLOX = [
    'model.data_preprocessor.batch_augments.0.random_size_range=(64,96)',
    'model.data_preprocessor.batch_augments.0.interval=1', 'model.test_cfg.score_thr=0.',
    *sizes('train', _0_img_scale=SQUARE, _1_border='(-32,-32)', _2_img_scale=SQUARE,
           _5_scale=SQUARE),
    *sizes('val', _1_scale=SQUARE), *sizes('test', _1_scale=SQUARE),
    # The second of two epochs is without mosaic and mix-up.
    'custom_hooks.0.num_last_epochs=1', 'train_dataloader.batch_size=4',
    'train_cfg.max_epochs=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=1']
# A new head predicts boxes without an area.
RTMDET = [
    'model.test_cfg.min_bbox_size=-1', 'model.test_cfg.score_thr=0.',
    *sizes('train', _2_img_scale=SQUARE, _3_scale='(128,128)', _4_crop_size=SQUARE, _7_size=SQUARE,
           _8_img_scale=SQUARE),
    *sizes('val', _1_scale=SQUARE, _2_size=SQUARE), *sizes('test', _1_scale=SQUARE, _2_size=SQUARE),
    'custom_hooks.1.switch_epoch=1', 'custom_hooks.1.switch_pipeline.2.scale=(64,64)',
    'custom_hooks.1.switch_pipeline.3.crop_size=(64,64)',
    'custom_hooks.1.switch_pipeline.6.size=(64,64)', 'train_dataloader.batch_size=4',
    'train_cfg.max_epochs=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2']
ITERATIONS = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2',
              'default_hooks.checkpoint.interval=2']


def mask2former(head):
    """Options for the head of a Mask2Former with that name."""
    return [f'model.{head}.{option}' for option in (
        f'in_channels={MAPS}', 'num_queries=10', 'transformer_decoder.num_layers=3',
        'pixel_decoder.encoder.num_layers=1')]


CASES = [
    Case('yolox_acmix_s', ['coco/bbox_mAP'], 'epoch_2.pth', YOLOX),
    Case('rtmdet_acmix_s', ['coco/bbox_mAP'], 'epoch_2.pth', RTMDET),
    Case('mask2former_acmix_swin_t_coco', ['coco/bbox_mAP', 'coco/segm_mAP'], 'iter_2.pth', [
        *mask2former('panoptic_head'), 'model.train_cfg.num_points=64', *ITERATIONS,
        'model.test_cfg.max_per_image=10',
        'model.data_preprocessor.batch_augments.0.size=(64,64)',
        *sizes('train', _3_scale=SQUARE, _4_crop_size=SQUARE),
        *sizes('val', _1_scale=SQUARE), *sizes('test', _1_scale=SQUARE)]),
    Case('mask2former_acmix_swin_t_ade20k', ['mIoU'], 'iter_2.pth', [
        *mask2former('decode_head'), 'model.decode_head.train_cfg.num_points=64', *ITERATIONS,
        'model.data_preprocessor.size=(64,64)',
        *sizes('train', _2_scales='[64,96]', _3_crop_size=SQUARE),
        *sizes('val', _1_scale=SQUARE), *sizes('test', _1_scale=SQUARE)], ['background', *CLASSES]),
    Case('dino_acmix_swin_t', ['coco/bbox_mAP'], 'epoch_1.pth', [
        f'model.neck.in_channels={MAPS[1:]}', 'model.num_queries=10',
        'model.test_cfg.max_per_img=10', 'model.encoder.num_layers=1', 'model.decoder.num_layers=2',
        'train_cfg.max_epochs=1',
        'train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[(64,64),(80,80)]',
        'train_dataloader.dataset.pipeline.3.transforms.1.0.scales=[(64,64),(80,80)]',
        'train_dataloader.dataset.pipeline.3.transforms.1.1.crop_size=(32,64)',
        'train_dataloader.dataset.pipeline.3.transforms.1.2.scales=[(64,64),(80,80)]',
        *sizes('val', _1_scale=SQUARE), *sizes('test', _1_scale=SQUARE)]),
]


def run_in_process(tool, *arguments):
    done = call_tool(tool, *arguments, own_visualizer())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def plain_swin(tmp_path_factory):
    """File with the weights of a small Swin of MMDetection."""
    path = tmp_path_factory.mktemp('plain') / 'swin.pth'
    torch.save(mmdet_swin.SwinTransformer(**SWIN).state_dict(), path)
    return path


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.config)
def test_config_trains_and_evaluates(case, shapes, plain_swin, tmp_path):
    options = [*FAST, *case.options, 'randomness.seed=0']
    if 'swin' in case.config:
        options += [*SMALL_SWIN, f'model.backbone.init_cfg.checkpoint={plain_swin}']
    else:
        options.append('model.backbone.init_cfg=None')
    run_in_process('train', ROOT / f'configs/{case.config}.py', '--data-root', shapes, '--classes',
                   *case.classes, '--work-dir', tmp_path, '--cfg-options', *options)
    losses = logged(tmp_path, 'loss')
    assert len(losses) >= 2
    assert all(0 < loss < 1000 for loss in losses)
    saved = torch.load(tmp_path / case.checkpoint, weights_only=False)
    assert list(saved['meta']['dataset_meta']['classes']) == case.classes
    if 'swin' in case.config:
        # The rates of a warm start from a plain Swin, and a low learning rate.
        layer = 'backbone.stages.0.blocks.0.attn.w_msa'
        rates = [saved['state_dict'][f'{layer}.{rate}'].item() for rate in ('rate1', 'rate2')]
        assert rates == pytest.approx([1, 0], abs=1e-2)
        plain = torch.load(plain_swin)['patch_embed.projection.weight']
        torch.testing.assert_close(
            saved['state_dict']['backbone.patch_embed.projection.weight'], plain, rtol=0, atol=1e-3)

    # The config that was written into the work directory has the data and the classes.
    run_in_process('test', tmp_path / f'{case.config}.py', tmp_path / case.checkpoint, '--work-dir',
                   tmp_path / 'test', '--show-dir', tmp_path / 'drawn', '--cfg-options')
    for metric in case.metrics:
        assert logged_metric(tmp_path / 'test', metric) == pytest.approx(
            logged(tmp_path, metric)[-1], abs=1e-6)
    assert len([*(tmp_path / 'drawn').glob('**/*.*g')]) == 4


def test_resumes_with_averaged_weights(shapes, tmp_path):
    """YOLOX averages its weights with a hook. Its checkpoints have both, and count the steps."""
    for epochs, resume in ((1, []), (2, ['--resume'])):
        run_in_process('train', ROOT / 'configs/yolox_acmix_s.py', '--data-root', shapes,
                       '--classes', *CLASSES, '--work-dir', tmp_path, *resume, '--cfg-options',
                       *FAST, *YOLOX, f'train_cfg.max_epochs={epochs}')
    first, second = (torch.load(tmp_path / f'epoch_{epoch}.pth', weights_only=False)
                     for epoch in (1, 2))
    assert [saved['ema_state_dict']['steps'].item() for saved in (first, second)] == [2, 4]
    # The hook saves the averages as the model's weights.
    averages, weights = (
        saved['state_dict']['bbox_head.multi_level_cls_convs.0.0.conv.dep_conv.weight']
        for saved in (second, dict(state_dict={
            key.removeprefix('module.'): value
            for key, value in second['ema_state_dict'].items()})))
    assert not torch.equal(averages, weights)
