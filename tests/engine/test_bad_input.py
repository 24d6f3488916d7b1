"""Bad input of every kind ends each tool with one message that names the problem.

Most rows run the tool in this process; test_tools.py runs some in processes of their own.
"""

import json
import shutil
from typing import Callable, NamedTuple, Optional

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.tools import DETECTION, FAST, SEGMENTATION, SMALL_IMAGES, call_tool
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import runner as mmengine_runner

from acmix_mm.engine.annotations import check_annotations
from acmix_mm.engine.config import load_config
from acmix_mm.engine.samples import CheckedPipeline
from acmix_mm.engine.settings import check_config, check_wrapper, warn_of_misspelt_settings
from acmix_mm.engine.unread import check_unread
from acmix_mm.environment import export_unavailable
from acmix_mm.layers import window_acmix
from acmix_mm.utils.errors import UsageError

TRAIN = 'annotations/instances_train2017.json'
VAL = 'annotations/instances_val2017.json'


class Row(NamedTuple):
    """A command and what its message must contain.

    Attributes:
        tool: name of the tool.
        arguments: its arguments; ``{data}``, ``{tmp}`` and ``{model}`` are replaced by a copy of
            the generated data, an empty folder, and a checkpoint of the detector.
        words: parts of the message.
        spoil: writes bad input; takes the copy of the data and the empty folder.
        status: exit status.
    """

    tool: str
    arguments: tuple
    words: tuple
    spoil: Optional[Callable] = None
    status: int = 1

    def __str__(self):
        return f'{self.tool}: {", ".join(self.words)[:60]}'


DATA = ('--data-root', '{data}', '--work-dir', '{tmp}/out')
DETECT = (DETECTION, *DATA)
SEGMENT = (SEGMENTATION, *DATA)
TEST_DETECT = (DETECTION, '{model}', *DATA)
COCO = ('configs/maskrcnn_acmix_swin_t.py',)
REMOTE = 'http://127.0.0.1:9/swin.pth'
OPTIONS = ('--cfg-options', *FAST, *SMALL_IMAGES)


def with_option(option, *words, base=DETECT):
    """Train with an option of the config."""
    return Row('train', (*base, '--cfg-options', *FAST, option), words)


def with_config(text, *words, tool='get_flops'):
    """Run a tool on a config file."""
    def write(data, tmp):
        (tmp / 'config.py').write_text(text)
    return Row(tool, ('{tmp}/config.py',), words, write)


def with_backbone(host, arguments, *words):
    """Count the demonstration's detector of a host, or a config, with arguments of the backbone."""
    config = str(ROOT / f'configs/shapes/maskrcnn_acmix_{host}.py')
    return with_config(f'_base_ = {config!r}\nmodel = dict(backbone=dict({arguments}))', *words)


def with_annotations(change, *words, name=TRAIN, tool='train', arguments=(*DETECT, *OPTIONS)):
    """Train on an annotation file whose content ``change`` modifies or replaces."""
    def spoil(data, tmp):
        path = data / name
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(changed if isinstance(changed, str) else json.dumps(
            content if changed is None else changed))
    return Row(tool, arguments, (name.split('/')[1], *words), spoil)


def with_files(pattern, change, *words, arguments=(*DETECT, *OPTIONS), tool='train'):
    """Train on data of which ``change`` modifies every file that matches a pattern."""
    def spoil(data, tmp):
        found = sorted(data.glob(pattern))
        assert found
        for path in found:
            change(path)
    return Row(tool, arguments, words, spoil)


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def relabel(label):
    """Set one pixel of a mask to a label."""
    def change(path):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        mask[0, 0] = label
        cv2.imwrite(str(path), mask)
    return change


def in_colour(path):
    cv2.imwrite(str(path), cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_UNCHANGED),
                                        cv2.COLOR_GRAY2BGR) * np.uint8([10, 20, 30]))


def shrink(path):
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), cv2.resize(image, (64, 64), interpolation=cv2.INTER_NEAREST))


def changed(key, index, **values):
    """A change of an entry of an annotation file; None removes a key."""
    def change(content):
        for name, value in values.items():
            if value is None:
                del content[key][index][name]
            else:
                content[key][index][name] = value
    return change


def without(key):
    def change(content):
        del content[key]
    return change


def checkpoint(content, *words, tool='test', arguments=None):
    """Run a tool on a checkpoint with a content, or one made from that of the detector."""
    def write(data, tmp):
        made = content(torch.load(data.parent / 'model.pth')) if callable(content) else content
        if isinstance(made, bytes):
            (tmp / 'bad.pth').write_bytes(made)
        else:
            torch.save(made, tmp / 'bad.pth')
    if arguments is None:
        arguments = (DETECTION, '{tmp}/bad.pth', *DATA, *OPTIONS)
    return Row(tool, arguments, ('bad.pth', *words), write)


