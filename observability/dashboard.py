#!/usr/bin/env python3
"""Generates dashboard.json, a dashboard for Grafana 12.

    observability/dashboard.py            writes dashboard.json
    observability/dashboard.py --check    fails if dashboard.json differs from what this script generates

A panel is one call of a function below: title, width, unit, description and queries. The description states what the
panel shows and what is normal. The layout fills rows of 24 columns from left to right.
"""

import json
import pathlib
import sys

PATH = pathlib.Path(__file__).with_name("dashboard.json")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 24, 8

# Selectors: of the series of a process, and of the series of a layer, which also have a name.
PROCESS = 'job=~"$job",instance=~"$instance"'
LAYER = PROCESS + ',name=~"$name"'
# The SLO is a rule. Without the rules, the dashboard uses 99.9 %.
MAX_ERRORS = "scalar(max(buttress:call_errors:max_ratio) or vector(0.001))"

GREEN, YELLOW, ORANGE, RED, BLUE, GRAY = "green", "yellow", "orange", "red", "blue", "text"


def layer(metric: str, *matchers: str) -> str:
    """Returns a selector of the series of layers."""
    return f"buttress_{metric}{{{','.join([LAYER, *matchers])}}}"


def process(metric: str, *matchers: str) -> str:
    """Returns a selector of the series of processes."""
    return f"buttress_{metric}{{{','.join([PROCESS, *matchers])}}}"


def rate(selector: str, by: str = "name", window: str = "$__rate_interval") -> str:
    return f"sum by ({by}) (rate({selector}[{window}]))"


def ratio(part: str, whole: str) -> str:
    """Returns a quotient that has no value where the divisor is 0."""
    return f"{part} / ({whole} > 0)"


def quantile(share: float, metric: str, by: str = "name") -> str:
    return f"histogram_quantile({share}, {rate(layer(metric + '_bucket'), f'{by}, le')})"


def error_ratio(window: str) -> str:
    errors = rate(layer("calls_total", 'outcome=~"failure|rejected"'), window=window)
    return ratio(errors, rate(layer("calls_total", 'outcome!="cancelled"'), window=window))


def state_number(metric: str, states: list[str], by: str, select=layer) -> str:
    """Returns the index of the current state of a one-hot metric."""
    terms = [f"""{index} * {select(metric, f'state="{state}"')}""" for index, state in enumerate(states)]
    return f"max by ({by}) ({' or '.join(terms)})"


def query(expr: str, legend: str = "{{name}}", **more) -> dict:
    return {"expr": expr, "legendFormat": legend, **more}


def steps(*pairs) -> dict:
    """Returns thresholds: a color from the first value on, and so on. The first value is None."""
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for value, color in pairs]}


def panel(kind: str, title: str, width: int, unit: str, description: str, queries: list[dict], **more) -> dict:
    targets = [
        {"datasource": DATASOURCE, "editorMode": "code", "range": True, "refId": chr(ord("A") + index), **target}
        for index, target in enumerate(queries)
    ]
    defaults = {"unit": unit, "color": {"mode": "palette-classic"}, "mappings": [], "thresholds": steps((None, GREEN))}
    defaults |= more.pop("defaults", {})
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": more.pop("overrides", [])},
        "options": more.pop("options", {}),
        "targets": targets,
        **more,
    }


def series(title, width, unit, description, *queries, stack=False, max_value=None, overrides=()) -> dict:
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 25 if stack else 5,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        "thresholdsStyle": {"mode": "off"},
    }
    defaults = {"custom": custom, "min": 0} | ({"max": max_value} if max_value is not None else {})
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel(
        "timeseries", title, width, unit, description, list(queries),
        defaults=defaults, options=options, overrides=list(overrides),
    )  # fmt: skip


def dashed(pattern: str, color: str) -> dict:
    """Draws the series whose legend matches as a dashed line: a bound beside the values."""
    return {
        "matcher": {"id": "byRegexp", "options": f"/{pattern}/"},
        "properties": [
            {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 8]}},
            {"id": "custom.fillOpacity", "value": 0},
            {"id": "custom.stacking", "value": {"mode": "none", "group": "bound"}},
            {"id": "color", "value": {"mode": "fixed", "fixedColor": color}},
        ],
    }


