"""Recording the rates of the two paths during training."""

import contextlib
from typing import Optional

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from acmix_mm.analysis.rates import rates_of
from acmix_mm.checkpoints.reading import WRAPPERS


@HOOKS.register_module()
class RateHook(Hook):
    """Log the rates of every ACmix layer to all visualization backends of a run.

    The scalars are named ``rates/LAYER.rate1`` (attention, α in arXiv 2111.14556) and
    ``rates/LAYER.rate2`` (convolution, β).

    Args:
        interval: number of iterations between records.

    Raises:
        UsageError: before training, if the model has no rates.
    """

    def __init__(self, interval: int = 50) -> None:
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        """Check that the model has rates."""
        self.scalars(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Optional[dict] = None,
                         outputs: Optional[dict] = None) -> None:
        """Log the rates every ``interval`` iterations."""
        if self.every_n_train_iters(runner, self.interval):
            runner.visualizer.add_scalars(self.scalars(runner), step=runner.iter + 1)

    def scalars(self, runner: Runner) -> dict[str, float]:
        """Return the rates of the model by the names of their scalars."""
        model = runner.model
        # With FSDP, each process has a part of the rates only.
        gather = getattr(model, 'summon_full_params', contextlib.nullcontext)
        with gather(model):
            weights = {WRAPPERS.sub('', key): value for key, value in model.named_parameters()}
            rates = rates_of(weights, 'The model for RateHook')
        return {f'rates/{layer}.{rate}': value
                for rate, values in (('rate1', rates.attention), ('rate2', rates.convolution))
                for layer, value in zip(rates.layers, values.tolist())}
