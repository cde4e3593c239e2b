//! `tower::balance::p2c` over three real upstreams, each behind a breaker that is not ready while open.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{
    Router,
    http::StatusCode,
    routing::{MethodRouter, get},
};
use buttress::{
    BoxError, CircuitBreakerLayer, Rejected, Trip,
    breaker::{CircuitBreakerHandle, CircuitState},
    permit::TrackedBody,
};
use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use tokio::{task::JoinSet, time::sleep};
use tower::{
    Service, ServiceBuilder, ServiceExt,
    balance::p2c::Balance,
    buffer::Buffer,
    discover::ServiceList,
    load::{CompleteOnResponse, PendingRequests},
    util::{BoxCloneService, BoxCloneSyncService},
};

use crate::support::net::{client, serve, soon};

/// The open time. All calls of one phase of the test fit into it, also on a slow machine.
const WAIT: Duration = Duration::from_secs(2);

struct Upstream {
    addr: SocketAddr,
    requests: Arc<AtomicUsize>,
    failing: Arc<AtomicBool>,
    circuit: CircuitBreakerHandle,
}

type Request0 = Request<Empty<Bytes>>;
type Balanced = BoxCloneService<Request0, StatusCode, BoxError>;

/// A generic function hides the type of the balancer, so that its future can be used in a task.
async fn read<S>(service: S) -> Result<StatusCode, BoxError>
where
    S: Service<Request0, Response = Response<TrackedBody<Incoming>>, Error = BoxError>,
{
    let response = service.oneshot(Request::new(Empty::new())).await?;
    let status = response.status();
    response.into_body().collect().await?;
    Ok(status)
}

/// A route to a service, made in a generic function.
fn route<S>(service: S) -> MethodRouter
where
    S: Service<Request0, Response = Response<TrackedBody<Incoming>>, Error = BoxError>,
    S: Clone + Send + Sync + 'static,
    S::Future: Send,
{
    get(async move || read(service.clone()).await.unwrap_or(StatusCode::BAD_GATEWAY))
}

/// Makes a balancer over three upstreams. A macro, because the compiler has to see its whole type in the callers.
macro_rules! balance {
    ($upstreams:expr, $layer:expr) => {{
        let client = client();
        let endpoints: Vec<_> = $upstreams
            .iter()
            .map(|upstream: &Upstream| {
                let addr = upstream.addr;
                let endpoint = ServiceBuilder::new()
                    .layer($layer())
                    .map_request(move |mut request: Request0| {
                        *request.uri_mut() = Uri::try_from(format!("http://{addr}/")).unwrap();
                        request
                    })
                    .service(client.clone());
                PendingRequests::new(endpoint, CompleteOnResponse::default())
            })
            .collect();
        Buffer::new(Balance::new(ServiceList::new(endpoints)), 64)
    }};
}

/// rustc rejects the plain balancer in both places: see `BoxError`.
#[tokio::test]
async fn balancer_over_breakers_works_in_tasks_and_handlers() {
    let layer = || CircuitBreakerLayer::http().backpressure();
    let (_, upstreams) = upstreams(layer).await;
    let balance = balance!(upstreams, layer);

    let task = tokio::spawn(read(balance.clone()));
    assert_eq!(soon(task).await.unwrap().unwrap(), StatusCode::OK);
    let boxed = BoxCloneSyncService::new(balance.clone());
    let task = tokio::spawn(async move { boxed.oneshot(Request::new(Empty::new())).await });
    assert_eq!(soon(task).await.unwrap().unwrap().status(), StatusCode::OK);

    let boxed = BoxCloneSyncService::new(balance.clone());
    let handler = get(move || {
        let service = boxed.clone();
        async move {
            let response = service.oneshot(Request::new(Empty::new())).await;
            response.map_or(StatusCode::BAD_GATEWAY, |response| response.status())
        }
    });
    let proxy = Router::new().route("/boxed", handler).route("/generic", route(balance));
    let addr = serve(proxy).await;
    for path in ["boxed", "generic"] {
        let request = Request::get(format!("http://{addr}/{path}")).body(Empty::<Bytes>::new());
        let response = soon(client().oneshot(request.unwrap())).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
    }
}

