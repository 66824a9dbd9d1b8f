"""The settings of a recovery, and the numerics of its loss against naive references."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from recovery_cases import denoiser_batches, labelled_images, quick, recovered, small_vit, student_of
from tiny_hosts import flux
from tiny_pipelines import sd_pipeline

from genprune.errors import GenpruneError, PlanMismatch
from genprune.recovery import NormalizedDistillation
from genprune.recovery.distillation import NORMALIZERS
from genprune.recovery.divergence import DivergenceGuard
from genprune.recovery.draws import Shuffled, min_snr_weight, sample_indices
from genprune.recovery.normalizers import DISTANCES, RunningScales, mean_square, raw_distance
from genprune.recovery.rows import LabelledImages, NoisedRows

# ---- settings -------------------------------------------------------------------------------------------------------


def test_settings_survive_json():
    settings = NormalizedDistillation(
        steps=7, betas=(0.8, 0.9), pairs=(("a", "b"),), min_snr_gamma=5.0, ema_decay=0.99, lora_rank=4
    )
    again = NormalizedDistillation.from_json(json.loads(json.dumps(settings.to_json())))
    assert again == settings and again != settings.changed(seed=1)
    with pytest.raises(GenpruneError, match="no 'learn_rate', nearest name: 'learning_rate'"):
        settings.changed(learn_rate=1)
    with pytest.raises(PlanMismatch, match="method 'magnitude'; expected 'normalized_distillation'"):
        NormalizedDistillation.from_json(settings.to_json() | {"method": "magnitude"})
    with pytest.raises(PlanMismatch, match="format_version=2.*Upgrade"):
        NormalizedDistillation.from_json(settings.to_json() | {"format_version": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0; expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size=True; expected a whole number"),
        ({"normalizer": "rel_l1"}, "normalizer='rel_l1', nearest name: 'rel_l2'; expected one of rel_l2"),
        ({"learning_rate": 0}, "learning_rate=0; expected a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan; expected a number above 0"),
        ({"prompt_dropout": 1}, "prompt_dropout=1; expected a number at least 0 and below 1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0; expected a number at least 0 and below 1"),
        ({"task_weight": 0, "output_weight": 0, "feature_weight": 0}, "are all 0; expected one above 0"),
        ({"pairs": [("a",)]}, "pairs has .'a',.; expected .student's module path"),
        ({"learned_weights": 1}, "learned_weights=1; expected True or False"),
        ({"betas": (0.9,)}, "betas=.*expected two numbers"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(GenpruneError, match=message):
        NormalizedDistillation(**changes)


def test_learning_rate_is_a_function_of_the_step():
    for name, last in (("constant", 1.0), ("linear", 1 / 8), ("cosine", 0.5 * (1 + math.cos(math.pi * 7 / 8)))):
        settings = NormalizedDistillation(steps=10, warmup_steps=2, learning_rate=2.0, lr_scheduler=name)
        assert [settings.learning_rate_at(step) for step in (0, 1, 2)] == [1.0, 2.0, 2.0]
        assert settings.learning_rate_at(9) == pytest.approx(2 * last)


# ---- normalisers ----------------------------------------------------------------------------------------------------


def features(seed=0, scale=1.0):
    source = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(2, 6, 8, generator=source), scale * torch.randn(2, 3, 4, 4, generator=source)]


def term(normalizer, student, teacher):
    """One tap's distance by its weight, after one look at the teacher."""
    scales = RunningScales(normalizer)
    scales.update([1.0 if normalizer == "first_ref" else float(mean_square(teacher)), float(mean_square(teacher))])
    distance = DISTANCES.get(normalizer, raw_distance)(student, teacher)
    return float(distance) * scales.weights(2)[1]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_only_plain_terms_grow_with_the_scale_of_a_tap(normalizer):
    student, teacher = features(1), features(2)
    ratio = term(normalizer, features(1, 100.0), features(2, 100.0)) / term(normalizer, student, teacher)
    assert ratio == pytest.approx(1e4 if normalizer in ("mse", "masked") else 1, rel=1e-4)


def test_distances_equal_naive_ones():
    student, teacher = features(1), features(2)
    pairs = list(zip(student, teacher))
    count = sum(each.numel() for each in student)
    naive = sum(((a.double() - b.double()) ** 2).sum() for a, b in pairs) / count
    assert float(raw_distance(student, teacher)) == pytest.approx(float(naive))

    def normed(each, dim):  # over channels
        each = each.double()
        return (each - each.mean(dim, keepdim=True)) / (each.var(dim, keepdim=True, unbiased=False) + 1e-5).sqrt()

    naive = sum(((normed(a, dim) - normed(b, dim)) ** 2).sum() for (a, b), dim in zip(pairs, (2, 1))) / count
    assert float(DISTANCES["layernorm"](student, teacher)) == pytest.approx(float(naive), rel=1e-4)

    def masked(each):  # each sample by itself
        rows = [row.double() * ((row - row.mean()).abs() < 2 * row.std()) for row in each]
        return torch.stack(rows)

    naive = sum(((masked(a) - masked(b)) ** 2).sum() for a, b in pairs) / count
    assert float(DISTANCES["masked"](student, teacher)) == pytest.approx(float(naive), rel=1e-5)
    assert float(naive) < float(raw_distance(student, teacher))


