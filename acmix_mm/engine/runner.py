"""Training and testing detectors and segmentors with MMEngine's runner."""

import contextlib
import logging
import os
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Optional, Union

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from acmix_mm.checkpoints.reading import LOAD_ERRORS, check_finite, explain_load_error, is_path
from acmix_mm.engine.config import (
    check_channels,
    check_class_counts,
    check_data,
    enter_scope,
)
from acmix_mm.engine.construction import construction_errors_as_usage_errors
from acmix_mm.engine.data_only import data_only
from acmix_mm.engine.loading import CheckFormatHook, CheckResumableHook, not_resumable
from acmix_mm.engine.outputs import (
    atomic_files,
    check_outputs,
    training_folder,
    use_atomic_checkpoints,
)
from acmix_mm.engine.resuming import make_reproducible
from acmix_mm.engine.samples import CheckSamplesHook
from acmix_mm.engine.settings import check_config, check_parts, warn_of_misspelt_settings
from acmix_mm.engine.unread import check_unread
from acmix_mm.environment import versions
from acmix_mm.layers.padded_conv import count_convolutions
from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import CheckpointError, UsageError, summary


class DataOnlyRunner(Runner):
    """MMEngine's runner; checkpoints run no code, and errors in config or checkpoint are explained.
    """

    # Whether a checkpoint must contain all weights of the model, as it must for testing.
    requires_all_weights = False

    def build_model(self, model: Union[nn.Module, dict]) -> nn.Module:
        """Build the model like :meth:`Runner.build_model`, and log its convolution layers.

        Distributed on CPUs, synchronised batch norms become ordinary ones.
        """
        built = super().build_model(model)
        log_convolutions(built)
        return without_sync_batchnorm(built) if self.distributed else built

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
        check_weights(shapes_of(self.model), checkpoint, filename, self.requires_all_weights)
        return checkpoint

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume like :meth:`Runner.resume`, from a checkpoint that has all that this needs.

        Raises:
            CheckpointError: as in :meth:`load_checkpoint`; or weights, or the state of the
                optimizer, are missing or do not match the config.
        """
        self.requires_all_weights = True
        self.register_hook(CheckResumableHook(filename), priority='VERY_HIGH')
        try:
            super().resume(filename, *args, **kwargs)
        except ValueError as error:
            # The optimizer has other parameter groups.
            raise CheckpointError(not_resumable(filename, str(error))) from error

    def save_checkpoint(self, *args: Any, meta: Optional[dict] = None, **kwargs: Any) -> None:
        """Save like :meth:`Runner.save_checkpoint`; ``meta`` also records package versions."""
        super().save_checkpoint(*args, meta={**(meta or {}), 'versions': versions()}, **kwargs)


class DataOnlyFlexibleRunner(FlexibleRunner):
    """MMEngine's runner for strategies such as FSDP, with the changes of :class:`DataOnlyRunner`.

    The model is built when the runner is created, as by MMEngine's other runner.
    """

    requires_all_weights = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with construction_errors_as_usage_errors():
            self.model = self.strategy.build_model(self.model)
        log_convolutions(self.model)
        self.model = without_sync_batchnorm(self.model)
        # Recorded now, because the strategy may distribute the weights over the processes.
        self.weight_shapes = shapes_of(self.model)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Load a checkpoint into the model like :meth:`FlexibleRunner.load_checkpoint`.

        Raises:
            CheckpointError: the file is missing, unreachable, damaged, contains code, or does not
                match the model.
        """
        with self.loading_as_data(filename):
            super().load_checkpoint(filename, *args, **kwargs)

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume from a checkpoint like :meth:`FlexibleRunner.resume`.

        Raises:
            CheckpointError: as in :meth:`load_checkpoint`; or weights, or the state of the
                optimizer, are missing.
        """
        self.requires_all_weights = True
        self.register_hook(CheckResumableHook(filename), priority='VERY_HIGH')
        with self.loading_as_data(filename):
            super().resume(filename, *args, **kwargs)

    @contextlib.contextmanager
    def loading_as_data(self, filename: str) -> Iterator[None]:
        """Read a checkpoint as data only, and explain errors until it has been read."""
        self.unread: Optional[str] = filename
        try:
            with data_only():
                yield
        except LOAD_ERRORS as error:
            if self.unread is None:
                raise
            raise CheckpointError(explain_load_error(filename, error)) from error

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks like :meth:`FlexibleRunner.call_hook`.

        MMEngine calls ``after_load_checkpoint`` when a checkpoint has been read, and before its
        weights are loaded into the model; after the hooks, this checks that they match.

        Raises:
            CheckpointError: the checkpoint does not match the model.
        """
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'after_load_checkpoint':
            check_weights(self.weight_shapes, kwargs['checkpoint'], self.unread,
                          self.requires_all_weights)
            self.unread = None

    def save_checkpoint(self, *args: Any, meta: Optional[dict] = None, **kwargs: Any) -> None:
        """Save like :meth:`FlexibleRunner.save_checkpoint`; ``meta`` also records package versions.
        """
        super().save_checkpoint(*args, meta={**(meta or {}), 'versions': versions()}, **kwargs)


