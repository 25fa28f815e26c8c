"""UPerNet checkpoints of mmseg: against mmseg's own outputs, and files that are read, completed or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evm_deploy.commands.convert import main as convert_main
from evm_deploy.errors import CheckpointError
from evm_deploy.model import segmentation
from evm_deploy.model.families import load_checkpoint
from evm_deploy.model.openmmlab import TrainingSettings
from evm_deploy.model.resampling import bilinear_weights
from evm_deploy.model.segmentation import LabelSelection
from evm_deploy.tasks.segmentation import decode
from evm_deploy.tasks.task import Reading
from tests import segmenters

HEAD = "decode_head."


def run(model, images):
    """Return the logits and the label map of a segmenter."""
    with torch.inference_mode():
        logits = model(torch.from_numpy(images))
        (label_map,) = model.selection(None, images.shape[2:])(logits)
    return logits.numpy(), label_map.numpy()


@pytest.mark.parametrize("name", segmenters.CASES)
def test_maps_are_those_of_mmseg(name, tmp_path):
    case = segmenters.case(name)
    model, spec = load_checkpoint(segmenters.saved(tmp_path, name))
    auxiliary = sum(v.size for k, v in case.state.items() if k.startswith("auxiliary") and "running" not in k)
    buffers = sum("num_batches_tracked" in k and k.startswith("auxiliary") for k in case.state)
    assert spec.parameters == case.facts["params"] - auxiliary + buffers
    logits, label_map = run(model, case.inputs)
    expected = case.expected.get("logits", case.expected.get("logits_first8"))
    assert np.abs(logits[:, : expected.shape[1]] - expected).max() < 1e-4
    assert label_map.dtype == np.uint8
    for j, each in enumerate(label_map):
        assert (each == case.expected[f"image{j}/map_input"])[case.expected[f"image{j}/margin_input"] > 1e-3].all()


def test_the_map_of_the_original_image_is_nearly_that_of_mmseg(tmp_path):
    """mmseg resizes the logits once more, which needs all of them; a map can only take the nearest pixel."""
    shares = []
    for name in segmenters.CASES:
        case = segmenters.case(name)
        _, label_map = run(load_checkpoint(segmenters.saved(tmp_path, name))[0], case.inputs)
        for j, each in enumerate(decode({"label_map": label_map}, Reading(places=segmenters.places(case)))):
            assert each.map.shape == case.expected[f"image{j}/map"].shape
            shares.append((each.map == case.expected[f"image{j}/map"]).mean())
    assert min(shares) > 0.98 and max(shares) == 1


@pytest.mark.parametrize(("classes", "size"), [(7, (33, 61)), (300, (20, 24)), (2, (4, 4)), (5, (190, 6))])
def test_strips_give_what_the_whole_gives(classes, size, monkeypatch):
    monkeypatch.setattr(segmentation, "STRIP_BYTES", 4000)
    maps = (-(-size[0] // 4), -(-size[1] // 4))
    logits = torch.randn(3, classes, *maps, generator=torch.Generator().manual_seed(classes))
    selection = LabelSelection(classes, maps, size, reads="")
    (label_map,) = selection(logits)
    whole = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    best = whole.topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    assert label_map.dtype == (torch.uint8 if classes <= 256 else torch.int32) and clear.float().mean() > 0.99
    assert torch.equal(label_map.long()[clear], whole.argmax(1)[clear])
    assert len(selection.strips) == min(size[0], 64, -(-4 * classes * size[0] * size[1] // 4000))
    judged = selection.judged(logits.numpy(), {"label_map": label_map.numpy()})["label_map"]
    assert np.abs(judged - best[:, 0].numpy()).max() < 1e-5
    off = selection.judged(logits.numpy(), {"label_map": label_map.numpy().astype(np.int64) + classes})["label_map"]
    assert np.isneginf(off).all()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("old", "new"), [(3, 7), (7, 3), (1, 5), (5, 1), (4, 16), (6, 6), (2, 3)])
def test_bilinear_weights_are_torchs(old, new, align_corners):
    x = torch.eye(old)[:, None, :, None]
    want = F.interpolate(x, (new, 1), mode="bilinear", align_corners=align_corners)[:, 0, :, 0].T
    np.testing.assert_allclose(bilinear_weights(old, new, align_corners=align_corners), want, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (4, 4), (100, 36), (33, 250)])
def test_any_size_runs(size, tmp_path):
    model, _ = load_checkpoint(segmenters.saved(tmp_path))
    logits, label_map = run(model, np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32))
    assert label_map.shape == (2, *size)
    whole = F.interpolate(torch.from_numpy(logits), size, mode="bilinear", align_corners=False)
    assert (label_map == whole.argmax(1).numpy()).mean() > 0.999


def test_what_the_configuration_says_is_used_and_named(tmp_path):
    text = segmenters.CONFIG.replace("align_corners=False", "align_corners=True")
    meta = {"cfg": text, "dataset_meta": {"classes": segmenters.NAMES, "palette": segmenters.PALETTE}}
    model, spec = load_checkpoint(segmenters.saved(tmp_path, meta=meta))
    assert spec.task == "segmentation" and spec.num_classes == 7 and spec.outputs == ("logits",)
    assert spec.defaults["labels"] == list(segmenters.NAMES) and spec.details["palette"] == segmenters.PALETTE
    assert np.allclose(spec.defaults["mean"], [0.485, 0.456, 0.406])
    preprocessing = {key: spec.defaults[key] for key in ("imgsz", "resize", "interpolation")}
    assert preprocessing == {"imgsz": "512x512", "resize": "pad", "interpolation": "bilinear-opencv"}
    found = spec.details["segmenter"]
    assert found["align_corners"] == {"value": True, "from": "meta.cfg model.decode_head.align_corners"}
    assert found["reduce_zero_label"] == {"value": True, "from": "meta.cfg test_pipeline"}
    assert model.sizes.align_corners
    plain = load_checkpoint(segmenters.saved(tmp_path))[1]
    assert plain.details["segmenter"]["pool_scales"] == {"value": [1, 2, 3, 6], "from": "default"}
    assert "labels" not in plain.defaults and "palette" not in plain.details
    assert all(key.startswith("auxiliary_head.") for key in plain.checkpoint["dropped"])
    assert len(plain.checkpoint["dropped"]) == 8


def test_aligned_corners_are_aligned_everywhere(tmp_path):
    case = segmenters.case("upernet_micro")
    text = segmenters.CONFIG.replace("align_corners=False", "align_corners=True")
    model, _ = load_checkpoint(segmenters.saved(tmp_path, meta={"cfg": text}))
    x = torch.rand(1, 3, 5, 7)
    want = F.interpolate(x, (10, 14), mode="bilinear", align_corners=True)
    assert torch.allclose(model.decode_head.resize(x, 10, 14), want, atol=1e-6)
    logits, label_map = run(model, case.inputs)
    assert np.abs(logits - case.expected["logits"]).max() > 0.01
    whole = F.interpolate(torch.from_numpy(logits), (72, 104), mode="bilinear", align_corners=True)
    assert (label_map == whole.argmax(1).numpy()).mean() > 0.999


def test_a_head_of_one_class_compares_with_its_threshold(tmp_path):
    case = segmenters.case("upernet_micro")
    for head, threshold in (({}, 0.3), ({"threshold": 0.6}, 0.6)):
        model, spec = load_checkpoint(segmenters.binary(tmp_path, **head))
        logits, label_map = run(model, case.inputs)
        whole = F.interpolate(torch.from_numpy(logits), (72, 104), mode="bilinear", align_corners=False)
        want = (torch.sigmoid(whole[:, 0]) > threshold).numpy()
        assert (label_map == want).mean() > 0.999 and 0 < want.mean() < 1
    assert spec.num_classes == 2 and spec.defaults["labels"] == ["background", "road"]
    assert any("class 0, its absence" in note for note in spec.notes)
    assert spec.details["segmenter"]["threshold"]["value"] == 0.6


@pytest.mark.parametrize(
    ("meta", "palette"),
    [
        ({"PALETTE": [[1, 2, 3]], "CLASSES": ("a",)}, ((1, 2, 3),)),
        ({"dataset_meta": {"palette": ((255, 0, 9), (1, 1, 1))}}, ((255, 0, 9), (1, 1, 1))),
        ({"dataset_meta": {"palette": [[1, 2]]}}, ()),
        ({"dataset_meta": {"palette": [[1, 2, 256]]}}, ()),
        ({"dataset_meta": {"palette": [[1, 2, True]]}}, ()),
        ({"PALETTE": None}, ()),
    ],
)
def test_palettes_of_both_generations(meta, palette):
    assert TrainingSettings.read(meta).palette == palette


def test_a_converted_file_keeps_names_palette_and_settings(tmp_path):
    meta = {"cfg": segmenters.CONFIG, "CLASSES": segmenters.NAMES, "PALETTE": segmenters.PALETTE}
    path = segmenters.saved(tmp_path, meta=meta)
    assert convert_main([str(path), "-q"]) == 0
    before, after = (load_checkpoint(path.with_suffix(suffix))[1] for suffix in (".pth", ".safetensors"))
    assert after.defaults == before.defaults and after.details == before.details


def test_an_auxiliary_head_in_a_list_is_dropped(tmp_path):
    state = segmenters.case("upernet_micro").state
    moved = {key: None for key in state if key.startswith("auxiliary_head.")}
    listed = {f"auxiliary_head.0.{key[15:]}": torch.from_numpy(np.asarray(state[key])) for key in moved}
    _, spec = load_checkpoint(segmenters.saved(tmp_path, **moved, **listed))
    assert spec.checkpoint["dropped"] == sorted(listed)
    assert load_checkpoint(segmenters.saved(tmp_path, **moved))[1].checkpoint["dropped"] == []


def test_a_head_may_read_some_stages(tmp_path):
    """Without the finest map: logits at an eighth of the input's size."""
    state = segmenters.case("upernet_micro").state
    changes = {key: None for key in state if key.startswith((f"{HEAD}lateral_convs.", f"{HEAD}fpn_convs.2"))}
    for j in (1, 2):
        prefix = f"{HEAD}lateral_convs.{j}."
        changes |= {
            f"{HEAD}lateral_convs.{j - 1}.{key.removeprefix(prefix)}": torch.from_numpy(np.asarray(value))
            for key, value in state.items()
            if key.startswith(prefix)
        }
    bottleneck = f"{HEAD}fpn_bottleneck.conv.weight"
    changes[bottleneck] = torch.from_numpy(state[bottleneck][:, :72])
    model, spec = load_checkpoint(segmenters.saved(tmp_path, **changes))
    logits, label_map = run(model, segmenters.case("upernet_micro").inputs)
    assert logits.shape == (2, 7, 9, 13) and label_map.shape == (2, 72, 104)
    assert "backbone.outnorm0.weight" in spec.checkpoint["dropped"]


