//! Vectors from the tests and specifications of other systems, for backoffs, budgets, hints and hedges.
//!
//! `vectors/retry.json` contains the vectors, each with its source. Each vector is replayed here, or is listed in
//! [`NOT_OURS`] with the reason.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    io,
    time::Duration,
};

use buttress::{
    BoxError, Deadline, DeadlineLayer, HedgeLayer, Outcome, RetryLayer,
    outcome::Reason,
    retry::{Attempts, Backoff, FailureKind, GiveUpReason, ReplayBody, RetryBudget, RetryPreset},
};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

// ===== The vectors =====

/// The vectors that do not apply, each with the reason.
const NOT_OURS: &[(&str, &str)] = &[
    ("backon-02", "jitter above the delay and its cap; here no delay exceeds its maximum"),
    ("urllib3-03", "jitter above the delay, as backon-02"),
    ("envoy-backoff-01", "documentation drift: Envoy's code doubles, 25, 50, 100, 200 ms"),
    ("envoy-backoff-02", "how Envoy reduces a random number, not which delays are possible"),
    ("envoy-backoff-05", "as envoy-backoff-02"),
    ("grpc-a6-hedge-03", "here no hedge attempt is sent after a response"),
    ("grpc-a6-hedge-05", "a hedge delay of 0 is a configuration error here"),
    ("tower-budget-03", "a reserve of 100; here it is 10, and 1 per second"),
    ("fsgo-budget-01", "a share of the active calls; see envoy-retrybudget-03"),
    (
        "linkerd-peektrailers-01",
        "the layer waits for one frame; after a message the caller has the response",
    ),
    ("smithy-v21-longpoll-01", "a response is never delayed"),
    ("urllib3-05", "hints are clamped at 300 s; the three dates are tested where they are parsed"),
    ("envoy-resetheader-07", "decimals are accepted and rounded up to the next millisecond"),
    ("envoy-resetheader-06", "a reset below 10⁹ is a number of seconds here, not a time"),
    ("tenacity-02", "stop rules are combined by or, never by and"),
    ("sim-hedge-01", "tested with a heavy tail, in the tests of the hedge layer"),
];

fn vectors() -> Vec<Value> {
    serde_json::from_str(include_str!("../vectors/retry.json")).unwrap()
}

#[tokio::test(start_paused = true)]
async fn every_retry_vector_is_replayed_or_listed() {
    let (mut ours, mut ids) = (0, BTreeSet::new());
    for vector in vectors() {
        let id = vector["id"].as_str().unwrap().to_owned();
        assert!(
            vector["source"].as_str().is_some_and(|source| !source.is_empty()),
            "{id} has no source"
        );
        let known = NOT_OURS.iter().any(|(not_ours, _)| *not_ours == id);
        if !known {
            replay(&id, &vector).await;
            ours += 1;
        }
        assert!(ids.insert(id), "ids are unique");
    }
    for (id, _) in NOT_OURS {
        assert!(ids.contains(*id), "{id} is not among the vectors");
    }
    assert_eq!(ours + NOT_OURS.len(), ids.len());
    println!("{ours} of {} replayed", ids.len());
    assert!(ours >= 58);
}

async fn replay(id: &str, vector: &Value) {
    let (config, steps) = (&vector["config"], vector["steps"].as_array().unwrap());
    match id {
        "backon-01" | "fsgo-retry-01" | "polly-backoff-04" => exact_waits(config, steps),
        "polly-backoff-01" | "polly-backoff-03" | "r4j-backoff-01" => {
            jitter_around(config, steps);
        }
        "tenacity-06" | "urllib3-01" | "urllib3-02" => own_waits(id, config, steps).await,
        "smithy-v20-02" | "smithy-v20-04" => bucket(id, config, steps).await,
        "smithy-v20-01" | "smithy-v21-01" | "smithy-v21-02" => aws(id, config, steps).await,
        "smithy-v20-retryafter-01" => {
            let layer = exact(Backoff::constant(Duration::ZERO), 1)
                .max_hint_extension(Duration::from_secs(3600))
                .max_wait(ms(&config["max_backoff_ms"]));
            hint_of(id, layer, &steps[0]).await;
        }
        "grpc-a6-pushback-01" => pushback_exact(steps).await,
        "grpc-a6-throttle-01" => throttle(config, steps).await,
        "grpc-a6-throttle-04" => throttle_recovers(config, steps),
        "grpc-a6-transparent-01" => transparent(config, steps).await,
        "envoy-backoff-06" => envoy_hint(config, steps).await,
        "retryafter-herd-01" => herd(config, steps).await,
        "fsgo-retry-03" => too_long(config, &steps[0]).await,
        "tenacity-03" => before_the_deadline(steps).await,
        "grpc-timeout-04" | "grpc-timeout-06" | "grpc-timeout-07" | "grpc-timeout-08" => {
            grpc_timeout(id, &steps[0]).await;
        }
        "smithy-v21-retryafter-01" | "smithy-v21-retryafter-02" | "smithy-v21-retryafter-03" => {
            reach(id, config, &steps[0]).await;
        }
        "envoy-resetheader-04" => reset_at(id, &steps[0]).await,
        "grpc-a6-attempt-header-01" => attempt_header(steps).await,
        "polly-backoff-07" => bounded(id, config, steps),
        "tenacity-08" => full_jitter(steps),
        "fsgo-retry-02"
        | "fsgo-retry-04"
        | "polly-retry-01"
        | "r4j-retry-02"
        | "tenacity-10"
        | "smithy-dynamo-v21-01" => whole_run(id, config, &steps[0]).await,
        "grpc-a6-validate-01" => limits_of_a_throttle(steps),
        "grpc-a6-hedge-04" => a_hedges_answer_ends_it(config, steps).await,
        "envoy-retrybudget-03" => failing_together(config),
        "fsgo-compose-06" => retry_over_hedge(&steps[0]["expect"]).await,
        "fsgo-hedge-02" => live_percentile(config, steps).await,
        "polly-hedge-04" => no_hedge_after_an_error().await,
        "linkerd-replay-01" | "linkerd-replay-03" => cap_of_bodies(config).await,
        "finagle-budget-02" | "finagle-budget-03" | "finagle-budget-04" | "finagle-budget-05" => {
            budget(id, config, &steps[0]);
        }
        "grpc-a6-pushback-parse-04" => {
            let value = steps[0]["value"].as_str().unwrap().to_owned();
            let ran = run(RetryLayer::grpc(), Method::POST, |_| grpc("14", Some(&value))).await;
            assert_eq!((ran.calls(), ran.told.stop), (1, GiveUpReason::Pushback), "{id}");
        }
        "linkerd-retryafter-01" | "linkerd-retryafter-04" | "linkerd-retryafter-06" => {
            retry_after(id, &steps[0]).await;
        }
        "urllib3-07" => connect_errors(steps).await,
        "urllib3-08" => predicate(steps).await,
        other => panic!("{other} is neither replayed nor listed"),
    }
}

