"""figures.py and plot.py: logs are read correctly, figures are not blank, user errors are one line."""
import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import finetune_classifier
import lr_finder
import plot
from exactgpt import config, figures
from exactgpt.config import UserError
from exactgpt.figures import LoggedRun, Series, read_run, smooth
from tests.common import ROOT

BUILD_NANOGPT_LOG = """0 val 10.9512
0 hella 0.2463
0 train 10.953100
1 train 10.501234
2 train 9.912345
250 val 5.9013
250 hella 0.2512
250 train 5.890000
"""


def write_rows(folder, rows, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def write_text(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text(text)
    return folder


def write_realistic(folder, steps=60, hellaswag=True, bits_per_byte=True):
    """Write the log of a run of `steps` steps of 100 tokens and 36 s each, evaluated every 20 steps."""
    rows = []
    for k in range(steps + 1):
        if k % 20 == 0:
            rows.append(dict(step=k, tokens=100 * k, val_loss=4 + 6 * 0.9**k))
            if bits_per_byte:
                rows[-1]["val_bpb"] = 1 + 1.5 * 0.9**k
            if hellaswag:
                rows.append(dict(step=k, tokens=100 * k, hella_acc=0.25 + k / 2000, hella_acc_norm=0.25 + k / 1000))
        if k < steps:
            rows.append(dict(step=k, tokens=100 * (k + 1), loss=4 + 6 * 0.9**k, lr=1e-3, grad_norm=1 / (k + 1),
                             ms=36000.0, tok_per_sec=3.0, mfu=None, data_wait_ms=0.1, peak_mem_gb=1.0))
    return write_rows(folder, rows)


def run_plot(*words):
    return subprocess.run([sys.executable, ROOT / "plot.py", *map(str, words)], capture_output=True, text=True)


# -----------------------------------------------------------------------------
# reading

def test_metrics_are_read_by_name_with_tokens_and_hours(tmp_path):
    run = read_run(write_rows(tmp_path / "tiny", [
        dict(step=0, tokens=0, val_loss=9.0),
        dict(step=0, tokens=8, loss=9.1, lr=1e-4, grad_norm=2.0, ms=3.6e6),
        dict(step=1, tokens=16, loss=8.0, lr=2e-4, grad_norm=1.5, ms=1.8e6),
        dict(step=2, tokens=16, val_loss=7.5, val_bpb=2.5), dict(step=2, tokens=16, samples=["once"]),
        dict(step=2, tokens=16, hella_acc=0.25, hella_acc_norm=0.26)]))
    assert (run.name, run.skipped, run.samples) == ("tiny", 0, {2: ["once"]})
    assert run.facts() == ["2 steps", "16 tokens", "1h30m", "train 8.0000", "val 7.5000 at step 2",
                           "2.5000 bits per byte", "HellaSwag 0.2600"]
    assert set(run.series) == {"loss", "lr", "grad_norm", "ms", "val_loss", "val_bpb", "hella_acc", "hella_acc_norm"}
    loss, val = run.series["loss"], run.series["val_loss"]
    assert loss.steps.tolist() == [0, 1] and loss.values.tolist() == [9.1, 8.0] and loss.tokens.tolist() == [8, 16]
    assert loss.hours.tolist() == [1.0, 1.5]
    assert val.steps.tolist() == [0, 2] and val.tokens.tolist() == [0, 16] and val.hours.tolist() == [0.0, 1.5]


def test_build_nanogpts_columns_are_read(tmp_path):
    run = read_run(write_text(tmp_path, BUILD_NANOGPT_LOG), tokens_per_step=1000)
    assert set(run.series) == {"loss", "val_loss", "hella_acc_norm"}
    assert run.series["loss"].steps.tolist() == [0, 1, 2, 250]
    assert run.series["loss"].values.tolist() == [10.9531, 10.501234, 9.912345, 5.89]
    assert run.series["loss"].tokens.tolist() == [1000, 2000, 3000, 251000]
    assert run.series["val_loss"].tokens.tolist() == [0, 250000]
    assert run.series["hella_acc_norm"].values.tolist() == [0.2463, 0.2512]
    assert np.isnan(run.series["loss"].hours).all()


def test_metrics_jsonl_takes_precedence_over_log_txt(tmp_path):
    write_text(tmp_path, BUILD_NANOGPT_LOG)
    assert read_run(write_rows(tmp_path, [dict(step=0, tokens=8, loss=1.0)])).series["loss"].values.tolist() == [1.0]


def test_an_incomplete_last_line_is_ignored(tmp_path):
    rows = [dict(step=0, tokens=8, loss=3.0), dict(step=1, tokens=16, loss=2.0)]
    run = read_run(write_rows(tmp_path / "json", rows, tail='{"step": 2, "tokens": 24, "lo'))
    assert run.series["loss"].values.tolist() == [3.0, 2.0] and run.skipped == 0
    complete = read_run(write_rows(tmp_path / "json", rows, tail='{"step": 2, "tokens": 24, "loss": 1.0}'))
    assert complete.series["loss"].values.tolist() == [3.0, 2.0, 1.0]
    torn = read_run(write_text(tmp_path / "text", "0 train 3.950000\n1 train 3"))  # 3 is the start of 3.94...
    assert torn.series["loss"].values.tolist() == [3.95] and torn.skipped == 0


def test_damaged_lines_are_counted(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 0, "loss": 3.0}\n{"step": 1, "lo{"step": 1, "loss": 2.5}\n[1]\n{"loss": 2}\n'
        b'{"step": -1, "loss": 2}\n{"step": "1", "loss": 2}\n\xff\xfe\n\n{"step": 2, "loss": 2.0}\n')
    run = read_run(tmp_path)
    assert run.series["loss"].values.tolist() == [3.0, 2.0] and run.skipped == 6
    columns = read_run(write_text(tmp_path / "text", "0 train 3.0\nhello\n1 train x\n1 2 3 4\n1 train 2.0\n"))
    assert columns.series["loss"].values.tolist() == [3.0, 2.0] and columns.skipped == 3


def test_values_that_are_not_finite_become_gaps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(
        f'{{"step": {i}, "loss": {value}, "ms": {value}}}\n' for i, value in enumerate(
            ["4", "NaN", "Infinity", "-Infinity", "null", '"3"', "[3]", "1" + "0" * 400, "3.5"])))
    loss = read_run(tmp_path).series["loss"]
    assert np.isnan(loss.values).tolist() == [False] + [True] * 7 + [False] and loss.values[[0, 8]].tolist() == [4, 3.5]
    assert np.isclose(loss.hours[8], 7.5 / 3.6e6)
    nan = read_run(write_text(tmp_path / "text", "0 train 4.0\n1 train nan\n2 train 3.0\n")).series["loss"].values
    assert np.isnan(nan).tolist() == [False, True, False]


def test_a_step_logged_again_replaces_what_followed(tmp_path):
    def attempt(steps, loss):
        return [row for k in steps for row in (dict(step=k, tokens=8 * k, val_loss=loss + 0.5),
                                               dict(step=k, tokens=8 * k + 8, loss=loss, ms=3.6e6))]

    run = read_run(write_rows(tmp_path, attempt(range(6), 5.0) + attempt(range(2, 4), 4.0)))
    assert run.series["val_loss"].values.tolist() == [5.5, 5.5, 4.5, 4.5]
    assert run.series["loss"].steps.tolist() == [0, 1, 2, 3]
    assert run.series["loss"].values.tolist() == [5.0, 5.0, 4.0, 4.0]
    assert run.series["loss"].hours.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("rows", [[], [dict(step=0, ms=3.0)], [dict(step=0, samples=["a"])]])
def test_a_log_without_losses_is_an_error(tmp_path, rows):
    with pytest.raises(UserError, match="no losses yet"):
        read_run(write_rows(tmp_path, rows))


# -----------------------------------------------------------------------------
# smoothing and number formats

@pytest.mark.parametrize("n, half", [(1, 0), (1, 5), (7, 3), (50, 4), (50, 0), (20, 30)])
def test_smoothing_is_the_mean_of_a_window(n, half):
    values = np.random.default_rng(n + half).normal(size=n)
    values[n // 2::7] = np.nan
    values[0] = 1e3
    expected = []
    for i in range(n):
        left = min(half, i)
        window = [v for v in values[i - left:i + left + 1] if not np.isnan(v)]
        expected.append(sum(window) / len(window) if not np.isnan(values[i]) else np.nan)
    np.testing.assert_allclose(smooth(values, half), expected, rtol=1e-10)


def test_noisy_curves_are_averaged_over_a_fiftieth_of_a_run_and_others_are_not():
    values = np.random.default_rng(0).normal(size=350)
    run = made_up_run("a", loss=values, grad_norm=values, lr=values, val_loss=values)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(run.shown(name)[10:-10], np.convolve(values, np.ones(7) / 7, "same")[10:-10])
    assert (run.shown("lr") == values).all() and (run.shown("val_loss") == values).all()


def test_an_enormous_spike_stays_within_its_window():
    values = np.full(100, 0.123456789)
    values[50] = 1e25
    assert np.allclose(smooth(values, 3)[60:], 0.123456789, rtol=1e-12)


@pytest.mark.parametrize("n, text", [(0, "0"), (950, "950"), (2500, "2.5k"), (999_900, "1000k"), (9.9992e9, "10B")])
def test_human_count(n, text):
    assert config.human_count(n) == text


@pytest.mark.parametrize("seconds, text", [(0, "0m00s"), (59.4, "0m59s"), (59.6, "1m00s"), (725, "12m05s"),
                                           (3599.7, "1h00m"), (5 * 3600 + 31 * 60 + 59, "5h31m")])
def test_human_time(seconds, text):
    assert config.human_time(seconds) == text


# -----------------------------------------------------------------------------
# figures

def made_up_run(name, **values):
    series = {key: Series(np.arange(len(v)), np.arange(len(v)) * 8.0, np.arange(len(v)) / 10, np.array(v, dtype=float))
              for key, v in values.items()}
    return LoggedRun(name, Path(name) / "metrics.jsonl", series)


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_only_panels_with_data_are_drawn(tmp_path):
    every, plain = write_realistic(tmp_path / "every"), write_realistic(tmp_path / "plain", 60, False, False)
    text = write_text(tmp_path / "text", BUILD_NANOGPT_LOG)
    expected = ["loss", "HellaSwag accuracy", "bits per byte", "learning rate", "gradient norm"]
    assert titles(figures.draw_runs([read_run(every)])) == expected
    assert titles(figures.draw_runs([read_run(plain)])) == [expected[0], *expected[3:]]
    assert titles(figures.draw_runs([read_run(text)])) == expected[:2]
    assert titles(figures.draw_runs([read_run(text), read_run(plain)])) == expected[:2] + expected[3:]


@pytest.mark.parametrize("bits_per_byte, panels_of_rows", [(False, [2, 2]), (True, [2, 3])])
def test_panels_fill_their_rows_and_no_text_lies_over_another(tmp_path, bits_per_byte, panels_of_rows):
    runs = [read_run(write_realistic(tmp_path / name, 60, True, bits_per_byte)) for name in "abc"]
    runs[0].skipped, runs[0].series["val_loss"].values[1] = 12345, 3.5      # two more facts above a single run
    for drawn in (runs, runs[:1]):
        figure = figures.draw_runs(drawn, "tokens")
        axes = iter(figure.axes)
        boxes = [*(ax.get_tightbbox() for ax in figure.axes), *(text.get_window_extent() for text in figure.texts)]
        assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        for n in panels_of_rows:
            row = [next(axes).get_position() for _ in range(n)]
            assert (row[0].x0, row[-1].x1) == pytest.approx((0.068, 0.932))
            assert [place.width for place in row] == pytest.approx([row[0].width] * n)
        assert all(text.get_window_extent().y0 > ax.bbox.y0 - 2 for ax in figure.axes for text in ax.texts)


def test_final_values_and_references_are_labelled():
    run = made_up_run("a", loss=[5, 4, 3], val_loss=[5, 3.4, 3.5, np.nan], val_bpb=[1.5, 1.1, 1.2],
                      hella_acc_norm=[0.25, 0.3], hella_acc=[0.25, 0.28])
    loss, hellaswag, bits = figures.draw_runs([run]).axes
    assert texts(loss) == ["3.000", "step 2", "3.500"]      # from below; the step is that of the last validation
    assert texts(bits) == ["step 2", "1.200"] and bits.get_ylim()[0] > 1
    assert run.facts()[-4:] == ["val 3.5000 at step 2", "1.2000 bits per byte", "HellaSwag 0.3000",
                                "best val 3.4000 at step 1"]
    assert set(texts(hellaswag)) == {"0.3000", "0.2800", "GPT-2 124M  0.2955", "GPT-3 124M  0.337"}
    loss, hellaswag, _ = figures.draw_runs([run], reference="gpt2").axes
    assert "GPT-2 124M  3.2924" in texts(loss)
    loss, hellaswag, _ = figures.draw_runs([run], reference="none").axes
    assert set(texts(hellaswag)) == {"0.3000", "0.2800"}


def test_several_runs_are_labelled_with_their_validation_loss():
    runs = [made_up_run("a", loss=[5, 3], val_loss=[5, 3.5]), made_up_run("b", loss=[5, 2]),
            made_up_run("c", val_loss=[4])]
    assert texts(figures.draw_runs(runs).axes[0]) == ["2.000", "3.500", "4.000"]


def test_matplotlib_thins_long_curves(tmp_path):
    loss = 4 + np.random.default_rng(0).normal(size=200_000)
    figures.save_figure(figures.draw_runs([made_up_run("a", loss=loss)]), tmp_path / "long.svg")
    assert (tmp_path / "long.svg").stat().st_size < 2e6


def test_final_values_do_not_overlap():
    runs = [made_up_run(str(i), val_loss=[5, 3 + i / 1000]) for i in range(9)]
    [ax] = figures.draw_runs(runs).axes
    heights = sorted(text.xy[1] for text in ax.texts)
    inches = np.diff(heights) * ax.get_position().height * ax.figure.get_figheight()
    assert len(heights) == 9 and (inches > 0.14).all()


def test_the_steep_start_is_cut_off_with_a_note():
    falling = 3 + 8 * np.exp(-np.arange(1000) / 10)
    ax = figures.draw_runs([made_up_run("a", loss=falling)]).axes[0]
    assert ax.get_ylim()[1] < 5 and "↑ from 11.0" in texts(ax)
    gentle = np.linspace(8, 4, 1000)
    assert figures.draw_runs([made_up_run("a", loss=gentle)]).axes[0].get_ylim()[1] > 8


@pytest.mark.parametrize("loss", [[3.0], [3.0, 3.0], [0.0, 0.0], [np.nan], [4, np.nan, 3], [3, 1e30], [-1, -2]])
def test_unusual_runs_are_drawn(loss, tmp_path):
    run, other = made_up_run("_a$b$", loss=loss), made_up_run("_c" * 80, val_loss=loss)
    for runs in ([run], [run, other]):
        for x in figures.X_LABELS:
            figures.save_figure(figures.draw_runs(runs, x), tmp_path / "odd.png")


def test_other_figures(tmp_path):
    lrs = np.geomspace(1e-6, 1, 50)
    losses = np.where(lrs > 0.1, np.inf, 5 - lrs)
    sweep = lr_finder.draw_lr_finder(lrs, losses, smooth(losses, 2), {"steepest slope": 1e-3, "a tenth": 2e-3})
    legend = [text.get_text() for text in sweep.axes[0].get_legend().get_texts()]
    assert legend[-2:] == ["steepest slope: 0.001", "a tenth: 0.002"]
    confusion = finetune_classifier.draw_confusion([[9, 1], [0, 0]], ["ham", "spam $1"])
    assert texts(confusion.axes[0]) == ["9", "1", "0", "0"]
    for figure in (sweep, confusion, finetune_classifier.draw_confusion(np.eye(30, dtype=int), list(range(30)))):
        figures.save_figure(figure, tmp_path / "figure.svg")
        assert not is_blank(tmp_path / "figure.svg")


@pytest.mark.parametrize("name", ["plot.png", "plot.SVG"])
def test_saving_is_atomic_and_only_over_a_figure_of_ours(name, tmp_path, monkeypatch):
    path, figure = tmp_path / name, figures.draw_runs([made_up_run("a", loss=[3, 2])])
    figure.savefig(path, format=name[-3:].lower())        # any program's
    theirs = path.read_bytes()
    with pytest.raises(UserError, match=f"{name} exists, and it is no figure of ours; move it away or choose another"):
        figures.save_figure(figure, path)
    assert path.read_bytes() == theirs
    path.unlink()
    figures.save_figure(figure, path)
    path.write_bytes(path.read_bytes() + b"an older one")
    figures.save_figure(figure, path)
    ours = path.read_bytes()
    assert not ours.endswith(b"an older one")
    monkeypatch.setattr(figure, "savefig", lambda f, **_: (f.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        figures.save_figure(figure, path)
    assert path.read_bytes() == ours and [p.name for p in tmp_path.iterdir()] == [name]


# -----------------------------------------------------------------------------
# the script

def is_blank(path):
    if path.suffix == ".svg":
        return len(ElementTree.parse(path).getroot().findall(".//{http://www.w3.org/2000/svg}path")) < 10
    from matplotlib.image import imread
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path)[..., :3]  # (height, width, 3), from 0 to 1
    coloured = (pixels.max(axis=-1) - pixels.min(axis=-1) > 0.3).mean()
    return not (coloured > 1e-3 and pixels.shape[1] >= 1600)


def test_one_run_to_png(tmp_path):
    folder = write_realistic(tmp_path / "run")
    done = run_plot(folder)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        f"{folder}: 60 steps | 6k tokens | 36m00s | train 4.0120 | val 4.0108 at step 60 | "
        "1.0027 bits per byte | HellaSwag 0.3100",
        f"wrote {folder / 'plot.png'}"]
    assert not is_blank(folder / "plot.png")


def test_several_runs_to_svg(tmp_path):
    first, second = write_realistic(tmp_path / "a" / "logs"), write_realistic(tmp_path / "b" / "logs", steps=40)
    out = tmp_path / "new" / "compare.svg"
    done = run_plot(first, second, "--x", "hours", "--reference", "gpt2", "--title", "two", "--out", out)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 3
    assert not is_blank(out)
    assert all(f"<!-- {name} -->" in out.read_text() for name in ("two", "a/logs", "b/logs"))


def test_tokens_per_step_of_log_txt_and_skipped_lines(tmp_path):
    folder = write_text(tmp_path / "build", BUILD_NANOGPT_LOG + "damaged\n")
    done = run_plot(folder, "--x", "tokens", "--tokens_per_step", "1000")
    assert done.returncode == 0 and "| 251k tokens |" in done.stdout and "1 unreadable line skipped" in done.stdout
    assert not is_blank(folder / "plot.png")


@pytest.mark.parametrize("words, message", [
    ([], "at least one run"), (["nothing"], "no metrics.jsonl or log.txt in nothing; name the --log_dir of a run"),
    (["."], "no metrics.jsonl or log.txt in ., but in its folders json, text"),
    (["json/metrics.jsonl"], "no metrics.jsonl or log.txt in json/metrics.jsonl; name the --log_dir"),
    (["json", "--out", "plot.pdf"], "must end in .png or .svg"), (["json", "--out", "json"], "must end in .png"),
    (["text", "--x", "hours"], "does not record hours"),
    (["json", "text", "--x", "hours"], "log.txt does not record hours"),
    (["json", "--x", "days"], "--x must be one of"), (["text", "--tokens_per_step", "0"], "--tokens_per_step must be"),
    (["json", "--out", "json/metrics.jsonl/plot.png"], "choose another place")])
def test_user_errors_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, words, message):
    write_realistic(tmp_path / "json")
    write_text(tmp_path / "text", BUILD_NANOGPT_LOG)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        plot.run_script(lambda: plot.main(words))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and message in error
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("plot.*"))


@pytest.mark.parametrize("words, message", [(["nothing"], "no metrics.jsonl"),
                                            (["json", "--out", "plot.jpg"], "must end in")])
def test_user_errors_end_the_process(tmp_path, words, message):
    write_realistic(tmp_path / "json")
    done = run_plot(*[tmp_path / word if word in ("nothing", "json") else word for word in words])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr and done.stdout == ""


def test_importing_is_silent_and_light():
    code = "import sys, plot; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
