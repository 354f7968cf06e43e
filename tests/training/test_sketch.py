from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swift_kernels.training.sketch import Sketch, pca_sketch, random_sketch

WIDTHS = (7, 16, 5)


def pilot(tokens: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, width, generator=generator) * 3 + 5 for width in WIDTHS]


@pytest.mark.parametrize("sketch", [random_sketch(WIDTHS, 4), pca_sketch(pilot(), 4)], ids=["random", "pca"])
def test_a_folded_head_is_the_sketchs_head(sketch: Sketch) -> None:
    entries = [entry.double() for entry in pilot(9)]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, sum(sketch.widths), generator=generator, dtype=torch.float64)
    bias = torch.randn(2, generator=generator, dtype=torch.float64)
    small = torch.cat(
        [
            (entry - mean.double()) @ projection.double()
            for entry, mean, projection in zip(entries, sketch.means, sketch.projections, strict=True)
        ],
        dim=1,
    )
    full, shift = sketch.fold(weight, bias)
    assert full.shape == (2, sum(WIDTHS))
    # Both in float64, a few dozen additions of numbers up to a hundred.
    torch.testing.assert_close(torch.cat(entries, dim=1) @ full.T + shift, small @ weight.T + bias, rtol=0, atol=1e-11)
    applied = torch.cat([sketch.apply(k, entry) for k, entry in enumerate(pilot(9))], dim=1)
    torch.testing.assert_close(applied.double(), small, rtol=1e-5, atol=1e-5)


def test_pca_keeps_what_varies_at_unit_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    deviations = torch.tensor([100.0, 30.0, 10.0] + [0.1] * 13)
    entry = (torch.randn(500, 16, generator=generator) * deviations) @ directions.T + 7
    sketch = pca_sketch([entry], 3)
    values = sketch.apply(0, entry)
    torch.testing.assert_close(values.T.cov(), torch.eye(3), rtol=0, atol=1e-3)
    kept = torch.nn.functional.normalize(sketch.projections[0], dim=0)
    # The three loud directions, up to what 500 tokens of noise turn them by.
    assert (kept.T @ directions[:, :3]).abs().diagonal().min() > 0.99


def test_an_entry_that_varies_in_few_directions_is_not_amplified() -> None:
    flat = torch.ones(20, 6)
    flat[:, 0] = torch.arange(20.0)
    values = pca_sketch([flat], 4).apply(0, flat)
    assert values.isfinite().all()
    assert not values[:, 1:].any()


def test_the_same_seed_makes_the_same_projections() -> None:
    one, same, other = random_sketch(WIDTHS, 3), random_sketch(WIDTHS, 3), random_sketch(WIDTHS, 3, seed=1)
    assert all(map(torch.equal, one.projections, same.projections))
    assert not torch.equal(one.projections[0], other.projections[0])


def test_a_sketch_is_read_as_it_was_written(tmp_path: Path) -> None:
    sketch = pca_sketch(pilot(), 2)
    sketch.save(tmp_path / "sketch.safetensors")
    read = Sketch.load(tmp_path / "sketch.safetensors")
    assert all(map(torch.equal, read.projections + read.means, sketch.projections + sketch.means))


@pytest.mark.parametrize("above", [None, 1], ids=["none", "more than any entry has"])
def test_bad_dimensions_are_refused(above: int | None) -> None:
    dimensions = 0 if above is None else max(WIDTHS) + above
    with pytest.raises(ValueError, match=rf"sketch has {dimensions} dimensions: expected 1\.\.{max(WIDTHS)}"):
        random_sketch(WIDTHS, dimensions)


@pytest.mark.parametrize("sketch", [random_sketch(WIDTHS, max(WIDTHS)), pca_sketch(pilot(), max(WIDTHS))])
def test_an_entry_no_wider_than_the_sketch_is_kept_as_it_is(sketch: Sketch) -> None:
    assert sketch.widths == WIDTHS
    for k, entry in enumerate(pilot()):
        assert torch.equal(sketch.apply(k, entry), entry)


def test_a_pilot_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="the pilot has 4 tokens for a sketch of 4"):
        pca_sketch(pilot(4), 4)
