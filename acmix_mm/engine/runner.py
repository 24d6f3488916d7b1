"""Training and testing with MMEngine's runner, for detection and segmentation alike."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Optional, Union
from urllib.error import URLError

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from acmix_mm.checkpoints.loading import summary
from acmix_mm.checkpoints.reading import (
    HAS_ALLOW_LIST,
    LOAD_ERRORS,
    allow_mmengine_checkpoints,
    explain_load_error,
    is_path,
    read_checkpoint,
    weights_only,
)
from acmix_mm.engine.config import check_data, explained_arguments
from acmix_mm.environment import versions
from acmix_mm.utils.errors import CheckpointError, UsageError


class DataOnlyRunner(Runner):
    """MMEngine's runner, which takes checkpoints as data and says plainly what is wrong with one.
    """

    # Whether a checkpoint must have all of the model's weights, as for a test.
    takes_whole_checkpoints_only = False

    def build_model(self, model: Union[nn.Module, dict]) -> nn.Module:
        """Build as :meth:`Runner.build_model`.

        Raises:
            UsageError: it does not take its arguments.
        """
        with explained_arguments():
            return super().build_model(model)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict:
        """Load into the model, as :meth:`Runner.load_checkpoint`.

        Raises:
            CheckpointError: the file is missing, unreachable, damaged, holds code, or is of another
                network.
        """
        try:
            with weights_only() if HAS_ALLOW_LIST else contextlib.nullcontext():
                checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        except LOAD_ERRORS as error:
            raise CheckpointError(explain_load_error(filename, error)) from error
        check_fit(self.model, checkpoint, filename, self.takes_whole_checkpoints_only)
        return checkpoint

    def save_checkpoint(self, *args: Any, meta: Optional[dict] = None, **kwargs: Any) -> None:
        """Save as :meth:`Runner.save_checkpoint`, and write down which versions trained this."""
        super().save_checkpoint(*args, meta={**(meta or {}), 'versions': versions()}, **kwargs)


def load_weights(model: nn.Module, source: str) -> None:
    """Load all weights of a model from a checkpoint of a training run, as data.

    Raises:
        CheckpointError: it cannot be read, or is of another network.
    """
    fill(model, read_checkpoint(source), source)


def fill(model: nn.Module, checkpoint: Mapping, source: str) -> None:
    """Give a model all of its weights, from a checkpoint that was read, or a state dict.

    Raises:
        CheckpointError: they are of another network.
    """
    check_fit(model, checkpoint, source, whole=True)
    model.load_state_dict(checkpoint.get('state_dict', checkpoint), strict=False)


def check_fit(model: nn.Module, checkpoint: Mapping, source: str, whole: bool) -> None:
    """Raise CheckpointError where a checkpoint has nothing of a model's weights or, with ``whole``,
    not all of them.
    """
    weights = checkpoint.get('state_dict', checkpoint)
    # What wraps a model, for several processes or for augmented tests, calls it "module".
    own = {key.removeprefix('module.'): value for key, value in model.state_dict().items()}
    unfit = [key for key, value in own.items()
             if key not in weights or weights[key].shape != value.shape]
    if len(unfit) == len(own) or (whole and unfit):
        raise CheckpointError(f'The checkpoint {source} is of another network than the '
                              f"config's: missing or of another shape: {summary(unfit)}.")


def train(cfg: Config) -> None:
    """Train as the config says, after checking that its data and checkpoints are there.

    Raises:
        UsageError: something is missing or unreachable; the message says what to do.
    """
    check_data(cfg, ('train', 'val') if cfg.get('val_cfg') else ('train',))
    if cfg.optim_wrapper.type == 'AmpOptimWrapper' and not torch.cuda.is_available():
        raise UsageError('Mixed precision needs a GPU, and torch sees none: leave out --amp or, '
                         'where the config asks for it, pass --cfg-options '
                         'optim_wrapper.type=OptimWrapper.')
    with prepared(cfg, checkpoint_sources(cfg)):
        build_runner(cfg).train()


def test(cfg: Config) -> dict[str, float]:
    """Test the checkpoint ``cfg.load_from`` and return its metrics.

    Raises:
        UsageError: something is missing or unreachable; the message says what to do.
    """
    check_data(cfg, ('test',))
    with prepared(cfg, [cfg.load_from]):
        runner = build_runner(cfg)
        runner.takes_whole_checkpoints_only = True
        return runner.test()


@contextlib.contextmanager
def prepared(cfg: Config, sources: Sequence[str]) -> Iterator[None]:
    """Check the checkpoints, prepare for a CPU, and explain failed downloads and empty data."""
    for source in sources:
        if is_path(source) and not os.path.isfile(source):
            raise CheckpointError(explain_load_error(source, FileNotFoundError()))
    allow_mmengine_checkpoints()
    if not torch.cuda.is_available():
        prepare_cpu(cfg)
    try:
        yield
    except (URLError, ConnectionError, TimeoutError) as error:
        remote = [source for source in sources if not is_path(source)]
        raise CheckpointError(explain_load_error(' or '.join(remote), error)) from error
    except ValueError as error:
        # What MMEngine says of a dataset without a picture.
        if str(error) != 'need at least one array to concatenate':
            raise
        raise UsageError("A dataset is empty: none of its pictures holds one of the config's "
                         'classes; name those of your data with --classes NAME ….') from error


def build_runner(cfg: Config) -> Runner:
    """The runner that the config names, or :class:`DataOnlyRunner`."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else DataOnlyRunner.from_cfg(cfg)


