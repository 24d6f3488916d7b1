"""Timing networks turn and turn about, so that a machine that drifts drifts for all."""

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

# Rounds of turns: as many as fit into the seconds, within these bounds.
SECONDS = 20.
ROUNDS = (7, 51)
# Training steps of each network that are timed, after some that are not.
STEPS, WARM_UP_STEPS = 20, 3


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


class Latency(NamedTuple):
    """Seconds of one prediction, and their ratio to the reference's in the same round."""

    seconds: Spread
    ratio: Spread


def spread(values: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(values, n=4, method='inclusive')
    return Spread(median, low, high)


def latencies(models: dict[str, ConfigDict], shape: tuple[int, int]) -> dict[str, Latency]:
    """Time the predictions of networks on one picture, without what selects boxes.

    Args:
        models: configs by name, the reference first.
        shape: (height, width) of the picture.
    """
    device = get_device()
    image = torch.rand(1, 3, *shape, device=device)
    networks = {name: build_network(deepcopy(model)).to(device) for name, model in models.items()}
    runs = {name: functools.partial(predict, network, image)
            for name, network in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    with torch.no_grad():
        for turn in range(ROUNDS[1]):
            if turn >= ROUNDS[0] and time.perf_counter() - start > SECONDS:
                break
            for name, run in runs.items():
                seconds[name].append(seconds_of(run, device))
    reference = next(iter(seconds.values()))
    return {name: Latency(spread(each), spread([a / b for a, b in zip(each, reference)]))
            for name, each in seconds.items()}


def picture_shape(cfg: Config) -> tuple[int, int]:
    """(height, width) of the first validation picture, as the network sees it."""
    sample = DATASETS.build(cfg.val_dataloader.dataset)[0]
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    return tuple(preprocessor(pseudo_collate([sample]))['inputs'].shape[-2:])


def iteration_seconds(cfg: Config, models: dict[str, ConfigDict]) -> dict[str, float]:
    """The mean time of a training iteration of each network, loading of its data included.

    All are fed from one data loader, the config's own, so that they wait for it as in training.
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
            start = time.perf_counter()
            network.train_step(next(batches), optimizer)
            if device != 'cpu':
                torch.cuda.synchronize()
            if step >= WARM_UP_STEPS:
                seconds[name] += (time.perf_counter() - start) / STEPS
    return seconds


def iter_batches(cfg: Config) -> Iterator[Any]:
    """Batches of the config's training data, epoch after epoch."""
    dataloader = Runner.build_dataloader(deepcopy(cfg.train_dataloader), seed=0)
    while True:
        yield from dataloader
