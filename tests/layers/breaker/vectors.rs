//! Sequences from the tests and documents of other circuit breakers, replayed against this one.
//!
//! Behaviour that some of them do not share: thresholds and deadlines are inclusive; a cancelled or ignored call is
//! neutral; probes decide as soon as the result is certain; rules are evaluated when a call fails or is slow; 429 is
//! not a failure; the open time is above zero.

use std::{collections::BTreeSet, time::Duration};

use buttress::breaker::Isolation;
use serde_json::Value;
use tokio::time::{Instant, advance};

use super::fixtures::*;
use crate::support::{empty, status};

/// Why a vector is not replayed.
const NOT_OURS: [(&str, &str); 21] = [
    ("envoy-admission-01", "a client throttle, not a breaker"),
    ("finagle-nack-01", "a client throttle, not a breaker"),
    ("sre-throttle-01", "a client throttle, not a breaker"),
    ("finagle-accrual-05", "a default: 80 % over an EWMA of 30 s; windows are exact here"),
    ("linkerd-breaker-unified-04", "429 is a failure there; here it is `Throttled`"),
    ("linkerd-breaker-unified-02", "429 is a failure there; here it is `Throttled`"),
    ("r4j-cb-01", "a success trips there; rules are evaluated on failures and slow calls here"),
    ("r4j-cb-09", "decides when all probes have ended; here as soon as the result is certain"),
    ("r4j-cb-14", "decides when all probes have ended; here as soon as the result is certain"),
    ("r4j-cb-20", "leaves half-open without a call; here only a probe in flight times out"),
    ("gobreaker-04", "its counts are cleared every 30 s; windows slide here"),
    ("r4j-cb-07", "forced open until a date; here until the next operation of the handle"),
    ("r4j-cb-18", "never changes state in metrics-only mode; shadow mode does, and never rejects"),
    ("r4j-cb-19", "events for exceeded rates in metrics-only mode; shadow mode has transitions"),
    ("fsgo-cb-19", "failures per time, and an open time of zero; here ratios, and above zero"),
    ("opossum-05", "warm-up by time; `min_calls` has this purpose here"),
    ("fsgo-compose-04", "an inner retry; see the tests of stacks"),
    ("fsgo-compose-02", "an outer retry; see the tests of stacks"),
    ("fsgo-cb-16", "half-open has its own window there; probes are counted here"),
    ("fsgo-win-04", "a coefficient of variation: for limits"),
    ("fsgo-win-03", "a moving maximum: for limits"),
];

