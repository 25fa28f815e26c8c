"""Images as Python's users and evm-run's users give them: one or many, of any type, some of them unreadable."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evm_deploy import cli
from evm_deploy.bundle.loaded import LoadedBundle, load
from evm_deploy.demo import write_images
from evm_deploy.errors import BundleError, EvmError, ImageError, UsageError
from evm_deploy.export.plan import ExportPlan


@pytest.fixture(scope="module")
def model(demo_bundle):
    with load(demo_bundle.path) as model:
        yield model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_images(folder, "heldout", 12)
    return sorted(folder.rglob("*.png"))


def arrays(files):
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


ONE = {
    "path": lambda file: file,
    "text": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda file: bytearray(file.read_bytes()),
    "BytesIO": lambda file: io.BytesIO(file.read_bytes()),
    "open file": lambda file: file.open("rb"),
    "Pillow": Image.open,
    "grey": lambda file: np.asarray(Image.open(file).convert("L")),
    "rgb": lambda file: np.asarray(Image.open(file).convert("RGB")),
    "rgba": lambda file: np.asarray(Image.open(file).convert("RGBA")),
}


@pytest.mark.parametrize("form", ONE)
def test_one_image_is_one_answer_alone_or_in_a_list(form, model, files):
    want = model.predict([files[0]])
    assert model.predict(ONE[form](files[0])) == want
    assert model.predict([ONE[form](files[0])]) == want
    assert len(want) == 1 and want != model.predict([files[-1]])


MANY = {
    "list": list,
    "tuple": tuple,
    "generator": lambda images: (each for each in images),
    "map": lambda images: map(str, images),
    "dict of paths": lambda images: dict.fromkeys(images),
    "batch": lambda images: np.stack(arrays(images)),
    "array of objects": lambda images: [Image.open(each) for each in images],
    "grey batch": lambda images: np.stack(arrays(images))[..., 0],
}


@pytest.mark.parametrize("form", MANY)
def test_many_images_are_as_many_answers(form, model, files):
    assert model.predict(MANY[form](files)) == [model.predict(file)[0] for file in files]


@pytest.mark.parametrize(
    "empty", [[], (), iter(()), np.empty((0, 8, 8, 3), np.uint8)], ids=lambda value: type(value).__name__
)
def test_no_images_are_no_answers(empty, model):
    assert model.predict(empty) == []


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        7,
        np.zeros((3, 64, 64), np.uint8),  # channels first: not three grey images
        np.zeros((1, 3, 64, 64), np.uint8),
        np.zeros((64, 64, 3)),
        np.zeros((64, 64, 3), bool),
        np.zeros(64, np.uint8),
        np.zeros((1, 1, 8, 8, 3), np.uint8),
        np.array(5, np.uint8),
        [None],
        [["a.png"]],
        [np.zeros((2, 8, 8, 3), np.uint8)],
        [b"no image" * 10000],
        b"no image" * 10000,
        "a" * 70000,
    ],
    ids=lambda value: f"{type(value).__name__}{getattr(value, 'shape', '')}",
)
def test_what_is_no_image_is_refused_in_a_few_words(wrong, model):
    with pytest.raises(EvmError) as error:
        model.predict(wrong)
    assert len(str(error.value)) < 800


def test_an_error_names_the_image(model, files):
    with pytest.raises(ImageError, match=r"images\[2\]: "):
        model.predict([files[0], files[1], b"no image"])
    with pytest.raises(ImageError, match=r"^image gone\.png does not exist"):
        model.predict([files[0], "gone.png"])


def test_one_unreadable_image_costs_that_image(model, files):
    errors = {}
    answers = model.predict([files[0], "gone.png", files[1], b"x", None, files[2]], on_error=errors.__setitem__)
    assert list(errors) == [1, 3, 4] and all(isinstance(each, ImageError) for each in errors.values())
    assert [answers[i] for i in (0, 2, 5)] == model.predict(files[:3])
    assert [answers[i] for i in (1, 3, 4)] == [[], [], []]


@pytest.mark.parametrize("top", [1, np.int64(3), np.uint8(2), 99])
def test_top_is_a_whole_number_of_any_kind(top, model, files):
    assert len(model.predict(files[0], top=top)[0]) == min(int(top), 10)
    assert len(model.classify([model.preprocessing.pixels(files[0])], top=top)[0]) == min(int(top), 10)


@pytest.mark.parametrize(
    "top", [0, -1, True, 2.0, np.float32(2), "2", None, [2], Fraction(2), float("nan"), np.array([1, 2])]
)
def test_any_other_top_is_refused(top, model, files):
    pixels = np.stack([model.preprocessing.pixels(files[0])])
    for call in (lambda: model.predict(files[0], top=top), lambda: model.classify(pixels, top=top)):
        with pytest.raises(UsageError, match="a whole number"):
            call()


def test_classify_takes_lists(model, files):
    pixels = [model.preprocessing.pixels(file) for file in files]
    want = model.classify(np.stack(pixels))
    assert model.classify(pixels) == model.classify(iter(pixels)) == model.classify(tuple(pixels)) == want
    assert model.classify([]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "a.png",
        ["a.png"],
        [np.zeros((64, 64, 3))],
        [np.zeros((32, 32, 3), np.uint8)],
        [np.zeros((2, 64, 64, 3), np.uint8)],  # its images would be lost but for the first batch
        [np.zeros((64, 64, 3), np.uint8), np.zeros((64, 65, 3), np.uint8)],
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((1, 3, 64, 64), np.uint8),
        np.zeros((1, 64, 64, 3), np.float32),
        {"a": 1},
        [[0]],
    ],
    ids=lambda value: f"{type(value).__name__}{getattr(value, 'shape', '')}",
)
def test_classify_refuses_the_rest(wrong, model):
    with pytest.raises(UsageError, match="pixels must be uint8"):
        model.classify(wrong)


def test_a_closed_bundle_says_so(demo_bundle, files):
    with load(demo_bundle.path) as model:
        pixels = np.stack([model.preprocessing.pixels(files[0])])
    for use in (
        lambda: model.predict(files),
        lambda: model.predict([]),
        lambda: model.classify(pixels),
        lambda: model.run({"image": pixels}),
        model.selftest,
        model.profiled,
        model.compute_plan,
        model.__enter__,
    ):
        with pytest.raises(UsageError, match="is closed"):
            use()
    model.close()  # twice is no error
    assert model.preprocessing.size == (64, 64) and model.labels


# -------------------------------------------------------------------------------------------------------------- evm-run


@pytest.fixture
def folder(files, tmp_path):
    """good.png, sub/other.jpg, cut.png, notes.txt and litter."""
    (tmp_path / "sub").mkdir()
    with Image.open(files[0]) as image:
        image.save(tmp_path / "good.png")
        image.convert("RGB").save(tmp_path / "sub" / "other.jfif", "JPEG")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "._good.png").write_bytes(b"x")
    return tmp_path


@pytest.fixture
def run(demo_bundle, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def run(*arguments):
        code = cli.run_main([str(demo_bundle.path), *arguments, "--top", "1", "-q"])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize(
    ("given", "good", "bad"),
    [
        (["good.png", "cut.png", "good.png"], ["good.png", "good.png"], ["cut.png"]),
        (["gone.png", "good.png"], ["good.png"], ["gone.png"]),
        (["*.png"], ["good.png"], ["cut.png"]),
        (["g*.png"], ["good.png"], []),
        (["**/*.jfif"], ["sub/other.jfif"], []),
        (["g??d.[p]ng", "sub"], ["good.png", "sub/other.jfif"], []),
        (["."], ["good.png", "sub/other.jfif"], ["cut.png"]),
        (["sub", "good.png"], ["sub/other.jfif", "good.png"], []),
        (["*.tga", "good.png"], ["good.png"], ["*.tga"]),
        (["notes.txt", "good.png"], ["good.png"], ["notes.txt"]),
        (["cut.png"], [], ["cut.png"]),
    ],
)
def test_evm_run_prints_the_good_and_names_the_bad(given, good, bad, run):
    code, out, err = run(*given)
    assert code == (2 if bad else 0)
    assert [line for line in out.splitlines() if not line.startswith("  ")] == good
    assert all(f"evm-run: image {name}" in err for name in bad) and "Traceback" not in err
    code, out, err = run(*given, "--json")
    rows = json.loads(out)
    assert code == (2 if bad else 0)
    assert [row["image"] for row in rows if "top" in row] == good
    assert [row["image"] for row in rows if "error" in row] == bad
    assert all(len(row["top"]) == 1 for row in rows if "top" in row)


def test_an_empty_name_is_refused_before_the_work(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("", "good.png")
    said = capsys.readouterr()
    assert ended.value.code == 2 and "is a shell variable not set?" in said.err and not said.out


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(run, folder):
    (folder / "g*[1].png").write_bytes((folder / "good.png").read_bytes())
    code, out, _ = run("g*[1].png")
    assert code == 0 and [line for line in out.splitlines() if not line.startswith("  ")] == ["g*[1].png"]


def test_a_folder_without_images_says_so_and_costs_nothing(run, folder):
    (folder / "empty").mkdir()
    code, out, err = run("empty", "good.png")
    assert code == 2 and "good.png" in out and "empty" in err and "folder" in err


def test_results_before_a_failure_of_the_model_are_not_lost(run, monkeypatch, folder):
    real, calls = LoadedBundle.predict, []

    def predict(self, images, **options):
        calls.extend([images] if images else [])  # without images: whether there will be answers
        if len(calls) == 2:
            raise BundleError("the network gives NaN", "run the self-test")
        return real(self, images, **options)

    monkeypatch.setattr(LoadedBundle, "predict", predict)
    code, out, _ = run(*["good.png"] * 65, "--json")
    assert code == 2 and len(json.loads(out)) == 64


def test_several_batches_keep_their_order(bundle_of, folder, monkeypatch):
    from evm_deploy.demo import CHECKPOINT

    with load(bundle_of(CHECKPOINT, ExportPlan("onnx")).path) as model:
        monkeypatch.chdir(folder)
        errors = {}
        found = model.predict(["good.png", "cut.png"] * 40 + ["good.png"], top=1, on_error=errors.__setitem__)
        assert list(errors) == list(range(1, 80, 2))
        assert [bool(each) for each in found] == [True, False] * 40 + [True]
