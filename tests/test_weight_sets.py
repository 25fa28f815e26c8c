"""Checkpoints as training tools lay them out: which weights are taken, and what is said of the others."""

from __future__ import annotations

import re

import golden
import pytest
import torch

from evm_deploy import cli
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.errors import CheckpointError
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.quantization import quantization_config
from evm_deploy.export.source import Source
from evm_deploy.model.families import load_checkpoint
from evm_deploy.model.weight_sets import kind_of

BUFFER = re.compile("running_mean|running_var|num_batches_tracked")
EMA = {k: torch.from_numpy(v) for k, v in golden.model_case("micro_64")["state"].items()}
RAW = {k: v if BUFFER.search(k) else v + 1 for k, v in EMA.items()}
PARAMETERS = {k: v for k, v in EMA.items() if not BUFFER.search(k)}
RAW_PARAMETERS = {k: RAW[k] for k in PARAMETERS}
TEN, ZERO = torch.tensor(10), torch.tensor(0)


def named(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def joined(prefix, joiner, state):
    return {(prefix + key).replace(".", joiner): value for key, value in state.items()}


# layouts that hold averaged and raw weights, by the tool that writes them
BOTH = {
    "timm": {"state_dict": RAW, "state_dict_ema": EMA, "epoch": 3},
    "Swin, VMamba": {"model": RAW, "model_ema": EMA, "max_accuracy": 1.0},
    "the authors": {"model": RAW, "ema_model": named("module.", EMA), "optimizer": {"lr": 0.1}},
    "torchvision": {"model": RAW, "model_ema": {"n_averaged": TEN, **named("module.", EMA)}},
    "BasicSR": {"params": RAW, "params_ema": EMA},
    "tutorials": {"model_state_dict": RAW, "ema_state_dict": EMA},
    "a list of EMA": {"net": RAW, "ema": {"decay": 0.9, "shadow_params": [*PARAMETERS.values()]}},
    "a dict of EMA": {"net": RAW, "ema": {"shadow": PARAMETERS, "backup": {}}},
    "DINO": {"student": named("module.backbone.", RAW), "teacher": named("backbone.", EMA)},
    "detectron2": {"model": RAW, "ema_state": {"decay": 0.9, "state": EMA}},
    "Lightning, EMA as a module": {"state_dict": {**named("net.", RAW), **named("ema_net.module.", EMA)}},
    "Lightning, EMA as a callback": {"state_dict": RAW, "callbacks": {"EMACallback": {"weights": EMA}}},
    "Lightning, SWA": {
        "state_dict": named("net.", RAW),
        "callbacks": {"StochasticWeightAveraging": {"n_averaged": 4, "average_model_state": named("net.", EMA)}},
    },
    "Lightning, WeightAveraging": {
        "state_dict": named("net.", EMA),
        "current_model_state": named("net.", RAW),
        "averaging_state": {"n_averaged": TEN},
    },
    "mmengine": {
        "meta": {"mmengine_version": "0.10.7"},
        "state_dict": named("backbone.", EMA),
        "ema_state_dict": {"steps": TEN, **named("module.backbone.", RAW)},
    },
    "mmcv": {"state_dict": {**named("backbone.", EMA), **joined("ema_backbone_", "_", RAW_PARAMETERS)}},
    "latent diffusion": {
        "state_dict": {
            **named("model.", RAW),
            **{f"model_ema.{k.replace('.', '')}": v for k, v in PARAMETERS.items()},
            "model_ema.decay": TEN,
        }
    },
    "ema-pytorch": {"state_dict": {**named("ema.online_model.", RAW), **named("ema.ema_model.", EMA), "ema.step": TEN}},
    "flat": {**RAW, **named("ema.module.", EMA)},
}


def loaded(content, path, **options):
    torch.save(content, path)
    module, spec = load_checkpoint(path, **options)
    return module.state_dict(), spec


def holds(state, weights):
    return all(torch.equal(state[key], weights[key]) for key in weights)


@pytest.mark.parametrize("tool", BOTH)
def test_averaged_weights_are_taken_and_raw_ones_on_request(tool, tmp_path):
    for weights, expected in (("ema", EMA), ("raw", RAW)):
        state, spec = loaded(BOTH[tool], tmp_path / "a.pth", weights=weights)
        assert holds(state, expected)
        assert not holds(state, RAW if expected is EMA else EMA)
        assert spec.checkpoint["weights"] == weights
        (other,) = spec.checkpoint["others"]
        assert any(f"'{other}'" in note and "also in the file" in note for note in spec.notes)


@pytest.mark.parametrize("tool", BOTH)
def test_a_set_is_taken_by_its_name(tool, tmp_path):
    _, spec = loaded(BOTH[tool], tmp_path / "a.pth")
    state, other = loaded(BOTH[tool], tmp_path / "a.pth", weights=spec.checkpoint["others"][0])
    assert holds(state, RAW) and other.checkpoint["weights"] == "raw"


INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
ONE = {
    "plain": EMA,
    "DeepSpeed": {"module": named("_forward_module.model.", EMA), "optimizer": None, "param_shapes": [{}]},
    "two levels": {"checkpoint": {"model": {"state_dict": named("net.", EMA)}}},
    "any prefix": named("a.b.encoder.trunk.", EMA),
    "a list": [{"epoch": 1}, EMA],
    "lightning": {"state_dict": {**named("model.", EMA), "criterion.pos_weight": torch.ones(3)}},
    "AveragedModel": {"n_averaged": TEN, **named("module.", EMA)},
    "twice the same": {"model": EMA, "state_dict": {k: v.clone() for k, v in EMA.items()}},
    "moments by name": {"model": EMA, "optimizer": {"exp_avg": RAW, "exp_avg_sq": RAW}},
    "dicts in dicts": {
        "patch_embed": {k[12:]: v for k, v in EMA.items() if k.startswith("patch_embed.")},
        "layers": {"0": {k[9:]: v for k, v in EMA.items() if k.startswith("layers.0.")}}
        | {k[7:]: v for k, v in EMA.items() if re.match(r"layers\.[^0]", k)},
        "classifier": {k[11:]: v for k, v in EMA.items() if k.startswith("classifier.")},
    },
    **{
        f"{wrapper} inside": {"model": {re.sub(r"^(layers\.0)\.", rf"\1.{wrapper}.", k): v for k, v in EMA.items()}}
        for wrapper in INSIDE
    },
    **{
        f"{wrapper} around the anchor": {
            k.replace("patch_embed.", f"patch_embed.{wrapper}."): v for k, v in EMA.items()
        }
        for wrapper in INSIDE
    },
}


@pytest.mark.parametrize("name", ONE)
def test_the_only_weights_are_found_behind_any_prefix(name, tmp_path):
    state, spec = loaded(ONE[name], tmp_path / "a.pth")
    assert holds(state, EMA)
    assert spec.checkpoint["others"] == (["state_dict"] if name == "twice the same" else [])
    assert spec.checkpoint["weights"] == ("ema" if name == "AveragedModel" else "raw")


NOT_BEGUN = {
    "AveragedModel": {"model": RAW, "model_ema": {"n_averaged": ZERO, **named("module.", EMA)}},
    "SWA": {"state_dict": RAW, "callbacks": {"SWA": {"n_averaged": 0, "average_model_state": EMA}}},
    "WeightAveraging": {"state_dict": EMA, "current_model_state": RAW, "averaging_state": {"n_averaged": ZERO}},
}


@pytest.mark.parametrize("name", NOT_BEGUN)
def test_an_average_that_had_not_begun_is_left_out(name, tmp_path):
    state, spec = loaded(NOT_BEGUN[name], tmp_path / "a.pth")
    assert holds(state, RAW) and spec.checkpoint["weights"] == "raw"
    assert "averaging had not begun" in spec.notes[0]


def test_an_average_that_equals_the_raw_weights_is_either(tmp_path):
    for content in ({"model_ema": EMA, "model": dict(EMA)}, {"model": EMA, "model_ema": dict(EMA)}):
        for weights, name in (("ema", "model_ema"), ("raw", "model"), ("model", "model"), ("model_ema", "model_ema")):
            state, spec = loaded(content, tmp_path / "a.pth", weights=weights)
            assert holds(state, EMA) and spec.checkpoint["container"] == name


UNKNOWN = {
    "a short list": {"net": RAW, "ema": {"shadow_params": [*PARAMETERS.values()][:-1]}},
    "slashes": {"net": RAW, "model_ema": {key.replace(".", "/"): value for key, value in EMA.items()}},
    "numbers of parameters": {"net": RAW, "ema": {140000 + i: value for i, value in enumerate(EMA.values())}},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_averages_that_cannot_be_read_are_told(name, tmp_path):
    state, spec = loaded(UNKNOWN[name], tmp_path / "a.pth")
    assert holds(state, RAW) and spec.checkpoint["weights"] == "raw"
    assert any("seem to be averaged weights" in note for note in spec.notes)
    assert not loaded({"net": RAW, "ema": {"decay": TEN}}, tmp_path / "a.pth")[1].notes


def test_an_average_beside_each_tensor_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="unexpected"):
        loaded({**RAW, **{f"{key}_ema": value for key, value in EMA.items()}}, tmp_path / "a.pth")


def wider(state):
    return {key: torch.zeros([2 * side for side in value.shape]) for key, value in state.items()}


UNCLEAR = {
    "last and best": ({"model": EMA, "best": RAW}, {}, "2 sets of raw weights(?s:.*)--weights model"),
    "two averages": ({"model": RAW, "ema_1": EMA, "ema_2": {**EMA, "norm.x": ZERO}}, {}, "2 sets of averaged weights"),
    "momentum encoders": ({"state_dict": {**named("encoder_q.", EMA), **named("encoder_k.", RAW)}}, {}, "encoder_k"),
    "a teacher of another size": ({"student": EMA, "teacher": wider(EMA)}, {}, "is no average of 'student'"),
    "raw of an average": ({"model_ema": EMA}, {"weights": "raw"}, "has no raw weights"),
    "a misspelt kind": (EMA, {"weights": "emma"}, "has no weights 'emma'; it has: 'file'"),
    "a name that needs quotes": ({"a b": EMA, "c": RAW}, {}, "--weights 'a b'"),
    "ZeRO 3": ({"module": {key: torch.zeros(0) for key in EMA}}, {}, "zero_to_fp32.py"),
    "FSDP, local": ({"_fsdp_wrapped_module.flat_param": torch.zeros(9)}, {}, "FULL_STATE_DICT"),
    "the same name twice": ({**EMA, "layers.0.module.a": ZERO, "layers.0.a": TEN}, {}, "two keys stand for"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_an_unclear_choice_is_refused_with_the_names(name, tmp_path):
    content, options, message = UNCLEAR[name]
    with pytest.raises(CheckpointError, match=message):
        loaded(content, tmp_path / "a.pth", **options)


BESIDE = (
    "aux_head.weight",
    "auxiliary.1.bias",
    "pos_weight",
    "loss_fn.weight",
    "train_acc.tp",
    "criterion.w",
    "ema.step",
)


@pytest.mark.parametrize("key", BESIDE)
def test_what_only_the_training_needs_is_dropped_and_listed(key, tmp_path):
    state, spec = loaded({**EMA, key: torch.ones(3)}, tmp_path / "a.pth")
    assert holds(state, EMA) and spec.checkpoint["dropped"] == [key]


@pytest.mark.parametrize("key", ["extra.weight", "pos_embed", "layers.0.blocks.0.mixer.weight"])
def test_other_keys_are_refused_until_they_are_dropped(key, tmp_path):
    content = {"model": named("net.", {**EMA, key: torch.ones(3)})}
    with pytest.raises(CheckpointError, match=r"1 unexpected(?s:.*)(--drop|another architecture)"):
        loaded(content, tmp_path / "a.pth")
    for pattern in (key, key.replace("e", "?"), f"net.{key}", f"model.net.{key}"):
        state, spec = loaded(content, tmp_path / "a.pth", drop=[pattern])
        assert holds(state, EMA) and spec.checkpoint["dropped"] == [f"net.{key}"]
    with pytest.raises(CheckpointError, match="fits no key"):
        loaded(content, tmp_path / "a.pth", drop=[key, "nothing.*"])
    with pytest.raises(CheckpointError, match=r"1 missing: patch_embed\.0\.bias"):
        loaded(content, tmp_path / "a.pth", drop=[key, "patch_embed.0.bias"])


@pytest.mark.parametrize(
    "path", ["ema", "state_dict_ema", "modelEMA", "EMACallback", "swa_model", "a.averaged.b", "ModelEma"]
)
def test_words_of_averages(path):
    assert kind_of(f"{path}.") == "ema"


@pytest.mark.parametrize(
    "path", ["", "state_dict", "schema", "remark", "avgpool", "ema.online_model", "student", "semantic"]
)
def test_other_words(path):
    assert kind_of(f"{path}.") == "raw"


def test_hostile_nesting_ends(tmp_path):
    lists = [torch.zeros(1)]
    for _ in range(200):
        lists = [lists] * 9
    loop = {"state_dict": EMA}
    loop["loop"] = loop
    for content in ({"lists": lists}, {"view": torch.zeros(1).expand(1 << 40)}):
        with pytest.raises(CheckpointError):
            loaded(content, tmp_path / "a.pth")
    assert holds(loaded(loop, tmp_path / "a.pth")[0], EMA)
    huge = {**EMA, "classifier.norm.bias": torch.zeros(1).expand(1 << 40)}
    with pytest.raises(CheckpointError, match="more values than the file holds"):
        loaded({"model": huge, "model_ema": dict(huge)}, tmp_path / "a.pth")


def test_export_says_which_weights_it_took(tmp_path, capsys):
    file = tmp_path / "both.pth"
    torch.save({"state_dict": RAW, "state_dict_ema": {**EMA, "extra.w": ZERO}, "loss": ZERO}, file)
    flags = [str(file), "--target", "onnx", "--imgsz", "64", "-o", str(tmp_path / "out"), "--drop", "extra.*"]
    assert cli.export_main([*flags, "--dry-run"]) == 0
    assert "key 'state_dict_ema', ema" in capsys.readouterr().out
    assert cli.export_main(flags) == 0
    assert "'state_dict_ema' (averaged); also in the file: 'state_dict' (raw)" in capsys.readouterr().out
    facts = open_bundle(next((tmp_path / "out").iterdir())).manifest.model["checkpoint"]
    assert (facts["weights"], facts["container"], facts["others"]) == ("ema", "state_dict_ema", ["state_dict"])
    assert facts["dropped"] == ["extra.w", "loss"]
    assert cli.export_main([*flags[:-1], "extra.*,"]) == 2


def test_weights_of_one_file_share_no_calibration(tmp_path):
    """A calibration table is kept by the file's hash and by what was taken from it."""
    file = tmp_path / "a.pth"
    torch.save({"state_dict": {**RAW, "aux.w": ZERO}, "state_dict_ema": EMA}, file)

    def identity(**options):
        plan = ExportPlan("onnx", "int8", calib="demo", **options)
        return quantization_config(plan, Source(file).network(plan).spec).checkpoint_sha256

    assert identity(weights="raw") != identity() == identity(weights="state_dict_ema")
    source = Source(file)
    plans = [ExportPlan("onnx", weights="raw", drop=drop) for drop in ("layers.0.*", (), ["aux.*"])]
    with pytest.raises(CheckpointError, match=r"missing|gaps|not fit"):
        source.network(plans[0])
    assert source.network(plans[1]).spec.checkpoint["dropped"] == ["aux.w"]
    assert source.network(plans[2]) is not source.network(plans[1])