RESUME = (*DETECT, '--resume', '{tmp}/bad.pth', *OPTIONS)
PUBLISH = ('{tmp}/bad.pth', '{tmp}/out/published')
CONVERT = ('{tmp}/bad.pth', '{tmp}/out/converted.pth')
VISUALIZE = (DETECTION, '{tmp}/bad.pth', '{data}/val2017/00000.jpg', '--out-dir', '{tmp}/out')


def nan(content):
    """A checkpoint in which one weight is NaN."""
    content['state_dict']['backbone.patch_embed.projection.bias'][0] = float('nan')
    return content


def half(content):
    weights = content['state_dict']
    content['state_dict'] = {key: weights[key] for key in list(weights)[::2]}
    return content


def lacking(*keys):
    def change(content):
        return {key: value for key, value in content.items() if key not in keys}
    return change


def backbone(content):
    return {key.removeprefix('backbone.'): value for key, value in content['state_dict'].items()
            if key.startswith('backbone.')}


SETTINGS = [
    with_option('train_cfg.max_epoch=3', 'train_cfg.max_epoch is unknown',
                'did you mean max_epochs?', 'EpochBasedTrainLoop'),
    with_option('train_cfg.type=EpochBasedLoop', "train_cfg.type='EpochBasedLoop'",
                'EpochBasedTrainLoop'),
    with_option('train_cfg.max_epochs=three', 'train_cfg.max_epochs must be of type int', 'three'),
    with_option('val_cfg.fp_16=True', 'val_cfg.fp_16 is unknown', 'did you mean fp16?'),
    with_option('optim_wrapper.optimizer.lrr=0.1', 'optim_wrapper.optimizer.lrr', 'mean lr?'),
    with_option('optim_wrapper.optimizer.lr=fast', 'optimizer.lr must be of type float', 'fast'),
    with_option('optim_wrapper.optimizer.type=AdamWW', 'AdamWW', 'did you mean AdamW?'),
    with_option('optim_wrapper.type=AmpWrapper', 'AmpWrapper', 'no optim_wrapper of this name'),
    with_option('optim_wrapper.accumulate=2', 'optim_wrapper.accumulate is unknown',
                'accumulative_counts'),
    with_option('optim_wrapper.clip_grad.max_nrm=1', 'clip_grad.max_nrm', 'max_norm'),
    with_option('optim_wrapper.clip_grad=3', 'optim_wrapper.clip_grad must be a dict'),
    with_option('optim_wrapper.paramwise_cfg.norm_mult=0', 'norm_mult', 'norm_decay_mult?'),
    with_option('optim_wrapper.paramwise_cfg.custom_keys.norm=0', 'norm must be a dict'),
    with_option('runner_type=MyRunner', 'MyRunner'),
    with_option('optim_wraper.type=OptimWrapper', 'optim_wraper', 'did you mean optim_wrapper?'),
    with_option('trian_cfg.max_epochs=1', 'trian_cfg', 'did you mean train_cfg?'),
    with_option('default_hooks.checkpoint.intervall=1', 'default_hooks.checkpoint.intervall',
                'did you mean interval?'),
    with_option('default_hooks.chekpoint.interval=1', "default_hooks.chekpoint has no 'type'",
                'did you mean checkpoint?'),
    with_option('default_hooks.logger.type=LogHook', 'LogHook', 'LoggerHook'),
    with_option('custom_hooks=[dict(type="EMAHok")]', 'custom_hooks', 'EMAHok'),
    with_option('train_dataloader.batchsize=2', 'train_dataloader.batchsize', 'batch_size'),
    with_option('train_dataloader.batch_size=two', 'batch_size', 'two'),
    with_option('train_dataloader.num_workers=many', 'num_workers', 'many'),
    with_option('train_dataloader.sampler.shufle=False', 'sampler.shufle', 'mean shuffle?'),
    with_option('train_dataloader.dataset.type=CocoDatset', 'CocoDatset', 'CocoDataset?'),
    with_option('train_dataloader.dataset.prefix=x', 'train_dataloader.dataset.prefix is unknown',
                'data_prefix'),
    with_option('train_dataloader.dataset.metainfo=3', 'metainfo of a dataset must be a dict'),
    with_option('train_dataloader.dataset.pipeline.0.type=LoadImage', 'pipeline.0.type',
                'LoadImageFromFile'),
    with_option('train_dataloader.dataset.pipeline.2.scal=3', 'pipeline.2.scal', 'mean scale?'),
    with_option('val_evaluator.metrics=bbox', 'val_evaluator.metrics', 'did you mean metric?'),
    with_option('val_evaluator.metric=box', "CocoMetric cannot be built", 'box'),
    with_option('param_scheduler.0.end=x', 'param_scheduler.0.end must be of type int'),
    with_option('param_scheduler.0.type=LineLR', 'LineLR', 'LinearLR'),
    with_option('param_scheduler.1.Tmax=3', 'param_scheduler.1.Tmax', 'did you mean T_max?'),
    with_option('randomness.sed=1', 'randomness.sed', 'did you mean seed?'),
    with_option('randomness.seed=x', 'randomness cannot be built'),
    with_option('visualizer.type=Visual', 'visualizer.type', 'Visualizer'),
    with_option('log_processor.window=5', 'log_processor.window', 'window_size'),
    with_option('env_cfg.cudnn=True', 'env_cfg.cudnn', 'cudnn_benchmark'),
    with_option('model.neck.in_channels=[24,48,96,96]', 'in_channels=[24, 48, 96, 96]',
                '[24, 48, 96, 192]'),
    with_option('model.test_cfg.rcnn.score_thrr=0.5', 'model.test_cfg.rcnn.score_thrr is unknown',
                'did you mean score_thr?'),
    with_option('model.train_cfg.rcnn.sampler.pos_fractoin=0.5', 'sampler.pos_fractoin is unknown'),
    with_option('model.test_cfg.crop_sise=(64,64)', 'model.test_cfg.crop_sise is unknown',
                'did you mean crop_size?', base=SEGMENT),
    with_option('model.decode_head.in_channels=[24,48,96,96]', 'decode_head has in_channels',
                '[24, 48, 96, 192]', base=SEGMENT),
    with_option('model.auxiliary_head.in_channels=48', 'auxiliary_head has in_channels=48', '[96]',
                base=SEGMENT),
    with_option('model.auxiliary_head.in_index=4', 'auxiliary_head has in_index=4', '4 outputs',
                base=SEGMENT),
    with_option('train_dataloader=3', 'train_dataloader must be a dict, got 3'),
    with_option('train_dataloader.dataset=None', 'train_dataloader.dataset must be a dict'),
    with_option('env_cfg=3', 'env_cfg must be a dict'),
    with_option('train_dataloader=None', 'has no train_dataloader'),
    with_option('optim_wrapper=None', 'has no optim_wrapper'),
    with_option('model=None', 'has no model'),
    with_option('model.type=MaskRNN', "model.type='MaskRNN'", 'MaskRCNN'),
    with_option('model.backbone.type=ACmixSwin', 'ACmixSwin', 'ACmixSwinTransformer'),
    with_option('model.neck.num_outs=five', 'model.neck.num_outs must be of type int', 'five'),
    with_option('model.neck.numouts=5', 'model.neck.numouts is unknown', 'num_outs'),
    with_option('model.neck.num_outs=1', 'FPN cannot be built', 'num_outs >='),
    with_option('model.rpn_head.anchor_generator.type=Anchors', 'Anchors is not in'),
    with_option('model.data_preprocessor.men=[1,2,3]', 'data_preprocessor.men', 'mean mean?'),
    with_option('model.decode_head.num_class=4', 'UPerHead', "argument 'num_class'",
                base=SEGMENT),
    with_option('train_dataloader.dataset.img_sufix=.png', 'img_sufix', 'img_suffix',
                base=SEGMENT),
    with_option('train_dataloader.dataset.img_suffix=.tif', 'contains no image *.tif',
                base=SEGMENT),
    with_option('train_dataloader.dataset.pipeline.9.type=x', '--cfg-options do not match'),
    Row('train', (*DETECT, '--cfg-options', 'nonsense'), ('takes KEY=VALUE pairs',), status=2),
]
CONFIGS = [
    with_config('model = dict(', 'config.py cannot be read: SyntaxError'),
    with_config('model = dict(type=missing)', 'NameError', "'missing'", 'config.py, line 1'),
    with_config('a = 1\nb = a / 0', 'ZeroDivisionError', 'config.py, line 2'),
    with_config('_base_ = "none.py"', 'inherits from a file that does not exist', 'none.py'),
    with_config('from nonexistent_package import A\nmodel = dict(type=A)', 'nonexistent_package'),
    with_config('custom_imports = dict(imports=["nonexistent_package"])', 'nonexistent_package'),
    with_config('custom_imports = 3', 'config.py cannot be read'),
    with_config('max_epochs = 1', 'config.py has no model'),
    with_config('optim_wrapper = dict(', 'SyntaxError', tool='train'),
    Row('get_flops', ('{data}/train2017/00000.jpg',), ('00000.jpg cannot be read',)),
    Row('get_flops', ('none.py',), ('none.py is neither a file nor',)),
]
BACKBONES = [
    with_backbone('swin', 'num_heads=[0, 3, 6, 12]', 'num_heads needs', '(0, 3, 6, 12)'),
    with_backbone('swin', 'num_heads=[5, 5, 5, 5]', 'num_heads must divide', '5 heads'),
    with_backbone('swin', 'depths=[2, 2]', 'num_heads needs one number for each of the 2'),
    with_backbone('swin', 'depths=2', 'depths needs one number for each stage'),
    with_backbone('swin', 'out_indices=(0, 7)', 'out_indices must lie in [0, 4)', '(0, 7)'),
    with_backbone('swin', 'out_indices=()', 'out_indices names no stage'),
    with_backbone('swin', 'window_size=0', 'window_size must be a positive integer'),
    with_backbone('swin', 'window_size="seven"', 'window_size must be', 'seven'),
    with_backbone('swin', 'drop_path_rate=2', 'drop_path_rate must lie in [0, 1), got 2'),
    with_backbone('swin', 'pretrained=123', 'pretrained must be the path', '123'),
    with_backbone('swin', 'pretrain_img_size=(1, 2, 3)', 'pretrain_img_size must be', '(1, 2, 3)'),
    with_backbone('swin', 'frozen_stages=9', 'frozen_stages must lie in [-1, 4], got 9'),
    with_backbone('swin', 'mix="atn"', 'mix must be one of', 'atn'),
    with_backbone('swin', 'acmix_cfg=dict(shfit="fixed")', 'acmix_cfg takes', 'shfit'),
    with_backbone('swin', 'acmix_cfg=3', 'acmix_cfg takes a dict', '3'),
    with_backbone('swin', 'init_cfg="weights.pth"', 'init_cfg=dict(type="Pretrained"'),
    with_backbone('swin', 'norm_cfg=dict(type="LayNorm")', 'LayNorm cannot be built'),
    with_backbone('swin', 'mixer=dict(type="Involution", grups=1)', 'Involution', 'grups'),
    with_backbone('swin', 'windowsize=7', 'windowsize'),
    with_backbone('pvt', 'sr_ratios=[0, 4, 2, 1]', 'sr_ratios needs', '(0, 4, 2, 1)'),
    with_backbone('pvt', 'num_layers=[2, 2]', 'num_layers needs', '(2, 2)'),
    with_backbone('pvt', 'pretrain_img_size=(1, 2, 3)', 'pretrain_img_size must be'),
    with_backbone('pvt', 'out_indices=(0, 4)', 'out_indices must lie in [0, 4)'),
    with_backbone('r50', 'depth=51', 'depth must be one of', '51'),
    with_backbone('r50', 'num_heads=0', 'num_heads must be a positive integer, got 0'),
    with_backbone('r50', 'dilations=(1, 1, 0, 1)', 'dilations needs', '(1, 1, 0, 1)'),
    with_backbone('r50', 'attn_kernel_size=-1', 'attn_kernel_size must be a positive integer'),
    with_backbone('r50', 'acmix_stages=(9,)', 'acmix_stages must lie in [0, 4)', '(9,)'),
    with_backbone('r50', 'acmix_stages=(-1,)', 'acmix_stages must lie in [0, 4)', '(-1,)'),
    with_backbone('r50', 'stage_blocks=(1,)', 'stage_blocks needs', '(1,)'),
    with_backbone('r50', 'mixer=dict(type="Conv2d", kernel_size=-1)', 'kernel_size of a mixer'),
    with_backbone('san', 'base_channels=40', 'base_channels must be a multiple of 32'),
    with_backbone('san', 'drop_path_rate="x"', 'drop_path_rate must lie in', 'x'),
    Row('receptive_field', ('configs/shapes/maskrcnn_acmix_swin.py', '--out', '{tmp}/out/a.png',
                            '--cfg-options', 'model.backbone.window_size=0'),
        ('window_size must be a positive integer',)),
    Row('export_onnx', ('configs/shapes/upernet_acmix_r50.py', '{tmp}/out/a.onnx',
                        '--cfg-options', 'model.backbone.acmix_stages=(7,)'),
        ('acmix_stages must lie in [0, 4)',)),
]
ANNOTATIONS = [
    with_annotations(lambda content: '', 'it is empty'),
    with_annotations(lambda content: '{"images": [', 'it is not valid JSON'),
    with_annotations(lambda content: [1, 2], 'it holds a list instead of an object'),
    with_annotations(without('categories'), "it has no list 'categories'"),
    with_annotations(without('images'), "it has no list 'images'"),
    with_annotations(without('annotations'), "it has no list 'annotations'"),
    with_annotations(changed('categories', 0, name=None), "categories[0] has no 'name'"),
    with_annotations(changed('categories', 1, name='circle'), "the name 'circle'"),
    with_annotations(changed('images', 0, file_name=None), "images[0] has no 'file_name'"),
    with_annotations(changed('images', 0, id=[1]), "images[0]['id'] has the wrong type: [1]"),
    with_annotations(changed('images', 0, height='tall'),
                     "images[0]['height'] has the wrong type: 'tall'"),
    with_annotations(changed('images', 1, id=0), 'the ids of images are not unique'),
    with_annotations(changed('annotations', 0, segmentation=None), 'Annotation 1',
                     'has no segmentation'),
    with_annotations(changed('annotations', 0, bbox=[1, 2, 3]), 'annotation 1 has the bbox'),
    with_annotations(changed('annotations', 0, bbox=None), "annotations[0] has no 'bbox'"),
    with_annotations(changed('annotations', 0, category_id=77), 'category_id 77, which'),
    with_annotations(changed('annotations', 0, image_id=77), 'image_id 77, which'),
    with_annotations(changed('annotations', 0, segmentation=dict(size=[5, 5], counts='a')),
                     'a mask of the size [5, 5]', 'the size [96, 96]'),
    with_annotations(changed('categories', 0, name='disc'), 'contain circle', 'disc'),
    with_annotations(lambda content: '{', 'it is not valid JSON', name=VAL),
    with_annotations(without('categories'), 'categories', name=VAL, tool='test',
                     arguments=(*TEST_DETECT, *OPTIONS)),
]
IMAGES = [
    with_files('train2017/*.jpg', lambda path: path.unlink(), '.jpg does not exist'),
    with_files('train2017/*.jpg', lambda path: path.write_bytes(b''), '.jpg is empty'),
    with_files('train2017/*.jpg', truncate, '.jpg is damaged or not an image'),
    with_files('train2017/*.jpg', shrink, 'is an image of 64×64', 'says 96×96'),
    with_files('val2017/*.jpg', truncate, '00000.jpg is damaged', tool='test',
               arguments=(*TEST_DETECT, *OPTIONS)),
    with_files('images/training/*.jpg', truncate, '.jpg is damaged', arguments=(
        *SEGMENT, '--cfg-options', *FAST)),
    *(with_files('annotations/training/*.png', change, *words,
                 arguments=(*SEGMENT, '--cfg-options', *FAST))
      for change, *words in [
          (lambda path: path.unlink(), '.png does not exist'),
          (lambda path: path.write_bytes(b''), '.png is empty'),
          (truncate, '.png is damaged or not an image'),
          (relabel(7), '.png has labels beyond the 4 classes: 7', 'range from 1 to 4'),
          (in_colour, '.png has 3 channels', 'index of the class'),
          (shrink, '.png is a mask of 64×64', 'has 96×96')]),
]
CLASSES = [
    Row('train', (*DETECT, '--classes', 'circle', 'circle'), ('circle more than once',)),
    Row('train', (*SEGMENT, '--classes', 'a', 'b', 'a', 'c'), ('a more than once',)),
    with_option('train_dataloader.dataset.metainfo.classes=circle', 'must be a list of names'),
    with_option("train_dataloader.dataset.metainfo.classes=('circle','sqare','triangle')",
                'contain sqare', 'did you mean square?'),
    with_option("train_dataloader.dataset.metainfo.classes=('car','bus','cat')",
                'None of the classes', 'circle square triangle', '--classes'),
    with_option('model.roi_head.bbox_head.num_classes=5', 'roi_head.bbox_head has num_classes=5',
                '3 classes', '--classes'),
    with_option('model.decode_head.num_classes=9', 'decode_head has num_classes=9', '4 classes',
                base=SEGMENT),
    Row('test', (*TEST_DETECT, '--cfg-options', *FAST, 'model.roi_head.mask_head.num_classes=4'),
        ('roi_head.mask_head has num_classes=4',)),
]
CHECKPOINTS = [
    checkpoint([1, 2], 'it holds a list instead of weights'),
    checkpoint({1: torch.zeros(1)}, 'it holds no weights by name'),
    checkpoint(b'', 'cannot be read', 'damaged'),
    checkpoint(lambda model: half(model), "does not match the config's model"),
    checkpoint(nan, 'NaN or infinite', 'projection.bias'),
    checkpoint([1, 2], 'it holds a list', tool='train', arguments=RESUME),
    checkpoint(half, 'does not match', 'missing or of another shape', tool='train',
               arguments=RESUME),
    checkpoint(nan, 'NaN or infinite', tool='train', arguments=RESUME),
    checkpoint(lacking('optimizer'), 'it lacks optimizer', 'load_from=', tool='train',
               arguments=RESUME),
    checkpoint(lacking('meta', 'message_hub'), 'it lacks meta, message_hub', tool='train',
               arguments=RESUME),
    checkpoint(nan, 'NaN or infinite', tool='publish_model', arguments=PUBLISH),
    checkpoint([1, 2], "no weights under 'state_dict'", tool='publish_model', arguments=PUBLISH),
    checkpoint(dict(state_dict={1: torch.zeros(1)}), 'no weights', tool='publish_model',
               arguments=PUBLISH),
    checkpoint(b'text', 'cannot be read', tool='publish_model', arguments=PUBLISH),
    checkpoint(nan, 'NaN or infinite', tool='convert_weights', arguments=CONVERT),
    checkpoint([1, 2], 'holds no weights', tool='convert_weights', arguments=CONVERT),
    checkpoint({1: torch.zeros(1)}, 'holds no weights', tool='convert_weights', arguments=CONVERT),
    checkpoint({'a.weight': torch.zeros(1)}, 'of no known network', tool='convert_weights',
               arguments=CONVERT),
    checkpoint(backbone, 'bad.pth', tool='convert_weights',
               arguments=(*CONVERT, '--arch', 'swin-t')),
    checkpoint([1, 2], 'has no class names', tool='visualize', arguments=VISUALIZE),
    checkpoint(lacking('meta'), 'has no class names', tool='visualize', arguments=VISUALIZE),
    checkpoint(nan, 'NaN or infinite', tool='visualize', arguments=VISUALIZE),
    checkpoint([1, 2], 'holds no weights', tool='plot_rates',
               arguments=('{tmp}/bad.pth', '--out', '{tmp}/out/a.png')),
    checkpoint({'a.weight': torch.zeros(1)}, 'has no rates', tool='plot_rates',
               arguments=('{tmp}/bad.pth', '--out', '{tmp}/out/a.png')),
    checkpoint([1, 2], 'bad.pth', tool='export_onnx', arguments=(
        SEGMENTATION, '{tmp}/bad.pth', '{tmp}/out/a.onnx')),
    checkpoint([1, 2], 'holds no weights', tool='receptive_field', arguments=(
        DETECTION, '--checkpoints', '{tmp}/bad.pth', '--out', '{tmp}/out/a.png')),
]
COMMANDS = [
    Row('make_shapes', ('{tmp}/out/shapes', '--seed', '-1'), ('seed must not be negative',)),
    Row('make_shapes', ('{tmp}/out/shapes', '--image-size', '8'), ('at least 64 pixels',)),
    Row('make_shapes', ('{tmp}/out/shapes', '--val-images', '0'), ('must be at least 1',)),
    Row('make_shapes', ('{data}',), ('exists and is not empty',)),
    Row('make_shapes', ('{tmp}/out/shapes', '--distance', '24'),
        ('of the task cue, not of outline',)),
    Row('make_shapes', ('{tmp}/out/shapes', '--task', 'count', '--number', '9'),
        ('must be 2 to 6',)),
    Row('make_shapes', ('{tmp}/out/shapes', '--illustration', '{tmp}/out/a.jpg'), ('.png files',)),
    Row('gpu_check', ('--json', '{tmp}'), ('cannot be written (it is a directory)',)),
    Row('gpu_check', ('--markdowm', 'a.md'), ('unrecognized arguments: --markdowm',), status=2),
    Row('benchmark', ('--cases', 'conv'), ('invalid choice', 'conv-200x336'), status=2),
    Row('benchmark', ('--repeats', '0'), ('--repeats', 'must be a positive integer'), status=2),
    Row('benchmark', ('--batch', '-1'), ('--batch', 'must be a positive integer'), status=2),
    Row('compare', (*SEGMENT, '--mixers', 'acmix'), ('two or more different mixers',)),
    Row('compare', (*SEGMENT, '--mixers', 'acmix', 'conv9'), ("no mixer 'conv9'",)),
    Row('compare', (*SEGMENT, '--mixers', 'acmix', 'conv', '--budget', '3'), ('300iters',),
        status=2),
    Row('compare', (*SEGMENT, '--mixers', 'acmix', 'conv', '--seeds', '0'),
        ('must be a positive integer',), status=2),
    Row('compare', (*SEGMENT[:1], '--data-root', '{tmp}', *SEGMENT[3:], '--mixers', 'acmix',
                    'conv'), ('is missing',)),
    Row('compare', (*SEGMENT, '--mixers', 'acmix', 'conv', '--cfg-options',
                    'optim_wrapper.optimizer.lrr=1'), ('optimizer.lrr',)),
    Row('summarize', ('a={tmp}', '--out', '{tmp}/out'), ('has no report.json',)),
    Row('summarize', ('a={tmp}', '--sweep', 'distance', '--out', '{tmp}/out'),
        ("each label must be a number, got 'a'",)),
    Row('summarize', ('a', '--out', '{tmp}/out'), ('takes NAME=VALUE pairs',), status=2),
    Row('export_onnx', ('configs/dino_acmix_swin_t.py', '{tmp}/out/a.onnx'),
        ('The detector DINO cannot be exported', '--backbone-only')),
    Row('export_onnx', (SEGMENTATION, '{tmp}/none/a.onnx'), ('does not exist',)),
    Row('export_onnx', (SEGMENTATION, '{tmp}/a.onnx', '--shape', '0', '8'),
        ('must be a positive integer',), status=2),
    Row('get_flops', (), ('either a config or --zoo',)),
    Row('get_flops', ('--zoo', '--shape', '8', '8'), ('omit --shape',)),
    Row('plot_rates', ('{tmp}',), ('contains no epoch_N.pth',)),
    Row('plot_rates', ('{model}', '--out', '{tmp}/out/a.jpg'), ('.png files',)),
    Row('publish_model', ('{model}', '{tmp}/none/a'), ('does not exist',)),
    Row('receptive_field', (DETECTION, '--checkpoints', 'a', 'b'), ('one file per config',)),
    Row('receptive_field', (DETECTION, '--mixers', 'conv9'), ('invalid choice',), status=2),
    Row('convert_weights', ('{model}', '{tmp}/out/a.txt'), ('written as .pth or .safetensors',)),
    Row('convert_weights', ('{model}', '{tmp}/out/a.pth', '--arch', 'swin-x'),
        ('invalid choice',), status=2),
    Row('visualize', (DETECTION, '{model}', 'none.jpg', '--out-dir', '{tmp}/out'),
        ('none.jpg does not exist',)),
    Row('visualize', (DETECTION, '{model}', '{data}/val2017/00000.jpg', '--out-dir', '{tmp}/out',
                      '--point', '500', '5'), ('lies outside',)),
    Row('train', (*COCO, '--work-dir', '{tmp}/out'),
        ('data/coco/annotations/instances_train2017.json does not exist', 'data/coco/val2017/',
         '--data-root DIR', 'make_shapes')),
    Row('train', (*COCO, *DATA, '--classes', 'circle', '--cfg-options', *FAST,
                  f'model.backbone.init_cfg.checkpoint={REMOTE}'),
        (f'{REMOTE} could not be downloaded', 'init_cfg.checkpoint=FILE', 'init_cfg=None')),
    Row('train', (*COCO, *DATA, '--classes', 'circle', '--cfg-options', *FAST,
                  'model.backbone.init_cfg=None', f'load_from={REMOTE}'),
        (f'{REMOTE} could not be downloaded',)),
    Row('train', (*COCO, *DATA), ('None of the classes', 'person, bicycle', '--classes NAME')),
    Row('train', (*DETECT, '--amp'), ('needs a GPU', 'leave out --amp')),
    Row('train', (*DETECT, '--resume', '{tmp}/none.pth'), ('none.pth does not exist',)),
    Row('train', (*DETECT, '--classes', 'circle', 'sqare', 'triangle'),
        ('names sqare, but', 'are circle square triangle')),
    Row('train', (*DETECT, '--classes', 'triangle', 'circle'),
        ('Labels follow the order of', 'pass --classes circle triangle')),
    Row('train', (*DETECT, '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None'),
        ('auto_scale_lr.base_batch_size=16',)),
    Row('train', (*DETECT, '--launcher', 'mpi'), ('--launcher mpi needs GPUs', 'dist_train.sh')),
    Row('test', (DETECTION, '{tmp}/none.pth', *DATA), ('none.pth does not exist',)),
    Row('test', (*TEST_DETECT, '--out', '{tmp}/out/a.txt'), ('--out writes detections',)),
]
ROWS = [*SETTINGS, *CONFIGS, *BACKBONES, *ANNOTATIONS, *IMAGES, *CLASSES, *CHECKPOINTS, *COMMANDS]