def stat(title, width, unit, description, thresholds, *queries) -> dict:
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
    }
    defaults = {"thresholds": thresholds, "color": {"mode": "thresholds"}}
    return panel("stat", title, width, unit, description, list(queries), defaults=defaults, options=options)


def heatmap(title, width, unit, description, selector, exemplars=False) -> dict:
    options = {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "scale": "exponential"},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }
    target = query(rate(selector, "le"), "{{le}}", format="heatmap", exemplar=exemplars)
    return panel("heatmap", title, width, unit, description, [target], options=options)


def timeline(title, width, description, states: list[tuple[str, str]], *queries) -> dict:
    """Shows states as bars. A value is the index of a state in `states`, which has the text and color of each."""
    mapping = {str(n): {"text": text, "color": color, "index": n} for n, (text, color) in enumerate(states)}
    defaults = {
        "mappings": [{"type": "value", "options": mapping}],
        "color": {"mode": "thresholds"},
        "custom": {"fillOpacity": 80, "lineWidth": 0},
    }
    options = {
        "mergeValues": True,
        "showValue": "auto",
        "alignValue": "left",
        "rowHeight": 0.8,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return panel("state-timeline", title, width, "none", description, list(queries), defaults=defaults, options=options)


def circuits_table(width: int) -> dict:
    affected = f"""on (job, instance, name) ({layer("breaker_state", 'state!="closed"')} == 1)"""
    more = {"instant": True, "range": False, "format": "table"}
    queries = [
        query(f"""max by (name, instance, state) ({layer("breaker_state", 'state!="closed"')} == 1)""", "", **more),
        query(f"""max by (name, instance) ({layer("breaker_open_remaining_seconds")} and {affected})""", "", **more),
        query(
            f"""sum by (name, instance, reason) (increase({layer("breaker_trips_total")}[1h]) > 0 and {affected})""",
            "",
            **more,
        ),
    ]
    names = {"Value #B": "open for another", "Value #C": "trips in 1 h"}
    transformations = [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {"Time": True, "Value #A": True},
                "indexByName": {"name": 0, "instance": 1, "state": 2, "Value #B": 3, "reason": 4, "Value #C": 5},
                "renameByName": names,
            },
        },
    ]
    trips = {
        "matcher": {"id": "byName", "options": names["Value #C"]},
        "properties": [{"id": "unit", "value": "short"}, {"id": "decimals", "value": 0}],
    }
    return panel(
        "table", "Circuits that are not closed", width, "s",
        "The circuits that reject or limit calls now, the time until the next probe, and the reasons for which they "
        "opened in the last hour. Normal: an empty table.",
        queries, transformations=transformations, overrides=[trips], options={"showHeader": True, "cellHeight": "sm"},
    )  # fmt: skip