# What the tools use in place of MMEngine's runners.
DATA_ONLY_RUNNERS = {Runner: DataOnlyRunner, FlexibleRunner: DataOnlyFlexibleRunner}


def log_convolutions(model: nn.Module) -> None:
    """Log how many convolutions this package's convolution types replaced, and left, if any."""
    layers, left = count_convolutions(model)
    if layers or left:
        built, unchanged = (', '.join(f'{number} {kind}' for kind, number in sorted(each.items()))
                            or 'none' for each in (layers, left))
        # Not "replaced": in a Swin, such a layer replaces attention.
        print_log(f'Convolution layers built: {built}; convolutions left unchanged: {unchanged}.',
                  logger='current')


def without_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace SyncBatchNorm, which needs GPUs, if there are none; the weights keep their names."""
    if torch.cuda.is_available() or not any(isinstance(module, nn.SyncBatchNorm)
                                            for module in model.modules()):
        return model
    print_log('SyncBatchNorm needs GPUs: on CPUs, each process normalises by its own images.',
              logger='current', level=logging.WARNING)
    return revert_sync_batchnorm(model)


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
    check_weights(shapes_of(model), checkpoint, source, require_all=True)
    model.load_state_dict(checkpoint.get('state_dict', checkpoint), strict=False)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the weights of a model, by their names in a checkpoint."""
    # Wrappers for distributed training and for test-time augmentation call the model "module".
    return {key.removeprefix('module.'): value.shape
            for key, value in model.state_dict().items()}


def check_weights(shapes: Mapping[str, torch.Size], checkpoint: Mapping, source: str,
                  require_all: bool) -> None:
    """Check that a checkpoint contains some or, with ``require_all``, all weights of a model.

    Args:
        shapes: the shapes of the weights, see :func:`shapes_of`.
        checkpoint: the checkpoint, or a state dict.
        source: where it comes from, for messages.
        require_all: whether all weights must be there.

    Raises:
        CheckpointError: the weights are missing or have another shape; or, with ``require_all``,
            some are NaN or infinite.
    """
    weights = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else {}
    missing = [key for key, shape in shapes.items()
               if key not in weights or weights[key].shape != shape]
    if len(missing) == len(shapes) or (require_all and missing):
        raise CheckpointError(f"The checkpoint {source} does not match the config's model; missing "
                              f'or of another shape: {summary(missing)}.')
    if require_all:
        check_finite(weights, source)


@data_only()
def train(cfg: Config) -> None:
    """Train a model as configured, after checking that data and checkpoints exist.

    Raises:
        UsageError: data or a checkpoint is missing or unreachable, or a setting is invalid.
    """
    splits = ('train', 'val') if cfg.get('val_cfg') else ('train',)
    check_run(cfg, splits)
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if type_name(wrapper) == 'AmpOptimWrapper' and not torch.cuda.is_available():
        raise UsageError('Mixed precision needs a GPU, but torch finds none: leave out --amp or, '
                         'if the config enables it, pass --cfg-options '
                         'optim_wrapper.type=OptimWrapper.')
    make_reproducible(cfg)
    use_atomic_checkpoints(cfg)
    with prepared(cfg, checkpoint_sources(cfg)), training_folder(cfg):
        build_runner(cfg, splits).train()


@data_only()
def test(cfg: Config) -> dict[str, float]:
    """Test the checkpoint ``cfg.load_from`` and return its metrics.

    Raises:
        UsageError: data or the checkpoint is missing or unreachable, or a setting is invalid.
    """
    check_run(cfg, ('test',))
    return test_checked(cfg, [cfg.load_from])