def test_blocks_and_what_stays_in_float_are_modules(tmp_path):
    model, spec = load_checkpoint(segmenters.saved(tmp_path))
    assert all(model.get_submodule(path) for path in (*spec.blocks, *spec.keep_float))
    covered = (*spec.blocks, *spec.keep_float)
    convolutions = [path for path, each in model.named_modules() if isinstance(each, torch.nn.Conv2d)]
    assert all(any(f"{path}.".startswith(f"{block}.") for block in covered) for path in convolutions)


def test_feature_maps_of_its_backbone(tmp_path):
    case = segmenters.case("upernet_micro")
    model, spec = load_checkpoint(segmenters.saved(tmp_path), head="features")
    assert spec.task == "features" and f"{segmenters.CLASSIFIER}.weight" in spec.checkpoint["dropped"]
    with torch.inference_mode():
        maps = model(torch.from_numpy(case.inputs))
    for i, got in enumerate(maps):
        assert np.abs(got.numpy().reshape(-1)[:64] - case.expected[f"feature{i}/head"]).max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{HEAD}bottleneck.conv.weight": None}, "1 missing: decode_head.bottleneck.conv.weight"),
        ({f"{HEAD}conv_seg.weight": torch.zeros(7)}, r"decode_head.conv_seg.weight is \[7\]"),
        ({f"{HEAD}lateral_convs.0.gn.weight": torch.ones(24)}, "1 unexpected: decode_head.lateral_convs.0.gn.weight"),
        ({f"{HEAD}lateral_convs.1.conv.weight": torch.zeros(24, 77, 1, 1)}, "the head reads maps of"),
        ({f"{HEAD}psp_modules.0.1.conv.weight": None}, "segmenter with the head"),
        ({f"{HEAD}psp_modules.3.1.conv.weight": None}, "pools to 3 sizes; without a configuration they would be"),
        ({"backbone.patch_embed.0.weight": None}, "segmenter whose backbone is not EfficientVMamba"),
        ({f"{HEAD}conv_seg.bias": torch.full((7,), np.nan)}, "holds NaN"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(segmenters.saved(tmp_path, **changes))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mode='whole'", "mode='slide', crop_size=(512, 512), stride=(341, 341)", "the test mode 'slide'"),
        ("type='UPerHead'", "type='FCNHead'", "head FCNHead; supported is UPerHead"),
        ("bgr_to_rgb=True", "bgr_to_rgb=False", "images in the order BGR"),
        ("pool_scales=", "act_cfg=dict(type='GELU'), pool_scales=", "the activation GELU"),
        ("pool_scales=", "conv_cfg=dict(type='ConvWS'), pool_scales=", "convolutions of another kind"),
        ("        3,\n            6,", "        3,", r"pools to 4 sizes; its configuration says \[1, 2, 3\]"),
    ],
)
def test_settings_that_would_give_other_maps_are_refused(old, new, message, tmp_path):
    assert old in segmenters.CONFIG
    meta = {"cfg": segmenters.CONFIG.replace(old, new)}
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(segmenters.saved(tmp_path, meta=meta))


def test_a_segmenter_has_no_logits(tmp_path):
    with pytest.raises(CheckpointError, match="holds a segmenter, which has no head 'logits'"):
        load_checkpoint(segmenters.saved(tmp_path), head="logits")


def test_a_threshold_out_of_range_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"the threshold of its head is 1\.0"):
        load_checkpoint(segmenters.binary(tmp_path, threshold=1.0))
