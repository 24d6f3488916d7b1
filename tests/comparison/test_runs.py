"""Runs of a comparison."""

import pytest

from acmix_mm.comparison.runs import (
    Run,
    duration,
    quality,
    train_all,
)
from acmix_mm.utils.errors import UsageError


def test_quality_selects_the_main_metrics():
    assert quality({'aAcc': 1., 'mIoU': 2., 'mAcc': 3.}) == {'mIoU': 2.}
    assert quality({'coco/bbox_mAP': 1., 'coco/bbox_mAP_50': 2., 'coco/segm_mAP': 3.}) == {
        'coco/bbox_mAP': 1., 'coco/segm_mAP': 3.}
    assert quality({'panoptic/PQ': 1., 'panoptic/SQ': 2.}) == {
        'panoptic/PQ': 1., 'panoptic/SQ': 2.}
    assert quality({'pascal_voc/mAP': 1., 'pascal_voc/AP50': 2.}) == {'pascal_voc/mAP': 1.}


def test_duration():
    assert [duration(seconds) for seconds in (0, 59.6, 61, 3700)] == [
        '0:00:00', '0:01:00', '0:01:01', '1:01:40']


def test_a_failed_run_reports_its_last_output(tmp_path):
    run = Run(str(tmp_path), 'acmix', 0)
    with pytest.raises(UsageError, match=r'acmix, seed 0, failed: \S+/config.py is neither'):
        train_all([run], dict(acmix=1))
