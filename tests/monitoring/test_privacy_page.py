"""The privacy report of a task: its numbers against the accountants, its page as a reader and a parser see it."""

import html.parser
import json
import math
import re
from dataclasses import replace

import pytest

from fedcompute.errors import ArtifactInvalid, OperationFailed
from fedcompute.monitoring import privacy_words
from fedcompute.monitoring.privacy_page import privacy_page, shown_rounds
from fedcompute.monitoring.privacy_plot import plot
from fedcompute.monitoring.privacy_recipe import recipe
from fedcompute.monitoring.task_privacy import PlanFacts, document, task_privacy
from fedcompute.privacy.budget import Budget
from fedcompute.privacy.composition import TaskReleases, epsilon, unamplified_epsilon
from fedcompute.privacy.ledger import GaussianEvent
from fedcompute.privacy.participation import Assumption, Participation
from fedcompute.privacy.planned import KINDS, planned_rounds
from fedcompute.privacy.report import Spent

NOISED = GaussianEvent(20.0)
TRAINING = {"task_id": 1, "rounds": [[GaussianEvent(1.0)]] * 4}
EVALUATION = {"task_id": 2, "kind": "EVALUATION", "rounds": [[]] * 3}
VOID = {"meta", "line", "circle", "polyline", "br", "hr"}


class Page(html.parser.HTMLParser):
    """Fails at a tag that is closed before one that it holds; keeps tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", "".join(self.text))


def rounds(kind, noise, count, goal=100, **more):
    return [list(events) for events in planned_rounds(kind, noise, count, report_goal=goal, **more)]


def page_of(ledger, task_id=1, **more):
    return Page(privacy_page(task_privacy(ledger, task_id, **more)))


def cases():
    for kind in KINDS:
        for participation in Participation:
            if kind == "banded_mf" and participation in (Participation.POISSON, Participation.FIXED_SIZE):
                continue
            if participation is Participation.FIXED_SIZE and "tree" in kind:
                continue
            yield kind, participation


@pytest.fixture
def task_of(write_ledger):
    """Returns task_of(kind, participation, noise=4, count=5, **more) -> a task's privacy."""

    def make(kind, participation, noise=4.0, count=5, metrics=0.0, **more):
        task = {
            "task_id": 1, "mechanism": kind.upper(), "goal": 100, "contributions": 100, "devices": 10_000,
            "separation": 2, "participation": participation, "metric_clip_norm": 8.0 if metrics else None,
            "rounds": rounds(kind, noise, count, bands=2, metrics_noise_multiplier=metrics),
        }  # fmt: skip
        return task_privacy(write_ledger(task), 1, **more)

    return make


@pytest.mark.parametrize(("kind", "participation"), list(cases()))
def test_the_page_says_what_the_accountants_say(task_of, kind, participation):
    found = task_of(kind, participation)
    task = TaskReleases(rounds(kind, 4.0, 5, bands=2), Assumption(participation, 10_000, 100, 2))
    assert found.report.epsilon == pytest.approx(epsilon([task], 1e-5), rel=1e-9)
    assert found.report.unamplified_epsilon == pytest.approx(unamplified_epsilon([task], 1e-5), rel=1e-9)
    words = Page(privacy_page(found)).words
    for value in (found.report.epsilon, found.report.unamplified_epsilon, found.report.separated_epsilon):
        assert f"{value:,.6g}" in words
    assert kind.upper() in words


@pytest.mark.parametrize(("kind", "participation"), list(cases()))
@pytest.mark.parametrize("metrics", [0.0, 20.0])
def test_the_recipe_gives_the_epsilon_that_stands_beside_it(task_of, kind, participation, metrics):
    found = task_of(kind, participation, metrics=metrics)
    lines = recipe([TaskReleases(found.releases.rounds, found.report.assumption)], found.report.delta)
    *before, last = lines.splitlines()
    names = {}
    exec("\n".join(before), names)
    assert eval(last, names) == pytest.approx(found.report.epsilon, rel=1e-9)
    assert "\n".join(before) in privacy_page(found)