def checkpoint_sources(node: Any) -> list[str]:
    """Every checkpoint that a config names, in ``load_from`` and in any ``init_cfg``."""
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
    """Let a distributed run work without a GPU; MMEngine takes one for granted.

    Raises:
        UsageError: the launcher is not torchrun.
    """
    if cfg.launcher == 'none':
        return
    if cfg.launcher != 'pytorch':
        raise UsageError(f'--launcher {cfg.launcher} needs GPUs, and torch sees none; on CPUs use '
                         'tools/dist_train.sh, which goes through torchrun.')
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    cfg.setdefault('model_wrapper_cfg', dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False)))


def show_predictions(cfg: Config, show: bool, show_dir: Optional[str], wait_time: float) -> None:
    """Draw every prediction of a test: in a window, or as pictures below ``show_dir``.

    Raises:
        UsageError: the config has no visualization hook.
    """
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise UsageError('--show and --show-dir draw through the hook default_hooks.visualization, '
                         'and the config has none.')
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
    """Write the predictions of a test to ``out``: a pickle of detections, or a folder of maps.

    Raises:
        UsageError: detections are to go into something else than a pickle.
    """
    if cfg.default_scope == 'mmseg':
        cfg.test_evaluator.update(output_dir=out, keep_results=True)
        return
    if not out.endswith(('.pkl', '.pickle')):
        raise UsageError(f'--out writes detections as a pickle: name a .pkl file, not {out}.')
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    cfg.test_evaluator = [*metrics, dict(type='DumpDetResults', out_file_path=out)]


def augment_test(cfg: Config) -> None:
    """Average predictions over augmented copies of each test image.

    As the config's ``tta_model`` and ``tta_pipeline`` say; detection configs have none, and get
    MMDetection's default, both horizontal flips.
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
        warnings.warn('MMDetection merges boxes alone over augmented images: masks are neither '
                      'predicted nor evaluated under --tta.', stacklevel=2)
        cfg.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
        cfg.test_evaluator.metric = 'bbox'
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def scale_learning_rate(cfg: Config) -> None:
    """Scale the learning rate to the batch size actually used.

    Raises:
        UsageError: the config does not say which batch size its learning rate is for.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UsageError('--auto-scale-lr needs to know which batch size the learning rate is for, '
                         'and the config does not say: pass --cfg-options '
                         'auto_scale_lr.base_batch_size=16, for 8 GPUs with 2 images each.')
    cfg.auto_scale_lr.enable = True


def use_mixed_precision(cfg: Config) -> None:
    """Train in mixed precision with dynamic loss scaling."""
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.loss_scale = 'dynamic'
