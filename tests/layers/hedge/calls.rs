//! Which calls are hedged, when, and which response the caller receives.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress::{
    Attempts, BoxError, ConcurrencyLimitLayer, Deadline, HedgeLayer, Outcome, Rejected,
    RetryBudget, RetryLayer,
    hedge::{Hedge, HedgeAttempt, HedgeFuture, Hedged},
    retry::{Attempt, ReplayBody},
};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Empty, Full};
use tokio::time::{Instant, sleep, timeout};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

const DELAY: Duration = Duration::from_millis(10);

// ===== A strict, scripted upstream with counters =====

#[derive(Clone, Copy, Debug)]
enum Answer {
    Status(u16),
    /// A gRPC response whose status is in the trailers.
    Grpc(&'static str),
    /// A gRPC stream whose first message never arrives.
    GrpcSilent,
    Fails,
    Panics,
}
use Answer::*;

use crate::support::ms;

#[derive(Default)]
struct Seen {
    /// For each attempt: 1 for the first attempt or 2 for the hedge attempt, its time in milliseconds since the start,
    /// and its body.
    calls: Vec<(usize, u64, Bytes)>,
    in_flight: usize,
    clones_ready: usize,
    shut: Option<&'static str>,
    waker: Option<Waker>,
}

/// Ends the two attempts of a call as planned, each after its time. Panics if it is called without readiness.
struct Upstream {
    plan: [(u64, Answer); 2],
    began: Instant,
    seen: Arc<Mutex<Seen>>,
    ready: bool,
}

impl Clone for Upstream {
    fn clone(&self) -> Self {
        Self { plan: self.plan, began: self.began, seen: self.seen.clone(), ready: false }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.seen.lock().unwrap().clones_ready -= usize::from(self.ready);
    }
}

struct InFlight(Arc<Mutex<Seen>>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.lock().unwrap().in_flight -= 1;
    }
}

impl Upstream {
    fn new(first: (u64, Answer), second: (u64, Answer)) -> Self {
        let seen = Arc::default();
        Self { plan: [first, second], began: Instant::now(), seen, ready: false }
    }

    fn calls(&self) -> Vec<(usize, u64)> {
        self.seen.lock().unwrap().calls.iter().map(|call| (call.0, call.1)).collect()
    }

    fn in_flight(&self) -> usize {
        self.seen.lock().unwrap().in_flight
    }

    /// Prevents further readiness: `poll_ready` is pending, or fails with this text.
    fn shut(&self, how: &'static str) {
        self.seen.lock().unwrap().shut = Some(how);
    }

    fn open(&self) {
        let mut seen = self.seen.lock().unwrap();
        seen.shut = None;
        if let Some(waker) = seen.waker.take() {
            waker.wake();
        }
    }
}

/// A body that yields its frames from the last to the first, or stays pending if it is silent.
struct Frames {
    frames: Vec<Frame<Bytes>>,
    silent: bool,
}

impl Body for Frames {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<std::io::Result<Frame<Bytes>>>> {
        if self.silent { Poll::Pending } else { Poll::Ready(self.frames.pop().map(Ok)) }
    }

    fn is_end_stream(&self) -> bool {
        !self.silent && self.frames.is_empty()
    }
}

fn answer(answer: Answer) -> Result<Response<Frames>, BoxError> {
    let grpc = Response::builder().header("content-type", "application/grpc");
    let (head, frames, silent) = match answer {
        Fails => return Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()),
        Panics => panic!("scripted panic"),
        Status(status) => (Response::builder().status(status), vec![], false),
        Grpc(status) => {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", status.parse().unwrap());
            (grpc, vec![Frame::trailers(trailers)], false)
        }
        GrpcSilent => (grpc, vec![], true),
    };
    Ok(head.body(Frames { frames, silent })?)
}