@pytest.fixture(scope='module')
def data(shapes, tmp_path_factory):
    """A copy of the generated data that a row may spoil, beside a checkpoint of the detector."""
    root = tmp_path_factory.mktemp('bad_input')
    cfg = load_config(DETECTION)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    classes = cfg.train_dataloader.dataset.metainfo
    torch.save(dict(
        meta=dict(epoch=1, iter=4, dataset_meta=dict(classes)), state_dict=model.state_dict(),
        message_hub={}, optimizer={}, param_schedulers=[]), root / 'model.pth')
    return root / 'data'


@pytest.mark.parametrize('row', ROWS, ids=str)
def test_bad_input(row, data, shapes, tmp_path, monkeypatch):
    if row.tool == 'export_onnx' and export_unavailable() is not None:
        pytest.skip(f'export to ONNX {export_unavailable()}')
    # It runs compilers to find out their versions.
    monkeypatch.setattr(mmengine_runner, 'collect_env', dict)
    if row.spoil is None:
        root = shapes
    else:
        shutil.copytree(shapes, data)
        root = data
        row.spoil(data, tmp_path)
    places = dict(data=root, tmp=tmp_path, model=data.parent / 'model.pth')
    (tmp_path / 'out').mkdir()
    done = call_tool(row.tool, *(argument.format(**places) for argument in row.arguments))
    shutil.rmtree(data, ignore_errors=True)

    assert done.returncode == row.status, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    assert done.stderr.count('error: ') == 1
    message = done.stderr[done.stderr.index('error: '):]
    for word in row.words:
        assert word in message
    # Logs and the lock of a work directory may be left, but no results.
    written = [path for path in (tmp_path / 'out').rglob('*')
               if path.is_file() and path.name != 'lock']
    assert {path.suffix for path in written} <= {'.log', '.json', '.py'}


