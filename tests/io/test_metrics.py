"""Counters and log records: the page about them runs, and what is counted is what a server has seen."""

from __future__ import annotations

import json
import logging
import re
import urllib.request

import pytest

import actcache
from actcache.io.metrics import Counters, JsonFormatter, process_metrics, prometheus_text
from tests.cli.running import cachectl
from tests.support import ROOT, put, recipe

PAGE = (ROOT / "docs/watching.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _own_logger():
    logger = logging.getLogger("actcache")
    before = logger.level, logger.handlers[:]
    yield
    logger.level, logger.handlers[:] = before


def test_the_examples_run():
    pytest.importorskip("fsspec")
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        if "opentelemetry" in code:
            pytest.importorskip("opentelemetry")
        exec(compile(code, "docs/watching.md", "exec"), names)
    with urllib.request.urlopen(f"http://127.0.0.1:{names['server'].server_port}") as answer:
        served = answer.read().decode()
    names["server"].shutdown()
    names["server"].server_close()
    for metric in process_metrics():
        assert f"| `{metric.name}` | `{metric.prometheus_name}` | {metric.unit} |" in PAGE
        assert f"# TYPE {metric.prometheus_name} counter\n" in served
        assert served.count(f"# TYPE {metric.prometheus_name} ") == 1
    observed = {
        tuple(one.attributes.items()): one.value for one in names["observed"]("actcache.objects.requests")(None)
    }
    assert observed == {m.attributes: m.value for m in process_metrics() if m.name == "actcache.objects.requests"}


def test_counters_add_up_by_operation():
    counters = Counters("things", [("io.time", "s", "Time"), ("kinds", "{kind}", "Kinds")])
    counters.add("get", io_time=0.5, kinds=1)
    counters.add("put", kinds=2)
    counters.add("get", io_time=0.25)
    assert prometheus_text(counters.metrics(), rank='"0"') == (
        "# HELP actcache_things_io_time_seconds_total Time\n"
        "# TYPE actcache_things_io_time_seconds_total counter\n"
        'actcache_things_io_time_seconds_total{operation="get",rank="\\"0\\""} 0.75\n'
        "# HELP actcache_things_kinds_total Kinds\n"
        "# TYPE actcache_things_kinds_total counter\n"
        'actcache_things_kinds_total{operation="get",rank="\\"0\\""} 1.0\n'
        'actcache_things_kinds_total{operation="put",rank="\\"0\\""} 2.0\n'
    )


def test_a_line_of_json(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        raised = (type(error), error, error.__traceback__)
    record = logging.LogRecord("actcache.x", logging.WARNING, "f.py", 1, "%d of %s", (5, "é"), raised)
    record.store, record.path = "s3://bucket", ROOT  # as by extra
    (line,) = JsonFormatter().format(record).splitlines()
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert "ValueError: two\nlines" in found.pop("error")
    assert found.pop("pid") > 0
    own = {"level": "WARNING", "logger": "actcache.x", "message": "5 of é", "rank": "3"}
    assert found == own | {"store": "s3://bucket", "path": str(ROOT)}


def test_a_commands_log_as_lines_of_json(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTCACHE_LOG", "json")
    with actcache.open(tmp_path / "one") as store, store.space(recipe()) as space:
        put(space, range(3))
    done = cachectl("migrate", tmp_path / "one", tmp_path / "two")
    assert done.code == 0
    lines = [json.loads(line) for line in done.err.splitlines() if line.startswith("{")]
    published = [line for line in lines if line["message"].startswith("published a segment of")]
    assert [line["entries"] for line in published] == [3]
    assert published[0]["level"] == "DEBUG"
