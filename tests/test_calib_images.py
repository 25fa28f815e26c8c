"""Images to calibrate and judge with: every kind of source, every kind of image, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from evm_deploy.data.images import calibration_images, find_images, labelled_images, sample
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.demo import digits, write_images
from evm_deploy.errors import CalibrationError
from evm_deploy.export.selftest import synthetic_image

PRE = Preprocessing((32, 32))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """120 different images, some in folders."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(120):
        path = folder / ("ab"[i % 2] if i % 3 else ".") / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(synthetic_image(40, 50, seed=i)).save(path)
    return folder


def refused(source, match, **options):
    with pytest.raises(CalibrationError, match=match) as error:
        calibration_images(source, PRE, **options)
    return str(error.value)


def test_a_folder_is_searched_whole_and_sampled_by_seed(images):
    everything = calibration_images(images, PRE)
    assert (len(everything), everything.skipped) == (120, ())
    assert all(pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 for pixels in everything.pixels())
    some = calibration_images(images, PRE, 110, seed=1)
    names = [p.name for p in some.items]
    assert len(set(names)) == 110 and names == sorted(names)
    assert some == calibration_images(images, PRE, 110, seed=1)
    assert some != calibration_images(images, PRE, 110, seed=2)


def test_lists_and_arrays_are_the_same_images(images, tmp_path):
    names = [p.name for p in find_images(images)]
    listed = images / "list.txt"
    listed.write_text("# chosen\n" + "\n".join(names) + "\n\n")
    arrays = tmp_path / "images.npz"
    np.savez(arrays, images=np.stack([np.asarray(Image.open(images / name)) for name in names]))
    sets = [calibration_images(source, PRE) for source in (images, listed, arrays)]
    a, b, c = (np.stack(list(found.pixels())) for found in sets)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
    assert sets[0].digest() == sets[1].digest() != sets[2].digest()


def test_the_digest_follows_content_order_and_preprocessing(images):
    chosen = calibration_images(images, PRE)
    assert chosen.digest() == calibration_images(images, PRE).digest()
    assert chosen.digest() != calibration_images(images, Preprocessing((32, 32), crop_pct=1.0)).digest()
    assert chosen.digest() != calibration_images(images, PRE, 119).digest()


def test_every_kind_of_image_is_read(images, tmp_path):
    for i in range(110):
        Image.fromarray(synthetic_image(40, 50, seed=i)).save(tmp_path / f"{i}.png")
    shot = Image.fromarray(synthetic_image(50, 40, seed=500))
    shot.convert("L").save(tmp_path / "grey.png")
    shot.convert("RGBA").save(tmp_path / "alpha.png")
    shot.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.asarray(shot.convert("L")).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    shot.save(tmp_path / "turned.JPG", exif=exif)
    images = calibration_images(tmp_path, PRE)
    assert (len(images), images.skipped) == (115, ())


def test_a_few_unreadable_ones_are_named_and_left_out(images, tmp_path):
    for i in range(120):
        Image.fromarray(synthetic_image(40, 50, seed=i)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    images = calibration_images(tmp_path, PRE)
    assert len(images) == 120
    assert [text.split(":")[0] for text in images.skipped] == ["broken.png", "cut.png"]
    for i in range(10):
        (tmp_path / f"more{i}.png").write_bytes(b"no image")
    assert "12 of 132 images cannot be read: broken.png" in refused(tmp_path, "cannot be read", force=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: np.zeros((20, 20, 3), np.uint8), "120 of 120 images have a single colour"),
        (lambda i: np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8), "look like random noise"),
        (lambda i: synthetic_image(40, 50, seed=i % 60), "60 of 120 images are copies of other images"),
    ],
)
def test_unfit_images_are_refused_unless_forced(make, message, tmp_path):
    for i in range(120):
        Image.fromarray(make(i)).save(tmp_path / f"{i}.png")
    assert "--force-calib" in refused(tmp_path, message)
    assert len(calibration_images(tmp_path, PRE, force=True)) == 120


def test_too_few_are_refused_unless_forced(tmp_path):
    Image.fromarray(synthetic_image(20, 20, seed=0)).save(tmp_path / "one.png")
    refused(tmp_path, "1 images are too few, at least 100")
    assert len(calibration_images(tmp_path, PRE, force=True)) == 1


