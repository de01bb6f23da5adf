"""DICOM: values as grey by window or range, colours, frames; and nothing of a patient anywhere."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from data_folders import features, write_csv
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from test_cli import mistake

from comfyui_l2p.l2p_core.dataset import formats, images
from comfyui_l2p.l2p_core.dataset.image_folder import open_folder
from comfyui_l2p.l2p_core.dataset.loader import Loader
from comfyui_l2p.l2p_core.deep_images import dicom
from comfyui_l2p.l2p_core.deep_images.common import BrokenImage
from comfyui_l2p.l2p_core.run import recipe, source_images
from comfyui_l2p.l2p_core.run.data import RunData
from comfyui_l2p.train.cli import main
from comfyui_l2p.train.pictures import reading_notes

PATIENT = "Doe^Secret"


def example(name: str) -> Path:
    return Path(str(get_testdata_file(name, download=False)))


def changed(target: Path, name: str = "CT_small.dcm", pixels: np.ndarray | None = None, **elements: Any) -> Path:
    """An example of pydicom with other elements, or of other pixels."""
    data = pydicom.dcmread(example(name))
    if pixels is not None:
        data.PixelData = pixels.tobytes()
        data.Rows, data.Columns = pixels.shape[-2:]
        data["PixelData"].VR = "OW"
    for key, value in elements.items():
        if value is None:
            data.pop(key, None)
        else:
            setattr(data, key, value)
    data.save_as(target)
    return target


def grey(path: Path, window: str = dicom.WINDOW, frame: int = 0) -> np.ndarray:
    """A file's one channel in [-1, 1], checked to be three equal ones."""
    header = images.look(path)
    pixels = images.load(path, header.width, header.height, frame, window)
    assert pixels.dtype == torch.float32 and (pixels == pixels[:1]).all()
    return pixels[0].numpy()


def hounsfield(path: Path) -> np.ndarray:
    data = pydicom.dcmread(path)
    return data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)


def test_a_ct_keeps_every_value_of_its_range() -> None:
    """CT_small has no window: its range is all of its values."""
    path = example("CT_small.dcm")
    values = hounsfield(path)
    expected = (values - values.min()) / (values.max() - values.min()) * 2 - 1
    for window in (dicom.WINDOW, dicom.FULL):
        found = grey(path, window)
        assert np.abs(found - expected).max() < 1e-6
        assert len(np.unique(found)) == len(np.unique(values))