// ===== A run of the layer =====

type Answer = Result<Response<Empty<Bytes>>, BoxError>;

struct Ran {
    /// The time of each attempt, in milliseconds since the start.
    at: Vec<u64>,
    told: Attempts,
}

impl Ran {
    fn calls(&self) -> usize {
        self.at.len()
    }

    fn waits(&self) -> Vec<u64> {
        self.at.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

fn status(status: u64) -> Answer {
    let status = u16::try_from(status).unwrap();
    Ok(Response::builder().status(status).body(Empty::new()).unwrap())
}

fn grpc(code: &str, pushback: Option<&str>) -> Answer {
    let mut answer =
        Response::builder().header("content-type", "application/grpc").header("grpc-status", code);
    if let Some(pushback) = pushback {
        answer = answer.header("grpc-retry-pushback-ms", pushback);
    }
    Ok(answer.body(Empty::new()).unwrap())
}

async fn run(layer: RetryLayer, method: Method, answer: impl Fn(usize) -> Answer) -> Ran {
    send(layer, method, Full::from(""), answer).await
}

async fn send<B>(
    layer: RetryLayer,
    method: Method,
    body: B,
    answer: impl Fn(usize) -> Answer,
) -> Ran
where
    B: Body<Data = Bytes, Error: std::fmt::Debug> + Unpin,
{
    let (start, at) = (Instant::now(), RefCell::new(Vec::new()));
    let (at_ref, answer) = (&at, &answer);
    let upstream = service_fn(move |request: Request<ReplayBody<B>>| async move {
        let n = at_ref.borrow().len();
        at_ref.borrow_mut().push(u64::try_from(start.elapsed().as_millis()).unwrap());
        request.into_body().collect().await.map_err(|_| "the body")?;
        answer(n)
    });
    let request = Request::builder().method(method).body(body).unwrap();
    let told = match layer.layer(upstream).oneshot(request).await {
        Ok(response) => Attempts::of(&response),
        Err(error) => Attempts::find(&*error).unwrap(),
    };
    Ran { at: at.into_inner(), told }
}

/// Returns a layer without jitter, with this number of retries.
fn exact(backoff: Backoff, retries: u64) -> RetryLayer {
    let attempts = u32::try_from(retries).unwrap() + 1;
    let backoff = backoff.without_jitter();
    let layer = RetryLayer::http().attempts(attempts).max_wait(Duration::from_secs(3600));
    layer.backoff(backoff).without_budget().checked().unwrap()
}

/// Returns a budget with this balance, which gains nothing over time.
fn purse(retries: u64) -> RetryBudget {
    let budget = RetryBudget::with(0.001, 0, u32::try_from(retries).unwrap());
    (0..retries * 1000).for_each(|_| budget.deposit());
    budget
}

fn ms(value: &Value) -> Duration {
    Duration::from_millis(value.as_u64().unwrap())
}

/// Returns the first of these fields that exists.
fn field<'a>(config: &'a Value, names: &[&str]) -> &'a Value {
    names.iter().map(|name| &config[name]).find(|value| !value.is_null()).unwrap_or(&Value::Null)
}

fn backoff(config: &Value) -> Backoff {
    let base = ms(field(config, &["min_ms", "initial_ms", "base_ms", "wait_ms", "delay_ms"]));
    let backoff = match config["kind"].as_str() {
        Some("linear") => Backoff::linear(base, base),
        Some("exponential") => {
            Backoff::exponential(base).factor(config["factor"].as_f64().unwrap())
        }
        _ if config["base_ms"].is_u64() => Backoff::exponential(base),
        _ => Backoff::constant(base),
    };
    match field(config, &["max_ms"]) {
        Value::Null => backoff.max(Duration::from_secs(3600)),
        max => backoff.max(ms(max)),
    }
}

