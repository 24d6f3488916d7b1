"""Training and testing detectors and segmentors with MMEngine's runner."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Optional, Union

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from acmix_mm.checkpoints.loading import summary
from acmix_mm.checkpoints.reading import LOAD_ERRORS, explain_load_error, is_path
from acmix_mm.engine.config import check_data, constructor_errors_as_usage_errors
from acmix_mm.engine.data_only import data_only
from acmix_mm.engine.outputs import (
    atomic_files,
    check_outputs,
    training_folder,
    use_atomic_checkpoints,
)
from acmix_mm.engine.resuming import make_reproducible
from acmix_mm.environment import versions
from acmix_mm.layers.padded_conv import count_convolutions
from acmix_mm.utils.errors import CheckpointError, UsageError


class DataOnlyRunner(Runner):
    """MMEngine's runner; checkpoints run no code, and errors in config or checkpoint are explained.
    """

    # Whether a checkpoint must contain all weights of the model, as it must for testing.
    requires_all_weights = False

    def build_model(self, model: Union[nn.Module, dict]) -> nn.Module:
        """Build the model like :meth:`Runner.build_model`, and log its convolution layers.

        Raises:
            UsageError: an argument is invalid.
        """
        with constructor_errors_as_usage_errors():
            built = super().build_model(model)
        log_convolutions(built)
        return built

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict:
        """Load a checkpoint into the model like :meth:`Runner.load_checkpoint`.

        Raises:
            CheckpointError: the file is missing, unreachable, damaged, contains code, or does not
                match the model.
        """
        try:
            with data_only():
                checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        except LOAD_ERRORS as error:
            raise CheckpointError(explain_load_error(filename, error)) from error
        check_weights(self.model, checkpoint, filename, self.requires_all_weights)
        return checkpoint

    def save_checkpoint(self, *args: Any, meta: Optional[dict] = None, **kwargs: Any) -> None:
        """Save like :meth:`Runner.save_checkpoint`; ``meta`` also records package versions."""
        super().save_checkpoint(*args, meta={**(meta or {}), 'versions': versions()}, **kwargs)


def log_convolutions(model: nn.Module) -> None:
    """Log how many convolutions this package's convolution types replaced, and left, if any."""
    layers, left = count_convolutions(model)
    if layers or left:
        built, unchanged = (', '.join(f'{number} {kind}' for kind, number in sorted(each.items()))
                            or 'none' for each in (layers, left))
        # Not "replaced": in a Swin, such a layer replaces attention.
        print_log(f'Convolution layers built: {built}; convolutions left unchanged: {unchanged}.',
                  logger='current')


def load_all_weights(model: nn.Module, checkpoint: Mapping, source: str) -> None:
    """Load a checkpoint or state dict that must contain all weights of a model.

    Other entries are ignored.

    Args:
        model: the model to load into.
        checkpoint: the checkpoint, already read.
        source: where it comes from, for messages.

    Raises:
        CheckpointError: the checkpoint does not match the model.
    """
    check_weights(model, checkpoint, source, require_all=True)
    model.load_state_dict(checkpoint.get('state_dict', checkpoint), strict=False)


def check_weights(model: nn.Module, checkpoint: Mapping, source: str, require_all: bool) -> None:
    """Check that a checkpoint contains some or, with ``require_all``, all weights of a model.

    Raises:
        CheckpointError: the weights are missing or have another shape.
    """
    weights = checkpoint.get('state_dict', checkpoint)
    # Wrappers for distributed training and for test-time augmentation call the model "module".
    own = {key.removeprefix('module.'): value for key, value in model.state_dict().items()}
    missing = [key for key, value in own.items()
               if key not in weights or weights[key].shape != value.shape]
    if len(missing) == len(own) or (require_all and missing):
        raise CheckpointError(f"The checkpoint {source} does not match the config's model; missing "
                              f'or of another shape: {summary(missing)}.')


@data_only()
def train(cfg: Config) -> None:
    """Train a model as configured, after checking that data and checkpoints exist.

    Raises:
        UsageError: data or a checkpoint is missing or unreachable, or a setting is invalid.
    """
    check_data(cfg, ('train', 'val') if cfg.get('val_cfg') else ('train',))
    if cfg.optim_wrapper.type == 'AmpOptimWrapper' and not torch.cuda.is_available():
        raise UsageError('Mixed precision needs a GPU, but torch finds none: leave out --amp or, '
                         'if the config enables it, pass --cfg-options '
                         'optim_wrapper.type=OptimWrapper.')
    make_reproducible(cfg)
    use_atomic_checkpoints(cfg)
    with prepared(cfg, checkpoint_sources(cfg)), training_folder(cfg):
        build_runner(cfg).train()


@data_only()
def test(cfg: Config) -> dict[str, float]:
    """Test the checkpoint ``cfg.load_from`` and return its metrics.

    Raises:
        UsageError: data or the checkpoint is missing or unreachable, or a setting is invalid.
    """
    check_data(cfg, ('test',))
    with prepared(cfg, [cfg.load_from]), atomic_files():
        runner = build_runner(cfg)
        runner.requires_all_weights = True
        return runner.test()


