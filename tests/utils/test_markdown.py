"""Tests of Markdown tables."""

from acmix_mm.utils.markdown import table


def test_table_has_a_header_and_a_separator():
    assert table([('mixer', 'mIoU'), ('acmix', '71.2'), ('conv', '70.9')]) == (
        '| mixer | mIoU |\n|---|---|\n| acmix | 71.2 |\n| conv | 70.9 |')