// ===== Backoffs =====

fn exact_waits(config: &Value, steps: &[Value]) {
    let mut delays = backoff(config).without_jitter().delays();
    let mut most = config["max_times"].as_u64().unwrap_or(u64::MAX);
    for step in steps {
        if most == 0 {
            // In this crate the number of attempts ends the retries, and the series of delays does not.
            assert!(step["expect"]["delay"].is_null());
            return;
        }
        assert_eq!(delays.next(), Some(ms(&step["expect"]["delay_ms"])), "{step}");
        most -= 1;
    }
}

fn bounded(id: &str, config: &Value, steps: &[Value]) {
    let (base, max) = (ms(&config["base_ms"]), ms(&config["max_ms"]));
    let waits: Vec<_> = Backoff::decorrelated(base).max(max).delays().take(1025).collect();
    for step in steps {
        let attempt = usize::try_from(step["event"]["attempt"].as_u64().unwrap()).unwrap();
        let wait = waits[attempt - 1];
        assert!(wait > Duration::ZERO && wait <= ms(&step["expect"]["max_ms"]), "{id}: {wait:?}");
    }
}

fn full_jitter(steps: &[Value]) {
    const DRAWS: u32 = 4000;
    let backoff = Backoff::exponential(Duration::from_millis(500)).max(Duration::from_secs(60));
    let series = |seed| backoff.seed(seed).delays().take(steps.len()).collect::<Vec<_>>();
    let all: Vec<Vec<Duration>> = (0..u64::from(DRAWS)).map(series).collect();
    for (n, step) in steps.iter().enumerate() {
        let waits = || all.iter().map(|waits| waits[n]);
        assert!(waits().all(|wait| wait <= ms(&step["expect"]["max_ms"])), "{step}");
        let mean = waits().sum::<Duration>().as_secs_f64() / f64::from(DRAWS);
        let expected = ms(&step["expect"]["mean_ms"]).as_secs_f64();
        assert!((mean / expected - 1.0).abs() < 0.08, "{step}: {mean} s");
    }
}

/// The random number of a step is a share of the range from which the delay is drawn.
fn jitter_around(config: &Value, steps: &[Value]) {
    let (base, share) = match config["jitter"].as_str() {
        Some("+-25%") => (ms(&config["base_ms"]), 0.25),
        _ => (ms(&config["delay_ms"]), 0.5),
    };
    let shape = match config["kind"].as_str() {
        Some("linear") => Backoff::linear(base, base),
        _ => Backoff::constant(base),
    };
    let backoff = shape.max(Duration::from_secs(3600)).jitter_around(share);
    for step in steps {
        let event = &step["event"];
        // A count from 0 is the number of earlier retries.
        let origin = config["attempt_origin"].as_u64().map_or(1, |origin| origin);
        let nth = usize::try_from(event["attempt"].as_u64().unwrap() - origin).unwrap();
        let draw = |seed| backoff.seed(seed).delays().nth(nth).unwrap();
        let waits: Vec<_> = (0..4000).map(draw).collect();
        let (least, most) = (*waits.iter().min().unwrap(), *waits.iter().max().unwrap());
        let expect = &step["expect"];
        let (told, rand) = match event["rand"].as_f64() {
            Some(rand) => (ms(&expect["delay_ms"]), rand),
            None => {
                assert!(least >= ms(&expect["min_ms"]) && most <= ms(&expect["max_ms"]), "{step}");
                continue;
            }
        };
        let at = least + (most - least).mul_f64(rand);
        let off = at.abs_diff(told).as_secs_f64() / told.as_secs_f64();
        assert!(off < 0.01, "{step}: {at:?}");
    }
}

/// Backoffs that `Backoff` does not support are iterators that adapt its delays.
async fn own_waits(id: &str, config: &Value, steps: &[Value]) {
    let longest = Duration::from_secs(10_000_000);
    let waits: Vec<Duration> = if id == "tenacity-06" {
        let base = Duration::from_secs(config["multiplier_s"].as_u64().unwrap());
        let floor = ms(&config["min_ms"]);
        let delays = Backoff::exponential(base).max(longest).without_jitter().delays();
        delays.map(|wait| wait.max(floor)).take(20).collect()
    } else {
        let base = Duration::from_secs_f64(2.0 * config["factor_s"].as_f64().unwrap());
        let max = Duration::from_secs(config["max_s"].as_u64().unwrap());
        let delays = Backoff::exponential(base).max(max).without_jitter().delays();
        std::iter::once(Duration::ZERO).chain(delays).take(20).collect()
    };
    let own = waits.clone();
    let layer = exact(Backoff::default(), 20).max_wait(longest);
    let ran =
        run(layer.backoff_with(move || own.clone().into_iter()), Method::GET, |_| status(503))
            .await;
    for step in steps {
        let attempt = usize::try_from(step["event"]["attempt"].as_u64().unwrap()).unwrap();
        // Before the first failure there is no delay.
        let Some(nth) = attempt.checked_sub(1) else { continue };
        assert_eq!(ran.waits()[nth], step["expect"]["delay_ms"].as_u64().unwrap(), "{id} {step}");
    }
}

