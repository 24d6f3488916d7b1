from acmix_mm.utils.markdown import table


def test_table_has_a_separator_below_the_headings():
    assert table([('name', 'value'), ('a', '1')]) == '| name | value |\n|---|---|\n| a | 1 |'
