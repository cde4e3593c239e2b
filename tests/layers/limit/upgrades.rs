//! Permits that outlive their call.

use std::sync::{Arc, Mutex};

use buttress::{
    ConcurrencyLimit, ConcurrencyLimitLayer, Rejected,
    classify::Http,
    limit::{
        CallPermit, ConcurrencyLimitHandle, OwnedPermit, Upgrades, adaptive::Knee,
        partition::CallClass,
    },
    outcome::RejectedKind,
};
use http::Request;
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, util::BoxCloneService};

use crate::support::{
    Oops, Piece, ScriptBody, Strict, Watch,
    contract::{Subject, contract_tests},
    empty, hello, read, refused_as, request,
};

type Limit = ConcurrencyLimit<Strict, Upgrades<Http>>;

/// A limit of one whose permit a handler may take.
struct One {
    layer: ConcurrencyLimitLayer<Upgrades<Http>>,
    handle: ConcurrencyLimitHandle,
    occupant: Option<<Limit as Service<Request<()>>>::Future>,
}

impl Subject for One {
    type Layer = ConcurrencyLimitLayer<Upgrades<Http>>;
    type Service = Limit;

    async fn new() -> Self {
        let layer = ConcurrencyLimitLayer::new(1).upgrades();
        Self { handle: layer.handle(), layer, occupant: None }
    }

    fn layer(&self) -> &Self::Layer {
        &self.layer
    }

    fn taken(&self) -> usize {
        self.handle.in_flight() as usize - usize::from(self.occupant.is_some())
    }

    fn shut(&mut self) {
        let (inner, _) = Strict::holding();
        self.occupant = Some(self.layer.layer(inner).call(request()));
    }

    fn unshut(&mut self) {
        self.occupant = None;
    }
}

contract_tests!(One);

// ===== Permits taken by the handler =====

type Server = BoxCloneService<
    Request<()>,
    http::Response<buttress::permit::TrackedBody<ScriptBody>>,
    buttress::BoxError,
>;

/// The handle that the handler found in the extensions of its request.
type Found = Arc<Mutex<Option<CallPermit>>>;

fn found(found: &Found) -> CallPermit {
    found.lock().unwrap().clone().expect("a handle in the extensions")
}

/// A limit over a service that holds every call and stores the handle from the request.
fn server(
    layer: ConcurrencyLimitLayer<Upgrades<Http>>,
) -> (Server, Watch, Found, ConcurrencyLimitHandle) {
    let (handle, found) = (layer.handle(), Found::default());
    let (inner, watch) = Strict::holding();
    let keep = found.clone();
    let inner = inner.map_request(move |request: Request<()>| {
        *keep.lock().unwrap() = request.extensions().get().cloned();
        request
    });
    (layer.layer(inner).boxed_clone(), watch, found, handle)
}

fn one() -> (Server, Watch, Found, ConcurrencyLimitHandle) {
    server(ConcurrencyLimitLayer::new(1).upgrades())
}

#[tokio::test(start_paused = true)]
async fn an_owned_permit_outlives_the_call() {
    let (service, watch, slot, handle) = one();
    let mut call = task::spawn(service.clone().oneshot(request()));
    assert_pending!(call.poll());
    let place = found(&slot).take().expect("the permit has not been taken");
    assert!(found(&slot).take().is_none(), "the permit can be taken only once");
    assert!(watch.end(0, Ok(empty())));
    drop(assert_ready_ok!(call.poll()));
    drop(call);
    assert_eq!(handle.in_flight(), 1);
    assert_eq!(refused_as(service.clone().oneshot(request()).await), RejectedKind::Full);
    drop(place);
    assert_eq!(handle.in_flight(), 0);
    assert!(found(&slot).take().is_none(), "the call has ended");
}

#[tokio::test(start_paused = true)]
async fn a_permit_that_no_handler_takes_is_released_with_the_body() {
    let (service, watch, slot, handle) = one();
    let mut call = task::spawn(service.oneshot(request()));
    assert_pending!(call.poll());
    assert!(watch.end(0, Ok(hello())));
    let response = assert_ready_ok!(call.poll());
    assert_eq!(handle.in_flight(), 1);
    assert_eq!(read(response.into_body()).await.unwrap().0, b"hello");
    assert_eq!(handle.in_flight(), 0);
    assert!(found(&slot).take().is_none(), "the stored handle holds no permit");
}

