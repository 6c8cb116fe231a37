"""The demo's command line."""

import pytest

from flash_attn_3 import demo


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--shapes", 2)])
def test_an_argument_does_not_start_the_demo(capsys, argument, status):
    with pytest.raises(SystemExit) as caught:
        demo.main([argument])
    assert caught.value.code == status
    shown = capsys.readouterr()
    assert "usage: python -m flash_attn_3.demo" in shown.out + shown.err
