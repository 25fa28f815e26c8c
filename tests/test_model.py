"""The network against the authors' own outputs."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch

from evm_deploy.model.efficientvmamba.blocks import merge_directions, split_directions
from evm_deploy.model.families import load_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.model_cases())
def test_logits_and_stages_match_golden(name, checkpoint):
    case = golden.model_case(name)
    model, spec = load_checkpoint(checkpoint(name))
    assert spec.parameters == golden.model_cases()[name]["params"]
    stages = []
    with torch.inference_mode():
        images = torch.from_numpy(case["images"])
        x = model.patch_embed(images)
        stages.append(x)
        for stage in model.layers:
            x = stage(x)
            x = stage.downsample(x) if stage.downsample is not None else x
            stages.append(x)
        logits = model(images).numpy()
    assert np.abs(logits - case["logits"]).max() < 1e-5
    for got, want in zip(stages, case["stages"], strict=True):
        assert tuple(got.shape) == want["shape"]
        assert np.abs(got.flatten()[:64].numpy() - want["head"]).max() < 1e-4
        stats = np.array([got.mean(), got.std(correction=0), got.abs().max()])
        np.testing.assert_allclose(stats, want["stats"], atol=1e-4, rtol=1e-4)


def test_the_worked_example_of_the_scan_order():
    tokens = torch.arange(1, 17).reshape(1, 1, 4, 4)
    order = split_directions(tokens)[0, :, :, 0].tolist()
    assert order == [[1, 3, 9, 11], [5, 13, 7, 15], [2, 4, 10, 12], [6, 14, 8, 16]]


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (8, 2), (10, 14)])
def test_merge_inverts_split(size):
    x = torch.randn(2, 3, *size)
    assert torch.equal(merge_directions(split_directions(x), *size), x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (7, 31), (33, 47), (226, 98)])
def test_any_size_runs(size, micro):
    model, _ = load_checkpoint(micro)
    with torch.inference_mode():
        assert torch.isfinite(model(torch.zeros(1, 3, *size))).all()


def test_features_have_the_backbones_strides(micro):
    model, spec = load_checkpoint(micro, head="features")
    with torch.inference_mode():
        maps = model(torch.zeros(1, 3, 90, 70))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 22, 17), (32, 11, 9), (64, 6, 5), (128, 3, 3)]
    assert any("outnorm" in note for note in spec.notes)


def test_trained_outputs(trained):
    with np.load(trained / "glyphs64_logits.npz") as data:
        logits = data["logits"]
    import sys

    sys.path.insert(0, str(trained))
    from glyphs import glyphs

    from evm_deploy.data.preprocessing import Preprocessing

    images, _ = glyphs(64, seed=7, size=64)
    model, _ = load_checkpoint(trained / "evm_tiny_glyphs64.ckpt")
    with torch.inference_mode():
        got = model(torch.from_numpy(Preprocessing((64, 64), crop_pct=1.0).normalise(images))).numpy()
    assert np.abs(got - logits).max() < 1e-4