impl<B> Service<Request<ReplayBody<B>>> for Upstream
where
    B: Body<Error: std::fmt::Debug> + Send + 'static,
{
    type Response = Response<Frames>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Frames>, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        let mut seen = self.seen.lock().unwrap();
        match seen.shut {
            Some("pending") => {
                seen.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            Some(error) => return Poll::Ready(Err(error.into())),
            None => {}
        }
        seen.clones_ready += usize::from(!self.ready);
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<ReplayBody<B>>) -> Self::Future {
        assert!(std::mem::take(&mut self.ready), "called without readiness");
        let copy = if request.extensions().get::<HedgeAttempt>().is_some() { 2 } else { 1 };
        let (after, last) = self.plan[copy - 1];
        let at = self.began.elapsed().as_millis() as u64;
        let mut seen = self.seen.lock().unwrap();
        seen.clones_ready -= 1;
        seen.in_flight += 1;
        seen.calls.push((copy, at, Bytes::new()));
        let index = seen.calls.len() - 1;
        drop(seen);
        let guard = InFlight(self.seen.clone());
        Box::pin(async move {
            let body = read(request.into_body()).await;
            guard.0.lock().unwrap().calls[index].2 = body;
            if after > 0 {
                sleep(ms(after)).await;
            }
            answer(last)
        })
    }
}

/// Reads a body as hyper does: a body whose `is_end_stream` is `true` is not polled.
async fn read<B: Body<Data = Bytes, Error: std::fmt::Debug>>(body: B) -> Bytes {
    let (mut body, mut read) = (pin!(body), Vec::new());
    while !body.is_end_stream() {
        let Some(frame) = body.frame().await else { break };
        read.extend_from_slice(&frame.unwrap().into_data().unwrap_or_default());
    }
    read.into()
}

fn get() -> Request<Empty<Bytes>> {
    Request::new(Empty::new())
}

async fn call<S, B>(service: &S, request: Request<B>) -> Result<S::Response, S::Error>
where
    S: Service<Request<B>> + Clone,
{
    service.clone().oneshot(request).await
}

fn hedged(upstream: &Upstream) -> Hedge<Upstream> {
    HedgeLayer::http(DELAY).layer(upstream.clone())
}

/// Returns the status or the error, its time, and whether the response is that of the hedge attempt.
async fn run(first: (u64, Answer), second: (u64, Answer)) -> (String, u64, Option<bool>) {
    let upstream = Upstream::new(first, second);
    let response = call(&hedged(&upstream), get()).await;
    let at = upstream.began.elapsed().as_millis() as u64;
    assert_eq!(upstream.in_flight(), 0);
    match response {
        Ok(response) => {
            let won = Hedged::of(&response).map(|hedged| hedged.won);
            (response.status().as_u16().to_string(), at, won)
        }
        Err(error) => (error.to_string(), at, None),
    }
}

// ===== Selection of the response =====