/// Returns the layer for the configuration of a vector.
fn layer(id: &str) -> CircuitBreakerLayer {
    let new = CircuitBreakerLayer::new;
    let run = |failures, open_ms| new(Trip::consecutive(failures)).open_for(ms(open_ms));
    let of = |needed, probes| run(1, 5000).half_open_of(needed, probes);
    let calls = |ratio, over| new(Trip::failure_ratio(ratio).over(over).min_calls(over));
    let time = |ratio, within, min| new(Trip::failure_ratio(ratio).within(within).min_calls(min));
    let only_counts = |within| time(1.0, within, u32::MAX);
    let backs_off = |failures, first, most| {
        run(failures, 1).open_for(OpenDuration::backoff(ms(first), ms(most)).jitter(0.0))
    };
    let slow = || Trip::any([Trip::failure_ratio(0.5), Trip::slow_ratio(0.5, secs(4))]);
    match id {
        "finagle-accrual-01" => run(3, 5000),
        "linkerd-breaker-consec-01" => backs_off(2, 1000, 100_000),
        "linkerd-breaker-unified-08" => run(3, 1000),
        "linkerd-breaker-wedge-01" => run(1, 1000),
        "linkerd-breaker-unified-03" => {
            let ratio = Trip::failure_ratio(0.2).min_calls(3);
            new(Trip::any([Trip::consecutive(3), ratio]))
        }
        "window-burst-01" => only_counts(secs(100)),
        "fsgo-cb-02" => run(3, 1000),
        "fsgo-cb-03" => calls(2.0 / 3.0, 3),
        "fsgo-cb-04" => calls(0.75, 4),
        "fsgo-cb-05" => run(2, 1000),
        "r4j-cb-25" => run(1, 2000),
        "fsgo-cb-08" => of(2, 3),
        "fsgo-cb-10" | "fsgo-cb-18" => of(3, 3),
        "fsgo-cb-11" | "fsgo-cb-12" => of(3, 4),
        "fsgo-cb-13" => of(2, 4),
        "fsgo-cb-15" => of(2, 2),
        "opossum-01" | "opossum-04" => run(1, 100),
        "opossum-03" => time(0.01, ms(300), 2).open_for(ms(300)),
        "polly-cb-05" | "polly-cb-08" | "cockatiel-05" => run(1, 5000),
        "r4j-cb-13" => of(3, 4),
        "cockatiel-03" => run(2, 1000).half_open(2).half_open_queue(9, secs(9)),
        "r4j-cb-23" | "r4j-cb-02" => time(0.5, secs(20), 5),
        "cockatiel-04" => backs_off(2, 1000, 2000),
        "failsafe-rs-01" => backs_off(3, 5000, 300_000),
        "recloser-04" => backs_off(1, 1000, 5000),
        "r4j-cb-03" | "r4j-cb-04" => new(slow().within(secs(20)).min_calls(5)),
        "polly-cb-02" => calls(0.1, 1),
        "fsgo-win-02" => calls(1.0, 100),
        "failsafe-rs-05" => only_counts(secs(3)),
        "fsgo-win-01" => only_counts(secs(4)),
        "polly-win-01" | "polly-win-02" => only_counts(secs(10)),
        _ => panic!("{id}: neither replayed nor listed in NOT_OURS"),
    }
}

// ===== The replay =====

struct Replay {
    id: String,
    rig: Rig,
    began: Instant,
    /// The calls in flight, each with the name that the vector gives it, if any.
    under_way: Vec<(Value, Call, usize)>,
    isolations: Vec<(Value, Isolation)>,
    straggler: Option<(Call, usize)>,
}

/// Normalises the event names of the vectors: some name operations, others use phrases.
fn op(event: &Value) -> (String, u64) {
    let n = event["n"].as_u64().unwrap_or(1);
    let Some(said) = event.as_str() else {
        return (event["op"].as_str().expect("an operation").into(), n);
    };
    let (n, said) = match said.split_once("x ") {
        Some((n, said)) if n.parse::<u64>().is_ok() => (n.parse().unwrap(), said),
        _ => (n, said),
    };
    let op = match said {
        "502" | "fail" => "failure",
        "200" => "success",
        "tick" => "observe",
        "admit probe" => "begin",
        "probe 502" => "end_last_fail",
        "probe 200" => "end_last_ok",
        said => said,
    };
    (op.into(), n)
}

fn pattern(event: &Value, i: u64) -> bool {
    match event["success_if"].as_str().expect("a pattern") {
        "i%3==0" => i % 3 == 0,
        "i%5==0" => i % 5 == 0,
        other => panic!("{other}"),
    }
}

impl Replay {
    fn new(id: &str) -> Self {
        let rig = Rig::new(layer(id));
        // A call that is admitted before the first step. Only one vector uses it.
        let straggler = (id == "linkerd-breaker-consec-01").then(|| rig.hold());
        let (under_way, isolations) = (Vec::new(), Vec::new());
        Self { id: id.into(), rig, began: Instant::now(), under_way, isolations, straggler }
    }

    async fn until(&self, at: Duration) {
        advance(at.saturating_sub(self.began.elapsed())).await;
    }

    /// Makes a call and leaves it in flight. Returns whether it was admitted.
    fn begin(&mut self, name: &Value) -> Option<bool> {
        let number = self.rig.watch.seen().calls;
        let mut call = self.rig.ask();
        let pending = call.poll().is_pending();
        let went = self.rig.watch.seen().calls > number;
        if pending {
            self.under_way.push((name.clone(), call, number));
        }
        Some(went)
    }