def test_checked(cfg: Config, checkpoints: Sequence[str]) -> dict[str, float]:
    """Test a model whose settings :func:`check_run` has checked, and return its metrics.

    Args:
        cfg: the config.
        checkpoints: those that it loads.

    Raises:
        UsageError: a checkpoint is missing, or an output cannot be written.
    """
    with prepared(cfg, checkpoints), atomic_files():
        runner = build_runner(cfg, ('test',))
        runner.requires_all_weights = True
        return runner.test()


@contextlib.contextmanager
def prepared(cfg: Config, sources: Sequence[str]) -> Iterator[None]:
    """Check checkpoints and output paths, and prepare CPU runs; explain empty datasets.

    Raises:
        CheckpointError: a checkpoint of ``sources`` does not exist.
        UsageError: a dataset is empty, a directory is not writable, the launcher needs a GPU, or
            there is no Slurm job.
    """
    if cfg.launcher == 'slurm' and 'SLURM_PROCID' not in os.environ:
        raise UsageError('--launcher slurm works in a Slurm job only: use tools/slurm_train.sh and '
                         'tools/slurm_test.sh.')
    check_outputs(cfg)
    for source in sources:
        if is_path(source) and not os.path.isfile(source):
            raise CheckpointError(explain_load_error(source, FileNotFoundError()))
    if not torch.cuda.is_available():
        prepare_cpu(cfg)
    try:
        with construction_errors_as_usage_errors():
            yield
    except ValueError as error:
        # MMEngine fails this way on a dataset without images.
        if str(error) != 'need at least one array to concatenate':
            raise
        raise UsageError("A dataset is empty: none of its images contains one of the config's "
                         'classes; name your own classes with --classes NAME ….') from error


def check_run(cfg: Config, splits: Sequence[str]) -> None:
    """Check the settings and the data of a run before anything is built.

    Raises:
        UsageError: a setting is missing or invalid, or data is missing or invalid.
    """
    check_parts(cfg, splits)
    enter_scope(cfg)
    check_config(cfg)
    check_unread(cfg)
    warn_of_misspelt_settings(cfg)
    check_data(cfg, splits)


def runner_class(cfg: Config) -> type:
    """Return the class of the runner that the config names as ``runner_type``, or of the default.

    In place of MMEngine's own runners, these are those in ``DATA_ONLY_RUNNERS``.

    Raises:
        UsageError: there is no such runner.
    """
    named = cfg.get('runner_type', Runner)
    found = RUNNERS.get(named) if isinstance(named, str) else named
    if found is None:
        raise UsageError(f'The runner {named!r} that the config names as runner_type is not '
                         "registered; MMEngine's are 'Runner' and 'FlexibleRunner'.")
    return DATA_ONLY_RUNNERS.get(found, found)


def build_runner(cfg: Config, splits: Sequence[str]) -> Union[Runner, FlexibleRunner]:
    """Build the runner of a config, and check that its model fits the data.

    Raises:
        UsageError: there is no such runner, the model has another number of classes than the
            datasets of ``splits``, or its neck does not fit the backbone.
    """
    runner = runner_class(cfg).from_cfg(cfg)
    model = getattr(runner.model, 'module', runner.model)
    check_class_counts(model, cfg, splits)
    check_channels(model)
    runner.register_hook(CheckSamplesHook())
    runner.register_hook(CheckFormatHook())
    return runner


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
        UsageError: the launcher is MPI.
    """
    if cfg.launcher == 'none':
        return
    if cfg.launcher == 'mpi':
        raise UsageError('--launcher mpi needs GPUs, but torch finds none; on CPUs use '
                         'tools/dist_train.sh or tools/slurm_train.sh.')
    if cfg.launcher == 'slurm':
        set_slurm_environment()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    cfg.setdefault('model_wrapper_cfg', dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False)))


def set_slurm_environment() -> None:
    """Set the environment variables that torch reads, as MMEngine does for Slurm jobs with GPUs."""
    task = {name: os.environ[f'SLURM_{name}'] for name in ('PROCID', 'LOCALID', 'NTASKS')}
    os.environ.update(
        RANK=task['PROCID'], LOCAL_RANK=task['LOCALID'], WORLD_SIZE=task['NTASKS'])
    os.environ.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in os.environ:
        hosts = subprocess.run(['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']],
                               check=True, capture_output=True, text=True)
        os.environ['MASTER_ADDR'] = hosts.stdout.split()[0]


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
    merges_boxes = type_name(cfg.tta_model.type) == 'DetTTAModel'
    if merges_boxes and cfg.model.get('roi_head', {}).get('mask_head'):
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
