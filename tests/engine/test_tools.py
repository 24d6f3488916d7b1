"""Tests of the tools, run from the command line, mostly as processes."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import cv2
import pytest
import torch
from helpers import ROOT
from helpers.tools import (
    DETECTION,
    FAST,
    SEGMENTATION,
    SMALL_IMAGES,
    Bomb,
    call_tool,
    data_options,
    data_roots,
    epochs,
    logged,
    logged_metric,
    own_visualizer,
    plain_message,
)

from acmix_mm.environment import stack
from acmix_mm.utils.errors import UsageError


def mim(command, library, *arguments):
    """A command line of mim or, for the forks, of the script that it would run.

    openmim looks for OpenMMLab's own distributions.
    """
    if stack() == 'OpenMMLab':
        return 'mim', command, library, *arguments
    package = import_module('mmseg' if library == 'mmsegmentation' else library)
    name, *rest = arguments if command == 'run' else (command, *arguments)
    return (Path(package.__file__).parent / f'.mim/tools/{name}.py',
            *(each for each in rest if each != '--checkpoint'))


@pytest.fixture(scope='module')
def detector(shapes, run_tool, tmp_path_factory):
    """Work directory of a detector whose training was killed in the second epoch and resumed."""
    folder = tmp_path_factory.mktemp('detector')
    arguments = ['tools/train.py', DETECTION, '--data-root', shapes, '--work-dir', folder,
                 '--cfg-options', *FAST, *SMALL_IMAGES, *epochs(3)]
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if re.search(r'Epoch\(train\) +\[2\]\[2/4\]', line):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert (folder / 'epoch_1.pth').is_file()
    assert not (folder / 'epoch_2.pth').exists()
    # The folders for logs are named after the second; the resumed run must get another one.
    time.sleep(1)
    done = run_tool(*arguments[:6], '--resume', *arguments[6:])
    assert done.returncode == 0, done.stderr
    return folder, done


def test_resumes_from_the_last_checkpoint_of_a_killed_run(detector):
    folder, done = detector
    assert f'Load checkpoint from {folder}/epoch_1.pth' in done.stdout
    assert 'resumed epoch: 1, iter: 4' in done.stdout
    assert 'Epoch(train) [1]' not in re.sub(' +', ' ', done.stdout)
    assert (folder / 'epoch_3.pth').is_file()
    losses = logged(folder, 'loss')
    assert len(losses) == 8
    saved = torch.load(folder / 'epoch_3.pth', weights_only=False)
    assert saved['meta']['iter'] == 12
    assert len(saved['message_hub']['log_scalars']['train/loss'].data[0]) == 12


def test_test_evaluates_and_draws(detector, shapes, run_tool, tmp_path):
    folder, _ = detector
    done = run_tool('tools/test.py', DETECTION, folder / 'epoch_3.pth', '--data-root', shapes,
                    '--work-dir', tmp_path, '--show-dir', tmp_path / 'drawn',
                    '--out', tmp_path / 'out.pkl', '--cfg-options', *FAST, *SMALL_IMAGES)
    assert done.returncode == 0, done.stderr
    for kind in ('bbox', 'segm'):
        metric = logged_metric(tmp_path, f'coco/{kind}_mAP')
        assert metric == pytest.approx(logged(folder, f'coco/{kind}_mAP')[-1], abs=1e-6)
    drawn = sorted((tmp_path / 'drawn').glob('*.jpg'))
    assert [path.name for path in drawn] == [f'{index:05d}.jpg' for index in range(4)]
    # Ground truth on the left and predictions on the right: twice the image width of 96.
    assert cv2.imread(str(drawn[0])).shape == (96, 192, 3)
    predictions = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert len(predictions) == 4
    assert 'masks' in predictions[0]['pred_instances']


def test_tta_evaluates_boxes(detector, shapes, run_tool, tmp_path):
    folder, _ = detector
    done = run_tool('tools/test.py', DETECTION, folder / 'epoch_3.pth', '--data-root', shapes,
                    '--work-dir', tmp_path, '--tta', '--cfg-options', *FAST, *SMALL_IMAGES)
    assert done.returncode == 0, done.stderr
    assert 'merges only boxes' in done.stderr
    assert logged_metric(tmp_path, 'coco/bbox_mAP') >= 0
    assert 'segm_mAP' not in done.stdout


@pytest.fixture(scope='module')
def segmentor(shapes, run_tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmentor')
    done = run_tool('tools/train.py', SEGMENTATION, '--data-root', shapes, '--work-dir', folder,
                    '--cfg-options', *FAST, 'train_cfg.max_iters=6', 'train_cfg.val_interval=6',
                    'default_hooks.checkpoint.interval=6', 'train_dataloader.batch_size=2',
                    'model.data_preprocessor.size=(96,96)')
    assert done.returncode == 0, done.stderr
    assert len(logged(folder, 'loss')) == 6
    return folder


def test_segmentation_evaluates_draws_and_saves(segmentor, shapes, run_tool, tmp_path):
    done = run_tool('tools/test.py', SEGMENTATION, segmentor / 'iter_6.pth', '--data-root', shapes,
                    '--work-dir', tmp_path, '--show-dir', tmp_path / 'drawn',
                    '--out', tmp_path / 'maps', '--cfg-options', *FAST)
    assert done.returncode == 0, done.stderr
    assert logged_metric(tmp_path, 'mIoU') == pytest.approx(logged(segmentor, 'mIoU')[-1])
    assert len(list((tmp_path / 'drawn').glob('**/*.png'))) == 4
    label_map = cv2.imread(str(tmp_path / 'maps' / '00000.png'), cv2.IMREAD_UNCHANGED)
    assert label_map.shape == (96, 96)
    # With reduce_zero_label MMSegmentation numbers the labels from 1, like the annotations.
    assert label_map.min() >= 1
    assert label_map.max() <= 4


def test_mmdetection_uses_the_checkpoint_by_itself(detector, shapes, run_tool, tmp_path):
    """Through its own API and test tool, which know nothing of this package but the config."""
    folder, _ = detector
    image = next((shapes / 'val2017').iterdir())
    script = tmp_path / 'infer.py'
    script.write_text(f"""