async fn upstreams(layer: impl Fn() -> CircuitBreakerLayer) -> (Balanced, Vec<Upstream>) {
    let client = client();
    let (mut upstreams, mut endpoints) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (requests, failing) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (count, fails) = (requests.clone(), failing.clone());
        let answer = move || async move {
            count.fetch_add(1, SeqCst);
            if fails.load(SeqCst) { StatusCode::BAD_GATEWAY } else { StatusCode::OK }
        };
        let addr = serve(Router::new().route("/", get(answer))).await;
        let layer = layer();
        upstreams.push(Upstream { addr, requests, failing, circuit: layer.handle() });
        let endpoint = ServiceBuilder::new()
            .layer(layer)
            .map_request(move |mut request: Request0| {
                *request.uri_mut() = Uri::try_from(format!("http://{addr}/")).unwrap();
                request
            })
            .service(client.clone());
        endpoints.push(PendingRequests::new(endpoint, CompleteOnResponse::default()));
    }
    let balance = Buffer::new(Balance::new(ServiceList::new(endpoints)), 64);
    let service = balance.and_then(|response: Response<TrackedBody<Incoming>>| async {
        let status = response.status();
        response.into_body().collect().await?;
        Ok::<_, BoxError>(status)
    });
    (BoxCloneService::new(service), upstreams)
}

/// Sends this many requests, 16 at a time, and returns the status of each.
async fn send(service: &Balanced, requests: usize) -> Vec<StatusCode> {
    let mut senders = JoinSet::new();
    for _ in 0..16 {
        let service = service.clone();
        senders.spawn(async move {
            let mut answers = Vec::new();
            for _ in 0..requests / 16 {
                match service.clone().oneshot(Request::new(Empty::new())).await {
                    Ok(status) => answers.push(status),
                    Err(error) => match Rejected::find(&*error) {
                        Some(refused) => panic!("a call was rejected: {refused}"),
                        None => panic!("{error}"),
                    },
                }
            }
            answers
        });
    }
    soon(senders.join_all()).await.concat()
}

fn failures(answers: &[StatusCode]) -> usize {
    answers.iter().filter(|status| !status.is_success()).count()
}

fn counts(upstreams: &[Upstream]) -> Vec<usize> {
    upstreams.iter().map(|upstream| upstream.requests.swap(0, SeqCst)).collect()
}

/// Many callers at once: after the trip only probes reach the dead upstream, no call is rejected, and a good probe
/// closes the circuit.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn after_the_trip_only_the_breakers_probes_reach_the_dead_upstream() {
    let layer = || CircuitBreakerLayer::new(Trip::consecutive(3)).open_for(WAIT).backpressure();
    let (service, upstreams) = upstreams(layer).await;
    assert_eq!(failures(&send(&service, 160).await), 0);
    assert!(counts(&upstreams).iter().all(|count| *count > 0));

    let dead = &upstreams[0];
    dead.failing.store(true, SeqCst);
    while dead.circuit.state() != CircuitState::Open {
        send(&service, 16).await;
    }
    counts(&upstreams);
    let mut opened = dead.circuit.snapshot().opened;
    for waits in [false, true] {
        if waits {
            sleep(WAIT).await;
        }
        let failed = failures(&send(&service, 160).await);
        // One probe for each open time that has ended. Each probe has failed and opened the circuit again.
        let now = dead.circuit.snapshot().opened;
        let probes = (now - opened) as usize;
        assert_eq!((counts(&upstreams)[0], failed), (probes, probes), "at {}", dead.addr);
        assert!(!waits || probes > 0);
        opened = now;
    }

    dead.failing.store(false, SeqCst);
    sleep(WAIT).await;
    assert_eq!(failures(&send(&service, 320).await), 0);
    assert_eq!(dead.circuit.state(), CircuitState::Closed);
    assert!(counts(&upstreams)[0] > 1);
    assert!(upstreams.iter().all(|upstream| upstream.circuit.snapshot().rejected == 0));
}
