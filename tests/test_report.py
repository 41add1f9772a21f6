"""Reports of made-up studies: the verdict comes first, nothing is fetched, every odd study has a page."""

import csv
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from statespan.orchestration import report_charts as charts
from statespan.orchestration.report import build_report
from statespan.orchestration.report_facts import gather, pareto
from statespan.orchestration.study_data import SAMPLE_COLUMNS, BenchmarkFacts
from tests.synthetic_study import DEPTHS, LENGTHS, make_study

VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="module")
def study():
    return make_study()


@pytest.fixture(scope="module")
def report(study):
    return build_report(study)


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place or never."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(html):
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return parser.seen


def with_rows(study, change):
    rows = study.samples.to_pylist()
    for row in rows:
        change(row)
    return dataclasses.replace(study, samples=pa.Table.from_pylist(rows, schema=SAMPLE_COLUMNS))


def test_the_verdict_in_one_sentence_comes_before_the_first_picture(report):
    html = report.html
    assert html.index("longmamba (trial 7) beats vanilla by 33.3 points") < html.index("<svg")
    first = html.index("<figure>")
    assert html.index("Vanilla", first) < html.index("Winner: longmamba (trial 7)", first)
    assert report.markdown.splitlines()[2].startswith("**longmamba (trial 7) beats vanilla by 33.3 points")


def test_a_study_in_which_nothing_wins_says_so_plainly():
    report = build_report(make_study(lift=0.0))
    assert "= Nothing beats vanilla" in report.html and "Winner" not in report.html
    assert report.markdown.splitlines()[2].startswith("**Nothing beats vanilla: ")


def test_the_page_is_whole_runs_no_script_and_fetches_nothing(report):
    tags = parsed(report.html)
    assert not {"script", "link", "iframe", "img", "object", "video"} & set(tags)
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", report.html)
    assert "prefers-color-scheme: dark" in report.html and "viewport" in report.html


def test_every_cell_of_length_and_depth_is_drawn_for_vanilla_winner_and_runner_up(report):
    assert report.html.count('class="cell"') == 3 * len(LENGTHS) * len(DEPTHS)
    assert report.html.count("trained to 1k") == 3 + 1  # on each heatmap and on the curves


def test_every_figure_stands_under_its_heading(report):
    table = re.search(r"Best configurations</h2>.*?</table>", report.html, re.DOTALL).group()
    lines = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line) for line in table.split("</tr>")[:3]]
    winner = dict(zip(lines[0], lines[2], strict=True))
    assert winner["gain on vanilla"].startswith("+33.3 points") and winner["memory"] == "85 MiB"
    assert "channel_threshold 0.0239" in winner["settings"]


def test_what_comes_from_users_and_models_is_escaped():
    study = make_study(per_cell=2)
    nasty = dataclasses.replace(study, name="<b>x</b>", settings={"a": "</pre><script>"}, serve_command="serve <x>")
    trials = [dataclasses.replace(one, method=f"<i>{one.method}") for one in nasty.trials]
    html = build_report(dataclasses.replace(nasty, trials=trials)).html
    assert "<i>longmamba" not in html and "&lt;i&gt;longmamba" in html
    parsed(html)
    assert "<script>" not in html and "<b>x" not in html and "I don&#x27;t &lt;know&gt;" in html


def test_a_report_built_twice_is_the_same(study, report):
    assert build_report(study) == report


def test_the_csv_has_a_line_a_trial_and_no_figure_that_was_not_measured(study, report):
    lines = list(csv.DictReader(io.StringIO(report.csv)))
    assert [line["trial_id"] for line in lines] == [trial.id for trial in study.trials]
    roles = {line["trial_id"]: line for line in lines}
    assert roles["t0007"]["role"] == "winner" and float(roles["t0007"]["gain"]) == pytest.approx(1 / 3, abs=1e-3)
    assert roles["t0001"]["heldout"] == "" and "nan" not in report.csv


def test_files_are_written_beside_each_other(report, tmp_path):
    paths = report.write(tmp_path / "new")
    assert [path.name for path in paths] == ["report.html", "report.md", "trials.csv"]
    assert paths[0].read_text(encoding="utf-8") == report.html


def only_search(study):
    kept = study.samples.filter(pa.compute.equal(study.samples["split"], "search"))
    return dataclasses.replace(study, samples=kept)


def only_vanilla(study):
    kept = study.samples.filter(pa.compute.equal(study.samples["trial_id"], "vanilla"))
    return dataclasses.replace(study, samples=kept, trials=study.trials[:1], winner_id=None, runner_up_id=None)


def no_samples(study):
    return dataclasses.replace(study, samples=SAMPLE_COLUMNS.empty_table(), winner_id=None, runner_up_id=None)