def rows() -> list[tuple[str, list[dict]]]:
    calls = rate(layer("calls_total"))
    retries, hedges = rate(layer("retry_attempts_total")), rate(layer("hedge_attempts_total"))
    successes = rate(layer("calls_total", 'outcome="success"'))
    finished = rate(layer("calls_total", 'outcome!="cancelled"'))
    circuits = [("closed", GREEN), ("half-open", YELLOW), ("open", RED), ("forced open", ORANGE), ("forced closed", BLUE)]
    circuit_states = ["closed", "half_open", "open", "forced_open", "forced_closed"]
    phases = [("starting", BLUE), ("ready", GREEN), ("draining", YELLOW), ("stopping", ORANGE), ("stopped", GRAY)]
    phase_terms = [f"""{n} * {process("lifecycle_phase", f'phase="{text}"')}""" for n, (text, _) in enumerate(phases)]
    open_time = layer("breaker_state_time_seconds_total", 'state=~"open|forced_open"')
    failed, opened = rate(layer("connection_failures_total")), rate(layer("connection_opened_total"))
    reuses, recoveries = rate(layer("connection_reuses_total")), rate(layer("retry_recoveries_total"))
    budget_left = f"1 - {error_ratio('30d')} / {MAX_ERRORS}"
    return [
        ("Overview", [
            series("Errors against the SLO", 8, "percentunit",
                "The share of failed and rejected calls, and the maximum that the SLO permits. Normal: below the dashed line.",
                query(error_ratio("$__rate_interval")), query(f"vector({MAX_ERRORS})", "maximum of the SLO"),
                overrides=[dashed("^maximum of the SLO$", RED)]),
            stat("Burn rate of 1 h", 4, "none",
                "How fast the error budget of 30 days is used. Normal: below 1. At 14.4, an hour uses 2 % of the budget.",
                steps((None, GREEN), (1, YELLOW), (14.4, RED)), query(f"{error_ratio('1h')} / {MAX_ERRORS}")),
            stat("Error budget left of 30 d", 4, "percentunit",
                "The share of the error budget that is left of the last 30 days. Normal: above 25 %. Below 0, the SLO is missed.",
                steps((None, RED), (0, YELLOW), (0.25, GREEN)), query(budget_left)),
            stat("Attempts per call", 4, "none",
                "The load that retries add to the upstream. Normal: below 1.1. Above 1.5, retries make an outage longer.",
                steps((None, GREEN), (1.1, YELLOW), (1.5, RED)), query(f"1 + {ratio(retries, calls)}")),
            stat("Instances", 4, "none",
                "The processes that export metrics of this crate, by version. Normal: the number of instances that you run.",
                steps((None, GREEN)), query(f"count by (version) ({process('build_info')})", "{{version}}")),
            circuits_table(12),
            series("Rejections by layer", 12, "reqps",
                "Calls that a layer did not let through. Normal: 0, or the constant share that a quota rejects.",
                query(rate(layer("rejections_total"), "name, layer"), "{{name}} {{layer}}"),
                query(rate(layer("shadow_rejections_total"), "name, layer"), "{{name}} {{layer}} (shadow mode)"), stack=True),
        ]),
        ("Calls", [
            series("Calls by outcome", 8, "reqps",
                "Calls at their end. Normal: nearly all succeed. Rejected calls never reached the upstream.",
                query(rate(layer("calls_total"), "name, outcome"), "{{name}} {{outcome}}"), stack=True),
            series("Effective and actual success", 8, "percentunit",
                "Effective: the share of calls that succeed. Actual: successes per attempt. Normal: both near 100 %. "
                "The distance between them is what retries and hedges hide.",
                query(ratio(successes, finished), "{{name}} effective"),
                query(ratio(successes, f"({finished} + ({retries} or 0 * {finished}) + ({hedges} or 0 * {finished}))"), "{{name}} actual"),
                max_value=1),
            series("Time to the response head", 8, "s",
                "Percentiles over all calls that were not rejected. Normal: constant. If only the 99th percentile rises, look at "
                "retries and queues.",
                *[query(quantile(share, "call_duration_seconds"), f"{{{{name}}}} p{share * 100:g}") for share in (0.5, 0.95, 0.99)]),
            heatmap("Time to the response head, all calls", 16, "s",
                "The distribution of the durations, with links to traces if exemplars are on. Normal: one band. A second band "
                "at a round number is a timeout.",
                layer("call_duration_seconds_bucket"), exemplars=True),
            series("Active calls", 8, "short",
                "Calls between their begin and the end of their body. Normal: proportional to calls and their duration.",
                query(f"sum by (name) ({layer('call_active')})")),
        ]),
        ("Circuits", [
            timeline("State of circuits", 24,
                "The worst state of each circuit. Normal: closed. Short openings between two scrapes are missing here; the "
                "share of time open contains them.",
                circuits, query(state_number("breaker_state", circuit_states, "name, instance"), "{{name}} {{instance}}")),
            series("Share of time open", 8, "percentunit",
                "The share of the time for which a circuit rejected all calls, averaged over instances. Normal: 0.",
                query(f"avg by (name) (sum without (state) (rate({open_time}[$__rate_interval])))"), max_value=1),
            series("Trips by reason", 8, "short",
                "How often circuits opened, by the rule that opened them. Normal: 0. During an outage, failed probes repeat.",
                query(f"sum by (name, reason) (increase({layer('breaker_trips_total')}[$__rate_interval]))", "{{name}} {{reason}}"),
                stack=True),
            series("Rejections of circuits by reason", 8, "reqps",
                "Calls that a circuit rejected. Normal: 0. The reason circuit_half_open means that all probe slots are taken.",
                query(rate(layer("rejections_total", 'layer="circuit_breaker"'), "name, reason"), "{{name}} {{reason}}"), stack=True),
            series("Failures in the window", 8, "percentunit",
                "The share of failed and of slow calls in the window that the circuit evaluates. Normal: well below the ratio that "
                "opens it.",
                query(ratio(f"sum by (name) ({layer('breaker_window_failures')})", f"sum by (name) ({layer('breaker_window_calls')})"), "{{name}} failed"),
                query(ratio(f"sum by (name) ({layer('breaker_window_slow')})", f"sum by (name) ({layer('breaker_window_calls')})"), "{{name}} slow"),
                max_value=1),
            series("Failures by reason", 8, "reqps",
                "Failures that circuits counted. Normal: a few. Only failures that the upstream caused are counted.",
                query(rate(layer("breaker_failures_total"), "name, reason"), "{{name}} {{reason}}"), stack=True),
            series("Circuits of keyed layers by state", 8, "short",
                "The number of circuits of layers with one circuit per key. Normal: all closed. Empty without a keyed layer.",
                query(f"sum by (name, state) ({layer('breaker_circuits')})", "{{name}} {{state}}"), stack=True),
        ]),
        ("Retries and hedges", [
            series("Retries by reason", 8, "reqps",
                "Attempts after the first, by the failure before. Normal: a small share of the calls.",
                query(rate(layer("retry_attempts_total"), "name, reason"), "{{name}} {{reason}}"), stack=True),
            series("Declined retries by reason", 8, "reqps",
                "Failed calls that were not retried. Normal: not_retryable and unsafe only. With budget_used_up, retries no longer "
                "hide an outage.",
                query(rate(layer("retry_declined_total"), "name, reason"), "{{name}} {{reason}}"), stack=True),
            series("Recovered share", 8, "percentunit",
                "The share of failed calls that succeeded after a retry. Normal: above 80 %. No value without failures.",
                query(ratio(recoveries, f"{recoveries} + {rate(layer('retry_declined_total'))}")), max_value=1),
            series("Retry budget", 8, "short",
                "The balance of the retry budget, and its maximum. Normal: at the maximum. At 0, no call is retried. Empty without a "
                "budget.",
                query(f"sum by (name) ({layer('retry_budget_remaining')})", "{{name}} balance"),
                query(f"sum by (name) ({layer('retry_budget_limit')})", "{{name}} maximum"), overrides=[dashed(" maximum$", GRAY)]),
            series("Delay between attempts", 8, "s",
                "The 99th percentile of the time of a retried call without an attempt in flight. Normal: the backoff that is set.",
                query(quantile(0.99, "retry_delay_seconds"))),
            heatmap("Retries per retried call", 8, "short",
                "The number of retries of calls that were retried. Normal: nearly all need one.",
                layer("retry_call_retries_bucket")),
            series("Hedges", 12, "reqps",
                "Hedge attempts, those whose response was used, and those that were due but not sent. Normal: 1 % to 5 % of the calls.",
                query(hedges, "{{name}} sent"), query(rate(layer("hedge_wins_total")), "{{name}} won"),
                query(rate(layer("hedge_declined_total"), "name, reason"), "{{name}} not sent: {{reason}}")),
            series("Hedge delay", 12, "s",
                "The time after which a hedge attempt is sent. Normal: near the 95th percentile of the calls.",
                query(f"max by (name) ({layer('hedge_delay_seconds')})")),
        ]),
        ("Concurrency limits", [
            series("Permits in use", 8, "short",
                "Calls in flight, and the limit, summed over instances. Normal: below 90 % of the limit.",
                query(f"sum by (name) ({layer('concurrency_usage')})", "{{name}} in use"),
                query(f"sum by (name) ({layer('concurrency_limit')})", "{{name}} limit"), overrides=[dashed(" limit$", RED)]),
            series("Queue depth", 8, "short",
                "Calls that wait for a permit, and the maximum. Normal: 0 with short peaks.",
                query(f"sum by (name, layer) ({layer('queue_depth')})", "{{name}} {{layer}} waiting"),
                query(f"sum by (name, layer) ({layer('queue_limit')})", "{{name}} {{layer}} maximum"), overrides=[dashed(" maximum$", RED)]),
            series("Time in the queue", 8, "s",
                "Percentiles over the calls that waited. Normal: milliseconds. Calls that need not wait are not counted.",
                *[query(quantile(share, "queue_wait_duration_seconds", "name, layer"), f"{{{{name}}}} {{{{layer}}}} p{share * 100:g}") for share in (0.5, 0.99)]),
            series("Rejections of limits by reason", 8, "reqps",
                "Calls that a concurrency limit rejected. Normal: 0. queue_timeout means that the queue is too long for the capacity.",
                query(rate(layer("rejections_total", 'layer="concurrency_limit"'), "name, reason"), "{{name}} {{reason}}"), stack=True),
            series("Changes of adaptive limits by reason", 8, "ops",
                "How often an algorithm changed its limit. Normal: headroom and slower alternate. Many drops mean overload.",
                query(rate(layer("concurrency_changes_total"), "name, reason"), "{{name}} {{reason}}"), stack=True),
            series("Exempt calls", 8, "reqps",
                "Calls without a permit, such as health calls. Normal: constant.",
                query(rate(layer("concurrency_exempt_total")))),
        ]),
        ("Connections", [
            series("Connections by state", 8, "short",
                "Open connections, and their limits. Normal: some idle connections, and a total below the limit.",
                query(f"sum by (name, state) ({layer('connections')})", "{{name}} {{state}}"),
                query(f"sum by (name, scope) ({layer('connection_limit')})", "{{name}} limit: {{scope}}"),
                stack=True, overrides=[dashed(" limit: ", RED)]),
            series("Opened and closed connections", 8, "ops",
                "Connections that were opened, and closed by reason. Normal: few, most of them closed for their age.",
                query(opened, "{{name}} opened"),
                query(rate(layer("connection_closed_total"), "name, reason"), "{{name}} closed: {{reason}}")),
            series("Failed connections", 8, "percentunit",
                "The share of new connections that failed. Normal: 0. No value if no connection is opened.",
                query(ratio(failed, f"{failed} + {opened}")), max_value=1),
            series("Calls on an open connection", 12, "percentunit",
                "The share of calls that reused a connection. Normal: above 95 %. Below, connections close too early.",
                query(ratio(reuses, f"{reuses} + {opened}")), max_value=1),
            series("Rejections for lack of a connection", 12, "reqps",
                "Calls that found no connection within the wait of their queue. Normal: 0.",
                query(rate(layer("rejections_total", 'layer="connect"'), "name, reason"), "{{name}} {{reason}}"), stack=True),
        ]),
        ("Health and lifecycle", [
            timeline("Health probes", 8, "The result of the health probes of upstreams. Normal: up.",
                [("unknown", GRAY), ("up", GREEN), ("down", RED)],
                query(state_number("probe_state", ["unknown", "up", "down"], "name, instance"), "{{name}} {{instance}}")),
            timeline("Health checks", 8, "The checks of the health registry. Normal: pass. A check that fails can make the instance not ready.",
                [("unknown", GRAY), ("pass", GREEN), ("fail", RED)],
                query(state_number("health_check_state", ["unknown", "pass", "fail"], "check, instance", process), "{{check}} {{instance}}")),
            timeline("Phase of the lifecycle", 8, "The phase of each process. Normal: ready. Stopping ends within the drain timeout, 20 s by default.",
                phases, query(f"max by (instance) ({' or '.join(phase_terms)})", "{{instance}}")),
            timeline("Readiness", 8, "Whether the readiness route of each process responds with success. Normal: ready.",
                [("not ready", RED), ("ready", GREEN)], query(f"max by (instance) ({process('health_ready')})", "{{instance}}")),
            series("Probe results", 4, "ops",
                "Health probes by result. Normal: pass, or spared if calls already proved the upstream healthy.",
                query(rate(layer("probe_runs_total"), "name, result"), "{{name}} {{result}}"), stack=True),
            series("Duration of probes", 4, "s",
                "The duration of the last probe. Normal: far below its timeout.",
                query(f"max by (name) ({layer('probe_last_duration_seconds')})")),
            series("Timeouts by phase", 8, "reqps",
                "Calls that a timeout or a deadline ended. Normal: few. The phase states which part of the call was too long.",
                query(rate(layer("timeouts_total"), "name, layer, phase"), "{{name}} {{layer}} {{phase}}"), stack=True),
        ]),
    ]  # fmt: skip