    fn end(&mut self, at: usize, good: bool) {
        let (_, mut call, number) = self.under_way.remove(at);
        self.rig.watch.end(number, Ok(if good { empty() } else { status(502) }));
        assert!(call.poll().is_ready(), "{}", self.id);
    }

    async fn step(&mut self, step: &Value) {
        let event = &step["event"];
        let (op, n) = op(event);
        let took = ms(event["duration_ms"].as_u64().unwrap_or(0));
        self.until(ms(step["at_ms"].as_u64().unwrap_or(0)).saturating_sub(took)).await;
        let mut permitted = None;
        for i in 0..n {
            match op.as_str() {
                "success" | "failure" if !took.is_zero() => {
                    let then = if op == "success" { Ok(()) } else { Err(Oops("down")) };
                    self.rig.takes(took, then).await;
                }
                "success" => self.rig.ok().await,
                "failure" => self.rig.fail().await,
                "filtered_error" => {
                    let code = event["status"].as_u64().unwrap() as u16;
                    assert!(self.rig.call(Then::Answer(status(code))).await);
                }
                "pattern" if pattern(event, i) => self.rig.ok().await,
                "pattern" => self.rig.fail().await,
                "add" => {
                    for _ in 0..event["value"].as_u64().unwrap() {
                        self.rig.fail().await;
                    }
                }
                "acquire" | "begin" => permitted = self.begin(&event["id"]),
                "release" => drop(self.under_way.pop().expect("a call in flight")),
                "end" => {
                    let at = self.under_way.iter().position(|(id, ..)| *id == event["id"]);
                    self.end(at.expect("in flight"), event["outcome"] == "success");
                }
                "end_last_ok" | "end_last_fail" => {
                    if self.under_way.is_empty() {
                        assert_eq!(self.begin(&Value::Null), Some(true));
                    }
                    self.end(self.under_way.len() - 1, op == "end_last_ok");
                }
                "straggler 200 while open" => {
                    let (mut call, number) = self.straggler.take().expect("one straggler");
                    self.rig.watch.end(number, Ok(empty()));
                    assert!(call.poll().is_ready());
                }
                "probe admitted, caller drops the future before headers" => drop(self.rig.hold()),
                "half_open" => self.rig.handle.half_open(),
                "force" => self.force(event).await,
                "dispose" => self.isolations.retain(|(handle, _)| *handle != event["handle"]),
                "reset" => self.rig.handle.reset(),
                "observe" => {}
                other => panic!("{}: {other}", self.id),
            }
        }
        self.check(step, permitted);
    }

    async fn force(&mut self, event: &Value) {
        match event["to"].as_str().unwrap() {
            "open" => self.rig.fail().await,
            "half_open" => self.rig.handle.half_open(),
            "closed" => self.rig.handle.reset(),
            "isolated" if event["handle"].is_null() => self.rig.handle.force_open(),
            "isolated" => {
                self.isolations.push((event["handle"].clone(), self.rig.handle.isolate()));
            }
            other => panic!("{}: {other}", self.id),
        }
    }