def test_running_scales_are_a_mean_and_then_a_window():
    scales = RunningScales("rel_l2")
    for value in (1.0, 2.0, 6.0):
        scales.update([value])
    assert scales.energies == pytest.approx([3.0]) and scales.weights(1) == pytest.approx([1 / 3])
    scales.count = 1000
    scales.update([103.0])
    assert scales.energies == pytest.approx([4.0])  # one hundredth of the way
    assert RunningScales("first_ref", [2.0, 8.0], 1).weights(2) == [1.0, 0.25]


def test_a_tap_of_a_hundredfold_scale_trains_alike():
    """The pitfall in a run: the features of a tap grow a hundredfold on both sides."""
    rows = {}
    for normalizer in ("rel_l2", "layernorm", "mse"):
        for scale in (1.0, 100.0):
            teacher = small_vit()
            student = student_of(teacher, "blocks.1:block")
            for model in (student, teacher):
                model.norm_scaled = Scale(scale)
                model.norm.register_forward_hook(model.norm_scaled.read)
            settings = quick(steps=1, normalizer=normalizer, pairs=(("norm_scaled", "norm_scaled"),))
            done = recovered(student, teacher, settings, data=labelled_images())
            rows[normalizer, scale] = done.curve[0]["terms"]["norm_scaled"]
    for normalizer, factor in (("rel_l2", 1), ("layernorm", 1), ("mse", 1e4)):
        one, hundred = rows[normalizer, 1.0], rows[normalizer, 100.0]
        assert hundred["weighted"] == pytest.approx(factor * one["weighted"], rel=1e-3)
        assert hundred["raw"] == pytest.approx(1e4 * one["raw"], rel=1e-3)


