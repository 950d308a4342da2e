"""Facts about this machine."""

import json
import os

from moe_edge.process import host
from moe_edge.process.limits import available_cores


def test_facts_are_plain_and_complete() -> None:
    facts = host.machine_facts()
    assert facts["cores"] == available_cores() >= 1
    assert facts["memory_bytes"] > 2**28
    assert {"cpu", "governor", "kernel"} <= facts.keys()
    json.dumps(facts)


def test_threads_never_exceed_the_machine() -> None:
    assert host.threads_for(None) == available_cores()
    assert host.threads_for(10_000) == available_cores()
    assert host.threads_for(1) == 1


def test_a_busy_machine_is_noted(monkeypatch) -> None:
    monkeypatch.setattr(host.psutil, "cpu_percent", lambda interval: 100.0)
    assert "cores when the measurement began" in host.load_facts(0)["notes"][0]
    monkeypatch.setattr(host.psutil, "cpu_percent", lambda interval: 1.0 / (os.cpu_count() or 1))
    assert host.load_facts(0)["notes"] == []


def test_versions_name_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(host, "_PACKAGES", ("numpy", "no-such-package-at-all"))
    versions = host.versions()
    assert versions["numpy"][0].isdigit()
    assert versions["no-such-package-at-all"] == "not installed"
