//! Circuits per key.

use std::collections::BTreeSet;

use buttress::{
    BoxError,
    breaker::{KeyedCircuitBreakerHandle, Origin},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::advance;
use tower::{Layer, Service, ServiceExt, service_fn};

use super::fixtures::*;
use crate::support::{empty, refused_as};

fn to(uri: &str) -> Request<()> {
    Request::get(uri).body(()).unwrap()
}

/// Makes a call. Returns whether the circuit admitted it.
async fn ask<S>(service: &S, watch: &Watch, uri: &str, good: bool) -> bool
where
    S: Service<Request<()>> + Clone,
{
    let before = watch.seen().calls;
    watch.script([if good { Then::Answer(empty()) } else { Then::Fail(Oops("down")) }]);
    let _ = service.clone().oneshot(to(uri)).await;
    watch.unscript();
    watch.seen().calls > before
}

fn names(handle: &KeyedCircuitBreakerHandle<Origin>) -> BTreeSet<String> {
    handle.all().iter().map(|(key, _)| key.to_string()).collect()
}

#[tokio::test(start_paused = true)]
async fn one_failed_origin_does_not_affect_other_origins() {
    let layer = touchy().per_origin();
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    assert!(ask(&service, &watch, "http://a/x", false).await);
    assert!(!ask(&service, &watch, "http://a/y", true).await, "the path is not part of the key");
    assert_eq!(refused_as(service.clone().oneshot(to("http://a/")).await), RejectedKind::Open);
    for other in ["https://a/", "http://a:81/", "http://b/", "/"] {
        assert!(ask(&service, &watch, other, true).await, "{other}");
    }
    let expected = ["", "http://a", "http://a:81", "http://b", "https://a"];
    assert_eq!(names(&handle), expected.map(String::from).into());
    let (key, circuit) = handle
        .all()
        .into_iter()
        .find(|(_, circuit)| circuit.state() == CircuitState::Open)
        .unwrap();
    assert_eq!((key.to_string().as_str(), circuit.snapshot().rejected), ("http://a", 2));
    // `get` returns the handle of one key.
    handle.get(&key).unwrap().reset();
    assert!(ask(&service, &watch, "http://a/", true).await);
}

#[tokio::test(start_paused = true)]
async fn a_key_by_closure_and_state_shared_across_layer_calls() {
    let layer =
        touchy().half_open_of(1, 2).keyed(|request: &Request<()>| request.uri().path().len());
    let (inner, watch) = Strict::holding();
    let (one, two) = (layer.layer(inner.clone()), layer.clone().layer(inner));
    assert!(ask(&one, &watch, "/a", false).await);
    assert!(!ask(&two, &watch, "/b", true).await);
    assert!(ask(&two, &watch, "/long", true).await);
    assert_eq!(layer.handle().get(&2).unwrap().state(), CircuitState::Open);
    assert!(layer.handle().get(&7).is_none());
    advance(WAIT).await;
    assert!(ask(&two, &watch, "/c", true).await);
    assert_eq!(layer.handle().get(&2).unwrap().state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn full_map_evicts_only_circuits_that_are_like_new() {
    let layer = touchy().per_origin().max_keys(2);
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    assert!(ask(&service, &watch, "http://down/", false).await);
    assert!(ask(&service, &watch, "http://good/", true).await);
    assert!(ask(&service, &watch, "http://new/", false).await);
    let full: BTreeSet<_> = ["http://down", "http://new"].map(String::from).into();
    assert_eq!(names(&handle), full, "the circuit without failures was evicted");
    advance(secs(1)).await;
    // Both circuits are open, so further keys have no circuit: their failures are not recorded.
    for host in ["third", "third", "fourth"] {
        assert!(ask(&service, &watch, &format!("http://{host}/"), false).await);
    }
    assert_eq!(names(&handle), full);
    let snapshot = handle.snapshot();
    assert_eq!((snapshot.circuits, snapshot.evicted, snapshot.uncovered), (2, 1, 3));
}

/// The keys come from requests, so their number must not determine the memory.
#[tokio::test(start_paused = true)]
async fn keys_from_requests_never_grow_memory() {
    let layer = touchy().per_origin().max_keys(16);
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    for n in 0..2000 {
        ask(&service, &watch, &format!("http://host{n}/"), n % 3 != 0).await;
        advance(ms(10)).await;
        assert!(handle.all().len() <= 16);
    }
}

/// A circuit is not evicted while a call is in flight or a handle, future or isolation refers to it.
#[tokio::test(start_paused = true)]
async fn a_circuit_in_use_is_not_evicted() {
    let layer = touchy().per_origin().max_keys(1);
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    let mut under_way = tokio_test::task::spawn(service.clone().oneshot(to("http://a/")));
    tokio_test::assert_pending!(under_way.poll());
    ask(&service, &watch, "http://b/", true).await;
    assert_eq!(names(&handle), [String::from("http://a")].into());
    watch.end(0, Err(Oops("down")));
    assert!(under_way.poll().is_ready());
    assert_eq!(handle.all()[0].1.state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_circuit_with_a_handle_is_not_evicted() {
    let layer = touchy().per_origin().max_keys(1);
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    ask(&service, &watch, "http://a/", true).await;
    let (_, looks) = handle.all().remove(0);
    let (changed, isolates) = (looks.changed(), looks.clone().isolate());
    drop(isolates);
    for holds in [Box::new(looks) as Box<dyn std::any::Any>, Box::new(changed)] {
        advance(secs(1)).await;
        ask(&service, &watch, "http://b/", true).await;
        assert_eq!(names(&handle), [String::from("http://a")].into());
        drop(holds);
    }
    advance(secs(1)).await;
    ask(&service, &watch, "http://b/", true).await;
    assert_eq!(names(&handle), [String::from("http://b")].into());
}

/// With boxed errors and inside a task: the future is `Send`, and no field of it has a projected type.
#[tokio::test(start_paused = true)]
async fn works_inside_tokio_spawn() {
    async fn hello(_: Request<()>) -> Result<Response<Full<Bytes>>, BoxError> {
        Ok(Response::default())
    }
    fn auto<T: Clone + Send + Sync + 'static>(_: &T) {}

    let layer = touchy().half_open_queue(1, secs(1)).per_origin();
    auto(&layer);
    auto(&layer.handle());
    let mut service = layer.layer(service_fn(hello));
    let task = tokio::spawn(async move {
        service.clone().oneshot(to("http://a/")).await?;
        service.ready().await?.call(to("http://b/")).await.map(drop)
    });
    task.await.unwrap().unwrap();
    let by_path = touchy().keyed(|request: &Request<()>| request.uri().path().to_owned());
    let service = by_path.layer(service_fn(hello));
    let task = tokio::spawn(async move { service.oneshot(to("/a")).await.map(drop) });
    task.await.unwrap().unwrap();
}