def test_the_recipe_of_tasks_that_claim_different_things_is_that_of_all_together():
    def task(participation, noise):
        return TaskReleases([[GaussianEvent(noise)]] * 3, Assumption(participation, 1000, 100))

    for first in (Participation.POISSON, Participation.FIXED_SIZE):
        tasks = [task(first, 2.0), task(Participation.NO_AMPLIFICATION, 3.0), task(Participation.POISSON, 4.0)]
        *before, last = recipe(tasks, 1e-5).splitlines()
        names = {}
        exec("\n".join(before), names)
        assert eval(last, names) == pytest.approx(epsilon(tasks, 1e-5), rel=1e-9)


def test_without_noise_there_is_no_recipe_and_no_promise(write_ledger):
    ledger = write_ledger({"task_id": 1, "mechanism": "NONE", "rounds": [[GaussianEvent(0.0)]] * 2})
    found = task_privacy(ledger, 1)
    assert recipe([found.releases], 1e-5) is None
    words = Page(privacy_page(found)).words
    assert "There is no privacy promise at all" in words
    assert "model, exact" in words
    assert math.isinf(found.report.epsilon)
    assert document(found)["epsilon"] is None
    json.dumps(document(found), allow_nan=False)


def test_noise_that_a_plans_graphs_may_add_is_said_not_to_count(write_ledger):
    ledger = write_ledger({"task_id": 1, "mechanism": "NONE", "rounds": [[GaussianEvent(0.0)]]})
    words = page_of(ledger, facts=PlanFacts(known=True, has_graphs=True)).words
    assert "Noise that they may add is drawn inside TensorFlow and is not counted here" in words
    assert "has no noise" not in words


def test_the_page_is_the_same_for_the_same_ledger(write_ledger):
    first, second = (privacy_page(task_privacy(write_ledger(TRAINING, EVALUATION), 1)) for _ in range(2))
    assert first == second


def test_the_page_asks_no_host_and_runs_no_script(write_ledger):
    text = privacy_page(task_privacy(write_ledger(TRAINING, EVALUATION), 1))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "xlink:href")]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert "default-src 'none'" in text


def test_no_string_of_the_ledger_becomes_markup(write_ledger):
    hostile = "<script>alert('x')</script>\"&"
    ledger = write_ledger(TRAINING, population=hostile)
    ledger = replace(ledger, tasks={"1": {"kind": hostile, "status": hostile, "reason": hostile}, "9": {"kind": 5}})
    entry = replace(ledger.entries[0], mechanism=hostile, created=hostile, released=hostile, hash=hostile)
    facts = PlanFacts(metric_names={1: (hostile,)})
    for damaged in (ledger, replace(ledger, entries=(entry, *ledger.entries[1:]))):
        page = page_of(damaged, facts=facts)
        assert "script" not in {tag for tag, _ in page.tags}
        assert hostile in "".join(page.text)


def test_tables_have_captions_and_headings_and_the_plot_has_words(write_ledger):
    page = page_of(write_ledger(TRAINING, EVALUATION))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("caption") == tags.count("table") >= 4
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    (drawing,) = (attributes for tag, attributes in page.tags if tag == "svg")
    assert drawing["role"] == "img"
    named = {attributes.get("id") for _, attributes in page.tags}
    assert set(drawing["aria-labelledby"].split()) <= named
    assert ("html", {"lang": "en"}) in page.tags
    scrolling = [attributes for _, attributes in page.tags if "scroll" in attributes.get("class", "")]
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in scrolling)


def test_every_round_stands_in_the_table_with_its_entry(write_ledger):
    ledger = write_ledger(TRAINING)
    words = page_of(ledger).words
    for entry in ledger.entries[1::2]:
        assert f"{entry.cumulative_epsilon:.4f}" in words
        assert entry.hash[:12] in words