from mmdet.apis import DetInferencer, inference_detector, init_detector
given = {DETECTION!r}, {str(folder / 'epoch_3.pth')!r}
model = init_detector(*given, device='cpu')
result = inference_detector(model, {str(image)!r})
found = DetInferencer(*given, device='cpu')({str(image)!r}, no_save_pred=True)['predictions'][0]
print(model.dataset_meta['classes'], len(result.pred_instances) == len(found['scores']))
""")
    done = run_tool(script)
    assert "('circle', 'square', 'triangle') True" in done.stdout, done.stderr
    # mim runs the scripts in the wheels of MMDetection and MMSegmentation.
    done = run_tool(*mim('run', 'mmdet', 'test', DETECTION, folder / 'epoch_3.pth', '--work-dir',
                         tmp_path, '--cfg-options', *FAST, *SMALL_IMAGES, *data_options(shapes)))
    assert done.returncode == 0, done.stderr
    assert logged_metric(tmp_path, 'coco/bbox_mAP') == pytest.approx(
        logged(folder, 'coco/bbox_mAP')[-1])


def test_mmdetection_resumes_the_training_by_itself(detector, shapes, run_tool, tmp_path):
    folder, _ = detector
    shutil.copy(folder / 'epoch_3.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
    done = run_tool(*mim('train', 'mmdet', DETECTION, '--work-dir', tmp_path, '--resume',
                         '--cfg-options', *FAST, *SMALL_IMAGES, *epochs(4), *data_options(shapes)))
    assert done.returncode == 0, done.stderr
    assert 'resumed epoch: 3, iter: 12' in done.stdout
    assert (tmp_path / 'epoch_4.pth').is_file()


def test_mmsegmentation_uses_the_checkpoint_by_itself(segmentor, shapes, run_tool, tmp_path):
    image = next((shapes / 'images/validation').iterdir())
    script = tmp_path / 'infer.py'
    script.write_text(f"""