def test_the_table_is_large_and_covers_all_tools(request):
    tools = {path.stem for path in (request.config.rootpath / 'tools').glob('*.py')}
    assert {row.tool for row in ROWS} == tools
    assert len(ROWS) >= 120
    assert len({str(row) for row in ROWS}) > 100


def test_bug_shows_its_traceback_and_how_to_report_it(monkeypatch):
    """Also if a layer of this package raises it while a config is built."""
    def broken(window_size):
        return window_size.missing

    monkeypatch.setattr(window_acmix, 'relative_position_index', broken)
    done = call_tool('get_flops', DETECTION)
    assert done.returncode == 1
    assert "AttributeError: 'int' object has no attribute 'missing'" in done.stderr
    assert done.stderr.splitlines()[-1].startswith('internal error (AttributeError): please report')
    assert 'python -m acmix_mm.environment' in done.stderr


def test_misspelt_setting_in_a_config_file_is_reported():
    cfg = Config(dict(custom_hook=[], train_pipeline=[], my_classes=3))
    with pytest.warns(UserWarning) as raised:
        warn_of_misspelt_settings(cfg)
    assert [str(each.message) for each in raised] == [
        'The setting custom_hook of the config has no effect (did you mean custom_hooks?).']


def test_setting_that_has_no_effect_is_reported():
    with pytest.warns(UserWarning, match=r'custom_keys\.norm\.wd_mult has no effect'):
        check_wrapper(dict(paramwise_cfg=dict(custom_keys=dict(norm=dict(wd_mult=0)))))


