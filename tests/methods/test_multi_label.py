"""What methods for one class an image do where images show several."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from clipadapt.backbones import load_backbone
from clipadapt.losses.ranking import pairwise_ranking
from clipadapt.methods import create
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.metrics.multilabel import mean_average_precision
from tests.tiny import tiny_clip


def test_linear_probe_equals_scikit_learns_one_against_the_rest():
    rng = np.random.default_rng(0)
    targets = rng.random((40, 3)) < [0.2, 0.5, 0.0]
    x = rng.standard_normal((40, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    logits = create("linear-probe", strength=3.0).fit_features(x, targets, np.eye(3, 8)).logits(x)
    reference = OneVsRestClassifier(LogisticRegression(C=3.0, max_iter=1000)).fit(x.astype(float), targets[:, :2])
    np.testing.assert_allclose(logits[:, :2], reference.decision_function(x.astype(float)), atol=2e-3)
    np.testing.assert_allclose(logits[:, 2], np.log(0.5 / 40.5), atol=1e-5)  # never present: its smoothed log-odds


def test_linear_probe_chooses_its_strength_by_map_on_val():
    rng = np.random.default_rng(0)
    x, targets = rng.standard_normal((60, 8)), rng.random((60, 3)) < 0.4
    x += targets @ rng.standard_normal((3, 8))
    val = x[30:], targets[30:]
    chosen = create("linear-probe").fit_features(x[:30], targets[:30], np.eye(3, 8), val=val)
    best = [
        create("linear-probe", strength=strength).fit_features(x[:30], targets[:30], np.eye(3, 8))
        for strength in (0.1, 1.0, 10.0, 100.0, 1000.0)
    ]
    figures = [mean_average_precision(val[1], head.logits(val[0])) for head in best]
    assert chosen.strength_ == best[int(np.argmax(figures))].strength_


def test_coop_learns_by_the_ranking_loss():
    backbone = load_backbone(tiny_clip())
    learner = create("coop", n_ctx=2).bind(backbone, ["cat", "red house", "star"])
    images = torch.nn.functional.normalize(torch.randn(4, backbone.dim), dim=-1)
    targets = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]]).bool()
    loss = learner.loss(Batch(torch.arange(4), targets, images, None))
    torch.testing.assert_close(loss, pairwise_ranking(4.0 * images @ learner.texts().T, targets))