async fn whole_run(id: &str, config: &Value, step: &Value) {
    let outcomes = match step["event"]["outcomes"].as_array() {
        Some(outcomes) => outcomes.iter().map(|o| o.as_str().unwrap().to_owned()).collect(),
        None => step["event"].as_str().unwrap().split(',').map(str::to_owned).collect::<Vec<_>>(),
    };
    let retries = config["max_retries"].as_u64().unwrap_or(outcomes.len() as u64 - 1);
    let layer = match id {
        "tenacity-10" => {
            let waits = [1, 2, 3, 3].map(Duration::from_secs);
            exact(Backoff::default(), retries).backoff_with(move || waits.into_iter())
        }
        "fsgo-retry-04" => exact(Backoff::constant(Duration::ZERO), retries),
        _ => exact(backoff(config), retries),
    };
    let ran = run(layer, Method::GET, |n| match &*outcomes[n] {
        "ok" | "200" => status(200),
        "500" => status(503),
        _ => Err(io::Error::from(io::ErrorKind::ConnectionReset).into()),
    })
    .await;
    assert_eq!(ran.calls(), outcomes.len(), "{id}");
    let expect = &step["expect"];
    if let Some(calls) = field(expect, &["calls", "attempts"]).as_u64() {
        assert_eq!(ran.calls() as u64, calls, "{id}");
    }
    if let Some(waits) = expect["delays_ms"].as_array() {
        let waits: Vec<_> = waits.iter().map(|wait| wait.as_u64().unwrap()).collect();
        assert_eq!(ran.waits(), waits, "{id}");
    }
    if let Some(all) = field(step, &["expect_total_sleep_ms"]).as_u64() {
        assert_eq!(ran.waits().iter().sum::<u64>(), all, "{id}");
    }
    if let Some(all) = expect["slept_ms"].as_u64() {
        assert_eq!(ran.waits().iter().sum::<u64>(), all, "{id}");
    }
}

// ===== Budgets =====

fn budget(id: &str, config: &Value, step: &Value) {
    let budget = RetryBudget::with(config["percent"].as_f64().unwrap(), 0, 10);
    let mut retries = 0;
    for _ in 0..10_000 {
        budget.deposit();
        while let Some(withdrawal) = budget.withdraw() {
            withdrawal.spend();
            retries += 1;
        }
    }
    let expected = step["expect_retries"].as_u64().unwrap();
    assert!(expected.abs_diff(retries) <= step["tolerance"].as_u64().unwrap(), "{id}: {retries}");
}

/// The vectors count tokens. The budget counts retries.
async fn bucket(id: &str, config: &Value, steps: &[Value]) {
    let cost = config["retry_cost"].as_u64().unwrap();
    let purse = purse(config["capacity"].as_u64().unwrap() / cost);
    let retries = config["max_attempts"].as_u64().map_or(99, |attempts| attempts - 1);
    let layer =
        exact(Backoff::exponential(Duration::from_secs(1)).max(Duration::from_secs(20)), retries);
    let ran = run(layer.budget(purse.clone()), Method::GET, |_| status(503)).await;
    let waits: Vec<_> = steps.iter().filter_map(|step| step["expect_delay_ms"].as_u64()).collect();
    assert_eq!(ran.waits(), waits, "{id}");
    let left = steps.last().unwrap()["expect_tokens"].as_u64().unwrap();
    // The call has deposited a thousandth of a retry, unless the budget was full.
    assert_eq!((purse.balance() * cost as f64) as u64, left, "{id}");
}