def test_arguments_that_a_constructor_ignores_are_checked():
    """Its ``**kwargs`` swallow them."""
    cfg = load_config(DETECTION)
    init_default_scope('mmdet')
    # This file must not contain the misspelt name.
    cfg.custom_hooks = [{'type': 'IgnoringHook', 'inter' 'vl': 3}]
    with pytest.raises(UsageError, match=r'0\.inter[v]l is unknown \(did you mean interval\?\)'):
        check_unread(cfg)


@HOOKS.register_module()
class IgnoringHook(Hook):
    """A hook that accepts any argument."""

    def __init__(self, interval=1, **kwargs):
        self.interval = interval


def test_setting_that_resembles_another_is_reported():
    cfg = load_config(DETECTION)
    init_default_scope('mmdet')
    # Other code of MMDetection has this name.
    cfg.model.train_cfg.rcnn.samplers = 3
    with pytest.warns(UserWarning, match=r'rcnn\.samplers may have no effect \(did you mean sam'):
        check_unread(cfg)


def test_class_without_a_category_is_reported(shapes):
    """A part of a dataset may lack a class."""
    classes = ['circle', 'hexagon', 'square', 'triangle']
    with pytest.warns(UserWarning, match=r'val2017\.json has no category hexagon'):
        check_annotations(shapes / VAL, classes, needs_boxes=True, needs_masks=True)


def test_error_that_is_not_of_a_file_passes_unchanged(shapes):
    def fail(data):
        raise KeyError('not of a file')

    pipeline = CheckedPipeline(Compose([fail]), num_classes=3, ignore_index=255)
    image = next((shapes / 'val2017').iterdir())
    with pytest.raises(KeyError, match='not of a file'):
        pipeline(dict(img_path=str(image)))


@pytest.mark.parametrize(('library', 'config'), [
    ('mmdet', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'),
    ('mmdet', 'yolox/yolox_s_8xb8-300e_coco.py'),
    ('mmdet', 'rtmdet/rtmdet-ins_s_8xb32-300e_coco.py'),
    ('mmdet', 'vfnet/vfnet_r50_fpn_1x_coco.py'),
    ('mmseg', 'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py'),
    ('mmseg', 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'),
])
def test_configs_of_the_libraries_pass_the_checks(library, config, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = "{library}::{config}"')
    check_config(load_config(str(path)))