def layout() -> list[dict]:
    """Returns the rows and panels with their ids and positions."""
    placed, y = [], 0

    def place(item: dict, x: int, y: int) -> None:
        position = {"x": x, "y": y, **item["gridPos"]}
        placed.append({"id": len(placed) + 1, **item, "gridPos": position})

    for title, panels in rows():
        place({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": WIDTH, "h": 1}}, 0, y)
        x, y = 0, y + 1
        for item in panels:
            width = item["gridPos"]["w"]
            if x + width > WIDTH:
                x, y = 0, y + HEIGHT
            place(item, x, y)
            x += width
        y += HEIGHT
    return placed


def variable(name: str, label: str, values: str) -> dict:
    return {
        "type": "query", "name": name, "label": label, "datasource": DATASOURCE, "definition": values,
        "query": {"query": values, "refId": name}, "refresh": 2, "sort": 1, "multi": True, "includeAll": True,
        "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}, "options": [], "regex": "", "hide": 0,
    }  # fmt: skip


def dashboard() -> dict:
    panels = layout()
    kinds = sorted({item["type"] for item in panels} - {"row"})
    openings = layer("breaker_transitions_total", 'state="open"')
    return {
        "__inputs": [
            {"name": "DS_PROMETHEUS", "label": "Prometheus", "description": "The data source with the metrics.",
             "type": "datasource", "pluginId": "prometheus", "pluginName": "Prometheus"},
        ],
        "__requires": [
            {"type": "grafana", "id": "grafana", "name": "Grafana", "version": "12.0.0"},
            {"type": "datasource", "id": "prometheus", "name": "Prometheus", "version": "1.0.0"},
            *[{"type": "panel", "id": kind, "name": kind, "version": ""} for kind in kinds],
        ],
        "uid": "buttress",
        "title": "buttress",
        "description": "Circuit breakers, retries, limits, connections and health of the layers of this crate.",
        "tags": ["buttress"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "",
        "links": [],
        "annotations": {"list": [
            {"name": "circuit opened", "enable": True, "hide": False, "iconColor": RED, "datasource": DATASOURCE,
             "expr": f"sum by (name, instance) (changes({openings}[1m])) > 0", "step": "60s",
             "titleFormat": "circuit {{name}} opened", "textFormat": "{{instance}}", "useValueForTime": False},
        ]},
        "templating": {"list": [
            {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "refresh": 1,
             "multi": False, "includeAll": False, "current": {"text": "Prometheus", "value": "${DS_PROMETHEUS}"},
             "options": [], "regex": "", "hide": 0},
            variable("job", "Job", "label_values(buttress_build_info, job)"),
            variable("instance", "Instance", 'label_values(buttress_build_info{job=~"$job"}, instance)'),
            variable("name", "Layer name", f'label_values({{__name__=~"buttress_.+",{PROCESS}}}, name)'),
        ]},
        "panels": panels,
    }  # fmt: skip


def main() -> int:
    text = json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"
    if sys.argv[1:] == ["--check"]:
        if not PATH.exists() or PATH.read_text() != text:
            print("dashboard.json differs from dashboard.py: run observability/dashboard.py", file=sys.stderr)
            return 1
        return 0
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    PATH.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
