"""The chart's alerts, tested by promtool, and its dashboards."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from cluster_debian import require

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).with_name("alerts.yaml")
DASHBOARDS = [json.loads(path.read_text()) for path in sorted((ROOT / "charts/moeserving/dashboards").glob("*.json"))]
PANELS = [
    pytest.param(panel, id=f"{dashboard['title']}: {panel['title']}")
    for dashboard in DASHBOARDS
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]


@pytest.fixture
def rules(render) -> dict:
    """The spec of the PrometheusRule as Helm renders it."""
    return render_rules(render, scraped=True)


def render_rules(render, *, scraped: bool) -> dict:
    values = {"alerts": {"enabled": True}, "serviceMonitor": {"enabled": scraped}}
    return next(row["spec"] for row in render(values) if row["kind"] == "PrometheusRule")


def test_alerts_that_need_the_operators_metrics_are_made_where_these_are_scraped(render):
    names = {group["name"] for group in render_rules(render, scraped=False)["groups"]}
    assert names == {"moeserving-requests", "moeserving-engines"}


def test_each_alert_fires_where_it_should_and_only_there(rules, tmp_path):
    require({"prometheus": "promtool"})
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (tmp_path / "alerts.yaml").write_text(CASES.read_text(), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_seen_to_fire(rules):
    fired = {
        case["alertname"]
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for group in rules["groups"] for rule in group["rules"]}


def test_each_alert_links_to_its_part_of_the_page(rules):
    page = (ROOT / "docs/alerts.md").read_text()
    headings = {
        f"docs/alerts.md#{line.removeprefix('## ').lower()}" for line in re.findall("^## .*", page, re.MULTILINE)
    }
    links = {rule["annotations"]["runbook_url"] for group in rules["groups"] for rule in group["rules"]}
    assert links <= headings


def test_a_dashboard_is_a_file_of_a_config_map_that_the_sidecar_finds(render):
    values = {"dashboards": {"enabled": True, "namespace": "monitoring"}}
    found = [row for row in render(values) if "-dashboard-" in row["metadata"]["name"]]
    assert [json.loads(text) for row in found for text in row["data"].values()] == DASHBOARDS
    assert {row["metadata"]["namespace"] for row in found} == {"monitoring"}
    assert all(row["metadata"]["labels"]["grafana_dashboard"] == "1" for row in found)


def test_nothing_is_made_unasked(render):
    kinds = {row["kind"] for row in render({})}
    assert "PrometheusRule" not in kinds
    assert not [row for row in render({}) if "-dashboard-" in row["metadata"]["name"]]


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_how_to_read_it_and_has_a_unit_a_legend_and_the_chosen_source(panel):
    assert panel["description"].endswith(".")
    assert panel["datasource"]["uid"] == "${datasource}"
    if panel["type"] != "table":
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard["title"])
def test_a_dashboard_has_its_panels_beside_each_other_and_no_title_twice(dashboard):
    taken = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(titles) == len(set(titles))