def test_sources_that_hold_nothing_are_named(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "no images found")
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path / "notes.txt", "no images found")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "bytes.txt", "not UTF-8")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    refused(tmp_path / "broken.npz", r"cannot be read as \.npz")
    np.savez(tmp_path / "floats.npz", images=np.zeros((3, 4, 4, 3)))
    refused(tmp_path / "floats.npz", r"uint8 \(n, H, W\)(?s:.*)float64 \[3, 4, 4, 3\]")
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    refused(tmp_path / "two.npz", "found: a, b")


def test_the_demos_digits_are_fit_to_calibrate_with(tmp_path):
    write_images(tmp_path, "train")
    assert len(calibration_images(tmp_path, Preprocessing((64, 64), crop_pct=1.0))) == 512


def test_classes_come_from_folders_or_a_csv(tmp_path):
    count = write_images(tmp_path, "heldout", 80)
    images = labelled_images(tmp_path, PRE, 10, [str(i) for i in range(10)])
    want = np.sort(digits("heldout")[1][:count])
    np.testing.assert_array_equal(images.labels, want)
    lines = [f"{p.name},{p.name.split('/')[0]}" for p in find_images(tmp_path)]
    for heading in ([], ["path,class"]):
        (tmp_path / "val.csv").write_text("\n".join([*heading, *lines]))
        np.testing.assert_array_equal(labelled_images(tmp_path / "val.csv", PRE, 10).labels, want)


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [(("07", "3"), 8, [7, 3]), (("²", "3"), 2, [1, 0]), (("9" * 5000, "3"), 2, [1, 0])],
    ids=["zeros", "superscript", "long"],
)
def test_names_that_are_digits_and_those_that_only_look_so(names, classes, labels, tmp_path):
    for file in ("a.png", "b.png"):
        Image.fromarray(synthetic_image(20, 20, seed=1)).save(tmp_path / file)
    (tmp_path / "val.csv").write_text("".join(f"{f},{n}\n" for f, n in zip(("a.png", "b.png"), names, strict=True)))
    assert labelled_images(tmp_path / "val.csv", PRE, classes).labels.tolist() == labels


def test_folders_with_other_names_go_by_the_alphabet(tmp_path):
    for name in ("n02", "n01", "n03"):
        (tmp_path / name).mkdir()
        Image.fromarray(synthetic_image(20, 20, seed=len(name))).save(tmp_path / name / "a.png")
    assert labelled_images(tmp_path, PRE, 3).labels.tolist() == [0, 1, 2]
    assert labelled_images(tmp_path, PRE, 4, ["n03", "n02", "x", "n01"]).labels.tolist() == [3, 1, 0]
    for classes, labels in ((4, None), (2, ["cat", "dog"])):
        with pytest.raises(CalibrationError, match=rf"3 classes \(n01, n02, n03\), the head has {classes}"):
            labelled_images(tmp_path, PRE, classes, labels)


def test_labelled_sources_without_classes_are_refused(images, tmp_path):
    with pytest.raises(CalibrationError, match="is not in a class folder"):
        labelled_images(images, PRE, 10)
    (tmp_path / "val.csv").write_text("a.png;3\n")
    with pytest.raises(CalibrationError, match="path,class"):
        labelled_images(tmp_path / "val.csv", PRE, 10)


def test_a_first_image_that_is_missing_is_no_heading(tmp_path):
    Image.fromarray(synthetic_image(20, 20, seed=1)).save(tmp_path / "b.png")
    (tmp_path / "val.csv").write_text("a.png,0\nb.png,1\n")
    with pytest.raises(CalibrationError, match=r"1 of 2 images cannot be read: a\.png"):
        labelled_images(tmp_path / "val.csv", PRE, 2)


def test_sampling_keeps_all_when_there_are_no_more(images):
    found = find_images(images)
    assert sample(found, 500) == found


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "no array `labels` of 3 whole numbers"),
        (np.zeros(2, np.int64), "no array `labels` of 3 whole numbers"),
        (np.zeros(3), "no array `labels` of 3 whole numbers"),
        (np.array([0, 1, 2]), "label 2, but the head has 2 classes"),
        (np.array([0, -1, 1]), "label -1, but the head has 2 classes"),
        (np.array([1, 0, 1]), ""),
    ],
)
def test_an_npz_of_labelled_images(labels, message, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    np.savez(tmp_path / "val.npz", images=images, **({} if labels is None else {"labels": labels}))
    if message:
        with pytest.raises(CalibrationError, match=re.escape(message)):
            labelled_images(tmp_path / "val.npz", Preprocessing((32, 32)), 2)
    else:
        assert list(labelled_images(tmp_path / "val.npz", Preprocessing((32, 32)), 2).labels) == [1, 0, 1]