class Scale(torch.nn.Module):
    """A tap beside the model: called with another module's output, which it scales."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, feature):
        return self.factor * feature

    def read(self, module, inputs, output):
        self(output)


# ---- terms ----------------------------------------------------------------------------------------------------------


def test_a_step_equals_the_naive_loss():
    """Every term of the first step, by hooks and sums of its own."""
    teacher = flux().eval()
    student = student_of(teacher, "transformer_blocks.0:block")
    data = denoiser_batches(teacher, count=1, rows=3)
    before = copy.deepcopy(student)
    settings = quick(steps=1, batch_size=3, task_weight=0.5, output_weight=2.0, feature_weight=0.25)
    record = recovered(student, teacher, settings, data=data).curve[0]

    inputs, target = data[0]
    outputs, caught = {}, {}
    for name, model in (("student", before), ("teacher", teacher)):
        handles = []
        for path in ("transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1"):
            hook = lambda m, i, out, key=(name, path): caught.__setitem__(key, [o.double() for o in out])  # noqa: E731
            handles.append(model.get_submodule(path).register_forward_hook(hook))
        with torch.no_grad():
            outputs[name] = model(**inputs).sample.double()
        for handle in handles:
            handle.remove()
    expected = {
        "task": 0.5 * (outputs["student"] - target).square().mean(),
        "output": 2.0 * (outputs["student"] - outputs["teacher"]).square().mean(),
    }
    for path in ("transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1"):
        for stream in range(2):  # text and image have scales of their own
            ours, theirs = (caught[name, path][stream] for name in ("student", "teacher"))
            expected[f"{path}[{stream}]"] = 0.25 * (ours - theirs).square().sum() / theirs.square().sum()
    assert list(record["terms"]) == list(expected)
    for name, value in expected.items():
        assert record["terms"][name]["weighted"] == pytest.approx(float(value), rel=1e-4), name
        # raw and weight, which the curve keeps beside it
        kept = record["terms"][name]
        assert kept["raw"] * kept["weight"] == pytest.approx(kept["weighted"], rel=1e-6)
    assert record["loss"] == pytest.approx(float(sum(expected.values())), rel=1e-4)


def test_logits_are_compared_at_a_temperature():
    ours, theirs = torch.randn(4, 5), torch.randn(4, 5)
    rows = LabelledImages(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 3]), "kl", temperature=2.0)
    p, q = (theirs.double() / 2).softmax(1), (ours.double() / 2).softmax(1)
    assert float(rows.output_loss(ours, theirs)) == pytest.approx(
        float(4 * (p * (p / q).log()).sum(1).mean()), rel=1e-5
    )
    plain = LabelledImages(rows.images, rows.labels, "mse")
    assert float(plain.output_loss(ours, theirs)) == pytest.approx(float((ours - theirs).square().mean()))
    assert float(rows.task_loss(ours)) == pytest.approx(float(-ours.log_softmax(1)[range(4), range(4)].mean()))


def test_a_learned_variance_has_no_task_but_an_output():
    rows = NoisedRows({}, torch.zeros(2, 3, 4), torch.tensor([1.0, 3.0]))
    prediction = torch.ones(2, 6, 4)
    assert float(rows.task_loss(prediction)) == 2.0  # rows weigh 1 and 3
    other = prediction.clone()
    other[1, 3:] = 0
    assert float(rows.output_loss(prediction, other)) == pytest.approx(3 * 0.5 / 2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_clean_sample(kind):
    """All three kinds of prediction give the x_0 error the weight min(SNR, gamma)."""
    for alpha in (0.05, 0.5, 0.9, 0.999):
        alpha = torch.tensor(alpha, dtype=torch.float64)
        snr = alpha / (1 - alpha)
        # d x_0 = k d prediction, from x_t = sqrt(a) x_0 + sqrt(1 - a) noise and v = sqrt(a) noise - sqrt(1 - a) x_0
        k = {"epsilon": ((1 - alpha) / alpha).sqrt(), "v_prediction": (1 - alpha).sqrt(), "sample": torch.tensor(1.0)}
        weight = min_snr_weight(alpha, kind, 5.0)
        assert float(weight / k[kind] ** 2) == pytest.approx(float(snr.clamp_max(5)))
    nothing = min_snr_weight(torch.tensor(0.0), kind, 5.0)  # zero terminal SNR
    assert float(nothing) == (1.0 if kind == "epsilon" else 0.0)


def test_learned_weights_balance_the_terms():
    teacher = flux().eval()
    student = student_of(teacher, "transformer_blocks.0:block")
    settings = quick(steps=30, learned_weights=True, learning_rate=0.03, normalizer="mse", output_weight=0)
    curve = recovered(student, teacher, settings, data=denoiser_batches(teacher)).curve
    first, last = curve[0]["terms"], curve[-1]["terms"]
    assert first["task"]["weight"] == 1.0 and first["output"]["weight"] == last["output"]["weight"] == 0
    # exp(-s) L + s is least at s = log L: the weight of a small term grows, that of a larger one less so
    assert last["transformer_blocks.1[1]"]["weight"] > 1.5 > last["task"]["weight"]


# ---- draws and the guard --------------------------------------------------------------------------------------------


def test_sample_indices_do_not_depend_on_how_rows_are_split():
    whole = list(sample_indices(3, 0, 1, 8, 0, 1))
    split = [g for m in range(2) for r in range(2) for g in sample_indices(3, m, 2, 2, r, 2)]
    assert whole == split == list(range(24, 32))


def test_every_epoch_sees_every_item_once():
    order = Shuffled(5, seed=0)
    epochs = [[order.item(5 * epoch + i) for i in range(5)] for epoch in range(3)]
    assert all(sorted(items) == list(range(5)) for items in epochs) and epochs[0] != epochs[1]
    assert [Shuffled(5, seed=0).item(7), Shuffled(5, seed=0).item(2)] == [epochs[1][2], epochs[0][2]]


def test_the_guard_waits_for_steps_in_a_row():
    guard = DivergenceGuard(factor=10, patience=3)
    assert not any(guard.diverged(1.0) for _ in range(20))
    assert [guard.diverged(loss) for loss in (11, 12, 2, 11, 12, 13)] == [False] * 5 + [True]
    assert guard.median() == 1.0  # high losses do not raise it


def test_flow_matching_has_no_min_snr_and_diffusion_no_logit_normal(tmp_path):
    from tiny_pipelines import flux_pipeline

    teacher = flux_pipeline(tmp_path)
    student = student_of(teacher, "transformer_blocks.0:block")
    with pytest.raises(GenpruneError, match="min_snr_gamma=5.0.*expected None.*logit_normal"):
        recovered(student, teacher, quick(min_snr_gamma=5.0), prompts=["abc"])
    teacher = sd_pipeline(tmp_path)
    student = student_of(teacher, "mid_block.attentions.0:wrapper")
    with pytest.raises(GenpruneError, match="no flow-matching pipeline; expected 'uniform'.*min_snr_gamma"):
        recovered(student, teacher, quick(timestep_sampling="logit_normal"), prompts=["abc"])