def test_windows_are_the_standards(tmp_path: Path) -> None:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, computed here as the standard writes them."""
    path = changed(tmp_path / "a.dcm", WindowCenter=[40, 900], WindowWidth=[400, 90])
    x, c, w = hounsfield(path), 40.0, 400.0
    linear = np.where(
        x <= c - 0.5 - (w - 1) / 2, 0, np.where(x > c - 0.5 + (w - 1) / 2, 1, (x - (c - 0.5)) / (w - 1) + 0.5)
    )
    exact = ((x - c) / w + 0.5).clip(0, 1)
    sigmoid = 1 / (1 + np.exp(-4 * (x - c) / w))
    for function, expected in (("LINEAR", linear), ("LINEAR_EXACT", exact), ("SIGMOID", sigmoid)):
        changed(path, WindowCenter=[40, 900], WindowWidth=[400, 90], VOILUTFunction=function)
        assert np.abs((grey(path) + 1) / 2 - expected).max() < 1e-6, function
    assert np.abs((grey(example("CT_small.dcm"), "40/400") + 1) / 2 - linear).max() < 1e-6
    assert grey(path, dicom.FULL).min() == -1 and grey(path, dicom.FULL).max() == 1


def test_an_mr_has_its_own_window() -> None:
    data = pydicom.dcmread(example("MR_small.dcm"))
    centre, width = float(data.WindowCenter), float(data.WindowWidth)
    found = grey(example("MR_small.dcm"))
    expected = ((data.pixel_array - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
    assert np.abs((found + 1) / 2 - expected).max() < 1e-6
    assert np.array_equal(found, grey(example("MR_small_RLE.dcm")))


def test_monochrome1_is_white_where_it_is_0(tmp_path: Path) -> None:
    path = changed(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1")
    for window in (dicom.FULL, "40/400"):
        assert np.abs(grey(path, window) + grey(example("CT_small.dcm"), window)).max() < 1e-6


def test_padding_is_not_part_of_the_range(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.int16).reshape(8, 8) + 100
    pixels[0, 0] = -2000
    path = changed(tmp_path / "a.dcm", pixels=pixels, PixelPaddingValue=-2000)
    found = grey(path, dicom.FULL)
    assert found[0, 0] == -1 and found[0, 1] == -1 and found[-1, -1] == 1


def test_one_value_everywhere_is_no_division_by_nothing(tmp_path: Path) -> None:
    path = changed(tmp_path / "a.dcm", pixels=np.full((8, 8), 7, np.int16))
    assert (grey(path, dicom.FULL) == -1).all()


@pytest.mark.parametrize("name", ["SC_rgb_small_odd.dcm", "SC_ybr_full_422_uncompressed.dcm", "examples_palette.dcm"])
def test_colours(name: str) -> None:
    path = example(name)
    header = images.look(path)
    loaded = images.load(path, header.width, header.height)
    data = pydicom.dcmread(path)
    expected = apply_color_lut(data.pixel_array, data) if "palette" in name else pixel_array(path)
    top = np.iinfo(expected.dtype).max
    assert np.abs(((loaded.permute(1, 2, 0).numpy() + 1) / 2) * top - expected).max() < 1e-2


def test_a_file_that_is_deflated_as_a_whole(tmp_path: Path) -> None:
    """Its pixels have no place in the file, and may be more than its bytes."""
    path = example("image_dfl.dcm")
    top = pydicom.dcmread(path).pixel_array
    low, high = float(top.min()), float(top.max())
    assert np.abs((grey(path, dicom.FULL) + 1) / 2 - (top - low) / (high - low)).max() < 1e-6


@pytest.mark.parametrize("is_implicit", [False, True])
def test_a_transfer_syntax_that_is_wrong_about_the_encoding(tmp_path: Path, is_implicit: bool) -> None:
    """The pixels lie some bytes from where it says, and other elements follow, so that nothing seems to be missing."""
    right, wrong = example("CT_small.dcm"), tmp_path / "wrong.dcm"
    data = pydicom.dcmread(right)
    syntax = pydicom.uid.ExplicitVRLittleEndian if is_implicit else pydicom.uid.ImplicitVRLittleEndian
    data.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(wrong, data, implicit_vr=is_implicit, little_endian=True, force_encoding=True)
    assert (grey(wrong) == grey(right)).all()


def test_a_compressed_file_whose_transfer_syntax_is_wrong_about_the_encoding() -> None:
    path = example("SC_rgb_jpeg.dcm")
    expected = torch.from_numpy(pydicom.dcmread(path).pixel_array).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(images.load(path, 256, 256), expected)


def test_frames_are_images_of_their_own(tmp_path: Path) -> None:
    """All in the range that they share, in their order, from one caption."""
    pixels = np.stack([np.full((64, 64), 100 * (number + 1), np.int16) for number in range(3)])
    pixels[:, 0, 0] = 0
    changed(tmp_path / "scan.dcm", pixels=pixels, NumberOfFrames=3)
    (tmp_path / "scan.txt").write_text("frame 7", encoding="utf-8")
    index = tmp_path / "sizes.json"
    for _ in range(2):  # the second time from the index
        data = open_folder(tmp_path, area=64 * 64, multiple=16, index=index)
        assert [image.sample.name for image in data.images] == [f"scan.dcm frame {n}" for n in (1, 2, 3)]
        assert data.total == 3 and not data.problems
    with Loader(data, features, batch_size=3, seed=0, window=dicom.FULL) as source:
        batch = source.batch(0)
    found = sorted(float(image[0, 5, 5]) for image in batch.pixels)
    assert np.allclose((np.array(found) + 1) / 2, [1 / 3, 2 / 3, 1])
    with pytest.raises(BrokenImage, match="damaged"):
        images.load(tmp_path / "scan.dcm", 64, 64, 3)
    (said,) = reading_notes(tmp_path / "scan.dcm")  # where one image is wanted
    assert said.endswith("scan.dcm has 3 frames, and only the first is used.")


def test_enhanced_frames_have_their_own_rescaling_and_window(tmp_path: Path) -> None:
    """C.7.6.16: in the groups of a frame, or in those that all share."""
    pixels = np.stack([np.arange(64, dtype=np.int16).reshape(8, 8)] * 2)
    frames = []
    for slope in (1, 2):
        of_values, window, group = Dataset(), Dataset(), Dataset()
        of_values.RescaleSlope, of_values.RescaleIntercept = slope, 10
        window.WindowCenter, window.WindowWidth, window.VOILUTFunction = 42, 64 * slope, "LINEAR_EXACT"
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [of_values], [window]
        frames.append(group)
    path = changed(
        tmp_path / "a.dcm", pixels=pixels, NumberOfFrames=2, RescaleSlope=None, RescaleIntercept=None,
        PerFrameFunctionalGroupsSequence=frames,
    )  # fmt: skip
    for frame, slope in enumerate((1, 2)):
        expected = ((pixels[frame] * slope + 10 - 42) / (64 * slope) + 0.5).clip(0, 1)
        assert np.abs((grey(path, frame=frame) + 1) / 2 - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: changed(path, BurnedInAnnotation="YES"), "burned into its pixels"),
        (lambda path: changed(path, PhotometricInterpretation="HSV"), "photometric interpretation is not supported"),
        (lambda path: changed(path, Rows=60000, Columns=60000), "more pixels than are safe"),
        (lambda path: changed(path, Rows=0), "no pixels"),
        (lambda path: changed(path, NumberOfFrames=2_000_000_000), "damaged or truncated"),
        (lambda path: changed(path, Rows=None), "no pixels"),
        (lambda path: changed(path, Rows=500), "damaged or truncated"),
        (lambda path: path.write_bytes(example("CT_small.dcm").read_bytes()[:9000]), "damaged or truncated"),
        (lambda path: path.write_bytes(example("CT_small.dcm").read_bytes()[:300]), "no pixels"),
        (lambda path: path.write_bytes(b"no scan"), "not a DICOM file"),
        (lambda path: path.write_bytes(example("JPEGLSNearLossless_16.dcm").read_bytes()), "decodes its compression"),
        (lambda path: path.write_bytes(example("JPGExtended.dcm").read_bytes()), "its compression needs pylibjpeg"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, make: Any, expected: str) -> None:
    make(tmp_path / "a.dcm")
    with pytest.raises(BrokenImage, match=expected) as error:
        header = images.look(tmp_path / "a.dcm")
        images.load(tmp_path / "a.dcm", header.width, header.height)
    assert "\n" not in str(error.value)


def test_files_of_scanners_have_no_suffix(tmp_path: Path) -> None:
    for name in ("IM0001", "IM0002", "IM0003.IMA"):
        changed(tmp_path / name)
    write_csv(tmp_path / "metadata.csv", [("IM0001", "a head", 1)])
    (tmp_path / "IM0002.txt").write_text("a chest")
    (tmp_path / "IM0003.txt").write_text("a knee")
    folder = open_folder(tmp_path, area=64 * 64, multiple=16, max_bad_share=1)
    assert [image.sample.name for image in folder.images] == ["IM0001", "IM0003.IMA"]
    assert "or .dcm for DICOM" in str(folder.problems)


def test_nothing_of_a_patient_is_copied(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    """Whatever the header says and however broken the file is: neither into messages nor into files."""
    data = tmp_path / "data"
    data.mkdir()
    identity: dict[str, Any] = {
        "PatientName": PATIENT, "PatientID": PATIENT, "PatientComments": PATIENT, "InstitutionName": PATIENT,
        "StudyDescription": PATIENT, "ImageComments": PATIENT, "ReferringPhysicianName": PATIENT,
    }  # fmt: skip
    changed(data / "good.dcm", **identity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed(data / "kind.dcm", PhotometricInterpretation=PATIENT, **identity)
    changed(data / "short.dcm", Rows=500, **identity)
    raw = (data / "good.dcm").read_bytes()
    (data / "cut.dcm").write_bytes(raw[: raw.index(b"Doe^Secret") + 400])
    names = ["good", "kind", "short", "cut"]
    write_csv(data / "metadata.csv", [(f"{name}.dcm", f"image {n}", n) for n, name in enumerate(names)])
    index = tmp_path / "sizes.json"
    said: list[str] = []
    caplog.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        folder = open_folder(data, area=64 * 64, multiple=16, index=index, max_bad_share=1)
        with Loader(folder, features, batch_size=1, seed=0, max_bad_share=1) as source:
            for number in range(4):
                source.batch(number)
            said += [str(problem) for problem in source.problems]
    assert len(said) == 3
    assert source_images._of_data_set(RunData(folder), "image 0", 64) is None, "no report shows a scan"
    text = "\n".join([*said, *folder.notes, *map(repr, warned), caplog.text, index.read_text(encoding="utf-8")])
    target = tmp_path / "made.tif"
    words = ["--prompt", "a red circle", "--init", str(data / "good.dcm"), "--width", "64", "--height", "64"]
    assert main(["sample", "tiny", *words, "--steps", "1", "--denoise", "0.1", "--output", str(target)]) == 0
    text += mistake(capsys, "sample", "tiny", *words[:3], data / "short.dcm", "--output", tmp_path / "b.tif")
    assert "Secret" not in text + target.read_bytes().decode("latin-1")


def test_a_recipe_says_how_values_become_grey() -> None:
    for window in ("window", "full", "40/400", "-600/1500.5"):
        section = {"kind": "folder", "path": "scans", "dicom": window}
        assert recipe.parse({"model": {"base": "tiny"}, "data": section}).data.dicom == window
    for window in ("", "soft", "40", "40/0", "40/nan", "1/2/3"):
        with pytest.raises(ValueError, match=r"\[data\] dicom must be"):
            recipe.parse({"model": {"base": "tiny"}, "data": {"kind": "folder", "path": "a", "dicom": window}})


def test_without_pydicom_files_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert formats.unreadable(".dcm") is None
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BrokenImage, match="need the package pydicom: install it into the Python"):
        images.look(changed(tmp_path / "a.dcm"))