def unbounded(study):
    facts = BenchmarkFacts(name="passkey", metric="nats per token")
    return with_rows(dataclasses.replace(study, benchmarks=[facts]), lambda row: row.update(score=-3.0 + row["score"]))


def nothing_timed(study):
    gone = {"prefill_seconds": float("nan"), "decode_seconds": None, "peak_bytes": None, "depth": None, "text": None}
    return with_rows(study, lambda row: row.update(gone))


def no_training_length(study):
    return dataclasses.replace(study, train_length=None)


def two_benchmarks(study):
    facts = [*study.benchmarks, BenchmarkFacts(name="other", metric="F1", low=0.0, high=1.0, weight=2.0)]
    half = dataclasses.replace(study, benchmarks=facts)
    return with_rows(half, lambda row: row.update(benchmark="other" if row["sample_id"].endswith("1") else "passkey"))


@pytest.mark.parametrize(
    "change, says",
    [
        pytest.param(only_search, "No verdict yet", id="no_held_out_scores"),
        pytest.param(only_vanilla, "no trial ran to the end", id="vanilla_only"),
        pytest.param(no_samples, "No verdict yet", id="no_samples"),
        pytest.param(unbounded, "nats per token", id="unbounded_metric"),
        pytest.param(nothing_timed, "beats vanilla", id="no_times_depths_or_texts"),
        pytest.param(no_training_length, "does not say its training length", id="no_training_length"),
        pytest.param(two_benchmarks, "other: F1 by length", id="two_benchmarks"),
    ],
)
def test_odd_studies_have_a_page_too(change, says):
    report = build_report(change(make_study(trials=6, per_cell=2)))
    parsed(report.html)
    assert says in report.html and not re.search(r"\bnan\b", report.html + report.markdown + report.csv)


def test_the_page_of_many_trials_stays_small():
    study = make_study(trials=1000, per_cell=1, failing=False, lengths=(512, 4096))
    html = build_report(study).html
    assert len(html) < 500_000
    assert html.count("<path") < 300  # many dots are one path


def test_the_pareto_front_leaves_out_what_another_beats(study):
    facts = gather(study)
    row = facts.row("t0007")
    slower = dataclasses.replace(row, seconds=row.seconds * 2, trial=dataclasses.replace(row.trial, id="slower"))
    nearly = dataclasses.replace(
        row, search=row.search - 0.1, seconds=row.seconds * 0.99, trial=dataclasses.replace(row.trial, id="nearly")
    )
    worse_but_fast = dataclasses.replace(
        row, search=0.1, seconds=row.seconds / 9, trial=dataclasses.replace(row.trial, id="fast")
    )
    assert pareto([row, slower, nearly, worse_but_fast]) == {"t0007", "fast"}


def test_cost_adds_up_to_what_every_trial_alone_would_have_read(study):
    cost = gather(study).cost
    whole = sum(row["tokens_prompt"] + row["tokens_new"] for row in study.samples.to_pylist())
    assert cost.computed + cost.shared + cost.cached == pytest.approx(whole, rel=1e-6)  # shares are float32
    assert cost.raced > 0


def luminance(color):
    channels = np.array(color) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def rgb(code):
    code = code.lstrip("#")
    code = "".join(c * 2 for c in code) if len(code) == 3 else code
    return [int(code[i : i + 2], 16) for i in (0, 2, 4)]


def test_words_can_be_read_on_every_background(report):
    # 4.5 is what WCAG 2.2 asks of text
    for theme in re.findall(r":root \{(.*?)\}", report.html, re.DOTALL):
        colors = dict(re.findall(r"--(\w+): (#\w+)", theme))
        for word in ("ink", "soft", "winner", "runner", "base", "good", "flat"):
            for back in ("page", "card"):
                assert contrast(rgb(colors[word]), rgb(colors[back])) >= 4.5, (word, back)
    for share in np.linspace(0, 1, 51):
        fill, ink = charts.heat_color(share)
        assert contrast([int(part) for part in re.findall(r"\d+", fill)], rgb(ink)) >= 4.5, share


@pytest.mark.parametrize(
    "value, words",
    [(float("nan"), "–"), (0.5, "0.5"), (-0.25, "−0.25"), (12345.6, "12,346"), (0.0, "0"), (2.5e-5, "2.5e−5")],
)
def test_figures_are_short_and_nothing_measured_is_a_dash(value, words):
    assert charts.short(value) == words


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.41, 0.93), (0.0, 2000.0), (3.0, 3.0), (-4.0, -3.5)])
def test_ticks_lie_within_the_axis_and_are_few(low, high):
    marks = charts.ticks(low, high)
    assert 1 <= len(marks) <= 7 and all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)
