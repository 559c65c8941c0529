"""`codistill plot`: means and intervals, files, what is said of what cannot be drawn."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from codistill import plots
from codistill.cli import main
from codistill.curves import Against
from codistill.plots import Curve, Panel, draw, half_interval, mean_of, student_t

ROOT = Path(__file__).resolve().parents[2]
T2 = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # Student's t for 2 degrees of freedom, in closed form


def run(folder, points, key="distance"):
    """A run with a metrics.jsonl of (update, value)."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"update": update, "epoch": 1, key: value}) + "\n" for update, value in points]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def table(path):
    """The rows of a written CSV: texts, and numbers as numbers."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    number = lambda text: float(text) if text else None  # noqa: E731
    return [(r["line"], r["key"], *(number(r[c]) for c in ("x", "mean", "low", "high")), int(r["n"])) for r in rows]


@pytest.fixture
def seeds(tmp_path):
    run(tmp_path / "seed-1", [(10, 1.0), (20, 2.0), (30, 3.0)])
    run(tmp_path / "seed-2", [(10, 3.0), (30, 5.0)])
    run(tmp_path / "seed-3", [(10, 5.0), (20, 6.0), (30, 7.0), (31, 9.0)])
    run(tmp_path / "alone", [(10, 1.5), (40, 2.5)])
    return tmp_path


def test_the_numbers_are_the_mean_and_students_interval_over_the_runs_of_a_name(seeds, capsys):
    out, numbers = seeds / "made" / "curves.png", seeds / "made" / "curves.csv"
    arguments = [f"codistill={seeds}/seed-*", f"plain={seeds}/alone", "--show", "distance"]
    assert main(["plot", *arguments, "--out", str(out), "--csv", str(numbers)]) == 0
    half = T2 * 2 / math.sqrt(3)
    found = table(numbers)
    assert [row[:4] for row in found[:3]] == [("codistill", "distance", x, x / 10 + 2) for x in (10, 20, 30)]
    for _, _, _, mean, low, high, n in found[:3]:
        assert (mean - low, high - mean, n) == (pytest.approx(half), pytest.approx(half), 3)
    assert found[3:] == [("plain", "distance", x, y, None, None, 1) for x, y in ((10, 1.5), (40, 2.5))]
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr() == (f"{out}, {numbers}: distance against updates\n", "")


def test_students_t_is_that_of_the_tables():
    tabled = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 100: 1.9840}
    assert {freedom: round(student_t(freedom), 4) for freedom in tabled} == tabled
    assert student_t(2) == pytest.approx(T2, rel=1e-12)


def test_a_mean_is_never_of_fewer_runs_than_all():
    curve = mean_of([[(0, 0.0), (10, 10.0)], [(4, 0.0), (8, 8.0), (20, 0.0)]])
    assert curve.x == [4, 8, 10]
    assert curve.mean == pytest.approx([2.0, 8.0, (10 + 8 - 8 / 6) / 2])
    assert list(mean_of([[(0, 1.0)], [(5, 1.0)]]).x) == []


def test_an_interval_needs_two_values_all_of_them_finite():
    assert half_interval([1.0, 3.0]) == pytest.approx(12.7062)
    assert all(math.isnan(half_interval(values)) for values in ([1.0], [1.0, math.nan], [1.0, math.inf, 2.0]))


@pytest.mark.parametrize(
    ("span", "shown"), [(2.0, (-0.1, 2.0)), (-2.0, (8.0, 10.1)), (20.0, (-0.5, 10.5)), (None, (-0.5, 10.5))]
)
def test_a_span_cuts_off_what_is_far_from_the_best(span, shown):
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    plots._draw_panel(axes, Panel({"line": Curve([1, 2, 3], [0.0, 4.0, 10.0])}, "x", "y", span=span), ["line"])
    assert axes.get_ylim() == pytest.approx(shown)


def test_ticks_say_what_stands_where():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    curves = {"line": Curve([-1, 0, 1], [0.0, 4.0, 10.0])}
    plots._draw_panel(axes, Panel(curves, "x", "y", ticks={-1: "half", 0: "one", 1: "two"}), ["line"])
    assert axes.get_xticks().tolist() == [-1, 0, 1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["half", "one", "two"]


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".SVG", b"<?xml")])
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path, suffix, begin):
    curves = {f"costs $1, {number}_$": Curve([1, 2], [1.0, number]) for number in range(10)}
    curves["several"] = Curve([1, 2, 3], [1.0, 2.0, 1.0], [0.5, 1.5, 0.5], [1.5, 2.5, 1.5], runs=2)
    panels = [Panel(curves, "updates", f"panel {number}", span=4.0, log_y=number == 3) for number in range(4)]
    draw(tmp_path / f"picture{suffix}", panels, title="50 % of $x^")
    assert (tmp_path / f"picture{suffix}").read_bytes().startswith(begin)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_legend_is_not_wider_than_the_picture(tmp_path, monkeypatch, count):
    module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(module.Figure, "savefig", lambda figure, path: drawn.append(figure))
    names = ["all_reduce", "codistill", "codistill, a longer name", "i", "ii", "iii"]
    curves = {name: Curve([1, 2], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5], runs=10) for name in names}
    draw(tmp_path / "picture.png", [Panel(curves, "x", "y")] * count)
    [figure] = drawn
    figure.canvas.draw()
    [legend] = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    ("counts", "label"),
    [((1, 1), "a"), ((5, 5), "a (mean of 5, 95 % interval)"), ((5, 1), "a (mean of 1 to 5, 95 % interval)")],
)
def test_the_legend_says_of_how_many_runs_a_line_is_the_mean(counts, label):
    panels = [Panel({"a": Curve([1], [2.0], runs=count), "b": Curve([1], [2.0])}, "x", "y") for count in counts]
    assert plots._label("a", panels) == label
    assert plots._label("b", panels) == "b"


def test_lines_differ_without_their_colours():
    dashes_and_marks = [look[1:] for look in plots._LOOKS]
    assert len(set(dashes_and_marks)) == len(dashes_and_marks)


def test_a_run_without_a_name_is_a_line_named_by_its_folder_or_its_path_where_that_is_not_enough(tmp_path, monkeypatch):
    a, b = run(tmp_path / "a" / "peer-0", [(1, 1.0)]), run(tmp_path / "b" / "peer-0", [(1, 2.0)])
    run(tmp_path / "lr=0.1", [(1, 3.0)])
    monkeypatch.chdir(tmp_path)
    numbers = tmp_path / "numbers.csv"
    assert main(["plot", f"{tmp_path}/*/peer-0", "lr=0.1", "--show", "distance", "--csv", str(numbers)]) == 0
    assert [row[0] for row in table(numbers)] == [str(a), str(b), "lr=0.1"]


def test_a_run_that_is_named_twice_counts_once(seeds):
    numbers = seeds / "numbers.csv"
    arguments = [f"x={seeds}/alone", f"x={seeds}/seed-1/../al*", "--show", "distance", "--csv", str(numbers)]
    assert main(["plot", *arguments]) == 0
    assert {row[-1] for row in table(numbers)} == {1}


def test_what_a_run_lacks_is_said_in_one_line_and_the_rest_is_drawn(seeds, capsys):
    other = run(seeds / "other", [(10, 4.0), (20, None), (30, 6.0)], key="gap")
    (seeds / "empty").mkdir()
    numbers = seeds / "numbers.csv"
    arguments = [f"seeds={seeds}/seed-[12]", str(other), str(seeds / "empty"), "--show", "distance,gap"]
    assert main(["plot", *arguments, "--csv", str(numbers)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"codistill: {seeds / 'empty'} is not a run: no numbers in a metrics.jsonl, a summary.csv or a fairseq log "
        "(*.log); left out",
        f"codistill: {other} has no distance; it has gap; left out",
        f"codistill: {seeds / 'seed-1'} has no gap; it has distance; left out",
        f"codistill: {seeds / 'seed-2'} has no gap; it has distance; left out",
        f"codistill: {other}: gap is not finite at 1 of 3 points; they are left out",
    ]
    assert [row[:4] for row in table(numbers)][-2:] == [("other", "gap", 10, 4.0), ("other", "gap", 30, 6.0)]


def test_lines_whose_runs_are_of_unlike_length_are_told(seeds, capsys):
    run(seeds / "seed-4", [(100, 1.0), (200, 1.0)])
    arguments = [f"a={seeds}/seed-1", f"a={seeds}/alone", f"b={seeds}/seed-[14]", "--show", "distance"]
    assert main(["plot", *arguments, "--csv", str(seeds / "numbers.csv")]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "codistill: a: distance ends at 30 updates with the shortest run, not at 40",
        "codistill: b: no updates at which all its runs have distance; left out",
    ]


def test_a_key_that_no_run_has_ends_with_status_1_and_no_file(seeds, capsys):
    arguments = [f"{seeds}/alone", "--show", "distance,speed", "--out", str(seeds / "x.png")]
    assert main(["plot", *arguments]) == 1
    assert capsys.readouterr() == (
        "",
        f"codistill: {seeds}/alone has no speed; it has distance; left out\n"
        "codistill: nothing to draw of speed against updates; no file was written\n",
    )
    assert not (seeds / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["x", "--out", "a.jpg"], "--out 'a.jpg': must end in .png, .pdf or .svg"),
        (["x"], "--out: give a file for the picture, or --csv a file for the numbers, or both"),
        (
            ["x", "--csv", "a", "--show", "loss,,gap"],
            "--show 'loss,,gap': must be keys with commas between them, such as valid_loss,train_loss",
        ),
        (["=x", "--csv", "a"], "'=x': must be RUN or NAME=RUN, with the save dir or log of a run, or a pattern"),
        (["x=", "--csv", "a"], "'x=': must be RUN or NAME=RUN, with the save dir or log of a run, or a pattern"),
        (
            ["x=no/such-*", "--csv", "a"],
            "'x=no/such-*': there is no such folder or file; give the save dir or log of a run",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused_in_one_line_with_status_2(
    arguments, complaint, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *arguments]) == 2
    assert capsys.readouterr() == ("", f"codistill: {complaint}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_line(seeds, capsys):
    in_the_way = seeds / "file"
    in_the_way.touch()
    for option, file in (("--out", in_the_way / "x.png"), ("--csv", in_the_way / "x.csv")):
        assert main(["plot", f"{seeds}/alone", "--show", "distance", option, str(file)]) == 1
        complaint = capsys.readouterr().err
        assert complaint.startswith(f"codistill: {in_the_way}")
        assert complaint.count("\n") == 1


def test_without_matplotlib_a_picture_is_refused_with_the_remedy_and_numbers_are_not(seeds, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # Python's own way to say: cannot be found
    arguments = [f"{seeds}/alone", "--show", "distance"]
    assert main(["plot", *arguments, "--out", str(seeds / "x.png")]) == 1
    complaint = "pictures need matplotlib; try: pip install matplotlib, or --csv without --out"
    assert capsys.readouterr() == ("", f"codistill: {complaint}\n")
    assert main(["plot", *arguments, "--csv", str(seeds / "x.csv")]) == 0


def test_the_help_names_what_can_be_chosen(capsys):
    with pytest.raises(SystemExit):
        main(["plot", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ",".join(get_args(Against)) in text
    assert f"(default: {','.join(plots.SHOW)})" in text
    assert f"{', '.join(plots.FORMATS[:-1])} or {plots.FORMATS[-1]}" in text
    for word in (*plots.MEANINGS, *plots.COLUMNS):
        assert word in text


def test_plot_loads_neither_torch_nor_a_host_framework(seeds):
    code = (
        "import sys; from codistill.cli import main; main(['plot', *sys.argv[1:]]);"
        "print({name.split('.')[0] for name in sys.modules} & {'torch', 'fairseq', 'timm', 'hydra'} or 'none of them')"
    )
    command = [sys.executable, "-c", code, str(seeds / "alone"), "--show", "distance", "--out", str(seeds / "x.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("none of them", "")