    fn check(&mut self, step: &Value, permitted: Option<bool>) {
        let id = format!("{} at {step}", self.id);
        let seen = self.rig.handle.snapshot();
        let expect = &step["expect"];
        if let Some(state) = expect["state"].as_str().or(step["expect_state"].as_str()) {
            let state = if state == "isolated" { "forced_open" } else { state };
            assert_eq!(seen.state.as_str(), state, "{id}");
        }
        if let Some(expected) = expect["permitted"].as_bool() {
            assert_eq!(permitted, Some(expected), "{id}");
        }
        let numbers = [
            ("buffered", seen.seen.window_calls),
            ("requests", seen.seen.window_calls),
            ("sum", seen.seen.window_calls),
            ("failed", seen.seen.window_failures),
            ("successful", seen.seen.window_calls - seen.seen.window_failures),
            ("slow_calls", seen.seen.window_slow),
        ];
        for (field, is) in numbers {
            if let Some(expected) = expect[field].as_u64() {
                assert_eq!(is, expected, "{id}: {field}");
            }
        }
        if let Some(dead) = step["expect_dead_ms"].as_u64() {
            assert_eq!(seen.open_for, Some(ms(dead)), "{id}");
        }
        if let Some(permits) = step["expect_permits"].as_u64() {
            assert_eq!(1 - seen.probes as u64, permits, "{id}");
        }
        if step["expect_reason"] == "consecutive_failures" {
            assert!(matches!(seen.last_trip, Some(TripReason::Consecutive { .. })), "{id}");
        }
        if step["required_behaviour"].is_string() {
            drop(self.rig.hold());
        }
        if expect["queued"] == true {
            assert_eq!((permitted, self.under_way.len()), (Some(false), 3), "{id}");
        }
        if !expect["started"].is_null() {
            let before = self.rig.watch.seen().calls;
            let (name, call, _) = self.under_way.last_mut().expect("a waiting call");
            assert_eq!(*name, expect["started"], "{id}");
            assert!(call.poll().is_pending());
            assert_eq!(self.rig.watch.seen().calls, before + 1, "{id}");
        }
    }
}

/// Runs a step of a vector whose steps are independent cases.
async fn case(id: &str, step: &Value) -> bool {
    let replay = || Replay::new(id);
    let (event, number) = (&step["event"], |name: &str| step["event"][name].as_f64().unwrap());
    match op(event).0.as_str() {
        "open_wait" => {
            let rig = replay().rig;
            for flaps in 0..=event["flaps"].as_u64().unwrap() {
                advance(rig.handle.snapshot().open_for.unwrap_or_default()).await;
                rig.fail().await;
                assert_eq!(rig.handle.snapshot().opened, flaps + 1);
            }
            let wait = step["expect"]["wait_ms"].as_u64().unwrap();
            assert_eq!(rig.handle.snapshot().open_for, Some(ms(wait)), "{id}: {step}");
        }
        "evaluate" => {
            let calls = number("throughput") as u32;
            let trip =
                Trip::failure_ratio(number("threshold")).min_calls(number("min_throughput") as u32);
            let rig = Rig::new(CircuitBreakerLayer::new(trip));
            let failures = (number("rate") * f64::from(calls)).round() as u32;
            for n in 0..calls {
                if rig.state() == CircuitState::Closed {
                    if n < calls - failures { rig.ok().await } else { rig.fail().await }
                }
            }
            let open = rig.state() == CircuitState::Open;
            assert_eq!(Some(open), step["expect"]["trip"].as_bool(), "{id}: {step}");
        }
        "1000 consecutive failures" => {
            let rig = replay().rig;
            for _ in 0..100 {
                rig.ok().await;
            }
            for _ in 0..1000 {
                rig.fail().await;
                advance(Duration::from_micros(step["spacing_us"].as_u64().unwrap())).await;
            }
            let seen = rig.handle.snapshot().seen;
            let good = 1.0 - seen.window_failures as f64 / seen.window_calls as f64;
            assert!((good - step["expect_window_rate"].as_f64().unwrap()).abs() < 1e-4, "{good}");
        }
        _ => return false,
    }
    true
}

#[tokio::test(start_paused = true)]
async fn every_vector_is_replayed_or_listed() {
    let vectors: Value = serde_json::from_str(include_str!("../vectors/breaker.json")).unwrap();
    let vectors = vectors.as_array().expect("a list");
    let mut listed: BTreeSet<_> = NOT_OURS.iter().map(|(id, _)| *id).collect();
    let mut replayed = 0;
    for vector in vectors {
        let id = vector["id"].as_str().expect("an id");
        if listed.remove(id) {
            continue;
        }
        replayed += 1;
        let mut replay = Replay::new(id);
        for step in vector["steps"].as_array().expect("steps") {
            if !case(id, step).await {
                replay.step(step).await;
            }
        }
    }
    assert!(listed.is_empty(), "listed, but not in the vectors: {listed:?}");
    assert_eq!(replayed + NOT_OURS.len(), vectors.len());
}
