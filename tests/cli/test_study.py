"""What a person is told before training: who stays together and why, and what was not selected."""

import csv
import shutil

from pydicom import dcmread

from medvit.cli import train
from medvit.io import scan_folder

CHOICE = ["model.name=vit_tiny_patch16_224", "model.weights=none", "preprocessing.size=32"]
CHOICE += ["model.options={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"]


def test_a_patient_copied_under_another_identity_is_joined_and_told_without_identity(site, tmp_path, capsys):
    folder, labels = tmp_path / "hospital", tmp_path / "labels.csv"
    shutil.copytree(site.folder, folder)
    with site.labels.open(newline="") as stream:
        known = {row["patient_id"]: row for row in csv.DictReader(stream)}
    series = next(one for one in scan_folder(folder).series if one.usable)
    for number, name in enumerate(series.files):
        dataset = dcmread(folder / name)
        dataset.PatientID, dataset.PatientName, dataset.InstitutionName = "SECRET-1", "SECRET^Two", "South"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "2.25.1", "2.25.2", "2.25.3"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"2.25.4.{number}"
        dataset.save_as(folder / f"copy{number}")
    patient = known[series.header.patient_id]
    text = site.labels.read_text() + f"SECRET-1,{patient['label']},South,{patient['sex']},{patient['age']}\n"
    labels.write_text(text)
    train.main([str(folder), "--labels", str(labels), "--dry-run", *CHOICE, f"data.cache_dir={tmp_path / 'cache'}"])
    shown = capsys.readouterr()
    told = shown.out + shown.err
    assert f"{site.patients + 1} labelled cases of {site.patients + 1} patients ({site.patients} groups" in told
    assert "joined by identical slices: 2 patient ids" in told
    assert "2 cases show the same slices" in told
    assert not [name for name in ("SECRET", *known) if name in told]
