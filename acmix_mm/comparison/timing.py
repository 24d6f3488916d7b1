"""Timing of networks in interleaved rounds, so that a drift of the machine affects all alike."""

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner, set_random_seed

from acmix_mm.analysis.complexity import predict
from acmix_mm.benchmark import seconds_of
from acmix_mm.engine.config import build_network

# Rounds, in which each network runs once, continue for this long, within these bounds.
SECONDS = 20.
MIN_ROUNDS, MAX_ROUNDS = 7, 101
# Training steps of each network that are timed, after the warm-up.
STEPS, WARM_UP_STEPS = 20, 3


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


class Latency(NamedTuple):
    """Seconds of one prediction, and the ratio to the reference's in the same round."""

    seconds: Spread
    ratio: Spread


def spread(values: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(values, n=4, method='inclusive')
    return Spread(median, low, high)


def latencies(models: dict[str, ConfigDict], shape: tuple[int, int]) -> dict[str, Latency]:
    """Measure the latency of networks on one image, without the selection of boxes.

    Args:
        models: model configs by name, the reference first.
        shape: (height, width) of the image.
    """
    device = get_device()
    image = torch.rand(1, 3, *shape, device=device)
    networks = {name: build_network(deepcopy(model)).to(device) for name, model in models.items()}
    runs = {name: functools.partial(predict, network, image)
            for name, network in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    with torch.no_grad():
        for finished in range(MAX_ROUNDS):
            if finished >= MIN_ROUNDS and time.perf_counter() - start > SECONDS:
                break
            for name, run in runs.items():
                seconds[name].append(seconds_of(run, device))
    reference = next(iter(seconds.values()))
    return {name: Latency(spread(each), spread([a / b for a, b in zip(each, reference)]))
            for name, each in seconds.items()}


def validation_image_size(cfg: Config) -> tuple[int, int]:
    """Return the (height, width) of the first validation image, as the network receives it."""
    sample = DATASETS.build(cfg.val_dataloader.dataset)[0]
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    return tuple(preprocessor(pseudo_collate([sample]))['inputs'].shape[-2:])


def iteration_seconds(cfg: Config, models: dict[str, ConfigDict]) -> dict[str, float]:
    """Measure the mean time of a training iteration of each network, data loading included.

    All networks read from the config's own data loader, and wait for it as they do in training.
    """
    device = get_device()
    set_random_seed(0)
    batches = iter_batches(cfg)
    trainers = {}
    for name, model in models.items():
        network = build_network(deepcopy(model)).to(device).train()
        trainers[name] = network, build_optim_wrapper(network, deepcopy(cfg.optim_wrapper))
    seconds = dict.fromkeys(trainers, 0.)
    for step in range(WARM_UP_STEPS + STEPS):
        for name, (network, optimizer) in trainers.items():
            # torch.utils.benchmark.Timer would add two warm-up steps to every step that it times.
            start = time.perf_counter()
            network.train_step(next(batches), optimizer)
            if device != 'cpu':
                torch.cuda.synchronize()
            if step >= WARM_UP_STEPS:
                seconds[name] += (time.perf_counter() - start) / STEPS
    return seconds


def iter_batches(cfg: Config) -> Iterator[Any]:
    """Yield batches of the config's training data, epoch after epoch."""
    dataloader = Runner.build_dataloader(deepcopy(cfg.train_dataloader), seed=0)
    while True:
        yield from dataloader
