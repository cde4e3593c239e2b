//! Sequences from the tests of other limits, replayed against this one. Each exception states its reason.

use std::{collections::BTreeSet, time::Duration};

use buttress::{
    ConcurrencyLimit, ConcurrencyLimitLayer,
    limit::{
        ConcurrencyLimitHandle, QueueOrder,
        adaptive::{Aimd, Algorithm, Sample, Vegas},
        partition::CallClass,
    },
};
use http::Request;
use serde_json::Value;
use tokio_test::{assert_ready_ok, task};
use tower::{Layer, ServiceExt, util::Oneshot};

use crate::support::{Strict, Watch, empty, request};

/// The vectors that are not replayed, each with its reason.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("slok-aimd-01", "another AIMD with a slow start; this one follows Netflix"),
    ("nflx-fn-01", "helpers that are private here; the logarithm is part of Vegas"),
    ("fsgo-adapt-02", "another algorithm: Vegas over windows that the test sets one by one"),
    ("fsgo-adapt-03", "the same"),
    ("fsgo-adapt-05", "the same, with a ceiling above the demand, which does not exist here"),
    ("fsgo-throttle-01", "a client-side throttle, not a limit"),
    ("fsgo-throttle-02", "a client-side throttle, not a limit"),
    ("fsgo-throttle-03", "a client-side throttle, not a limit"),
    ("nflx-vegas-05", "a custom decrease and smoothing, which are not settings here"),
    ("nflx-vegas-06", "a custom decrease, which is not a setting here"),
    (
        "envoy-gradient-epoch-01",
        "no measuring phase here; calls of an older limit are not recorded",
    ),
    ("envoy-gradient-fixpoint-01", "no gradient like Envoy's here: it pins the limit to measure"),
    ("envoy-gradient-fixpoint-05", "the same"),
    ("envoy-gradient-minrtt-01", "the same"),
    ("envoy-gradient-reset-01", "the same"),
    ("envoy-outlier-sr-02", "outlier detection over endpoints, not a limit"),
    ("grpc-a50-02", "outlier detection over endpoints, not a limit"),
    ("fsgo-adapt-09", "rejects at random before the queue is full; only a full queue rejects here"),
    ("smithy-adaptive-cubic-01", "a rate limit"),
    ("fsgo-rl-04", "a rate limit"),
    ("r4j-rl-06", "a rate limit"),
    ("r4j-rl-01", "a rate limit"),
    ("r4j-rl-02", "a rate limit"),
    ("r4j-rl-04", "a rate limit"),
    ("governor-01", "a rate limit"),
    ("governor-02", "a rate limit"),
    ("governor-07", "a rate limit"),
    ("fsgo-rl-01", "a rate limit"),
    ("fsgo-rl-03", "a rate limit"),
];

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn number(value: &Value, key: &str) -> Option<usize> {
    value[key].as_u64().map(|number| usize::try_from(number).unwrap())
}

// ===== Partitions =====