from mmseg.apis import MMSegInferencer, inference_model, init_model
given = {SEGMENTATION!r}, {str(segmentor / 'iter_6.pth')!r}
model = init_model(*given, device='cpu')
labels = inference_model(model, {str(image)!r}).pred_sem_seg.data[0].numpy()
found = MMSegInferencer(*given, device='cpu')({str(image)!r})['predictions']
print(model.dataset_meta['classes'], labels.shape, bool((labels == found).all()))
""")
    done = run_tool(script)
    assert "'triangle') (96, 96) True" in done.stdout, done.stderr


def test_mmsegmentation_resumes_and_evaluates_by_itself(segmentor, shapes, run_tool, tmp_path):
    shutil.copy(segmentor / 'iter_6.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_6.pth'))
    given = ['--cfg-options', *FAST, *data_roots(shapes), 'train_dataloader.batch_size=2',
             'model.data_preprocessor.size=(96,96)', 'train_cfg.max_iters=8',
             'train_cfg.val_interval=8', 'default_hooks.checkpoint.interval=8']
    done = run_tool(*mim('train', 'mmsegmentation', SEGMENTATION, '--work-dir', tmp_path,
                         '--resume', *given))
    assert done.returncode == 0, done.stderr
    assert 'resumed epoch: 0, iter: 6' in done.stdout
    done = run_tool(*mim('test', 'mmsegmentation', SEGMENTATION, '--checkpoint',
                         tmp_path / 'iter_8.pth', '--work-dir', tmp_path / 'test', *given))
    assert done.returncode == 0, done.stderr
    assert logged_metric(tmp_path / 'test', 'mIoU') == pytest.approx(logged(tmp_path, 'mIoU')[-1])


def test_segmentation_tta(segmentor, shapes, tmp_path):
    done = call_tool('test', ROOT / SEGMENTATION, segmentor / 'iter_6.pth', '--data-root', shapes,
                     '--work-dir', tmp_path, '--tta', '--cfg-options', *FAST,
                     'test_dataloader.dataset.indices=1')
    assert done.returncode == 0, done.stderr
    assert logged_metric(tmp_path, 'mIoU') >= 0


DETECTION_SIZES = [
    'train_dataloader.dataset.pipeline.2.scale=(96,96)',
    'val_dataloader.dataset.pipeline.1.scale=(96,96)', 'train_cfg.max_epochs=1']
SEGMENTATION_SIZES = [
    'model.data_preprocessor.size=(96,96)', 'train_dataloader.batch_size=2',
    'train_dataloader.dataset.pipeline.2.scale=(96,96)',
    'train_dataloader.dataset.pipeline.3.crop_size=(96,96)',
    'val_dataloader.dataset.pipeline.1.scale=(96,96)',
    'train_cfg.max_iters=2', 'train_cfg.val_interval=2']


@pytest.mark.parametrize(('config', 'options', 'metric'), [
    ('maskrcnn_acmix_r50', DETECTION_SIZES, 'coco/segm_mAP'),
    # An untrained model scores everything below the threshold.
    ('retinanet_acmix_r50', [*DETECTION_SIZES, 'model.test_cfg.score_thr=0.'], 'coco/bbox_mAP'),
    ('maskrcnn_r50_acmix_fpn_mask', DETECTION_SIZES, 'coco/segm_mAP'),
    ('upernet_acmix_r50', SEGMENTATION_SIZES, 'mIoU'),
    ('upernet_acmix_r50_d8', SEGMENTATION_SIZES, 'mIoU'),
    ('shapes/maskrcnn_acmix_r50', [*SMALL_IMAGES, *epochs(1)], 'coco/segm_mAP'),
    ('shapes/upernet_acmix_r50', ['model.data_preprocessor.size=(96,96)',
                                  'train_cfg.max_iters=2', 'train_cfg.val_interval=2'], 'mIoU'),
])
def test_resnet_config_trains_and_evaluates(config, options, metric, shapes, tmp_path):
    classes = ['circle', 'square', 'triangle']
    if 'upernet' in config:
        classes = ['background', *classes]
    done = call_tool('train', ROOT / f'configs/{config}.py', '--data-root', shapes, '--classes',
                     *classes, '--work-dir', tmp_path, '--cfg-options', *FAST, *options,
                     'model.backbone.init_cfg=None', 'train_dataloader.dataset.indices=4',
                     'val_dataloader.dataset.indices=1', own_visualizer())
    assert done.returncode == 0, done.stderr
    losses = logged(tmp_path, 'loss')
    assert len(losses) >= 2
    assert all(0 < loss < 100 for loss in losses)
    assert 0 <= logged(tmp_path, metric)[-1] <= 100


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_checkpoint_with_code_is_rejected_without_running_it(tool, shapes, run_tool, tmp_path):
    checkpoint = tmp_path / 'bomb.pth'
    torch.save(dict(state_dict={}, meta=dict(epoch=1, iter=1, trap=Bomb(tmp_path / 'ran'))),
               checkpoint)
    given = {'train': ['tools/train.py', DETECTION, '--resume', checkpoint],
             'test': ['tools/test.py', DETECTION, checkpoint]}[tool]
    # Users of MMEngine set this as a workaround for torch 2.6; it must have no effect here.
    done = run_tool(*given, '--data-root', shapes, '--work-dir', tmp_path / 'work',
                    '--cfg-options', *FAST, *SMALL_IMAGES, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='1')
    assert 'is refused and nothing in it was run' in plain_message(done)
    assert 'posix.system' in done.stderr
    assert not (tmp_path / 'ran').exists()


def test_messages(shapes, run_tool, tmp_path):
    """Of processes; the table of bad input runs the tools in the process of the tests."""
    done = run_tool('tools/train.py', 'configs/upernet_acmix_swin_t.py', '--data-root', tmp_path)
    message = plain_message(done)
    assert f'{tmp_path}/images/training does not exist' in message
    assert '--data-root DIR' in message


def test_error_of_a_worker_process_names_the_file_once(shapes, run_tool, tmp_path):
    data = shutil.copytree(shapes, tmp_path / 'data')
    for path in (data / 'train2017').iterdir():
        path.write_bytes(b'')
    done = run_tool('tools/train.py', DETECTION, '--data-root', data, '--work-dir',
                    tmp_path / 'work', '--cfg-options', 'train_dataloader.num_workers=2')
    message = plain_message(done)
    assert message.startswith(f'error: {data}/train2017/')
    assert message.endswith('.jpg is empty.\n')
    assert len(message.splitlines()) == 1
    assert not list((tmp_path / 'work').glob('*.pth'))


@pytest.mark.parametrize('other', [
    ['configs/shapes/maskrcnn_acmix_r50.py'],
    ['configs/shapes/upernet_acmix_swin.py'],
    [DETECTION, '--classes', 'circle', 'square'],
])
def test_checkpoint_of_another_network_is_rejected(other, detector, shapes, tmp_path):
    folder, _ = detector
    done = call_tool('test', ROOT / other[0], folder / 'epoch_3.pth', *other[1:],
                     '--data-root', shapes, '--work-dir', tmp_path, '--cfg-options', *FAST)
    message = plain_message(done)
    assert f"{folder}/epoch_3.pth does not match the config's model" in message
    assert 'missing or of another shape: ' in message


def test_options_without_a_value_are_rejected(run_tool):
    done = run_tool('tools/train.py', DETECTION, '--cfg-options', 'nonsense')
    assert done.returncode == 2
    assert "--cfg-options takes KEY=VALUE pairs, got 'nonsense'" in done.stderr
    assert 'Traceback' not in done.stderr


def test_make_shapes_does_not_overwrite(shapes, run_tool):
    message = plain_message(run_tool('tools/make_shapes.py', shapes))
    assert f'{shapes} exists and is not empty' in message


@pytest.mark.parametrize(('fault', 'message'), [
    ('missing', 'has no operators'),
    ('foreign', 'was built for another torch'),
])
def test_broken_mmcv_is_reported(fault, message, tmp_path, run_tool):
    """Use a copy of mmcv whose compiled operators are missing or cannot be loaded."""
    import mmcv
    package = tmp_path / 'mmcv'
    package.mkdir()
    for path in (ROOT / mmcv.__path__[0]).iterdir():
        if not path.name.startswith('_ext'):
            (package / path.name).symlink_to(path)
    if fault == 'foreign':
        (package / '_ext.py').write_text(
            'raise ImportError("_ext.so: undefined symbol: _ZN3c106detail")\n')
    for arguments in (['-m', 'acmix_mm.environment'],
                      ['tools/train.py', SEGMENTATION, '--classes', 'a', 'b']):
        done = run_tool(sys.executable, *arguments,
                        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
        assert message in plain_message(done)
        assert 'pip install --no-build-isolation' in done.stderr


def test_mmcv_for_another_torch_is_reported(tmp_path, monkeypatch):
    from acmix_mm import environment
    monkeypatch.setattr(environment, 'BUILT_FOR', tmp_path / 'stamp')
    environment.check_mmcv()
    (tmp_path / 'stamp').write_text('1.0.0\n')
    with pytest.raises(UsageError, match=r'was built for torch 1\.0\.0, but .* is installed'):
        environment.check_mmcv()