async fn aws(id: &str, config: &Value, steps: &[Value]) {
    let fails: Vec<_> = steps.iter().filter(|step| step["event"] != "success").collect();
    let code = if steps[0]["event"] == "throttled" { 429 } else { 503 };
    let (mut backoff, mut budget) = (Backoff::aws(), RetryBudget::aws());
    if let Some(base) = config["initial_backoff_ms"].as_u64() {
        backoff = Backoff::exponential(Duration::from_millis(base));
        budget = budget.cost(FailureKind::Status, config["retry_cost"].as_f64().unwrap());
    }
    let tokens = RefCell::new(Vec::new());
    let answer = |n| {
        tokens.borrow_mut().push(budget.balance() as u64);
        status(if n < fails.len() { code } else { 200 })
    };
    let ran = run(exact(backoff, 2).budget(budget.clone()), Method::GET, answer).await;
    let told = |name| fails.iter().map(|step| step[name].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(ran.waits(), told("expect_delay_ms"), "{id}");
    assert_eq!(tokens.borrow()[1..], told("expect_tokens"), "{id}");
    assert_eq!(budget.balance() as u64, steps[fails.len()]["expect_tokens"], "{id}");
}

async fn throttle(config: &Value, steps: &[Value]) {
    let fine: Vec<_> = config["server_ok_attempt_indexes"].as_array().unwrap().to_vec();
    let budget = RetryBudget::grpc(
        u32::try_from(config["max_tokens"].as_u64().unwrap()).unwrap(),
        config["token_ratio"].as_f64().unwrap(),
    );
    let (seen, layer) = (Cell::new(0), RetryLayer::grpc().preset(RetryPreset::Grpc));
    let layer = layer.budget(budget.clone());
    for step in steps {
        let ran = run(layer.clone(), Method::POST, |_| {
            let nth = seen.replace(seen.get() + 1);
            grpc(if fine.iter().any(|index| *index == nth) { "0" } else { "14" }, None)
        })
        .await;
        assert_eq!(ran.calls() as u64, step["attempts"], "{step}");
        assert_eq!(seen.get() - 1, step["expect_last_server_attempt_index"], "{step}");
        assert_eq!(budget.balance(), step["expect_tokens_after"].as_f64().unwrap(), "{step}");
        let denied = ran.told.stop == GiveUpReason::BudgetUsedUp;
        assert_eq!(denied, step["expect_result"] == "UNAVAILABLE", "{step}");
    }
}

/// The vectors permit two to five attempts. This crate does not have these bounds.
fn limits_of_a_throttle(steps: &[Value]) {
    for step in steps {
        let (value, expect) = (&step["value"], &step["expect"]);
        match step["event"].as_str().unwrap() {
            "max_tokens" => {
                assert_eq!(expect, "reject");
                let most = u32::try_from(value.as_u64().unwrap()).unwrap();
                assert_eq!(RetryBudget::grpc(most, 0.1).check().unwrap_err().field, "budget.cap");
                assert!(RetryBudget::grpc(most - 1, 0.1).check().is_ok());
            }
            "token_ratio" => {
                let budget = RetryBudget::grpc(10, value.as_f64().unwrap());
                (0..11).for_each(|_| drop(budget.withdraw()));
                budget.deposit();
                assert_eq!(budget.balance(), expect.as_f64().unwrap());
            }
            other => assert_eq!(other, "max_attempts"),
        }
    }
}

/// A known defect of budgets that are a share of the active calls: calls that fail together lose their retries. A
/// budget with deposits does not have this defect.
fn failing_together(config: &Value) {
    let ratio = config["budget_percent"].as_f64().unwrap() / 100.0;
    let budget = RetryBudget::with(ratio, 0, 100);
    (0..6).for_each(|_| budget.deposit());
    let retries = std::iter::from_fn(|| budget.withdraw().map(|retry| retry.spend())).count();
    assert_eq!(retries, 6);
}

fn throttle_recovers(config: &Value, steps: &[Value]) {
    let most = u32::try_from(config["max_tokens"].as_u64().unwrap()).unwrap();
    let budget = RetryBudget::grpc(most, config["token_ratio"].as_f64().unwrap());
    // The balance falls to 0, but not below.
    (0..=most).for_each(|_| drop(budget.withdraw()));
    assert_eq!(budget.balance(), config["start_tokens"].as_f64().unwrap());
    for step in steps {
        (0..step["count"].as_u64().unwrap()).for_each(|_| budget.deposit());
        assert_eq!(budget.balance(), step["expect_tokens"].as_f64().unwrap());
        // A withdrawal charges a token for its failure first. The test uses a copy of the budget that has one token
        // more.
        let ask = RetryBudget::grpc(most, 0.1);
        let tokens = (budget.balance() * 10.0).round();
        (0..=most).for_each(|_| drop(ask.withdraw()));
        (0..tokens as u64 + 10).for_each(|_| ask.deposit());
        assert_eq!(ask.withdraw().is_some(), step["expect_retry_allowed"].as_bool().unwrap());
    }
}

// ===== Hints, kinds, methods, bodies =====

async fn retry_after(id: &str, step: &Value) {
    let code = step["status"].as_u64().unwrap();
    let answer = |n| {
        let mut answer = status(if n == 0 { code } else { 200 })?;
        let value = step["value"].as_str().unwrap().parse().unwrap();
        answer.headers_mut().insert("retry-after", value);
        Ok(answer)
    };
    let ran = run(exact(Backoff::constant(Duration::ZERO), 1), Method::GET, answer).await;
    assert_eq!(ran.waits(), [step["expect_ms"].as_u64().unwrap()], "{id}");
}

/// The quota is used up and resets at a Unix time. `null` means that the value is invalid.
async fn reset_at(id: &str, step: &Value) {
    let answer = |n| {
        let answer = Response::builder()
            .status(if n == 0 { 429 } else { 200 })
            .header("date", "Sun, 09 Sep 2001 01:46:40 GMT")
            .header("x-ratelimit-remaining", "0")
            .header("x-ratelimit-reset", step["value"].as_str().unwrap());
        Ok(answer.body(Empty::new()).unwrap())
    };
    let ran = run(exact(Backoff::constant(Duration::ZERO), 1), Method::GET, answer).await;
    assert_eq!(ran.waits(), [step["expect_ms"].as_u64().unwrap_or(0)], "{id}");
}

async fn reach(id: &str, config: &Value, step: &Value) {
    let layer = exact(Backoff::constant(ms(&config["t_i_ms"])), 1)
        .max_hint_extension(Duration::from_secs(5));
    hint_of(id, layer, step).await;
}

async fn hint_of(id: &str, layer: RetryLayer, step: &Value) {
    let answer = |n| {
        let mut answer = status(if n == 0 { 503 } else { 200 })?;
        answer
            .headers_mut()
            .insert("retry-after-ms", step["server_delay_ms"].as_u64().unwrap().into());
        Ok(answer)
    };
    let ran = run(layer, Method::GET, answer).await;
    assert_eq!(ran.waits(), [step["expect_delay_ms"].as_u64().unwrap()], "{id}");
}

async fn pushback_exact(steps: &[Value]) {
    for _ in 0..50 {
        let layer = RetryLayer::grpc().preset(RetryPreset::Grpc).without_budget();
        let ran = run(layer, Method::POST, |n| {
            let pushback = steps.get(n).and_then(|step| step["pushback_header"].as_str());
            grpc(if n < steps.len() { "14" } else { "0" }, pushback)
        })
        .await;
        assert_eq!(ran.calls(), 4);
        for (step, wait) in steps.iter().zip(ran.waits()) {
            match step["expect_delay_ms"].as_u64() {
                Some(exact) => assert_eq!(wait, exact),
                // The timers of tokio have a resolution of one millisecond.
                None => assert!(
                    step["expect_delay_min_ms"].as_u64().unwrap() <= wait
                        && wait <= step["expect_delay_max_ms"].as_u64().unwrap() + 1,
                    "{step}: {wait}"
                ),
            }
        }
    }
}

async fn transparent(config: &Value, steps: &[Value]) {
    let (start, at) = (Instant::now(), RefCell::new(Vec::new()));
    let at_ref = &at;
    let upstream = service_fn(move |()| async move {
        at_ref.borrow_mut().push(start.elapsed().as_millis());
        Err::<(), _>("refused")
    });
    let attempts = u32::try_from(config["max_attempts"].as_u64().unwrap()).unwrap();
    let layer = RetryLayer::grpc().preset(RetryPreset::Grpc).attempts(attempts).without_budget();
    let layer = layer
        .backoff(Backoff::constant(Duration::from_millis(100)).without_jitter())
        .classify(|_: Result<&(), &&str>| Outcome::failure().because(Reason::RefusedStream));
    layer.layer(upstream).oneshot(()).await.unwrap_err();
    let (at, mut charged, mut due) = (at.into_inner(), 0, 0);
    for (nth, step) in steps.iter().enumerate() {
        due += if step["expect_retry"] == "immediate" { 0 } else { 100 };
        assert!(at[nth + 1].abs_diff(due) <= nth as u128, "{step}: {at:?}");
        charged += step["expect_attempts_charged"].as_u64().unwrap();
    }
    // One attempt for each step, after the first attempt. All attempts but the first are charged, except for
    // transparent retries.
    assert_eq!((at.len(), charged), (steps.len() + 1, u64::from(attempts) - 1));
}

/// The jitter is up to half of the hint. Envoy reduces its random numbers to this range.
async fn envoy_hint(config: &Value, steps: &[Value]) {
    let hint = config["reset_header_ms"].as_u64().unwrap();
    for _ in 0..100 {
        let layer = RetryLayer::http().preset(RetryPreset::Envoy).without_budget();
        let ran = run(layer, Method::GET, |n| {
            let mut answer = status(if n == 0 { 503 } else { 200 })?;
            answer.headers_mut().insert("retry-after-ms", hint.into());
            Ok(answer)
        })
        .await;
        let told = steps.iter().map(|step| step["expect_ms"].as_u64().unwrap());
        let (least, most) = (hint, told.max().unwrap());
        // The timers of tokio have a resolution of one millisecond.
        assert!(least <= ran.waits()[0] && ran.waits()[0] <= most + 2, "{:?}", ran.waits());
    }
}

/// Checks the number of clients that return within the same interval.
async fn herd(config: &Value, steps: &[Value]) {
    let (clients, stretch) = (config["clients"].as_u64().unwrap(), &config["bucket_ms"]);
    let hint = config["retry_after_s"].as_u64().unwrap();
    for (step, jitter) in steps.iter().zip([false, true]) {
        let mut buckets = std::collections::BTreeMap::<u64, u64>::new();
        for _ in 0..clients {
            let backoff = Backoff::constant(Duration::ZERO);
            let backoff = if jitter { backoff } else { backoff.without_jitter() };
            let layer = RetryLayer::http().backoff(backoff);
            let ran = run(layer, Method::GET, |n| {
                let mut answer = status(if n == 0 { 503 } else { 200 })?;
                answer.headers_mut().insert("retry-after", hint.into());
                Ok(answer)
            })
            .await;
            assert!(ran.waits()[0] >= hint * 1000, "the hint is a lower bound");
            *buckets.entry(ran.waits()[0] / stretch.as_u64().unwrap()).or_default() += 1;
        }
        let peak = *buckets.values().max().unwrap();
        match step["expect_peak"].as_u64() {
            Some(all) => assert_eq!(peak, all),
            None => assert!(peak <= step["expect_peak_at_most"].as_u64().unwrap(), "{peak}"),
        }
    }
}

/// The maximum duration of the vector is a deadline here, and the stop reason is the deadline.
async fn too_long(config: &Value, step: &Value) {
    let took: Vec<_> = step["event"]["outcome_ms"].as_array().unwrap().iter().map(ms).collect();
    let calls = Cell::new(0);
    let (calls_ref, took) = (&calls, &took);
    let upstream = service_fn(move |_: Request<ReplayBody<Empty<Bytes>>>| async move {
        let nth = calls_ref.replace(calls_ref.get() + 1);
        sleep(took[nth]).await;
        status(503)
    });
    let mut request = Request::new(Empty::new());
    request.extensions_mut().insert(Deadline::after(ms(&config["max_duration_ms"])));
    let retry = exact(Backoff::constant(ms(&config["delay_ms"])), 2);
    let error = retry.layer(upstream).oneshot(request).await.unwrap_err();
    assert_eq!(calls.get() as u64, step["expect"]["calls"]);
    assert_eq!(Attempts::find(&*error).unwrap().stop, GiveUpReason::DeadlinePassed);
}

/// A second of the vectors is 1000 seconds here, because timers have a resolution of one millisecond. Each step gives
/// the time of the first attempt and the delay, and whether the retries stop.
async fn before_the_deadline(steps: &[Value]) {
    for step in steps {
        let seconds =
            |name: &str| Duration::from_secs_f64(step["event"][name].as_f64().unwrap() * 1000.0);
        let (took, wait) = (seconds("elapsed_s"), seconds("upcoming_s"));
        let calls = Cell::new(0);
        let calls_ref = &calls;
        let upstream = service_fn(move |_: Request<ReplayBody<Empty<Bytes>>>| async move {
            calls_ref.set(calls_ref.get() + 1);
            if calls_ref.get() == 1 {
                sleep(took).await;
            }
            status(503)
        });
        let mut request = Request::new(Empty::new());
        request.extensions_mut().insert(Deadline::after(Duration::from_secs(1000)));
        let retry = exact(Backoff::constant(wait), 1).min_attempt_time(Duration::ZERO);
        // Only the number of attempts matters, not the result.
        let _ = retry.layer(upstream).oneshot(request).await;
        assert_eq!(calls.get() == 1, step["expect"]["stop"].as_bool().unwrap(), "{step}");
    }
}

/// The deadline that a server reads from `grpc-timeout`. `null` means no deadline.
async fn grpc_timeout(id: &str, step: &Value) {
    let upstream = service_fn(async |request: Request<Empty<Bytes>>| {
        let left = Deadline::of(request.extensions()).map(|deadline| deadline.left());
        assert_eq!(left.map(|left| left.as_secs_f64() * 1e3), step["expect_ms"].as_f64(), "{id}");
        status(200)
    });
    let request = Request::post("/")
        .header("content-type", "application/grpc")
        .header("grpc-timeout", step["value"].as_str().unwrap());
    let request = request.body(Empty::new()).unwrap();
    DeadlineLayer::new().layer(upstream).oneshot(request).await.unwrap();
}

async fn attempt_header(steps: &[Value]) {
    let seen = RefCell::new(Vec::new());
    let seen_ref = &seen;
    let upstream = service_fn(move |request: Request<ReplayBody<Empty<Bytes>>>| async move {
        let header = request.headers().get("grpc-previous-rpc-attempts");
        seen_ref.borrow_mut().push(header.map(|value| value.to_str().unwrap().to_owned()));
        let answer = Response::builder().header("content-type", "application/grpc");
        Ok::<_, BoxError>(answer.header("grpc-status", "14").body(Empty::<Bytes>::new()).unwrap())
    });
    let call = Request::post("/").header("content-type", "application/grpc").body(Empty::new());
    RetryLayer::grpc().layer(upstream).oneshot(call.unwrap()).await.unwrap();
    let told = |step: &Value| step["expect_header"].as_str().map(str::to_owned);
    assert_eq!(seen.into_inner(), steps.iter().map(told).collect::<Vec<_>>());
}

async fn connect_errors(steps: &[Value]) {
    for step in steps {
        let event = &step["event"];
        let most = event["total"].as_u64().unwrap_or(100);
        let connect = u32::try_from(event["connect"].as_u64().unwrap()).unwrap();
        let layer = exact(Backoff::constant(Duration::ZERO), most)
            .max_retries_for(FailureKind::Connect, connect);
        let refused = |_| Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
        let ran = run(layer, Method::GET, refused).await;
        assert_eq!(ran.calls() as u64, step["expect"]["exhausted_on"].as_u64().unwrap(), "{step}");
    }
}

async fn predicate(steps: &[Value]) {
    for step in steps {
        let event = &step["event"];
        let layer =
            exact(Backoff::constant(Duration::ZERO), 1).retry_on(StatusCode::INTERNAL_SERVER_ERROR);
        let layer = match event["allowed"].as_str().unwrap() {
            "any" => layer.assume_idempotent(),
            "POST" => layer.methods([Method::POST]),
            _ => layer,
        };
        let method = event["method"].as_str().unwrap().parse().unwrap();
        let ran = run(layer, method, |_| status(event["status"].as_u64().unwrap())).await;
        assert_eq!(ran.calls() == 2, step["expect"]["retry"].as_bool().unwrap(), "{step}");
    }
}

async fn cap_of_bodies(config: &Value) {
    let cap = config["max_bytes"].as_u64().unwrap();
    let told = Full::from(vec![b'x'; usize::try_from(cap).unwrap()]);
    let untold = |bytes: u64| {
        let chunks =
            (0..bytes).map(|_| Ok::<_, io::Error>(http_body::Frame::data(Bytes::from("x"))));
        StreamBody::new(futures_util::stream::iter(chunks))
    };
    let layer = || exact(Backoff::constant(Duration::ZERO), 1).max_replay_bytes(cap);
    let fails = |_| status(503);
    assert_eq!(send(layer(), Method::PUT, told, fails).await.calls(), 2);
    assert_eq!(send(layer(), Method::PUT, untold(cap), fails).await.calls(), 2);
    let over = Full::from(vec![b'x'; usize::try_from(cap).unwrap() + 1]);
    for ran in [
        send(layer(), Method::PUT, over, fails).await,
        send(layer(), Method::PUT, untold(cap + 1), fails).await,
    ] {
        // The upstream has received the complete request. Otherwise the stop reason would be a different one.
        assert_eq!((ran.calls(), ran.told.stop), (1, GiveUpReason::BodyGone));
    }
}

// ===== Hedges =====

type Twice = ReplayBody<ReplayBody<Empty<Bytes>>>;

async fn retry_over_hedge(expect: &Value) {
    let calls = Cell::new(0);
    let calls_ref = &calls;
    let upstream = service_fn(move |_: Request<Twice>| async move {
        calls_ref.set(calls_ref.get() + 1);
        sleep(Duration::from_millis(20)).await;
        status(503)
    });
    let hedge = HedgeLayer::http(Duration::from_millis(10)).without_budget();
    let handle = hedge.handle();
    let retry = exact(Backoff::constant(Duration::ZERO), 2);
    let answer = retry.layer(hedge.layer(upstream)).oneshot(Request::new(Empty::new())).await;
    assert_eq!(answer.as_ref().unwrap().status(), 503);
    let retries = u64::from(Attempts::of(&answer.unwrap()).made) - 1;
    let found = [calls.get(), retries, handle.snapshot().sent];
    let expected = ["attempts", "retries", "hedges"].map(|name| expect[name].as_u64().unwrap());
    assert_eq!(found, expected);
}

async fn no_hedge_after_an_error() {
    let upstream = service_fn(|_: Request<ReplayBody<Empty<Bytes>>>| async {
        Err::<Response<Empty<Bytes>>, BoxError>("unhandled".into())
    });
    let hedge = HedgeLayer::http(Duration::from_millis(10));
    let handle = hedge.handle();
    let mut service = hedge.layer(upstream);
    let request = Request::new(Empty::new());
    let error = service.ready().await.unwrap().call(request).await.unwrap_err();
    assert_eq!((error.to_string().as_str(), handle.snapshot().sent), ("unhandled", 0));
}

/// INVALID_ARGUMENT is caused by the request, so the response of the hedge attempt ends the call.
async fn a_hedges_answer_ends_it(config: &Value, steps: &[Value]) {
    let delay = ms(&config["hedging_delay_ms"]);
    let (calls, under_way, start) = (Cell::new(0), Cell::new(0_i32), Instant::now());
    let (calls_ref, under_way_ref) = (&calls, &under_way);
    struct Leaves<'a>(&'a Cell<i32>);
    impl Drop for Leaves<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() - 1);
        }
    }
    let answered = steps.last().unwrap();
    let upstream = service_fn(move |_: Request<ReplayBody<Empty<Bytes>>>| async move {
        let nth = calls_ref.replace(calls_ref.get() + 1) + 1;
        under_way_ref.set(under_way_ref.get() + 1);
        let _leaves = Leaves(under_way_ref);
        if answered["attempt"] != nth {
            std::future::pending::<()>().await;
        }
        sleep(ms(&answered["at_ms"]) - start.elapsed()).await;
        assert_eq!(answered["code"], "INVALID_ARGUMENT");
        grpc("3", None)
    });
    let hedges = u32::try_from(config["max_attempts"].as_u64().unwrap()).unwrap() - 1;
    let hedge = HedgeLayer::http(delay).max_hedges(hedges);
    let mut service = hedge.without_budget().layer(upstream);
    let request = Request::new(Empty::new());
    let answer = service.ready().await.unwrap().call(request).await.unwrap();
    assert_eq!(answer.headers()["grpc-status"], "3");
    assert!(start.elapsed().abs_diff(ms(&answered["at_ms"])) < Duration::from_millis(3));
    sleep(delay * 9).await;
    assert_eq!(
        (calls.get(), under_way.get()),
        (2, 0),
        "the first attempt is dropped, and no third one is sent"
    );
}

async fn live_percentile(config: &Value, steps: &[Value]) {
    let slow = Cell::new(Duration::ZERO);
    let slow_ref = &slow;
    let upstream = service_fn(move |_: Request<ReplayBody<Empty<Bytes>>>| async move {
        sleep(slow_ref.get()).await;
        Ok::<_, BoxError>(Response::new(Empty::<Bytes>::new()))
    });
    let hedge = HedgeLayer::after_percentile(config["quantile"].as_f64().unwrap());
    let (handle, service) = (hedge.handle(), hedge.layer(upstream));
    for step in steps {
        let (event, before) = (&step["event"], handle.snapshot().sent);
        slow.set(ms(field(event, &["each_ms", "primary_ms"])));
        for _ in 0..event["n"].as_u64().unwrap_or(1) {
            service.clone().oneshot(Request::new(Empty::new())).await.unwrap();
        }
        if let Some(hedges) = field(&step["expect"], &["hedges", "hedges_added"]).as_u64() {
            assert_eq!(handle.snapshot().sent - before, hedges, "{step}");
        }
    }
}
