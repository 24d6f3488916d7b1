"""Timing of networks."""

from helpers.comparison import DETECTION, SEGMENTATION, SHAPE, TINY, config

from acmix_mm.comparison import timing
from acmix_mm.comparison.matching import BackboneSize, Family
from acmix_mm.comparison.timing import latencies, validation_image_size


def test_latencies_are_relative_to_the_first_network(monkeypatch):
    monkeypatch.setattr(timing, 'SECONDS', 3.)
    cfg = config(SEGMENTATION, **TINY)
    wide = Family(cfg.model, 'acmix', SHAPE).config(BackboneSize(64, (1, 1, 1, 1)))
    measured = latencies(dict(narrow=cfg.model, wide=wide), SHAPE)
    assert measured['narrow'].ratio == (1., 1., 1.)
    assert 1.2 < measured['wide'].ratio.low <= measured['wide'].ratio.median
    assert 0 < measured['narrow'].seconds.low <= measured['narrow'].seconds.high


def test_validation_image_size_is_that_of_the_network_input(shapes):
    """Images of 96 pixels; for detection resized to 100 and padded to a multiple of 32."""
    assert validation_image_size(config(SEGMENTATION, shapes)) == (96, 96)
    cfg = config(DETECTION, shapes, **{'val_dataloader.dataset.pipeline.1.scale': (100, 100)})
    assert validation_image_size(cfg) == (128, 128)
