"""The bench of decoding's attention, where there is no kernel: plain XLA's figures, and why there are no others."""

import pytest

from sepjax.bench.decode_attention import Settings, main, measure
from sepjax.config import ConfigError


@pytest.mark.soak  # the kernel is in attention/test_decode.py
def test_figures_and_reasons(capsys):
    settings = Settings(
        shapes=("2/1/64",), cache_sizes=(325,), rows=(2,), cache_dtypes=("int8",), gigabytes=0.0, seconds=0.0
    )
    main(settings)
    lines = capsys.readouterr().out.splitlines()
    device = "an NVIDIA Hopper GPU (compute capability 9.0), the device is cpu (cpu)"
    for kind, reason, line in zip(settings.cache_dtypes, lines[1:2], lines[3:4], strict=True):
        assert reason == f"2/1/64 {kind}: no kernel: it needs {device}"
        shape, cache, slots, rows, form, *numbers = line.split()
        assert [shape, cache, slots, rows, form] == ["2/1/64", kind, "448", "2", "xla"]
        assert 0 < float(numbers[-1]) < 0.05, "bfloat16 errs, and by little"


def test_a_shape_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="takes query heads/key heads/head size, like 9/3/64, got '9/2/64'"):
        list(measure(Settings(shapes=("9/2/64",), cache_sizes=(325,), rows=(1,))))
