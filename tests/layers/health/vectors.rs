//! Vectors from the tests and specifications of other systems, for health and panic in fleets.
//!
//! `vectors/fleet.json` contains the vectors, each with its source. Each vector is replayed here, or is listed in
//! [`NOT_HERE`] with the reason.

use std::{collections::BTreeSet, time::Duration};

use buttress::{
    HealthProbeLayer,
    health::{FailOpen, HealthProbeHandle, ProbeState},
};
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tower::{Layer, service_fn};

const NOT_HERE: &[(&str, &str)] = &[
    ("linkerd-ewma-01", "the load of a balancer; a health probe has none"),
    (
        "envoy-outlier-ejecttime-01",
        "ejection by the results of traffic; a health probe ejects by probes",
    ),
    ("grpc-a50-01", "as envoy-outlier-ejecttime-01"),
    ("envoy-outlier-fp-01", "as envoy-outlier-ejecttime-01"),
    ("grpc-a50-03", "as envoy-outlier-ejecttime-01"),
    ("grpc-a50-04", "a maximum share of ejected hosts; a panic guard admits calls instead"),
    ("sim-chain-01", "retries, not health"),
    ("sim-metastable-01", "retries and queues, not health"),
    ("smithy-stall-02", "throughput of an upload, not health"),
];

/// Steps of replayed vectors, or parts of them, that do not apply.
const STEPS_NOT_HERE: &[(&str, &str, &str)] = &[
    ("envoy-panic-01", "expect_traffic_p0", "a balancer divides traffic between priorities"),
    (
        "hc-interval-01",
        "never had traffic",
        "an upstream without traffic is probed like any other, with one request per interval",
    ),
    (
        "hc-interval-01",
        "just became healthy",
        "healthy_edge_interval: `every` applies from the first passed probe",
    ),
];

fn vectors() -> Vec<Value> {
    serde_json::from_str(include_str!("../vectors/fleet.json")).unwrap()
}

fn vector(id: &str) -> Value {
    vectors().into_iter().find(|vector| vector["id"] == id).expect(id)
}

#[test]
fn every_vector_is_replayed_or_listed() {
    let all: BTreeSet<_> =
        vectors().iter().map(|vector| vector["id"].as_str().unwrap().to_owned()).collect();
    let replayed = ["envoy-panic-01", "hc-interval-01"];
    let known: BTreeSet<_> =
        NOT_HERE.iter().map(|(id, _)| *id).chain(replayed).map(str::to_owned).collect();
    assert_eq!(all, known);
    for (id, what, _) in STEPS_NOT_HERE {
        let steps = vector(id)["steps"].to_string();
        assert!(steps.contains(what), "{id} has no `{what}`");
    }
}

/// A host with its own probe layer. The test sets the results of the probes and reads their times.
struct Host {
    well: watch::Sender<bool>,
    asked: watch::Receiver<Vec<Duration>>,
    handle: HealthProbeHandle,
}

fn host(
    layer: impl FnOnce(watch::Receiver<bool>, watch::Sender<Vec<Duration>>) -> HealthProbeHandle,
) -> Host {
    let (well, told) = watch::channel(true);
    let (asks, asked) = watch::channel(Vec::new());
    Host { well, asked, handle: layer(told, asks) }
}

fn gate(guard: Option<&FailOpen>, every: Duration, while_down: Duration) -> Host {
    host(|told, asks| {
        let began = Instant::now();
        let layer = HealthProbeLayer::new(|| ())
            .every(every)
            .every_while_down(while_down)
            .jitter(0.0)
            .thresholds(2, 2);
        let layer = match guard {
            Some(guard) => layer.fail_open(guard),
            None => layer,
        };
        let service = service_fn(move |()| {
            asks.send_modify(|asked| asked.push(began.elapsed()));
            let well = *told.borrow();
            async move { if well { Ok(()) } else { Err("down") } }
        });
        let handle = layer.handle();
        drop(layer.layer(service));
        handle
    })
}

/// Each priority has a hundred hosts, so that a percentage is a number of hosts.
#[tokio::test(start_paused = true)]
async fn gates_fail_open_below_half_as_in_envoy() {
    let vector = vector("envoy-panic-01");
    let threshold = vector["config"]["threshold_pct"].as_f64().unwrap() / 100.0;
    let second = Duration::from_secs(1);
    let priorities = [(); 2].map(|()| FailOpen::below(threshold).unwrap());
    let hosts = priorities
        .each_ref()
        .map(|guard| (0..100).map(|_| gate(Some(guard), second, second)).collect::<Vec<_>>());
    for step in vector["steps"].as_array().unwrap() {
        for (hosts, name) in hosts.iter().zip(["p0", "p1"]) {
            let healthy = usize::try_from(step[name].as_u64().unwrap()).unwrap();
            for (n, host) in hosts.iter().enumerate() {
                host.well.send_replace(n < healthy);
            }
        }
        sleep(3 * second).await;
        for (hosts, name) in hosts.iter().zip(["p0", "p1"]) {
            let up = hosts.iter().filter(|host| host.handle.state() == ProbeState::Up).count();
            assert_eq!(u64::try_from(up).unwrap(), step[name].as_u64().unwrap(), "{step}");
        }
        let is_active = priorities.each_ref().map(FailOpen::is_active);
        assert_eq!(serde_json::to_value(is_active).unwrap(), step["expect_panic"], "{step}");
    }
}

#[tokio::test(start_paused = true)]
async fn intervals_are_those_of_envoy() {
    let (every, while_down) = (Duration::from_secs(10), Duration::from_secs(2));
    let interval = |expected: &str| match expected {
        "unhealthy_edge" | "unhealthy" => while_down,
        "interval + jitter" => every,
        other => panic!("unknown interval: {other}"),
    };
    for step in vector("hc-interval-01")["steps"].as_array().unwrap() {
        let event = step["event"].as_str().unwrap();
        if STEPS_NOT_HERE.iter().any(|(_, what, _)| *what == event) {
            continue;
        }
        let host = gate(None, every, while_down);
        let before = match event {
            "steady" => 3,
            "just became unhealthy" | "still unhealthy" => {
                sleep(Duration::from_secs(1)).await;
                host.well.send_replace(false);
                host.handle.changed().await;
                host.asked.borrow().len() + usize::from(event == "still unhealthy") * 3
            }
            other => panic!("unknown event: {other}"),
        };
        sleep(6 * every).await;
        let asked = host.asked.borrow();
        let wait = asked[before] - asked[before - 1];
        assert_eq!(wait, interval(step["expect_interval"].as_str().unwrap()), "{event}");
    }
}
