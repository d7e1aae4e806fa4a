"""Whole views against PIL's, from the same draws, within the tolerance that the benchmark states."""

import pytest

from benchmarks import views as pil
from mirepro.params import ViewParams


@pytest.mark.parametrize(("side", "size"), [(32, 32), (96, 64)])
@pytest.mark.parametrize("hue", [0.0, 0.4])
def test_views_are_close_to_those_of_pil(side: int, size: int, hue: float) -> None:
    params = ViewParams(size=size, jitter=(0.4, 0.4, 0.4, hue))
    batch = pil.images(24, side)
    assert pil.close(pil.differences(batch, params))
    assert not pil.close(pil.differences(batch, params, other=1))  # the control