def test_a_long_task_shows_its_first_round_its_last_and_some_between(task_of):
    found = task_of("fixed_gaussian", Participation.NO_AMPLIFICATION, count=300)
    shown = [one.iteration_id for one in shown_rounds(found.rounds)]
    assert (shown[0], shown[-1]) == (1, 300)
    assert len(shown) == 25
    assert "25 of 300 rounds" in Page(privacy_page(found)).words


def test_what_leaves_without_noise_is_named_and_counted(write_ledger):
    facts = PlanFacts(metric_names={1: ("server/client_work/train/loss",)})
    found = task_privacy(write_ledger(TRAINING, EVALUATION), 1, facts=facts)
    assert [(one.task_id, one.released, one.count) for one in found.unprotected] == [
        (1, "metrics", 4),
        (2, "metrics", 3),
    ]
    words = Page(privacy_page(found)).words
    assert "server/client_work/train/loss" in words
    assert "2 (evaluation)" in words


def test_noised_metrics_are_a_part_of_epsilon_and_said_to_be(task_of):
    without = task_of("fixed_gaussian", Participation.NO_AMPLIFICATION)
    found = task_of("fixed_gaussian", Participation.NO_AMPLIFICATION, metrics=20.0)
    assert found.report.unamplified_epsilon > without.report.unamplified_epsilon
    assert not found.unprotected
    words = Page(privacy_page(found)).words
    assert "The metrics of 5 rounds of this task are clipped and noised" in words
    assert "160" in words  # deviation 20 * 8


def test_an_evaluation_with_noised_metrics_has_a_report_of_its_own(write_ledger):
    ledger = write_ledger({**EVALUATION, "rounds": [[NOISED]] * 3, "metric_clip_norm": 32.0})
    found = task_privacy(ledger, 2)
    assert found.report.epsilon == pytest.approx(
        epsilon([TaskReleases([[NOISED]] * 3, Assumption(Participation.NO_AMPLIFICATION, 10, 10))], 1e-5)
    )
    assert "N(0, 640²)" in Page(privacy_page(found)).words


def test_a_task_that_spends_nothing_says_so(write_ledger):
    words = page_of(write_ledger(TRAINING, EVALUATION), 2).words
    assert "promises nothing and spends nothing" in words


def test_tasks_of_a_population_add_up_and_are_told_apart(write_ledger):
    other = {"task_id": 3, "rounds": [[GaussianEvent(2.0)]] * 2}
    budget = Budget(50.0, 1e-5)
    found = task_privacy(write_ledger(TRAINING, EVALUATION, other, budget=budget), 1)
    releases = [
        TaskReleases(task["rounds"], Assumption(Participation.NO_AMPLIFICATION, 1000, 10)) for task in (TRAINING, other)
    ]
    assert found.population_bounds.upper == pytest.approx(epsilon(releases, 1e-5))
    assert found.budget_spent == pytest.approx(epsilon(releases, 1e-5))
    assert found.report.epsilon == pytest.approx(epsilon(releases[:1], 1e-5))
    assert [one.task_id for one in found.tasks] == [1, 2, 3]
    words = Page(privacy_page(found)).words
    assert "The budget is epsilon 50" in words
    assert "outside" in words


def test_a_promise_is_read_beside_what_was_spent(write_ledger):
    facts = PlanFacts(known=True, promised_epsilon=7.25, promised_rounds=40)
    assert "promises its devices epsilon 7.25" in page_of(write_ledger(TRAINING), facts=facts).words
    assert "The plan promises nothing." in page_of(write_ledger(TRAINING), facts=PlanFacts(known=True)).words


def test_a_changed_entry_is_a_finding_on_the_page(write_ledger):
    ledger = write_ledger(TRAINING)
    entries = list(ledger.entries)
    entries[2] = replace(entries[2], contributions=11)
    found = task_privacy(replace(ledger, entries=tuple(entries)), 1)
    words = Page(privacy_page(found)).words
    assert "The ledger does not hold" in words
    assert "entry 3 was changed" in words
    assert "The chain is whole" not in words
    assert "The chain is whole" in page_of(ledger).words