@contextlib.contextmanager
def prepared(cfg: Config, sources: Sequence[str]) -> Iterator[None]:
    """Check checkpoints and output paths, and prepare CPU runs; explain empty datasets.

    Raises:
        CheckpointError: a checkpoint of ``sources`` does not exist.
        UsageError: a dataset is empty, a directory is not writable, or the launcher needs a GPU.
    """
    check_outputs(cfg)
    for source in sources:
        if is_path(source) and not os.path.isfile(source):
            raise CheckpointError(explain_load_error(source, FileNotFoundError()))
    if not torch.cuda.is_available():
        prepare_cpu(cfg)
    try:
        yield
    except ValueError as error:
        # MMEngine fails this way on a dataset without images.
        if str(error) != 'need at least one array to concatenate':
            raise
        raise UsageError("A dataset is empty: none of its images contains one of the config's "
                         'classes; name your own classes with --classes NAME ….') from error


def build_runner(cfg: Config) -> Runner:
    """Build the runner named by the config; :class:`DataOnlyRunner` in place of MMEngine's."""
    named = cfg.get('runner_type', 'Runner')
    return DataOnlyRunner.from_cfg(cfg) if named == 'Runner' else RUNNERS.build(cfg)


def checkpoint_sources(node: Any) -> list[str]:
    """List the checkpoints that a config names, in ``load_from`` and in any ``init_cfg``."""
    if isinstance(node, (list, tuple)):
        return [source for child in node for source in checkpoint_sources(child)]
    if not isinstance(node, (dict, Config)):
        return []
    found = []
    for key, value in node.items():
        if key in ('load_from', 'checkpoint', 'pretrained') and isinstance(value, str):
            found.append(value)
        elif not key.startswith('_'):
            found += checkpoint_sources(value)
    return found


def prepare_cpu(cfg: Config) -> None:
    """Set up a distributed run without GPUs, which MMEngine does not support by itself.

    Raises:
        UsageError: the launcher is not torchrun.
    """
    if cfg.launcher == 'none':
        return
    if cfg.launcher != 'pytorch':
        raise UsageError(f'--launcher {cfg.launcher} needs GPUs, but torch finds none; on CPUs use '
                         'tools/dist_train.sh, which uses torchrun.')
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    cfg.setdefault('model_wrapper_cfg', dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False)))


def show_predictions(cfg: Config, show: bool, show_dir: Optional[str], wait_time: float) -> None:
    """Draw every prediction of a test in a window, or into image files below ``show_dir``.

    Raises:
        UsageError: the config has no visualization hook.
    """
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise UsageError('--show and --show-dir need the hook default_hooks.visualization, which '
                         'this config does not have.')
    hook.draw = True
    hook.interval = 1
    if show:
        hook.show = True
        hook.wait_time = wait_time
    if show_dir and cfg.default_scope == 'mmseg':
        cfg.visualizer.save_dir = os.path.abspath(show_dir)
    elif show_dir:
        hook.test_out_dir = os.path.abspath(show_dir)


def save_predictions(cfg: Config, out: str) -> None:
    """Save the predictions of a test: detections as a pickle, segmentations as a folder of maps.

    Raises:
        UsageError: the output file for detections is not a pickle.
    """
    if cfg.default_scope == 'mmseg':
        cfg.test_evaluator.update(output_dir=out, keep_results=True)
        return
    if not out.endswith(('.pkl', '.pickle')):
        raise UsageError(f'--out writes detections as a pickle; name a .pkl file, not {out}.')
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    cfg.test_evaluator = [*metrics, dict(type='DumpDetResults', out_file_path=out)]


def augment_test(cfg: Config) -> None:
    """Average predictions over augmented copies of each test image (test-time augmentation).

    Uses the config's ``tta_model`` and ``tta_pipeline``. Detection configs without them get
    MMDetection's default, the image and its horizontal flip.
    """
    if cfg.default_scope == 'mmdet' and 'tta_model' not in cfg:
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(
            nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
    if 'tta_pipeline' not in cfg:
        *load, pack = deepcopy(cfg.test_dataloader.dataset.pipeline)
        pack.meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
                          'flip_direction')
        flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
        cfg.tta_pipeline = [*load, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    if cfg.tta_model.type == 'DetTTAModel' and cfg.model.get('roi_head', {}).get('mask_head'):
        warnings.warn('MMDetection merges only boxes over augmented images: masks are neither '
                      'predicted nor evaluated with --tta.', stacklevel=2)
        cfg.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
        cfg.test_evaluator.metric = 'bbox'
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def scale_learning_rate(cfg: Config) -> None:
    """Scale the learning rate linearly to the actual batch size.

    Raises:
        UsageError: the config does not state the batch size that its learning rate is for.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UsageError('--auto-scale-lr needs the batch size that the learning rate is for, '
                         'which this config does not state: pass --cfg-options '
                         'auto_scale_lr.base_batch_size=16, for 8 GPUs with 2 images each.')
    cfg.auto_scale_lr.enable = True


def use_mixed_precision(cfg: Config) -> None:
    """Train in mixed precision with dynamic loss scaling."""
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.loss_scale = 'dynamic'
