"""Training with fully sharded data parallelism (FSDP)."""

from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.optim import BaseOptimWrapper, DefaultOptimWrapperConstructor
from mmengine.registry import FUNCTIONS, OPTIM_WRAPPER_CONSTRUCTORS, STRATEGIES
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.fully_sharded_data_parallel import OptimStateKeyType
from torch.optim import Optimizer

from acmix_mm.backbones.base import Block
from acmix_mm.utils.errors import UsageError, summary


@FUNCTIONS.register_module()
def backbone_block_policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Shard each block of an ACmix backbone separately, as ``auto_wrap_policy`` of FSDP.

    All other modules are sharded together. FSDP gathers the parameters of a unit in its
    ``forward``, on all processes: but MMDetection calls other methods of the heads, and runs some
    heads only for images with proposals.
    """
    return recurse or isinstance(module, Block)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class FSDPOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor; ``paramwise_cfg`` matches the names in the unsharded model."""

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '',
                   **kwargs: Any) -> None:
        """Add the parameters of a module like :meth:`DefaultOptimWrapperConstructor.add_params`."""
        # FSDP inserts a module of this name.
        super().add_params(params, module, prefix.replace('._fsdp_wrapped_module', ''), **kwargs)


@STRATEGIES.register_module()
class ACmixFSDPStrategy(FSDPStrategy):
    """MMEngine's FSDPStrategy, corrected for torch 2.1 and newer and for CPUs.

    Checkpoints contain the weights of the unsharded model: they can be tested without FSDP, and
    training can be resumed on another number of processes.

    Args:
        kwargs: arguments of ``FSDPStrategy``, except ``state_dict_cfg``.

    Raises:
        UsageError: this is not a distributed job.
    """

    def __init__(self, **kwargs: Any) -> None:
        # Offloading frees the original, which on a CPU is the only copy.
        states = dict(rank0_only=True, offload_to_cpu=torch.cuda.is_available())
        super().__init__(**kwargs, state_dict_cfg=dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', **states),
            optim_state_dict_config=dict(type='FullOptimStateDictConfig', **states)))
        if not self.distributed:
            raise UsageError(
                'FSDP needs a distributed job: use tools/dist_train.sh or tools/slurm_train.sh. To '
                'test a checkpoint in one process, use the config without FSDP.')

    def build_model(self, model: Union[nn.Module, dict]) -> nn.Module:
        """Build the model like :meth:`FSDPStrategy.build_model`."""
        built = super().build_model(model)
        self.weight_shapes = {key: value.shape for key, value in built.state_dict().items()}
        return built

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not torch.cuda.is_available():
            # MMEngine's default, the local rank, would be the index of a GPU.
            self.model_wrapper = {**(self.model_wrapper or {}), 'device_id': torch.device('cpu')}
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper: Union[Optimizer, BaseOptimWrapper, dict],
                            model: Optional[nn.Module] = None) -> BaseOptimWrapper:
        """Build the optimizer wrapper like :meth:`FSDPStrategy.build_optim_wrapper`.

        ``paramwise_cfg`` applies to the names and shapes of the unsharded model.

        Raises:
            UsageError: gradients are to be clipped. MMEngine would clip the shard of each process
                by a norm of its own.
        """
        if isinstance(optim_wrapper, dict):
            if optim_wrapper.get('clip_grad'):
                raise UsageError('Gradients cannot be clipped with FSDP: pass --cfg-options '
                                 'optim_wrapper.clip_grad=None, or use the config without FSDP.')
            optim_wrapper.setdefault('constructor', 'FSDPOptimWrapperConstructor')
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return super().build_optim_wrapper(optim_wrapper, model)

    def load_model_state_dict(self, state_dict: Mapping[str, Tensor], *, strict: bool = False,
                              revise_keys: Optional[list] = None) -> None:
        """Load the weights of the unsharded model like :meth:`FSDPStrategy.load_model_state_dict`.

        Weights with another shape are left out, as MMEngine does without FSDP.
        """
        fitting = {key: value for key, value in state_dict.items()
                   if self.weight_shapes.get(key) == value.shape}
        missing = [key for key in self.weight_shapes if key not in fitting]
        if missing:
            self.logger.warning('Not in the checkpoint or of another shape: %s', summary(missing))
        super().load_model_state_dict(fitting, strict=strict)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the optimizer state of the unsharded model, saved with or without FSDP."""
        optimizer = self.optim_wrapper.optimizer
        if any(isinstance(key, int) for key in state_dict['state']):
            state_dict = FullyShardedDataParallel.rekey_optim_state_dict(
                state_dict, OptimStateKeyType.PARAM_NAME, self.model, optim=optimizer)
        # MMEngine passes the arguments in the order that they had before torch 2.1.
        self.optim_wrapper.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=optimizer, optim_state_dict=state_dict))