def test_what_a_reader_puts_in_place_of_the_claim_is_said(task_of, write_ledger):
    claimed = task_of("fixed_gaussian", Participation.POISSON)
    fewer = task_of("fixed_gaussian", Participation.POISSON, devices=1000)
    assert fewer.report.epsilon > claimed.report.epsilon
    assert "1,000 devices instead of the task's 10,000" in Page(privacy_page(fewer)).words
    stricter = task_privacy(write_ledger(TRAINING), 1, delta=1e-9)
    assert stricter.report.delta == 1e-9
    assert stricter.recomputed
    with pytest.raises(OperationFailed, match="fewer than the 10 of a round"):
        task_privacy(write_ledger(TRAINING), 1, devices=5)


def test_a_ledger_with_a_senseless_delta_is_refused(write_ledger):
    ledger = write_ledger({**EVALUATION, "delta": 2.0})
    with pytest.raises(ArtifactInvalid, match="delta is 2"):
        task_privacy(ledger, 2)


@pytest.mark.parametrize("number", [0, -1, 2**62])
def test_a_ledger_with_a_senseless_round_is_refused_before_it_takes_memory(write_ledger, number):
    ledger = write_ledger(TRAINING)
    entry = replace(ledger.entries[2], iteration_id=number)
    with pytest.raises(ArtifactInvalid, match="so many rounds"):
        task_privacy(replace(ledger, entries=(*ledger.entries[:2], entry)), 1)


def test_rounds_above_the_goal_count_as_such_and_the_denominator_stays(write_ledger):
    task = {**TRAINING, "participation": Participation.POISSON, "contributions": 13}
    found = task_privacy(write_ledger(task), 1, facts=PlanFacts(most_devices=15))
    assert (found.goal, found.report.assumption.report_goal) == (10, 13)
    words = privacy_words.over_selection_words(found)
    assert "divided by the report goal 10" in words
    assert "Up to 15 devices" in words
    assert "accountant uses 13" in words


def test_curves_that_lie_far_apart_share_a_logarithmic_axis():
    near = [Spent(number, 1.0 * number, 2.0 * number) for number in (1, 2, 3)]
    far = [Spent(number, 0.1 * number, 20.0 * number) for number in (1, 2, 3)]
    assert not plot(near, "claim", False).logarithmic
    assert plot(far, "claim", False).logarithmic
    assert len(plot(near, "claim", True).curves) == 1
    assert plot([Spent(1, math.inf, math.inf)], "claim", False) is None
    assert plot([], "claim", False) is None


@pytest.mark.parametrize("claim", [1e-6, 0.02, 1.0, 12.0, 5e4])
@pytest.mark.parametrize("factor", [1.0, 1.0001, 3.0, 1e5])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_whatever_is_drawn_lies_within_the_picture(claim, factor, count):
    series = [Spent(number, claim * number / count, factor * claim * number / count) for number in range(1, count + 1)]
    drawn = plot(series, "claim", False)
    for curve in drawn.curves:
        assert len(curve.points) == count
        for x, y in curve.points:
            assert drawn.left - 1e-6 <= x <= drawn.right + 1e-6
            assert drawn.top - 1e-6 <= y <= drawn.bottom + 1e-6
    for mark in drawn.rows:
        assert drawn.top - 1e-6 <= mark.place <= drawn.bottom + 1e-6
    assert abs(drawn.curves[0].label_y - drawn.curves[1].label_y) >= 31
    assert len(drawn.rows) >= 1
    assert drawn.columns


def test_numbers_read_as_people_write_them():
    shown = {
        0.5: "0.5", 1000000.0: "1,000,000", 1492.391: "1,492.39", 1e-6: "10⁻⁶", 3.333333e-7: "3.33333·10⁻⁷",
        math.inf: "∞", None: "—", 0.0: "0", 1e20: "10²⁰",
    }  # fmt: skip
    assert {value: privacy_words.number(value) for value in shown} == shown