fn partitions(vector: &Value) {
    let config = &vector["config"];
    let share = |name: &str| config["partitions"][name].as_f64().unwrap();
    let sort = |request: &Request<()>| *request.extensions().get::<CallClass>().unwrap();
    let layer = ConcurrencyLimitLayer::new(number(config, "limit").unwrap())
        .classify_by(sort)
        .partitions(&[share("batch"), share("live")]);
    let (service, handle) = (layer.layer(Strict::holding().0), layer.handle());
    let mut calls = Vec::new();
    for step in vector["steps"].as_array().unwrap() {
        let (event, expect) = (&step["event"], &step["expect"]);
        let mut admitted = None;
        match text(event, "op") {
            "observe" => {}
            "set_limit" => handle.limit().set_limit(number(event, "limit").unwrap()).unwrap(),
            "enter" => {
                for _ in 0..number(event, "n").unwrap_or(1) {
                    let mut asking = request();
                    let line = u8::from(text(event, "partition") == "live");
                    asking.extensions_mut().insert(CallClass::default().partition(line));
                    let mut call = task::spawn(service.clone().oneshot(asking));
                    admitted = Some(call.poll().is_pending());
                    calls.push(call);
                }
            }
            other => panic!("{other}"),
        }
        let told = handle.partitions();
        let seen = |key: &str| match key {
            "batch_limit" => Value::from(told[0].share),
            "live_limit" => Value::from(told[1].share),
            "inflight" => Value::from(handle.limit().in_flight()),
            "admitted" => Value::from(admitted.unwrap()),
            other => panic!("{other}"),
        };
        for (key, value) in expect.as_object().unwrap() {
            assert_eq!(&seen(key), value, "{}: {key}", text(vector, "id"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_vector_is_replayed_or_excepted() {
    let all: Value = serde_json::from_str(include_str!("../vectors/limit.json")).unwrap();
    let mut excepted: BTreeSet<_> = EXCEPTIONS.iter().map(|(id, _)| *id).collect();
    let mut replayed = 0;
    for vector in all.as_array().unwrap() {
        let id = text(vector, "id");
        if excepted.remove(id) {
            continue;
        }
        match text(vector, "feature") {
            "adaptive_aimd" | "concurrency.aimd" | "adaptive_vegas" => adaptive(vector),
            "partitioned_limit" => partitions(vector),
            "bulkhead_queue" | "bulkhead_queue_cancel" | "bulkhead_wait" | "lifo_queue" => {
                queue(vector).await;
            }
            other => panic!("{id}: {other} is neither replayed nor excepted"),
        }
        replayed += 1;
    }
    assert_eq!(excepted, BTreeSet::new(), "excepted, but not in the vectors");
    assert_eq!(replayed, 10);
}

// ===== Algorithms =====

fn algorithm(vector: &Value) -> Box<dyn Algorithm> {
    let config = &vector["config"];
    let initial = number(config, "initial").unwrap();
    match text(vector, "feature") {
        "adaptive_vegas" => {
            Box::new(Vegas::new(initial, 1..=number(config, "max").unwrap()).unwrap())
        }
        // Netflix's minimum is the initial limit.
        "concurrency.aimd" => Box::new(Aimd::new(initial, initial..=200).unwrap()),
        _ => Box::new(Aimd::new(initial, 1..=200).unwrap()),
    }
}

fn adaptive(vector: &Value) {
    let id = text(vector, "id");
    let mut tried = algorithm(vector);
    let mut now = Duration::from_secs(1);
    for (at, step) in vector["steps"].as_array().unwrap().iter().enumerate() {
        let event = &step["event"];
        now += Duration::from_secs(1);
        if text(event, "op") == "new_instance" {
            tried = algorithm(vector);
            continue;
        }
        let limit = tried.limit();
        let (ms, in_flight, dropped) = match event.as_str() {
            Some("ok, inflight*2 >= limit") => (1, limit, false),
            Some("ok, inflight small") => (1, 1, false),
            Some("dropped") => (1, limit, true),
            Some(other) => panic!("{id}: {other}"),
            None => (
                event["rtt_ms"].as_u64().unwrap(),
                u32::try_from(event["inflight"].as_u64().unwrap()).unwrap(),
                event["dropped"].as_bool().unwrap(),
            ),
        };
        let sample = Sample::new(now, Duration::from_millis(ms), in_flight);
        let _ = tried.on_sample(&if dropped { sample.dropped() } else { sample });
        let expected = step["expect_limit"].as_u64().or(step["expect"]["limit"].as_u64()).unwrap();
        assert_eq!(u64::from(tried.limit()), expected, "{id}, step {at}");
    }
}

// ===== Queues =====

struct Caller {
    id: usize,
    /// The number of the call at the inner service.
    number: Option<usize>,
    call: task::Spawn<Oneshot<ConcurrencyLimit<Strict>, Request<()>>>,
}

struct Rig {
    service: ConcurrencyLimit<Strict>,
    watch: Watch,
    handle: ConcurrencyLimitHandle,
    limit: usize,
    queue: usize,
    callers: Vec<Caller>,
    /// The callers that got a permit, in this order.
    started: Vec<usize>,
}

impl Rig {
    fn new(vector: &Value) -> Self {
        let config = &vector["config"];
        let limit = number(config, "limit").or(number(config, "max_concurrent")).unwrap();
        let queue = number(config, "queue").or(number(config, "backlog")).unwrap_or(0);
        let patience = number(config, "backlog_timeout_ms").unwrap_or(60_000);
        let order = match text(vector, "feature") {
            "lifo_queue" => QueueOrder::Lifo,
            _ => QueueOrder::Fifo,
        };
        let layer = ConcurrencyLimitLayer::new(limit)
            .queue(queue, Duration::from_millis(patience as u64))
            .queue_order(order);
        let (inner, watch) = Strict::holding();
        let (service, handle) = (layer.layer(inner), layer.handle());
        Self { service, watch, handle, limit, queue, callers: vec![], started: vec![] }
    }

    /// Makes a call. Returns whether it got a permit or may wait.
    fn enter(&mut self, id: usize) -> bool {
        let before = self.watch.seen().calls;
        let mut call = task::spawn(self.service.clone().oneshot(request()));
        let stays = call.poll().is_pending();
        let number = (self.watch.seen().calls > before).then_some(before);
        if number.is_some() {
            self.started.push(id);
        }
        if stays {
            self.callers.push(Caller { id, number, call });
        }
        stays
    }

    fn exit(&mut self, id: Option<usize>) {
        let at = self
            .callers
            .iter()
            .position(|caller| caller.number.is_some() && id.is_none_or(|id| id == caller.id))
            .expect("a call in flight");
        let mut gone = self.callers.remove(at);
        assert!(self.watch.end(gone.number.unwrap(), Ok(empty())));
        assert_ready_ok!(gone.call.poll());
    }

    /// Polls a caller that was woken. Returns its id.
    fn look(&mut self) -> Option<usize> {
        let before = self.watch.seen().calls;
        let woken = self.callers.iter_mut().find(|caller| caller.call.is_woken())?;
        assert!(woken.call.poll().is_pending());
        woken.number = (self.watch.seen().calls > before).then_some(before);
        self.started.extend(woken.number.map(|_| woken.id));
        Some(woken.id)
    }
}

async fn queue(vector: &Value) {
    let name = text(vector, "id");
    let mut rig = Rig::new(vector);
    let mut now = 0;
    for (at, step) in vector["steps"].as_array().unwrap().iter().enumerate() {
        let due = step["at_ms"].as_u64().unwrap();
        tokio::time::advance(Duration::from_millis(due - now)).await;
        now = due;
        let (event, expect) = (&step["event"], &step["expect"]);
        let id = number(event, "id");
        let mut admitted = true;
        match text(event, "op") {
            "enter" | "enter_async" | "enter_waiting" => {
                let wait = number(event, "max_wait_ms");
                if let Some(wait) = wait {
                    rig.handle.set_queue(wait, Duration::from_millis(wait as u64)).unwrap();
                }
                for number in 0..number(event, "n").unwrap_or(1) {
                    admitted &= rig.enter(id.unwrap_or(100 + number));
                }
                if let Some(wait) = wait.filter(|wait| *wait > 0) {
                    tokio::time::advance(Duration::from_millis(wait as u64)).await;
                    let mut waits = rig.callers.pop().unwrap();
                    admitted = waits.call.poll().is_pending();
                }
            }
            "exit" => {
                rig.exit(id);
                let all = expect.get("admitted_order").is_some();
                while let Some(started) = rig.look() {
                    if all {
                        rig.exit(Some(started));
                    }
                }
            }
            "cancel" => rig.callers.retain(|caller| Some(caller.id) != id),
            other => panic!("{name}: {other}"),
        }
        let seen = rig.handle.snapshot();
        let (inside, waiting) = (seen.in_flight as usize, seen.waiting as usize);
        for (key, value) in expect.as_object().unwrap() {
            let number = value.as_u64().map(|value| usize::try_from(value).unwrap());
            match key.as_str() {
                "exec_slots" => assert_eq!(Some(rig.limit - inside), number, "{name}, {at}"),
                "queue_slots" => assert_eq!(Some(rig.queue - waiting), number, "{name}, {at}"),
                "inflight" => assert_eq!(Some(inside), number, "{name}, {at}"),
                "queued" => assert_eq!(Some(waiting), number, "{name}, {at}"),
                "started" => assert_eq!(rig.started.last().copied(), number, "{name}, {at}"),
                "cancelled" => assert!(!rig.started.contains(&number.unwrap()), "{name}, {at}"),
                "admitted" => assert_eq!(value.as_bool(), Some(admitted), "{name}, {at}"),
                "admitted_order" => {
                    let order: Vec<_> =
                        value.as_array().unwrap().iter().filter_map(Value::as_u64).collect();
                    let started: Vec<_> =
                        rig.started.iter().filter(|id| **id < 100).map(|id| *id as u64).collect();
                    assert_eq!(started, order, "{name}, {at}");
                }
                // `admitted` shows the rejection, and `enter` shows that it was immediate.
                "error" | "waited_max_ms" => {}
                other => panic!("{name}: {other}"),
            }
        }
    }
}
