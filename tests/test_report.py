"""Tables and charts from hand-made results."""

import threading

import numpy as np
import pytest
from matplotlib.image import imread

from dcase import report
from dcase.data.tau22 import DEVICES, SCENES
from dcase.errors import UserError
from dcase.report import (
    BASELINE,
    BASELINE_NOTE,
    charts,
    class_table,
    complexity_comparison,
    confusion_png,
    device_png,
    device_table,
    write_report,
)

SCENE_ACC = (0.4497, 0.5451, 0.4902, 0.3993, 0.6936, 0.2983, 0.5215, 0.2970, 0.7542, 0.4831)  # the users' document
DEVICE_ACC = (0.6558, 0.5410, 0.5869, 0.4282, 0.4479, 0.4985, 0.4242, 0.4585, 0.3985)
AUM_SMALL = {
    "params": 25_342_346,
    "total_param_bytes": 101_369_384,
    "bytes_in_16_bit": 50_684_692,
    "bytes_in_8_bit": 26_374_952,
    "macs": 1_751_572_736,
    "torchinfo_macs": 29_826_698,
    "max_param_bytes": 128_000,
    "max_macs": 30_000_000,
}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Charts of few pixels draw faster."""
    monkeypatch.setattr(charts, "DPI", 60)


@pytest.fixture
def results() -> dict:
    confusion = np.full((10, 10), 5)
    np.fill_diagonal(confusion, 55)
    return {
        "macro_avg_acc": 0.4932,
        "acc": 0.49334,
        "loss": 1.41421,
        "scene_acc": dict(zip(SCENES, SCENE_ACC, strict=True)),
        "device_acc": dict(zip(DEVICES, DEVICE_ACC, strict=True)),
        "device_group_acc": {"real": 0.5946, "seen": 0.4582, "unseen": 0.42707},
        "n_clips": 1000,
        "confusion": confusion.tolist(),
    }


@pytest.fixture
def partial(results) -> dict:
    """No clip of metro, none of device b, none of the unseen devices."""
    results["scene_acc"]["metro"] = None
    results["confusion"][SCENES.index("metro")] = [0] * 10
    for device in ("b", "s4", "s5", "s6"):
        results["device_acc"][device] = None
    results["device_group_acc"]["unseen"] = None
    return results


@pytest.fixture
def empty() -> dict:
    return {
        "macro_avg_acc": None,
        "acc": None,
        "loss": None,
        "scene_acc": dict.fromkeys(SCENES),
        "device_acc": dict.fromkeys(DEVICES),
        "device_group_acc": dict.fromkeys(("real", "seen", "unseen")),
        "n_clips": 0,
        "confusion": [[0] * 10 for _ in range(10)],
    }


# Tables


def test_class_table_is_laid_out_as_in_the_users_document(results):
    assert class_table(results, "AuM-Small", beside_baseline=False) == (
        "| Model     | Airport |   Bus | Metro | Metro Station |  Park | Public Square | Shopping Mall "
        "| Street Pedestrian | Street Traffic |  Tram | Macro Avg. Accuracy |\n"
        "| --------- | ------: | ----: | ----: | ------------: | ----: | ------------: | ------------: "
        "| ----------------: | -------------: | ----: | ------------------: |\n"
        "| AuM-Small |   44.97 | 54.51 | 49.02 |         39.93 | 69.36 |         29.83 |         52.15 "
        "|             29.70 |          75.42 | 48.31 |               49.32 |"
    )


def test_device_table_has_devices_and_groups(results):
    assert device_table(results, "AuM-Small", beside_baseline=False) == (
        "| Model     |     A |     B |     C |    S1 |    S2 |    S3 |    S4 |    S5 |    S6 | Macro Avg. Accuracy |\n"
        "| --------- | ----: | ----: | ----: | ----: | ----: | ----: | ----: | ----: | ----: | ------------------: |\n"
        "| AuM-Small | 65.58 | 54.10 | 58.69 | 42.82 | 44.79 | 49.85 | 42.42 | 45.85 | 39.85 |               49.32 |\n"
        "\n"
        "| Model     | Real (A, B, C) | Seen (S1, S2, S3) | Unseen (S4, S5, S6) |\n"
        "| --------- | -------------: | ----------------: | ------------------: |\n"
        "| AuM-Small |          59.46 |             45.82 |               42.71 |"
    )


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line]


def test_the_published_rows_stand_beside_ours_only_when_asked(results):
    general, specific, ours = rows(class_table(results, "ours", beside_baseline=True))[2:]
    published = "38.94 62.28 40.60 50.72 72.03 29.20 56.04 34.76 73.21 49.42"
    assert general == ["Baseline, general", *published.split(), "50.72 ± 0.47"]
    assert specific[0] == "Baseline, device-specific" and specific[-1] == "51.89 ± 0.05" and ours[0] == "ours"
    devices, groups = device_table(results, "ours", beside_baseline=True).split("\n\n")
    assert rows(devices)[3][1:10] == ["63.98", "55.85", "59.09", "48.68", "48.74", "52.72", "48.14", "47.23", "42.60"]
    assert rows(groups)[2] == ["Baseline, general", "56.63", "49.56", "45.99"]
    for table in (class_table, device_table):
        assert "Baseline" not in table(results, "ours", beside_baseline=False)


def test_the_published_figures_are_consistent():
    for row in BASELINE:  # the macro average is the mean over scenes, within rounding
        assert np.mean(row.scene_acc) == pytest.approx(row.macro_avg_acc, abs=0.006)
        assert np.mean(row.device_acc) == pytest.approx(row.macro_avg_acc, abs=0.06)


def test_what_has_no_clip_is_a_dash_and_not_zero(partial, empty):
    row = rows(class_table(partial, "x", False))[2]
    assert row[1 + SCENES.index("metro")] == "-" and row.count("-") == 1
    devices, groups = device_table(partial, "x", False).split("\n\n")
    assert rows(devices)[2] == ["x", "65.58", "-", "58.69", "42.82", "44.79", "49.85", "-", "-", "-", "49.32"]
    assert rows(groups)[2] == ["x", "59.46", "45.82", "-"]
    assert rows(class_table(empty, "x", False))[2] == ["x", *["-"] * 11]


def test_a_name_cannot_break_the_table(results):
    table = class_table(results, "a|b\nc", False)
    assert r"| a\|b c |" in table and len(table.splitlines()) == 3
    assert len({len(line) for line in table.splitlines()}) == 1


def test_complexity_against_the_limits():
    assert complexity_comparison(AUM_SMALL, "AuM-Small", beside_baseline=False, macro_avg_acc=0.4932) == (
        "| Metric                                 |     AuM-Small |      Limit |    Of the Limit |\n"
        "| -------------------------------------- | ------------: | ---------: | --------------: |\n"
        "| Parameters                             |    25,342,346 |          - |               - |\n"
        "| MACs                                   | 1,751,572,736 | 30,000,000 |    58.4 x, over |\n"
        "| MACs as the challenge's checker counts |    29,826,698 | 30,000,000 | 0.994 x, within |\n"
        "| Memory (as stored)                     | 101,369,384 B |  128,000 B |     792 x, over |\n"
        "| Memory (16-bit)                        |  50,684,692 B |  128,000 B |     396 x, over |\n"
        "| Memory (8-bit)                         |  26,374,952 B |  128,000 B |     206 x, over |"
    )


def test_complexity_beside_cp_mobile():
    table = rows(complexity_comparison(AUM_SMALL, "AuM-Small", beside_baseline=True, macro_avg_acc=0.4932))
    assert table[0][4:] == ["CP-Mobile Baseline", "Difference"]
    cells = {row[0]: row[4:] for row in table[2:]}
    assert cells == {
        "Macro Avg. Accuracy (Baseline, general)": ["50.72 ± 0.47", "-1.40"],
        "Macro Avg. Accuracy (Baseline, device-specific)": ["51.89 ± 0.05", "-2.57"],
        "Parameters": ["61,148", "+41,344.3 %"],
        "MACs": ["29,419,156", "+5,853.9 %"],
        "MACs as the challenge's checker counts": ["29,419,156", "+1.4 %"],
        "Memory (as stored)": ["122,296 B", "+82,788.6 %"],
        "Memory (16-bit)": ["127,712 B", "+39,586.7 %"],
        "Memory (8-bit)": ["71,980 B", "+36,542.1 %"],
    }
    assert rows(complexity_comparison(AUM_SMALL, "x", True, None))[2][1::4] == ["-", "-"]


# Charts


def ink(path) -> np.ndarray:
    """Pixels as floats (height, width, 3), from a file that is a whole PNG."""
    return imread(path)[..., :3]


def has_colour(image: np.ndarray, colour: str) -> bool:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool((np.abs(image - rgb).max(-1) < 0.01).sum() > 100)


def test_charts_show_the_figures(results, empty, tmp_path):
    for draw in (confusion_png, device_png):
        draw(results, tmp_path / "full.png", "title", "note")
        draw(empty, tmp_path / "empty.png", "title", "note")
        full, nothing = ink(tmp_path / "full.png"), ink(tmp_path / "empty.png")
        assert min(full.shape[:2]) > 300 and full.shape == nothing.shape
        assert np.abs(full - nothing).max(-1).mean() > 0.02


def test_bars_take_their_groups_colour_and_absent_groups_have_none(results, tmp_path):
    device_png(results, tmp_path / "d.png", "title")
    assert all(has_colour(ink(tmp_path / "d.png"), colour) for colour in ("#0072B2", "#E69F00", "#CC79A7"))
    for device in ("s4", "s5", "s6"):
        results["device_acc"][device] = None
    results["device_group_acc"]["unseen"] = None
    device_png(results, tmp_path / "d.png", "title")
    assert not has_colour(ink(tmp_path / "d.png"), "#CC79A7")


@pytest.mark.parametrize("with_clips", [("a", "s1"), ("s4",), ()])
def test_devices_without_a_clip_have_no_bar(results, tmp_path, monkeypatch, with_clips):
    figures = []
    monkeypatch.setattr(charts, "_save", lambda figure, path: figures.append(figure))
    for device in set(DEVICES) - set(with_clips):
        results["device_acc"][device] = None
    device_png(results, tmp_path / "d.png", "title")
    (axes,) = figures[0].axes
    labels = [label.get_text().partition("\n") for label in axes.get_xticklabels()]
    expected = [(device.upper(), f"{100 * results['device_acc'][device]:.1f}") for device in with_clips]
    assert [(name, value) for name, _, value in labels] == (expected or [(d.upper(), "no clips") for d in DEVICES])
    assert len(axes.patches) == len(labels)


def test_a_note_is_drawn_and_odd_titles_are_no_formula(partial, tmp_path):
    for draw in (confusion_png, device_png):
        draw(partial, tmp_path / "plain.png", "title")
        draw(partial, tmp_path / "note.png", "title", "synthetic data")
        assert not np.array_equal(ink(tmp_path / "plain.png"), ink(tmp_path / "note.png"))
        draw(partial, tmp_path / "odd.png", r"$\frac{ " + "long" * 60, "$_{")
        assert ink(tmp_path / "odd.png").shape == ink(tmp_path / "plain.png").shape


def test_charts_can_be_drawn_in_any_thread_without_pyplot(results, tmp_path):
    thread = threading.Thread(target=device_png, args=(results, tmp_path / "d.png", "title"))
    thread.start()
    thread.join()
    assert ink(tmp_path / "d.png").size


# Report


def test_report_writes_its_files_and_returns_what_to_print(results, tmp_path):
    folder = tmp_path / "run" / "report"
    text = write_report(results, folder, "ours", "SynthTAU: synthetic data", complexity=AUM_SMALL)
    assert sorted(path.name for path in folder.iterdir()) == ["confusion.png", "devices.png", "report.md"]
    written = (folder / "report.md").read_text(encoding="utf-8")
    for part in (
        "# Results of ours",
        "**SynthTAU: synthetic data**",
        "**49.32 %** (mean over scenes), overall accuracy 49.33 %, log loss 1.4142, 1,000 clips",
        class_table(results, "ours", False),
        device_table(results, "ours", False),
        complexity_comparison(AUM_SMALL, "ours", False),
    ):
        assert part in text and part in written
    assert "Baseline" not in text + written
    assert "(confusion.png)" in written and "(devices.png)" in written
    assert text.endswith(f"Plots: {folder / 'confusion.png'}, {folder / 'devices.png'}")


def test_report_beside_the_baseline_names_its_source(results, tmp_path):
    text = write_report(results, tmp_path, "ours", beside_baseline=True, complexity=AUM_SMALL)
    assert text.count("| Baseline, general ") == 3  # scenes, devices, groups
    assert BASELINE_NOTE in text and "mean of 4 runs" in BASELINE_NOTE
    assert "CP-Mobile Baseline" in text


def test_report_without_clips_or_complexity(empty, tmp_path):
    text = write_report(empty, tmp_path, "ours")
    assert "accuracy **-** (mean over scenes), overall accuracy -, log loss -, 0 clips" in text
    assert "Complexity" not in text


def test_a_write_that_fails_half_way_leaves_the_old_file(results, tmp_path, monkeypatch):
    path = tmp_path / "confusion.png"
    confusion_png(results, path, "title")
    before = path.read_bytes()

    def disk_full(figure, place, **kwargs):
        place.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(charts.Figure, "savefig", disk_full)
    with pytest.raises(UserError, match="confusion.png cannot be written"):
        confusion_png(results, path, "title")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_fine_tuning_table(results, tmp_path):
    outcome = {"kept": True, "reason": "the loss falls", "n_train": 1840, "n_val": 210}
    none = {"kept": False, "reason": "no training clip of this device", "n_train": 0, "n_val": 0}
    results["fine_tuning"] = {
        "a": {**outcome, "general": 0.5, "fine_tuned": 0.5125, "epoch": 3},
        "c": {**none, "general": None, "fine_tuned": None, "epoch": None},
    }
    text = report.write_report(results, tmp_path, "ours")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["a", "1,840", "210", "50.00", "51.25", "yes: the loss falls"] in rows
    assert ["c", "0", "0", "-", "-", "no: no training clip of this device"] in rows
    assert "1 of 2 fine-tuned devices has a model of its own: A." in text
    results["fine_tuning"]["a"]["kept"] = False
    text = report.write_report(results, tmp_path, "ours")
    assert "No device has a model of its own: the general model stays for all of them." in text