#[tokio::test(start_paused = true)]
async fn an_owned_permit_that_is_dropped_early_stays_with_the_call() {
    let (service, watch, slot, handle) = one();
    let mut call = task::spawn(service.oneshot(request()));
    assert_pending!(call.poll());
    drop(found(&slot).take());
    assert_eq!(handle.in_flight(), 1);
    assert!(watch.end(0, Ok(hello())));
    let response = assert_ready_ok!(call.poll());
    assert_eq!(handle.in_flight(), 1);
    drop(response);
    assert_eq!(handle.in_flight(), 0);
}

/// The connection breaks while the handler runs, and the task of the handler lives on with the permit.
#[tokio::test(start_paused = true)]
async fn an_owned_permit_outlives_a_dropped_call() {
    let (service, _watch, slot, handle) = one();
    let mut call = task::spawn(service.clone().oneshot(request()));
    assert_pending!(call.poll());
    let place = found(&slot).take();
    drop(call);
    assert_eq!(handle.in_flight(), 1);
    drop(place);
    assert_eq!(handle.in_flight(), 0);
    let mut call = task::spawn(service.oneshot(request()));
    assert_pending!(call.poll());
    drop(call);
    assert_eq!(handle.in_flight(), 0, "a handle alone holds no permit");
    assert!(found(&slot).take().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_permit_can_be_taken_while_the_body_continues() {
    let (service, watch, slot, handle) = one();
    let mut call = task::spawn(service.oneshot(request()));
    assert_pending!(call.poll());
    let stuck = http::Response::new(ScriptBody::new([Piece::data("a"), Piece::Stuck]));
    assert!(watch.end(0, Ok(stuck)));
    let response = assert_ready_ok!(call.poll());
    let place = found(&slot).take().expect("the permit is available while the body lasts");
    drop(response);
    assert_eq!(handle.in_flight(), 1);
    drop(place);
    assert_eq!(handle.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_released_owned_permit_passes_to_a_queued_caller() {
    let layer = ConcurrencyLimitLayer::new(1).queue(1, std::time::Duration::from_secs(9));
    let (service, watch, slot, handle) = server(layer.upgrades());
    let mut call = task::spawn(service.clone().oneshot(request()));
    assert_pending!(call.poll());
    let place = found(&slot).take();
    assert!(watch.end(0, Ok(empty())));
    assert_ready_ok!(call.poll());
    let mut next = task::spawn(service.oneshot(request()));
    assert_pending!(next.poll());
    assert!(!next.is_woken());
    drop(place);
    assert!(next.is_woken());
    assert_pending!(next.poll());
    assert_eq!((watch.seen().calls, handle.in_flight()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn the_permits_of_two_limits_are_taken_together() {
    let outer = ConcurrencyLimitLayer::new(5).upgrades();
    let inner = ConcurrencyLimitLayer::new(3).upgrades();
    let (a, b) = (outer.handle(), inner.handle());
    let (inner, watch, slot, _) = server(inner);
    let mut call = task::spawn(outer.layer(inner).oneshot(request()));
    assert_pending!(call.poll());
    let place = found(&slot).take();
    assert!(watch.end(0, Ok(empty())));
    drop(assert_ready_ok!(call.poll()));
    assert_eq!((a.in_flight(), b.in_flight()), (1, 1));
    drop(place);
    assert_eq!((a.in_flight(), b.in_flight()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_owned_permit_is_held_although_the_call_releases_at_its_head() {
    let (service, watch, slot, handle) =
        server(ConcurrencyLimitLayer::new(1).release_at_head().upgrades());
    for take in [false, true] {
        let mut call = task::spawn(service.clone().oneshot(request()));
        assert_pending!(call.poll());
        let place = take.then(|| found(&slot).take());
        assert!(watch.end(usize::from(take), Ok(hello())));
        let _response = assert_ready_ok!(call.poll());
        assert_eq!(handle.in_flight(), u32::from(take));
        drop(place);
        assert_eq!(handle.in_flight(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn without_upgrades_nothing_is_in_the_request() {
    let (inner, _watch) = Strict::new();
    let inner = inner.map_request(|request: Request<()>| {
        assert!(request.extensions().is_empty());
        request
    });
    ConcurrencyLimitLayer::new(1).layer(inner).oneshot(request()).await.unwrap();
}

/// The lifetime of a socket is not a latency.
#[tokio::test(start_paused = true)]
async fn the_time_of_an_owned_permit_is_not_a_sample() {
    let layer = ConcurrencyLimitLayer::adaptive(Knee::new(4, 1..=100).unwrap()).until_body_end();
    let (service, watch, slot, handle) = server(layer.upgrades());
    for number in 0..2000 {
        let mut call = task::spawn(service.clone().oneshot(request()));
        assert_pending!(call.poll());
        let place = found(&slot).take();
        assert!(watch.end(number, Ok(empty())));
        assert_ready_ok!(call.poll());
        tokio::time::advance(std::time::Duration::from_secs(number as u64 % 50)).await;
        drop(place);
    }
    assert_eq!((handle.in_flight(), handle.snapshot().last_change), (0, None));
}

// ===== Permits without a call =====

#[tokio::test(start_paused = true)]
async fn a_permit_of_the_handle_counts_in_the_same_limit() {
    let layer = ConcurrencyLimitLayer::new(2).name("sockets");
    let (inner, watch) = Strict::holding();
    let (handle, service) = (layer.handle(), layer.layer(inner));
    let place: OwnedPermit = handle.try_acquire().unwrap();
    let mut call = task::spawn(service.clone().oneshot(request()));
    assert_pending!(call.poll());
    assert_eq!(refused_as(service.oneshot(request()).await), RejectedKind::Full);
    let refused: Rejected = handle.try_acquire().unwrap_err();
    assert_eq!((refused.kind(), refused.name()), (RejectedKind::Full, Some("sockets")));
    assert_eq!((handle.in_flight(), handle.snapshot().rejected_full), (2, 2));
    drop(place);
    let again = handle.try_acquire().unwrap();
    assert!(watch.end(0, Err(Oops("gone"))));
    assert!(call.poll().is_ready());
    drop(again);
    assert_eq!(handle.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn try_acquire_does_not_overtake_queued_callers() {
    let layer = ConcurrencyLimitLayer::new(1).queue(1, std::time::Duration::from_secs(9));
    let (inner, _watch) = Strict::holding();
    let (handle, service) = (layer.handle(), layer.layer(inner));
    let place = handle.try_acquire().unwrap();
    let mut waiting = task::spawn(service.oneshot(request()));
    assert_pending!(waiting.poll());
    drop(place);
    assert!(waiting.is_woken());
    assert!(handle.try_acquire().is_err());
    drop(waiting);
    assert!(handle.try_acquire().is_ok());
}

#[tokio::test(start_paused = true)]
async fn acquire_can_wait_in_the_queue() {
    let layer = ConcurrencyLimitLayer::new(1).queue(1, std::time::Duration::from_secs(9));
    let handle = layer.handle();
    let first = handle.acquire().await.unwrap();
    let mut gone = task::spawn(handle.acquire());
    assert_pending!(gone.poll());
    assert_eq!(handle.acquire().await.unwrap_err().kind(), RejectedKind::Full);
    drop(gone);
    let mut next = task::spawn(handle.acquire());
    assert_pending!(next.poll());
    drop(first);
    let second = assert_ready_ok!(next.poll());
    assert_eq!(handle.acquire().await.unwrap_err().kind(), RejectedKind::WaitedTooLong);
    drop(second);
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (0, 0));
}

/// A permit that is reserved for a partition cannot be acquired with the handle either.
#[tokio::test(start_paused = true)]
async fn the_handle_does_not_acquire_reserved_permits() {
    let layer = ConcurrencyLimitLayer::new(2)
        .classify_by(|_: &Request<()>| CallClass::default().partition(0))
        .partitions(&[0.5]);
    let (inner, _watch) = Strict::holding();
    let (handle, service) = (layer.handle(), layer.layer(inner));
    let limit = handle.limit();
    let (first, _second) = (limit.acquire().await.unwrap(), limit.acquire().await.unwrap());
    assert_eq!(refused_as(service.clone().oneshot(request()).await), RejectedKind::Full);
    drop(first);
    assert!(limit.try_acquire().is_err());
    assert_eq!(limit.acquire().await.unwrap_err().kind(), RejectedKind::Full);
    assert_pending!(task::spawn(service.oneshot(request())).poll());
}

#[test]
fn owned_permits_can_move_to_any_thread() {
    fn goes<T: Send + Sync + 'static>() {}
    goes::<CallPermit>();
    goes::<OwnedPermit>();
}
