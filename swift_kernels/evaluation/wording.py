"""Figures in words, the same in the terminal, in reports and in cards."""

from __future__ import annotations

import math

from swift_kernels.evaluation.calibration import Abstention, Calibration
from swift_kernels.evaluation.evaluate import Evaluation
from swift_kernels.evaluation.metrics import Estimate
from swift_kernels.evaluation.study import Cost, TaskStudy

COVERAGES_SHOWN = (1.0, 0.5, 0.2)


def percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} ({100 * estimate.low:.1f}-{100 * estimate.high:.1f})"


def points(estimate: Estimate) -> str:
    # Rounded before the sign is set: -0.04 is +0.0.
    mean, low, high = (round(100 * value, 1) + 0.0 for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def evaluation_facts(evaluation: Evaluation) -> list[str]:
    """AUC, counts, and what is left out."""
    auc = evaluation.auc
    facts = []
    if not math.isnan(auc.mean):
        facts.append(
            f"Within-problem AUC {auc.mean:.3f} ({auc.low:.3f}-{auc.high:.3f}), over the "
            f"{evaluation.mixed_problems} of {evaluation.problems} problems with right and wrong answers"
        )
    if evaluation.unscored:
        facts.append(f"{evaluation.unscored} of {evaluation.candidates} answers have no score; never chosen")
    return [*facts, *evaluation.notes]


def study_facts(study: TaskStudy) -> list[str]:
    """What stands beside the table of one task."""
    facts = evaluation_facts(study.evaluation)
    loss = study.pairwise_loss
    if not math.isnan(loss.mean):
        facts.append(f"Pairwise loss {loss.mean:.3f} ({loss.low:.3f}-{loss.high:.3f}); 0.693 knows nothing")
    if study.calibration is not None:
        facts += [calibration_fact(study.calibration), *_abstention_facts(study.calibration)]
    if study.over_optimization is not None:
        facts.append(_over_optimization_fact(study))
    if study.weight is not None:
        facts.append(f"Weight of SWIFT beside {study.reward} in the weighted mean, of all problems: {study.weight:.2f}")
    if len(study.costs) > 1:
        facts += [_cost_fact(cost) for cost in study.costs]
    return [*facts, *study.notes]


def calibration_fact(found: Calibration) -> str:
    before, after, picks = found.before, found.after, found.picks
    return (
        f"P(correct) = sigmoid(score / {found.scaling.temperature:.4g} {found.scaling.offset:+.4g}), fitted to all "
        f"problems; fitted in {found.folds} parts and judged on what each left out, ECE {before.ece:.3f} before, "
        f"{after.ece:.3f} after, Brier score {before.brier.mean:.3f}, {after.brier.mean:.3f}; of the picks, ECE "
        f"{picks.ece:.3f}"
    )


def _abstention_facts(found: Calibration) -> list[str]:
    curves: list[tuple[str, Abstention | None]] = [
        ("Among all answers, SWIFT's picks where only the surest by score are given", found.abstention),
        ("The vote's, where only the surest by their share are given", found.vote_abstention),
    ]
    return [
        f"{name}: "
        + ", ".join(
            f"{curve.coverage[place]:.0%} {percent(curve.accuracy[place])}"
            for place in (
                min(range(len(curve.coverage)), key=lambda each, share=share: abs(curve.coverage[each] - share))  # type: ignore[misc]
                for share in COVERAGES_SHOWN
            )
        )
        for name, curve in curves
        if curve is not None
    ]


def _over_optimization_fact(study: TaskStudy) -> str:
    found, n = study.over_optimization, study.evaluation.n
    assert found is not None
    text = (
        f"At N={n} the picks are believed right in {percent(found.belief[n])}, and are in "
        f"{percent(study.evaluation.accuracy[n]['swift'])}"
    )
    if found.peak == n:
        return f"{text}; no smaller N is better"
    return f"{text}; best at N={found.peak}, from there {points(found.fall)}, p {p_value(found.fall.p)}, not adjusted"


def _cost_fact(cost: Cost) -> str:
    seconds = "" if cost.seconds is None else f", {1e3 * cost.seconds / cost.answers:.3g} ms"
    flops = "" if cost.flops is None else f", {cost.flops / cost.answers:.3g} FLOPs"
    return f"Cost of {cost.what}: {cost.parameters:,} parameters; an answer of {cost.answers:,}{flops}{seconds}"