/// In contrast, `hedge` of tower returns the first result, even an error.
#[tokio::test(start_paused = true)]
async fn first_success_wins_although_an_error_arrived_first() {
    for bad in [Fails, Status(429), Status(500), Status(503), Status(408)] {
        // The hedge attempt fails at 15 ms, and the first attempt succeeds at 100 ms.
        let (answer, at, won) = run((100, Status(200)), (5, bad)).await;
        assert_eq!((&*answer, at, won), ("200", 100, Some(false)), "{bad:?}");
        // The first attempt fails at 15 ms, and the hedge attempt succeeds at 50 ms.
        let (answer, at, won) = run((15, bad), (40, Status(200))).await;
        assert_eq!((&*answer, at, won), ("200", 50, Some(true)), "{bad:?}");
    }
    for good in [200, 204, 304, 404, 501] {
        let (answer, at, won) = run((100, Status(200)), (5, Status(good))).await;
        assert_eq!((answer, at, won), (good.to_string(), 15, Some(true)));
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_failed_responses_the_last_is_returned() {
    assert_eq!(run((15, Status(503)), (40, Status(502))).await, ("502".into(), 50, Some(true)));
    assert_eq!(run((90, Status(503)), (40, Status(502))).await, ("503".into(), 90, Some(false)));
    assert_eq!(run((90, Fails), (1, Status(502))).await, ("connection reset".into(), 90, None));
}

#[tokio::test(start_paused = true)]
async fn a_failed_response_before_the_hedge_attempt_is_returned() {
    for bad in [Status(503), Status(429), Status(500)] {
        let (answer, at, won) = run((9, bad), (0, Status(200))).await;
        assert_eq!((format!("Status({answer})"), at, won), (format!("{bad:?}"), 9, None));
    }
    assert_eq!(run((9, Fails), (0, Status(200))).await.1, 9);
}

#[tokio::test(start_paused = true)]
async fn passes_through() {
    let upstream = Upstream::new((0, Status(200)), (0, Status(500)));
    let layer = HedgeLayer::http(DELAY);
    let service = layer.layer(upstream.clone());
    let request = Request::put("/").body(Full::new(Bytes::from("ping"))).unwrap();
    let response = call(&service, request).await.unwrap();
    assert_eq!((response.status().as_u16(), Hedged::of(&response)), (200, None));
    assert_eq!(upstream.seen.lock().unwrap().calls[0].2, "ping");
    let snapshot = layer.handle().snapshot();
    assert_eq!((snapshot.sent, snapshot.won, snapshot.budget_denied), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_error_is_returned_unchanged() {
    let upstream = Upstream::new((0, Fails), (0, Status(200)));
    let error = call(&hedged(&upstream), get()).await.err().unwrap();
    assert!(error.is::<std::io::Error>());
}

#[tokio::test(start_paused = true)]
async fn a_grpc_response_is_classified_by_its_trailers() {
    for (first, second, won, at) in [
        (Grpc("14"), Grpc("0"), true, 50),
        (Grpc("13"), Grpc("0"), true, 50),
        (Grpc("8"), Grpc("0"), true, 50),
        // INVALID_ARGUMENT is caused by the call, so another attempt would have the same result.
        (Grpc("3"), Grpc("0"), false, 15),
        (Grpc("0"), Grpc("14"), false, 15),
        // The layer waits 10 ms for the first message of a stream. After that the response is good.
        (GrpcSilent, Grpc("0"), false, 25),
    ] {
        let upstream = Upstream::new((15, first), (40, second));
        let service = HedgeLayer::http(DELAY).assume_idempotent().layer(upstream.clone());
        let request = Request::post("/").body(Full::new(Bytes::from("ping"))).unwrap();
        let response = call(&service, request).await.unwrap();
        assert_eq!(Hedged::of(&response).unwrap().won, won, "{first:?} {second:?}");
        assert_eq!(upstream.began.elapsed(), ms(at), "{first:?} {second:?}");
        if let Grpc(status) = if won { second } else { first } {
            let trailers = response.into_body().collect().await.unwrap().trailers().cloned();
            assert_eq!(trailers.unwrap()["grpc-status"], status, "the peeked frame is not lost");
        }
    }
}

// ===== Hedge attempts =====

#[tokio::test(start_paused = true)]
async fn no_hedge_before_the_delay() {
    for (after, calls) in [(9, vec![(1, 0)]), (100, vec![(1, 0), (2, 10)])] {
        let upstream = Upstream::new((after, Status(200)), (200, Status(200)));
        assert_eq!(call(&hedged(&upstream), get()).await.unwrap().status(), 200);
        assert_eq!(upstream.calls(), calls);
    }
}

#[tokio::test(start_paused = true)]
async fn the_delay_is_measured_from_the_call() {
    let upstream = Upstream::new((100, Status(200)), (100, Status(200)));
    let mut service = hedged(&upstream);
    let future =
        ServiceExt::<Request<Empty<Bytes>>>::ready(&mut service).await.unwrap().call(get());
    sleep(ms(7)).await;
    future.await.unwrap();
    assert_eq!(upstream.calls(), [(1, 0), (2, 10)]);
}

/// A timer panics outside of a runtime. The layer creates its timer only after the first attempt is pending.
#[test]
fn a_response_at_the_first_poll_needs_no_timer() {
    let upstream = Upstream::new((0, Status(200)), (0, Status(500)));
    let mut service = hedged(&upstream);
    let response = ServiceExt::<Request<Empty<Bytes>>>::ready(&mut service)
        .now_or_never()
        .unwrap()
        .unwrap()
        .call(get())
        .now_or_never();
    assert_eq!(response.unwrap().unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn a_post_is_never_hedged() {
    let slow = || Upstream::new((100, Status(200)), (0, Status(200)));
    let post = || Request::post("/").body(Full::new(Bytes::from("ping"))).unwrap();

    let upstream = slow();
    let layer = HedgeLayer::http(DELAY);
    call(&layer.layer(upstream.clone()), post()).await.unwrap();
    assert_eq!(upstream.calls(), [(1, 0)]);
    assert_eq!(layer.handle().snapshot().budget_denied, 0, "the budget is not used");
    // A POST without a body is not hedged either, because the method decides.
    let upstream = slow();
    let empty = Request::post("/").body(Empty::<Bytes>::new()).unwrap();
    call(&hedged(&upstream), empty).await.unwrap();
    assert_eq!(upstream.calls().len(), 1);

    // An idempotency key or `assume_idempotent` permits a hedge.
    let upstream = slow();
    let mut request = post();
    request.headers_mut().insert("idempotency-key", "1".parse().unwrap());
    call(&hedged(&upstream), request).await.unwrap();
    assert_eq!(upstream.calls().len(), 2);
    let upstream = slow();
    call(&HedgeLayer::http(DELAY).assume_idempotent().layer(upstream.clone()), post())
        .await
        .unwrap();
    assert_eq!(upstream.calls().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_hedge_carries_the_same_body() {
    let upstream = Upstream::new((100, Status(200)), (0, Status(200)));
    let request = Request::put("/").body(Full::new(Bytes::from("ping"))).unwrap();
    call(&hedged(&upstream), request).await.unwrap();
    let seen = upstream.seen.lock().unwrap();
    assert_eq!(seen.calls.iter().map(|call| &call.2[..]).collect::<Vec<_>>(), [b"ping", b"ping"]);
}

/// A body that never ends.
struct Endless;

impl Body for Endless {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Pending
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_still_read_or_over_the_cap_is_not_hedged() {
    let upstream = Upstream::new((0, Status(200)), (0, Status(200)));
    let layer = HedgeLayer::http(DELAY);
    let service = layer.layer(upstream.clone());
    let request = Request::put("/").body(Endless).unwrap();
    assert!(timeout(ms(50), call(&service, request)).await.is_err());
    assert_eq!((upstream.calls(), upstream.in_flight()), (vec![(1, 0)], 0));

    let upstream = Upstream::new((100, Status(200)), (0, Status(200)));
    let layer = layer.max_replay_bytes(3);
    let service = layer.layer(upstream.clone());
    let request = Request::put("/").body(Full::new(Bytes::from("ping"))).unwrap();
    call(&service, request).await.unwrap();
    assert_eq!(upstream.calls(), [(1, 0)]);
    let snapshot = layer.handle().snapshot();
    assert_eq!((snapshot.sent, snapshot.budget_denied), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_hedged_after_the_deadline() {
    for (deadline, calls) in [(ms(10), vec![(1, 0)]), (ms(20), vec![(1, 0), (2, 10)])] {
        let layer = HedgeLayer::http(DELAY);
        let upstream = Upstream::new((30, Status(200)), (30, Status(200)));
        let mut request = get();
        request.extensions_mut().insert(Deadline::after(deadline));
        let response = call(&layer.layer(upstream.clone()), request).await.unwrap();
        assert_eq!((response.status().as_u16(), upstream.calls()), (200, calls));
        assert_eq!(layer.handle().snapshot().budget_denied, 0);
    }
}

// ===== The budget =====

#[tokio::test(start_paused = true)]
async fn the_budget_bounds_hedge_attempts() {
    // Each call deposits a tenth of a hedge attempt. The initial balance is 0.
    let budget = RetryBudget::with(0.1, 0, 10);
    let layer = HedgeLayer::http(DELAY).budget(budget.clone());
    let upstream = Upstream::new((100, Status(200)), (0, Status(200)));
    let service = layer.layer(upstream.clone());
    for _ in 0..20 {
        call(&service, get()).await.unwrap();
    }
    let snapshot = layer.handle().snapshot();
    assert_eq!((snapshot.sent, snapshot.won, snapshot.budget_denied), (2, 2, 18));
    assert_eq!(snapshot.budget_balance, Some(0.0));
    assert_eq!(upstream.calls().len(), 22);

    // The layer has built a service, so the setter returns a layer with counts of its own.
    let layer = layer.without_budget();
    let service = layer.layer(upstream.clone());
    for _ in 0..20 {
        call(&service, get()).await.unwrap();
    }
    let snapshot = layer.handle().snapshot();
    assert_eq!((snapshot.sent, snapshot.budget_balance), (20, None));
}

#[tokio::test(start_paused = true)]
async fn the_default_budget_permits_ten_hedge_attempts_and_five_percent() {
    let upstream = Upstream::new((100, Status(200)), (0, Status(200)));
    let layer = HedgeLayer::http(DELAY);
    let service = layer.layer(upstream.clone());
    let began = Instant::now();
    // All calls begin at the same instant, so that the budget gains nothing by time.
    let calls = (0..1000).map(|_| call(&service, get()));
    futures_util::future::join_all(calls).await;
    assert_eq!(began.elapsed(), ms(100));
    // The initial balance of 10, and 5 % of 1000 calls.
    assert_eq!(layer.handle().snapshot().sent, 60);
}

// ===== Release =====

#[tokio::test(start_paused = true)]
async fn the_loser_is_dropped_at_once() {
    for (first, second) in [(100, 5), (20, 90)] {
        let upstream = Upstream::new((first, Status(200)), (second, Status(200)));
        let mut service = hedged(&upstream);
        let service = ServiceExt::<Request<Empty<Bytes>>>::ready(&mut service).await.unwrap();
        let mut future = pin!(service.call(get()));
        assert!(timeout(ms(12), &mut future).await.is_err());
        assert_eq!(upstream.in_flight(), 2);
        // The future is not dropped, but its attempts are.
        let _response = future.as_mut().await.unwrap();
        assert_eq!(upstream.in_flight(), 0);
    }
}

/// The failed response may hold the permit that the hedge attempt waits for.
#[tokio::test(start_paused = true)]
async fn a_failed_response_releases_its_permit_to_the_hedge_attempt() {
    let upstream = Upstream::new((15, Grpc("14")), (5, Status(200)));
    let limit = ConcurrencyLimitLayer::new(1).queue(1, ms(1000));
    let service =
        ServiceBuilder::new().layer(HedgeLayer::http(DELAY)).layer(limit).service(upstream.clone());
    let response = call(&service, get()).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(
        upstream.calls(),
        [(1, 0), (2, 15)],
        "the hedge attempt was queued until the first attempt released its permit"
    );
}

#[tokio::test(start_paused = true)]
async fn a_hedge_attempt_under_a_retry_has_the_number_of_its_attempt() {
    let upstream = Upstream::new((30, Status(503)), (30, Status(503)));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let numbers = seen.clone();
    let service = ServiceBuilder::new()
        .layer(RetryLayer::http().attempts(2).assume_idempotent())
        .layer(HedgeLayer::http(DELAY).assume_idempotent())
        .map_request(move |request: Request<ReplayBody<ReplayBody<Empty<Bytes>>>>| {
            let extensions = request.extensions();
            let attempt = extensions.get().map_or(1, |attempt: &Attempt| attempt.0);
            let before = request.headers().get("grpc-previous-rpc-attempts");
            let before = before.map_or(0, |before| before.to_str().unwrap().parse().unwrap());
            let is_hedge = extensions.get::<HedgeAttempt>().is_some();
            numbers.lock().unwrap().push((attempt, is_hedge, before));
            request
        })
        .service(upstream.clone());
    for (content_type, before) in [("application/grpc", [0, 1, 1, 2]), ("text/plain", [0; 4])] {
        let request = Request::post("/").header("content-type", content_type).body(Empty::new());
        let response = call(&service, request.unwrap()).await.unwrap();
        assert_eq!((response.status().as_u16(), Attempts::of(&response).made), (503, 2));
        let [a, b, c, d] = before;
        let expected = [(1, false, a), (2, true, b), (2, false, c), (3, true, d)];
        assert_eq!(std::mem::take(&mut *seen.lock().unwrap()), expected, "{content_type}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_over_a_hedge_replays_the_body() {
    let upstream = Upstream::new((30, Status(503)), (30, Status(503)));
    let stack = ServiceBuilder::new().layer(RetryLayer::http()).layer(HedgeLayer::http(DELAY));
    let request = Request::put("/").body(Full::new(Bytes::from("ping"))).unwrap();
    let response = call(&stack.service(upstream.clone()), request).await.unwrap();
    assert_eq!(Attempts::of(&response).made, 3);
    let seen = upstream.seen.lock().unwrap();
    assert_eq!(seen.calls.iter().filter(|call| call.2 == "ping").count(), 6);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_hedge_attempt_does_not_fail_the_call() {
    let upstream = Upstream::new((100, Status(200)), (0, Status(200)));
    let layer = HedgeLayer::http(DELAY);
    let stack = ServiceBuilder::new().layer(layer.clone()).layer(ConcurrencyLimitLayer::new(1));
    let service = stack.service(upstream.clone());
    let response = call(&service, get()).await.unwrap();
    assert_eq!((response.status().as_u16(), Hedged::of(&response).unwrap().won), (200, false));
    assert_eq!((upstream.calls().len(), layer.handle().snapshot().sent), (1, 1));
    // A rejection of the first attempt ends the call without a hedge attempt.
    let other = tokio::spawn(service.clone().oneshot(get()));
    tokio::task::yield_now().await;
    let error = call(&service, get()).await.err().unwrap();
    assert!(Rejected::find(&*error).is_some());
    assert_eq!(layer.handle().snapshot().sent, 1);
    other.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_call_drops_both_attempts_and_refunds_an_unsent_one() {
    let upstream = Upstream::new((100, Status(200)), (100, Status(200)));
    let layer = HedgeLayer::http(DELAY);
    let service = layer.layer(upstream.clone());
    assert!(timeout(ms(50), call(&service, get())).await.is_err());
    assert_eq!((upstream.calls().len(), upstream.in_flight()), (2, 0));
    let snapshot = layer.handle().snapshot();
    assert_eq!((snapshot.sent, snapshot.won), (1, 0));

    // The hedge attempt waits for readiness. The call makes the only deposit, one hedge attempt.
    let budget = RetryBudget::with(1.0, 0, 1);
    let layer = HedgeLayer::http(DELAY).budget(budget.clone());
    let mut service = layer.layer(upstream.clone());
    ServiceExt::<Request<Empty<Bytes>>>::ready(&mut service).await.unwrap();
    upstream.shut("pending");
    {
        let mut future = pin!(service.call(get()));
        assert!(timeout(ms(50), &mut future).await.is_err());
        assert_eq!(budget.balance(), 0.0, "the withdrawal precedes the hedge attempt");
    }
    assert_eq!(budget.balance(), 1.0, "the withdrawal is refunded");
    assert_eq!((layer.handle().snapshot().sent, upstream.in_flight()), (0, 0));
    assert_eq!(upstream.seen.lock().unwrap().clones_ready, 0);
}

#[tokio::test(start_paused = true)]
async fn an_unpolled_future_releases_what_it_holds() {
    let upstream = Upstream::new((100, Status(200)), (100, Status(200)));
    let mut service = hedged(&upstream);
    drop(ServiceExt::<Request<Empty<Bytes>>>::ready(&mut service).await.unwrap().call(get()));
    assert_eq!(upstream.in_flight(), 0);
    ServiceExt::<Request<Empty<Bytes>>>::ready(&mut service).await.unwrap();
    assert_eq!(upstream.seen.lock().unwrap().clones_ready, 1);
    drop(service);
    assert_eq!(upstream.seen.lock().unwrap().clones_ready, 0);
}

// ===== Readiness =====

#[tokio::test(start_paused = true)]
async fn a_hedge_that_is_not_ready_does_not_block_the_first() {
    for how in ["pending", "broken"] {
        let upstream = Upstream::new((100, Status(503)), (0, Status(200)));
        let budget = RetryBudget::with(1.0, 0, 10);
        let layer = HedgeLayer::http(DELAY).budget(budget.clone());
        let mut service = layer.layer(upstream.clone());
        ServiceExt::<Request<Empty<Bytes>>>::ready(&mut service).await.unwrap();
        upstream.shut(how);
        // The failure ends the call, because no hedge attempt is in flight.
        let response = service.call(get()).await.unwrap();
        assert_eq!((response.status().as_u16(), Hedged::of(&response)), (503, None));
        assert_eq!((upstream.calls(), upstream.began.elapsed()), (vec![(1, 0)], ms(100)));
        assert_eq!((budget.balance(), layer.handle().snapshot().sent), (1.0, 0), "{how}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hedge_is_sent_when_it_becomes_ready() {
    let upstream = Upstream::new((100, Status(200)), (5, Status(200)));
    let mut service = hedged(&upstream);
    ServiceExt::<Request<Empty<Bytes>>>::ready(&mut service).await.unwrap();
    upstream.shut("pending");
    let future = tokio::spawn(service.call(get()));
    sleep(ms(40)).await;
    upstream.open();
    let response = future.await.unwrap().unwrap();
    assert!(Hedged::of(&response).unwrap().won);
    assert_eq!((upstream.calls(), upstream.began.elapsed()), (vec![(1, 0), (2, 40)], ms(45)));
}

#[tokio::test(start_paused = true)]
async fn ready_is_sticky_and_is_not_cloned() {
    let upstream = Upstream::new((0, Status(200)), (0, Status(200)));
    let mut service = hedged(&upstream);
    for _ in 0..3 {
        ServiceExt::<Request<Empty<Bytes>>>::ready(&mut service).await.unwrap();
    }
    assert_eq!(upstream.seen.lock().unwrap().clones_ready, 1);
    let mut clone = service.clone();
    let unready = std::panic::catch_unwind(AssertUnwindSafe(|| {
        drop(clone.call(get()));
    }));
    assert!(unready.is_err(), "a clone needs its own readiness");
    assert_eq!(service.call(get()).await.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn inner_poll_ready_error_propagates() {
    let upstream = Upstream::new((0, Status(200)), (0, Status(200)));
    upstream.shut("broken");
    let error = call(&hedged(&upstream), get()).await.err().unwrap();
    assert_eq!(error.to_string(), "broken");
}

/// The upstream panics if it is called without readiness. The limit of tower reserves its permits in `poll_ready`.
#[tokio::test(start_paused = true)]
async fn no_call_without_ready() {
    let upstream = Upstream::new((100, Status(200)), (20, Status(200)));
    let limited = tower::limit::ConcurrencyLimit::new(upstream.clone(), 2);
    let service = HedgeLayer::http(DELAY).layer(limited);
    for _ in 0..3 {
        assert_eq!(call(&service, get()).await.unwrap().status(), 200);
    }
    assert_eq!((upstream.calls().len(), upstream.in_flight()), (6, 0));
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_the_calls_and_releases_everything() {
    for plan in [[(15, Panics), (90, Status(200))], [(90, Status(200)), (5, Panics)]] {
        let upstream = Upstream::new(plan[0], plan[1]);
        let service = hedged(&upstream);
        let panicked = tokio::spawn(service.clone().oneshot(get())).await;
        assert!(panicked.is_err_and(|error| error.is_panic()));
        assert_eq!((upstream.calls().len(), upstream.in_flight()), (2, 0));
        assert_eq!(upstream.seen.lock().unwrap().clones_ready, 0);
        // The service still works.
        let again = tokio::spawn(service.clone().oneshot(get())).await;
        assert!(again.is_err_and(|error| error.is_panic()));
        assert_eq!((upstream.calls().len(), upstream.in_flight()), (4, 0));
    }
}

// ===== Types, settings, sharing =====

#[derive(Clone, Debug, PartialEq)]
struct Row(u32);

#[derive(Debug, PartialEq)]
enum DbError {
    Gone,
    Constraint,
}

#[tokio::test(start_paused = true)]
async fn works_for_any_types() {
    // The first attempt fails after 15 ms, and the second succeeds after 40 ms.
    let n = Arc::new(Mutex::new(0));
    let db = tower::service_fn(move |row: Row| {
        let mut n = n.lock().unwrap();
        *n += 1;
        let n = *n;
        async move {
            sleep(ms(if n % 2 == 1 { 15 } else { 40 })).await;
            match (row.0, n % 2) {
                (0, _) => Err(DbError::Constraint),
                (_, 1) => Err(DbError::Gone),
                _ => Ok(Row(row.0 + 1)),
            }
        }
    });
    let layer = HedgeLayer::http(DELAY).classify(|result: Result<&Row, &DbError>| match result {
        Ok(_) | Err(DbError::Constraint) => Outcome::success(),
        Err(DbError::Gone) => Outcome::failure(),
    });
    let mut service = layer.layer(db);
    assert_eq!(service.ready().await.unwrap().call(Row(1)).await, Ok(Row(2)));
    let began = Instant::now();
    // An error that the closure classifies as a success ends the call.
    assert_eq!(service.ready().await.unwrap().call(Row(0)).await, Err(DbError::Constraint));
    assert_eq!(began.elapsed(), ms(15));
    let snapshot = layer.handle().snapshot();
    assert_eq!((snapshot.sent, snapshot.won), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn works_inside_tokio_spawn() {
    let upstream = Upstream::new((100, Status(200)), (5, Status(200)));
    let service = hedged(&upstream);
    let response = tokio::spawn(async move { service.oneshot(get()).await.unwrap() }).await;
    assert_eq!(response.unwrap().status(), 200);

    // Over an inner service whose error is `BoxError`.
    let inner = tower::service_fn(|n: u32| async move {
        sleep(ms(20)).await;
        if n > 0 { Ok(n) } else { Err(BoxError::from("zero")) }
    });
    let inner = tower::util::BoxCloneSyncService::new(inner);
    let layer = HedgeLayer::http(DELAY).classify(|result: Result<&u32, &BoxError>| {
        result.map_or(Outcome::failure(), |_| Outcome::success())
    });
    let mut service = ServiceBuilder::new().layer(layer).service(inner);
    let answer = tokio::spawn(async move { service.ready().await.unwrap().call(1).await });
    assert_eq!(answer.await.unwrap().unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn state_shared_across_layer_calls() {
    let layer = HedgeLayer::http(DELAY).budget(RetryBudget::with(1.0, 0, 1));
    let handle = layer.clone().handle();
    let upstream = Upstream::new((100, Status(200)), (0, Status(200)));
    for _ in 0..3 {
        call(&layer.layer(upstream.clone()), get()).await.unwrap();
        call(&layer.clone().layer(upstream.clone()), get()).await.unwrap();
    }
    assert_eq!(handle.snapshot().sent, 6);
}

#[tokio::test(start_paused = true)]
async fn handle_changes_a_running_layer_and_a_setter_does_not() {
    let layer = HedgeLayer::http(DELAY);
    let handle = layer.handle();
    // Before the first service a setter changes the shared state.
    let layer = layer.without_budget();
    assert_eq!(handle.snapshot().budget_balance, None);
    let upstream = Upstream::new((1000, Status(200)), (1000, Status(200)));
    let service = layer.layer(upstream.clone());
    handle.set_max_hedges(2).unwrap();
    call(&service, get()).await.unwrap();
    assert_eq!(handle.snapshot().sent, 2);
    let forked = layer.max_hedges(5);
    call(&service, get()).await.unwrap();
    assert_eq!(handle.snapshot().sent, 4, "the service keeps its settings");
    call(&forked.layer(upstream), get()).await.unwrap();
    assert_eq!((forked.handle().snapshot().sent, handle.snapshot().sent), (5, 4));
    let error = handle.set_max_hedges(11).unwrap_err();
    assert_eq!((error.field, &*error.value), ("max_hedges", "11"));
}

#[tokio::test(start_paused = true)]
async fn invalid_setting_is_a_typed_error() {
    let error = HedgeLayer::http(Duration::ZERO).checked().unwrap_err();
    assert_eq!((error.field, &*error.value), ("delay", "0ns"));
    for bad in [f64::NAN, 0.0, -0.1, 50.0] {
        let layer = HedgeLayer::http(DELAY).budget(RetryBudget::ratio(bad));
        assert_eq!(layer.checked().unwrap_err().field, "budget.ratio");
    }
    let error = HedgeLayer::http(DELAY).budget(RetryBudget::with(0.1, 1, 0)).checked().unwrap_err();
    assert_eq!(error.field, "budget.cap");
    assert!(HedgeLayer::http(DELAY).checked().is_ok());

    // A misconfigured layer never hedges.
    let upstream = Upstream::new((100, Status(200)), (0, Status(200)));
    call(&HedgeLayer::http(Duration::ZERO).layer(upstream.clone()), get()).await.unwrap();
    assert_eq!(upstream.calls().len(), 1);
    // A layer whose delay exceeds the range of the clock never hedges.
    let upstream = Upstream::new((100, Status(200)), (0, Status(200)));
    call(&HedgeLayer::http(Duration::MAX).layer(upstream.clone()), get()).await.unwrap();
    assert_eq!(upstream.calls().len(), 1);
}

#[test]
fn auto_traits() {
    fn all<T: Send + Sync + Unpin + Clone + std::fmt::Debug + 'static>() {}
    fn send<T: Send + 'static>() {}
    all::<HedgeLayer>();
    all::<Hedge<Upstream>>();
    all::<buttress::hedge::HedgeHandle>();
    type Call = <Hedge<Upstream> as Service<Request<Empty<Bytes>>>>::Future;
    send::<Call>();
    fn named<S, F, P, C>(_: Option<HedgeFuture<S, F, P, C>>) {}
    named(None::<Call>);
}
