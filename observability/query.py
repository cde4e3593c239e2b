#!/usr/bin/env python3
"""Runs every expression of the dashboard and of the rules against a Prometheus.

    observability/query.py URL      for example http://127.0.0.1:9090

Reports expressions with an error or without data, and fails if there is one that MAY_BE_EMPTY does not list. Windows are
shortened to 15 s, so a scrape interval of 1 s and a run of one minute are sufficient. The rules need not be loaded: their
names are replaced by their expressions. An alert that does not fire has no data, so its thresholds are removed: the
query then returns what the alert compares.
"""

import json
import pathlib
import re
import sys
import urllib.error
import urllib.parse
import urllib.request

HERE = pathlib.Path(__file__).parent
WINDOW = "15s"
VARIABLES = {"$job": ".*", "$instance": ".*", "$name": ".*", "$__rate_interval": WINDOW, "$__interval": WINDOW}

# Expressions that may have no data: the start of their label, and the reason.
MAY_BE_EMPTY = {
    "panel Circuits that are not closed": "empty while all circuits are closed",
    "panel Circuits of keyed layers by state": "needs a layer with one circuit per key",
    "panel Failures in the window": "needs calls in the window of the circuit",
    "panel Recovered share": "needs failed calls within the window",
    "panel Failed connections": "needs a connection that was opened within the window",
    "panel Changes of adaptive limits by reason": "needs an adaptive limit",
    "panel Retry budget": "needs a retry budget",
    "annotation circuit opened": "empty unless a circuit opened within the window",
    "record buttress:retry_recovery:ratio_rate5m": "needs failed calls within the window",
    "alert ButtressMetricsMissing": "empty if all instances export metrics",
    "alert ButtressMeterMissing": "empty if all instances have a meter",
    "alert ButtressDependencyDown": "needs calls within the window",
}

RULE = re.compile(r"^      - (?P<kind>record|alert): (?P<name>\S+)\n(?P<body>(?:        .*\n)+)", re.M)
EXPRESSION = re.compile(r"^        expr: (?:\|\n(?P<block>(?:          .*\n)+)|(?P<line>.+)\n)", re.M)
RECORDED = re.compile(r"buttress:\w+(?::\w+)?")
THRESHOLD = re.compile(r"(?:[<>]=?|==|!=) +(?:[\d.]+ \* )?(?:scalar\([^()]*\)|\d[\d.]*)(?![\w.*])")


def rules() -> list[tuple[str, str, str]]:
    """Returns the kind, name and expression of each rule of rules.yml, which has a fixed indentation."""
    found = []
    for rule in RULE.finditer((HERE / "rules.yml").read_text()):
        expression = EXPRESSION.search(rule["body"])
        text = expression["block"] or expression["line"]
        found.append((rule["kind"], rule["name"], " ".join(text.split())))
    return found


def dashboard() -> dict:
    return json.loads((HERE / "dashboard.json").read_text())


def panel_expressions() -> list[tuple[str, str]]:
    """Returns the label and expression of each query of the dashboard."""
    found = [
        (f"panel {panel['title']} {target['refId']}", target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]
    return found + [
        (f"annotation {annotation['name']}", annotation["expr"])
        for annotation in dashboard()["annotations"]["list"]
        if "expr" in annotation
    ]


def inline(expression: str, recorded: dict[str, str]) -> str:
    """Replaces the names of recording rules by their expressions."""
    while RECORDED.search(expression):
        expression = RECORDED.sub(lambda name: f"({recorded[name.group()]})", expression)
    return expression


def shorten(expression: str) -> str:
    """Replaces the variables of the dashboard, and shortens all windows."""
    for variable, value in sorted(VARIABLES.items(), key=lambda item: -len(item[0])):
        expression = expression.replace(variable, value)
    return re.sub(r"\[\w+\]", f"[{WINDOW}]", expression)


def without_thresholds(expression: str) -> str:
    """Removes the comparisons with numbers, so that the query returns what they compare. After `unless`, `==` remains:
    it selects the series to leave out."""
    condition, *exceptions = re.split(r"(?= unless )", expression)
    keep_equal = lambda match: match.group() if match.group().startswith("==") else ">= -Inf"
    return THRESHOLD.sub(">= -Inf", condition) + "".join(THRESHOLD.sub(keep_equal, part) for part in exceptions)


def queries() -> list[tuple[str, str, bool]]:
    """Returns label, expression and whether it has to have data."""
    recorded = {name: expression for kind, name, expression in rules() if kind == "record"}
    found = []
    for label, expression in panel_expressions():
        found.append((label, shorten(inline(expression, recorded)), True))
    for kind, name, expression in rules():
        if kind == "record":
            found.append((f"record {name}", shorten(inline(expression, recorded)), True))
        else:
            found.append((f"alert {name} as it is", shorten(inline(expression, recorded)), False))
            found.append((f"alert {name}", shorten(inline(without_thresholds(expression), recorded)), True))
    return found


def ask(url: str, expression: str) -> int:
    """Returns the number of samples of a query. Raises `RuntimeError` with the message of Prometheus."""
    body = urllib.parse.urlencode({"query": expression}).encode()
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/api/v1/query", body, timeout=30) as response:
            result = json.load(response)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode(errors="replace")) from None
    return len(result)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    failed, with_data, empty = 0, 0, 0
    checks = queries()
    for label in MAY_BE_EMPTY:
        if not any(name.startswith(label) for name, _, _ in checks):
            print(f"MAY_BE_EMPTY has {label!r}, which does not exist")
            failed += 1
    for label, expression, needs_data in checks:
        try:
            samples = ask(sys.argv[1], expression)
        except RuntimeError as error:
            print(f"error    {label}: {error}\n         {expression}")
            failed += 1
            continue
        reason = next((why for start, why in MAY_BE_EMPTY.items() if label.startswith(start)), None)
        if samples:
            with_data += 1
        elif not needs_data:
            empty += 1
        elif reason:
            print(f"empty    {label}: {reason}")
            empty += 1
        else:
            print(f"no data  {label}\n         {expression}")
            failed += 1
    print(f"{len(checks)} expressions: {with_data} with data, {empty} permitted without data, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
