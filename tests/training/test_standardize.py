from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.training import standardize
from swift_kernels.training.fit import fit
from tests.training.data import QUICK, facts_of, held_out, separable


class TestStandardize:
    def test_statistics_of_far_off_features(self) -> None:
        activations, _ = separable()
        activations.values.mul_(torch.tensor([1.0, 3.0, 1e-2, 1.0, 1.0])).add_(torch.tensor([0.0, 1e4, 1.0, 0.0, 0.0]))
        activations.values[:, 4] = 7.0
        responses = torch.tensor([0, 3, 4, 30])
        keep = torch.tensor([True, False, False, True])
        statistics, means = standardize.survey(activations, responses, keep, torch.device("cpu"))
        own = [activations.values[slice(*activations.cu_seqlens[r : r + 2].tolist())].double() for r in responses]
        tokens = torch.cat(own)
        # 16 tokens or fewer, summed in float64 about a point near their mean.
        torch.testing.assert_close(statistics.mean, tokens.mean(dim=0), rtol=1e-14, atol=1e-14)
        deviation = tokens.std(dim=0, correction=0)
        torch.testing.assert_close(statistics.inverse_deviation[:4], 1 / deviation[:4], rtol=1e-11, atol=0)
        assert statistics.inverse_deviation[4] == 0, "a feature that never changes gets no weight"
        expected = torch.stack([own[0].mean(dim=0), own[3].mean(dim=0)]).float()
        torch.testing.assert_close(means, expected, rtol=2e-7, atol=0)

    def test_many_parts_are_as_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        activations, _ = separable()
        everything = torch.arange(40), torch.ones(40, dtype=torch.bool), torch.device("cpu")
        one, means = standardize.survey(activations, *everything)
        monkeypatch.setattr(standardize, "TOKENS_AT_ONCE", 7)
        assert len(list(standardize.parts(everything[0], activations.lengths))) > 10
        many, others = standardize.survey(activations, *everything)
        torch.testing.assert_close(many.mean, one.mean, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(many.inverse_deviation, one.inverse_deviation, rtol=1e-12, atol=0)
        assert torch.equal(means, others)

    def test_folded_weights_read_raw_features(self) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(50, 8, generator=generator, dtype=torch.float64)
        features = features * torch.logspace(-3, 3, 8) + torch.linspace(-100, 100, 8)
        statistics = standardize.Statistics(features.mean(dim=0), 1 / features.std(dim=0))
        weight = torch.randn(2, 8, generator=generator)
        bias = torch.randn(2, generator=generator)
        columns = torch.tensor([1, 2, 4, 7])
        expected = (features - statistics.mean) * statistics.inverse_deviation
        expected = expected[:, columns] @ weight[:, columns].T.double() + bias
        raw, shift = (part.float().double() for part in statistics.fold(weight[:, columns], bias, columns))
        error = (features[:, columns] @ raw.T + shift - expected).abs()
        # Folding is exact to float64; each weight then rounds once to float32, by half an eps.
        scale = features[:, columns].abs() @ raw.abs().T + shift.abs()
        assert (error <= (torch.finfo(torch.float32).eps / 2 + 1e-13) * scale).all()
        assert error.max() > 0

    @pytest.mark.parametrize("shape", [(30, 6), (6, 30)], ids=["more-candidates", "more-features"])
    def test_ridge_solves_its_normal_equations(self, shape: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(shape, generator=generator)
        labels = torch.rand(shape[0], generator=generator)
        counts = torch.randint(1, 4, (shape[0],), generator=generator).float()
        paths = standardize.ridge_paths(features, labels, counts)
        repeats = counts.long()
        x = features.double().repeat_interleave(repeats, dim=0)
        y = labels.double().repeat_interleave(repeats)
        x, y = x - x.mean(dim=0), y - y.mean()
        assert len(paths) == len(standardize.PENALTIES)
        length = x.square().sum() / shape[0]
        for penalty, weight in zip(standardize.PENALTIES, paths, strict=True):
            gradient = x.T @ (x @ weight - y) + penalty * length * weight
            # The Gram matrix is of float32 products; a penalty of 1e-2 amplifies their rounding at most a hundredfold.
            assert gradient.norm() < 1e-4 * (x.T @ y).norm()

    def test_ridge_start_is_the_best_of_its_penalties(self) -> None:
        activations, examples = separable(problems=60, noise=3.0)
        head = SwiftHead([3, 2])
        result = fit(head, activations, examples, replace(QUICK, start="ridge", epochs=1, learning_rate=0.0))
        assert result.penalty in standardize.PENALTIES
        assert (head.weight[0].abs().max(), head.bias[0]) == (0, 0)
        assert facts_of(head, activations, held_out(result, examples), "bce")[1] == result.history[0].validation_auc
        # The scale is that of logits: better than answering the share of right ones.
        assert result.history[0].validation_loss < 0.693

    def test_logistic_scale_is_where_the_slope_is_zero(self) -> None:
        generator = torch.Generator().manual_seed(0)
        scores = 0.01 * torch.randn(400, generator=generator).double()
        labels = (torch.rand(400, generator=generator) < (150 * scores - 1).sigmoid()).double()
        scale, shift = standardize.logistic_scale(scores, labels)
        residual = labels - (scale * scores + shift).sigmoid()
        # Up to the prior, of the weight of one observation.
        assert residual.sum().item() == pytest.approx(shift, rel=1e-6)
        assert (residual * scores).sum().item() == pytest.approx(scale * scores.var().item(), rel=1e-6)
        assert scale == pytest.approx(150, rel=0.3)
