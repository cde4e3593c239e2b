//! One classification per response: the breaker, the adaptive limit, the retry and the hedge agree on it.
//!
//! Each row of the table is one response to one kind of request. Each layer alone receives this response, and the test
//! compares the behaviour of the layer with the outcome that `call::Http` documents.

use std::{
    convert::Infallible,
    ops::RangeInclusive,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{
    Attempts, Backoff, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, HedgeLayer,
    RetryLayer, Trip,
    breaker::CircuitState,
    hedge::Hedged,
    limit::adaptive::{Algorithm, LimitChange, Sample},
    outcome::{Outcome, OutcomeKind, Reason},
    retry::{Failure, GiveUpReason},
};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use tokio::time::{advance, sleep};
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};

const GRPC: &str = "application/grpc+proto";
const GRPC_WEB: &str = "application/grpc-web";
const HTML: &str = "text/html";

// ===== A row =====

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Get,
    Post,
    Grpc,
    /// A request with the content type of gRPC and another method, which is not a gRPC call.
    GrpcGet,
}

/// Where the response carries its `grpc-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the head of a response without a body.
    Head,
    /// In trailers that follow the head.
    Trailers,
    /// In trailers that follow a message: the retry and the hedge have passed the response on by then.
    AfterMessage,
}

#[derive(Clone, Debug)]
struct Row {
    kind: Kind,
    status: u16,
    content_type: Option<&'static str>,
    grpc_status: Option<(u16, Place)>,
    /// Whether the head says that there is no body.
    ended: bool,
    headers: Vec<(&'static str, &'static str)>,
}

fn row(kind: Kind, status: u16, content_type: Option<&'static str>) -> Row {
    Row { kind, status, content_type, grpc_status: None, ended: false, headers: Vec::new() }
}

impl Row {
    fn with_status(mut self, code: u16, place: Place) -> Self {
        (self.grpc_status, self.ended) = (Some((code, place)), place == Place::Head);
        self
    }

    fn ended(mut self) -> Self {
        self.ended = true;
        self
    }

    fn header(mut self, name: &'static str, value: &'static str) -> Self {
        self.headers.push((name, value));
        self
    }

    fn request(&self) -> Request<Full<Bytes>> {
        let method = match self.kind {
            Kind::Get | Kind::GrpcGet => Method::GET,
            Kind::Post | Kind::Grpc => Method::POST,
        };
        let content_type = match self.kind {
            Kind::Get | Kind::Post => "application/json",
            Kind::Grpc | Kind::GrpcGet => "application/grpc",
        };
        let request = Request::builder().method(method).header("content-type", content_type);
        request.body(Full::default()).unwrap()
    }

    fn response(&self) -> Response<Body> {
        let mut response = Response::builder().status(self.status);
        if let Some(content_type) = self.content_type {
            response = response.header("content-type", content_type);
        }
        for (name, value) in &self.headers {
            response = response.header(*name, *value);
        }
        let mut frames = Vec::new();
        if let Some((code, place)) = self.grpc_status {
            match place {
                Place::Head => response = response.header("grpc-status", code),
                Place::Trailers => frames.push(Frame::trailers(trailers(code))),
                Place::AfterMessage => {
                    frames.push(Frame::data(Bytes::from_static(b"message")));
                    frames.push(Frame::trailers(trailers(code)));
                }
            }
        }
        let body = if self.ended {
            Empty::new().boxed_unsync()
        } else {
            let frames = frames.into_iter().map(Ok::<_, Infallible>);
            StreamBody::new(stream::iter(frames)).boxed_unsync()
        };
        response.body(body).unwrap()
    }

    /// Returns a service that responds with this row each time.
    fn call(
        &self,
    ) -> impl Fn() -> std::future::Ready<Result<Response<Body>, BoxError>> + Clone + use<> {
        let row = self.clone();
        move || std::future::ready(Ok(row.response()))
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

fn trailers(code: u16) -> HeaderMap {
    HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.into())])
}

// ===== The table =====

/// The classification of a response that every layer must use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Expected {
    kind: OutcomeKind,
    reason: Reason,
    code: Option<u16>,
    /// Whether a retry repeats the call if this is safe.
    retryable: bool,
}

fn grpc_code(code: u16) -> Expected {
    use OutcomeKind::{Cancelled, Failure, Success, Throttled};
    let kind = match code {
        0 | 3 | 5 | 6 | 7 | 9 | 10 | 11 | 12 | 16 => Success,
        1 => Cancelled,
        2 | 4 | 13 | 14 | 15 => Failure,
        8 => Throttled,
        // The protocol has no other codes.
        _ => return grpc_code(2),
    };
    Expected { kind, reason: Reason::GrpcStatus, code: Some(code), retryable: code == 14 }
}

/// The table in `doc/http-grpc-status-mapping.md` of gRPC.
fn mapped(status: u16) -> Expected {
    let code = match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    };
    let plain = grpc_code(code);
    match status {
        429 | 529 => Expected { kind: OutcomeKind::Throttled, retryable: true, ..plain },
        _ => plain,
    }
}

fn http_status(status: u16) -> Expected {
    let (kind, reason) = match status {
        429 | 529 => (OutcomeKind::Throttled, Reason::Status),
        501 | 505 => (OutcomeKind::Success, Reason::Status),
        500..=599 => (OutcomeKind::Failure, Reason::Status),
        _ => (OutcomeKind::Success, Reason::Completed),
    };
    let code = (reason == Reason::Status).then_some(status);
    let retryable = matches!(status, 408 | 421 | 425 | 429 | 502..=504 | 520..=524 | 529);
    Expected { kind, reason, code, retryable }
}

fn expected(row: &Row) -> Expected {
    let is_web = row.content_type == Some(GRPC_WEB);
    let is_grpc_response = is_web || row.content_type == Some(GRPC);
    if row.kind != Kind::Grpc && !is_grpc_response {
        return http_status(row.status);
    }
    let success = Expected {
        kind: OutcomeKind::Success,
        reason: Reason::Completed,
        code: None,
        retryable: false,
    };
    match row.grpc_status {
        Some((code, Place::Head)) => grpc_code(code),
        Some((code, _)) if is_grpc_response && !is_web => grpc_code(code),
        _ if row.status == 200 && is_web => success,
        _ if row.status == 200 && is_grpc_response => Expected {
            kind: OutcomeKind::Failure,
            reason: Reason::MissingStatus,
            code: None,
            retryable: false,
        },
        _ => mapped(row.status),
    }
}

fn table() -> Vec<Row> {
    const STATUSES: [u16; 28] = [
        200, 204, 301, 400, 401, 403, 404, 408, 409, 418, 421, 422, 425, 429, 500, 501, 502, 503,
        504, 505, 511, 519, 520, 522, 524, 525, 529, 599,
    ];
    let mut rows = Vec::new();
    for kind in [Kind::Get, Kind::Post, Kind::Grpc, Kind::GrpcGet] {
        for status in STATUSES {
            for content_type in [None, Some(HTML), Some(GRPC), Some(GRPC_WEB)] {
                let row = row(kind, status, content_type);
                rows.push(row.clone());
                rows.push(row.clone().ended());
                let codes = if matches!(status, 200 | 403 | 503) { 0..=17 } else { 14..=14 };
                for code in codes {
                    for place in [Place::Head, Place::Trailers, Place::AfterMessage] {
                        rows.push(row.clone().with_status(code, place));
                    }
                }
            }
        }
    }
    rows
}

// ===== How each layer classifies a row =====

/// Sends a row through a breaker and reads the response: the state afterwards of a circuit that was closed, and of one
/// that was half-open. Together the two states distinguish the four kinds of outcomes.
async fn breaker(row: &Row) -> (CircuitState, CircuitState) {
    let mut states = Vec::new();
    for half_open in [false, true] {
        let wait = Duration::from_secs(30);
        let layer = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(wait);
        let handle = layer.handle();
        if half_open {
            handle.record(Outcome::failure());
            advance(wait).await;
            assert_eq!(handle.state(), CircuitState::HalfOpen);
        }
        let call = row.call();
        let service = ServiceBuilder::new().layer(layer);
        let service = service.service(service_fn(move |_: Request<Full<Bytes>>| call()));
        let response = service.oneshot(row.request()).await.unwrap();
        response.into_body().collect().await.unwrap();
        states.push(handle.state());
    }
    (states[0], states[1])
}

fn breaker_expects(kind: OutcomeKind) -> (CircuitState, CircuitState) {
    match kind {
        OutcomeKind::Success => (CircuitState::Closed, CircuitState::Closed),
        OutcomeKind::Failure => (CircuitState::Open, CircuitState::Open),
        OutcomeKind::Throttled => (CircuitState::Closed, CircuitState::Open),
        OutcomeKind::Cancelled => (CircuitState::Closed, CircuitState::HalfOpen),
    }
}

/// Records the samples of an adaptive limit.
#[derive(Clone, Debug, Default)]
struct Recorder(Arc<Mutex<Vec<bool>>>);

impl Algorithm for Recorder {
    fn limit(&self) -> u32 {
        8
    }

    fn set_limit(&mut self, _: u32) {}

    fn set_bounds(&mut self, _: RangeInclusive<u32>) -> bool {
        false
    }

    fn on_sample(&mut self, sample: &Sample) -> Option<LimitChange> {
        self.0.lock().unwrap().push(sample.dropped);
        None
    }
}

/// The samples that an adaptive limit records: whether each is a drop.
async fn adaptive(row: &Row, until_body_end: bool) -> Vec<bool> {
    let recorder = Recorder::default();
    let mut layer = ConcurrencyLimitLayer::adaptive(recorder.clone());
    if until_body_end {
        layer = layer.until_body_end();
    }
    let call = row.call();
    let service = ServiceBuilder::new().layer(layer);
    let service = service.service(service_fn(move |_: Request<Full<Bytes>>| call()));
    let response = service.oneshot(row.request()).await.unwrap();
    response.into_body().collect().await.unwrap();
    let samples = recorder.0.lock().unwrap();
    samples.clone()
}

fn adaptive_expects(expected: Expected) -> Vec<bool> {
    match (expected.kind, expected.reason, expected.code) {
        (OutcomeKind::Success, ..) => vec![false],
        (OutcomeKind::Throttled, ..)
        | (OutcomeKind::Failure, Reason::Status, Some(503 | 504 | 520..=524))
        | (OutcomeKind::Failure, Reason::GrpcStatus, Some(4 | 14)) => vec![true],
        _ => Vec::new(),
    }
}

/// Sends a row through a retry: the outcome of the first attempt, the number of attempts, and the reason to stop.
async fn retry(layer: RetryLayer, row: &Row) -> (Outcome, u32, GiveUpReason) {
    let outcomes = Arc::new(Mutex::new(Vec::new()));
    let log = outcomes.clone();
    let layer = layer.attempts(2).backoff(Backoff::constant(Duration::ZERO)).without_budget();
    let layer = layer.retry_if(move |seen| {
        log.lock().unwrap().push(seen.outcome());
        None
    });
    let call = row.call();
    let service =
        ServiceBuilder::new().layer(layer).service(service_fn(move |_: Request<_>| call()));
    let response = service.oneshot(row.request()).await.unwrap();
    let told = Attempts::of(&response);
    response.into_body().collect().await.unwrap();
    let outcomes = outcomes.lock().unwrap();
    // The closure does not see a response that forbids the retry.
    let outcome = outcomes.first().copied().unwrap_or_else(|| told.records()[0].outcome);
    (outcome, told.made, told.stop)
}

fn retry_expects(row: &Row, expected: Expected) -> (u32, GiveUpReason) {
    let is_safe = matches!(row.kind, Kind::Get | Kind::GrpcGet);
    let is_trusted = expected.reason == Reason::GrpcStatus && expected.code == Some(14);
    // 425 states that the server has not processed the request.
    let is_trusted = is_trusted || (expected.reason == Reason::Completed && row.status == 425);
    match expected.retryable {
        false => (1, GiveUpReason::Responded),
        true if is_safe || is_trusted => (2, GiveUpReason::AttemptsUsedUp),
        true => (1, GiveUpReason::Unsafe),
    }
}

/// Returns whether a hedge accepts the row, which is the first response to arrive while the hedge attempt is in flight.
async fn hedge_accepts(row: &Row) -> bool {
    let layer = HedgeLayer::http(Duration::from_millis(10)).assume_idempotent().without_budget();
    let (row, calls) = (row.clone(), Arc::new(Mutex::new(0)));
    let request = row.request();
    let service = ServiceBuilder::new().layer(layer).service(service_fn(move |_: Request<_>| {
        let (row, calls) = (row.clone(), calls.clone());
        async move {
            let first = {
                let mut calls = calls.lock().unwrap();
                *calls += 1;
                *calls == 1
            };
            if first {
                sleep(Duration::from_millis(20)).await;
                return Ok::<_, BoxError>(row.response());
            }
            sleep(Duration::from_secs(1)).await;
            let ok = Response::builder().header("content-type", GRPC).header("grpc-status", "0");
            Ok(ok.body(Empty::new().boxed_unsync()).unwrap())
        }
    }));
    let response = service.oneshot(request).await.unwrap();
    let hedged = Hedged::of(&response).expect("there was a hedge");
    !hedged.won
}

// ===== The tests =====

#[track_caller]
fn assert_outcome(outcome: Outcome, expected: Expected, row: &Row) {
    let seen = (outcome.kind(), outcome.reason(), outcome.code());
    let expected = match expected.reason {
        // 408, 421 and 425: the retry records them as failures, because it repeats them.
        Reason::Completed if expected.retryable => {
            (OutcomeKind::Failure, Reason::Status, Some(row.status))
        }
        _ => (expected.kind, expected.reason, expected.code),
    };
    assert_eq!(seen, expected, "{row:?}");
}

async fn every_layer_agrees(row: &Row, expected: Expected) {
    assert_eq!(breaker(row).await, breaker_expects(expected.kind), "breaker: {row:?}");
    for until_body_end in [true, false] {
        let samples = adaptive(row, until_body_end).await;
        assert_eq!(samples, adaptive_expects(expected), "adaptive limit: {row:?}");
    }
    if matches!(row.grpc_status, Some((_, Place::AfterMessage))) {
        return;
    }
    let (outcome, made, stop) = retry(RetryLayer::grpc(), row).await;
    assert_outcome(outcome, expected, row);
    assert_eq!((made, stop), retry_expects(row, expected), "retry: {row:?}");
    let is_good = expected.kind == OutcomeKind::Success && !expected.retryable;
    assert_eq!(hedge_accepts(row).await, is_good, "hedge: {row:?}");
}

#[tokio::test(start_paused = true)]
async fn breaker_adaptive_limit_retry_and_hedge_agree_on_every_response() {
    let rows = table();
    assert!(rows.len() > 4000, "{}", rows.len());
    for row in rows {
        every_layer_agrees(&row, expected(&row)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn http_503_with_html_for_a_grpc_call_is_unavailable_and_retried() {
    let row = row(Kind::Grpc, 503, Some(HTML));
    let unavailable = Expected {
        kind: OutcomeKind::Failure,
        reason: Reason::GrpcStatus,
        code: Some(14),
        retryable: true,
    };
    every_layer_agrees(&row, unavailable).await;
    assert_eq!(retry(RetryLayer::grpc(), &row).await.1, 2, "retried by `RetryLayer::grpc()`");
    let (_, made, stop) = retry(RetryLayer::http(), &row).await;
    assert_eq!((made, stop), (1, GiveUpReason::Unsafe), "a POST for `RetryLayer::http()`");
}

/// Sends a call whose response has this `grpc-status`. Returns whether a circuit counts it as a failure, and the code
/// that tonic parses.
async fn record_grpc_status(grpc_status: &'static str) -> (bool, tonic::Code) {
    let head = move || Response::builder().header("content-type", GRPC);
    let response = move || head().header("grpc-status", grpc_status).body(Full::<Bytes>::default());
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1));
    let handle = layer.handle();
    let service = layer.layer(service_fn(move |_: Request<Full<Bytes>>| async move {
        Ok::<_, BoxError>(response().unwrap())
    }));
    let response = service.oneshot(row(Kind::Grpc, 200, None).request()).await.unwrap();
    let status = tonic::Status::from_header_map(response.headers()).unwrap();
    (handle.state() == CircuitState::Open, status.code())
}

#[tokio::test(start_paused = true)]
async fn a_grpc_status_other_than_a_code_of_the_protocol_is_unknown_as_in_tonic() {
    let others = ["17", "99", "70000", "-1", "+0", "00", "000", "014", " ", "", "abc", "0, 14"];
    for other in others {
        assert_eq!(record_grpc_status(other).await, (true, tonic::Code::Unknown), "{other:?}");
    }
    for code in ["0", "3", "16"] {
        assert!(!record_grpc_status(code).await.0, "{code}");
    }
}

#[tokio::test(start_paused = true)]
async fn http_503_with_grpc_status_not_found_is_a_regular_response() {
    let not_found = Expected {
        kind: OutcomeKind::Success,
        reason: Reason::GrpcStatus,
        code: Some(5),
        retryable: false,
    };
    for content_type in [Some(GRPC), Some(HTML), None] {
        let row = row(Kind::Grpc, 503, content_type).with_status(5, Place::Head);
        every_layer_agrees(&row, not_found).await;
    }
    for place in [Place::Trailers, Place::AfterMessage] {
        let row = row(Kind::Grpc, 503, Some(GRPC)).with_status(5, place);
        every_layer_agrees(&row, not_found).await;
    }
}

#[tokio::test(start_paused = true)]
async fn http_403_with_grpc_status_unavailable_is_unavailable_for_every_layer() {
    for place in [Place::Head, Place::Trailers] {
        let row = row(Kind::Grpc, 403, Some(GRPC)).with_status(14, place);
        every_layer_agrees(&row, grpc_code(14)).await;
        assert_eq!(retry(RetryLayer::grpc(), &row).await.1, 2);
    }
}

#[tokio::test(start_paused = true)]
async fn http_200_or_400_with_html_for_a_grpc_call_is_a_failure_for_every_layer() {
    for (status, code) in [(200, 2), (400, 13)] {
        for row in
            [row(Kind::Grpc, status, Some(HTML)), row(Kind::Grpc, status, Some(HTML)).ended()]
        {
            let failure = Expected {
                kind: OutcomeKind::Failure,
                reason: Reason::GrpcStatus,
                code: Some(code),
                retryable: false,
            };
            every_layer_agrees(&row, failure).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn http_429_without_a_grpc_status_is_throttled_and_unavailable_to_its_caller() {
    let throttled = Expected {
        kind: OutcomeKind::Throttled,
        reason: Reason::GrpcStatus,
        code: Some(14),
        retryable: true,
    };
    every_layer_agrees(&row(Kind::Grpc, 429, Some(HTML)), throttled).await;
}

#[tokio::test(start_paused = true)]
async fn http_529_is_throttled_and_retried_where_that_is_safe() {
    for kind in [Kind::Get, Kind::Post, Kind::Grpc] {
        let row = row(kind, 529, Some(HTML));
        assert_eq!(breaker(&row).await, (CircuitState::Closed, CircuitState::Open), "{kind:?}");
        assert_eq!(adaptive(&row, false).await, [true], "{kind:?}");
        let (outcome, made, stop) = retry(RetryLayer::http(), &row).await;
        assert_eq!(outcome.kind(), OutcomeKind::Throttled, "{kind:?}");
        let expected = match kind {
            Kind::Get => (2, GiveUpReason::AttemptsUsedUp),
            _ => (1, GiveUpReason::Unsafe),
        };
        assert_eq!((made, stop), expected, "{kind:?}");
        assert!(!hedge_accepts(&row).await, "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn pushback_forbids_a_retry_of_a_mapped_status() {
    for pushback in ["-1", "soon", ""] {
        let row = row(Kind::Grpc, 503, Some(HTML)).header("grpc-retry-pushback-ms", pushback);
        let (_, made, stop) = retry(RetryLayer::grpc(), &row).await;
        assert_eq!((made, stop), (1, GiveUpReason::Pushback), "{pushback:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_mapped_status_carries_the_hint_of_the_response_head() {
    for content_type in [Some(HTML), Some(GRPC)] {
        let row = row(Kind::Grpc, 503, content_type).header("retry-after", "7");
        let (outcome, made, _) = retry(RetryLayer::grpc(), &row).await;
        assert_eq!((outcome.retry_after(), made), (Some(Duration::from_secs(7)), 2));
    }
}

#[tokio::test(start_paused = true)]
async fn a_listed_http_status_matches_calls_that_are_not_grpc_and_a_grpc_code_those_that_are() {
    let quick = || RetryLayer::grpc();
    let no_503 = || quick().never_on(StatusCode::SERVICE_UNAVAILABLE);
    let no_unavailable = || quick().never_on(Failure::Grpc(14));
    let (plain, grpc) = (row(Kind::Get, 503, Some(HTML)), row(Kind::Grpc, 503, Some(HTML)));
    assert_eq!(retry(no_503(), &plain).await.1, 1);
    assert_eq!(retry(no_503(), &grpc).await.1, 2);
    assert_eq!(retry(no_unavailable(), &plain).await.1, 2);
    assert_eq!(retry(no_unavailable(), &grpc).await.1, 1);

    // A status that is not a failure by itself, but is listed as one.
    let (plain, grpc) = (row(Kind::Get, 404, Some(HTML)), row(Kind::Grpc, 404, Some(HTML)));
    let also_404 = || quick().assume_idempotent().retry_on(StatusCode::NOT_FOUND);
    assert_eq!(retry(also_404(), &plain).await.1, 2);
    assert_eq!(retry(also_404(), &grpc).await.1, 1);
    let also_unimplemented = || quick().assume_idempotent().retry_on(Failure::Grpc(12));
    assert_eq!(retry(also_unimplemented(), &plain).await.1, 1);
    assert_eq!(retry(also_unimplemented(), &grpc).await.1, 2);

    // A gRPC stream that ended without a gRPC status does not match its HTTP status, which is 200.
    let missing = row(Kind::Grpc, 200, Some(GRPC));
    let also_200 = quick().assume_idempotent().retry_on(StatusCode::OK);
    assert_eq!(retry(also_200, &missing).await.1, 1);
    let also_missing = quick().assume_idempotent().retry_on(Reason::MissingStatus);
    assert_eq!(retry(also_missing, &missing).await.1, 2);
}

/// The record names the gRPC status that was listed, not the HTTP status that carried it.
#[tokio::test(start_paused = true)]
async fn an_attempt_records_the_listed_grpc_status() {
    let layer = RetryLayer::grpc().assume_idempotent().retry_on(Failure::Grpc(10));
    let layer = layer.attempts(2).backoff(Backoff::constant(Duration::ZERO)).without_budget();
    let aborted = row(Kind::Grpc, 200, Some(GRPC)).with_status(10, Place::Head);
    let call = aborted.call();
    let service =
        ServiceBuilder::new().layer(layer).service(service_fn(move |_: Request<_>| call()));
    let response = service.oneshot(aborted.request()).await.unwrap();
    let told = Attempts::of(&response);
    assert_eq!(told.made, 2);
    let first = told.records()[0].outcome;
    assert_eq!((first.reason(), first.code()), (Reason::GrpcStatus, Some(10)));
}

/// The head is a failure by the table. Trailers may still bring a status, and the caller does not wait for them.
#[tokio::test(start_paused = true)]
async fn an_error_response_dropped_before_its_trailers_counts_as_its_http_status() {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1));
    let handle = layer.handle();
    for (status, state) in
        [(200, CircuitState::Closed), (404, CircuitState::Closed), (503, CircuitState::Open)]
    {
        let row = row(Kind::Grpc, status, Some(GRPC)).with_status(0, Place::Trailers);
        let call = row.call();
        let service = ServiceBuilder::new().layer(layer.clone());
        let service = service.service(service_fn(move |_: Request<Full<Bytes>>| call()));
        drop(service.oneshot(row.request()).await.unwrap());
        assert_eq!(handle.state(), state, "{status}");
    }
}

/// The first frame of the stream does not arrive while the retry waits for it.
#[tokio::test(start_paused = true)]
async fn an_error_response_whose_trailers_are_late_is_retried_by_its_http_status() {
    let pending = || StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>());
    for (status, made) in [(200, 1), (404, 1), (503, 2)] {
        let layer = RetryLayer::grpc().attempts(2).backoff(Backoff::constant(Duration::ZERO));
        let service = service_fn(move |_: Request<_>| async move {
            let head = Response::builder().status(status).header("content-type", GRPC);
            Ok::<_, BoxError>(head.body(pending().boxed_unsync()).unwrap())
        });
        let request = row(Kind::Grpc, status, None).request();
        let response = ServiceBuilder::new().layer(layer).service(service).oneshot(request).await;
        assert_eq!(Attempts::of(&response.unwrap()).made, made, "{status}");
    }
}

/// A closure over the head replaces the table; the trailers and a rejection of an inner layer still decide.
#[tokio::test(start_paused = true)]
async fn a_head_classifier_replaces_the_mapped_status_and_not_the_trailers() {
    let good = || {
        let layer = CircuitBreakerLayer::new(Trip::consecutive(1));
        layer.classify_head(|_, _| Outcome::success())
    };
    let rows = [
        (row(Kind::Grpc, 503, Some(HTML)), CircuitState::Closed),
        (row(Kind::Grpc, 200, Some(HTML)), CircuitState::Closed),
        (row(Kind::Grpc, 503, Some(GRPC)), CircuitState::Closed),
        (row(Kind::Grpc, 503, Some(GRPC)).with_status(14, Place::Trailers), CircuitState::Open),
        (row(Kind::Grpc, 200, Some(GRPC)), CircuitState::Open),
    ];
    for (row, state) in rows {
        let (layer, call) = (good(), row.call());
        let handle = layer.handle();
        let service = ServiceBuilder::new().layer(layer);
        let service = service.service(service_fn(move |_: Request<Full<Bytes>>| call()));
        let response = service.oneshot(row.request()).await.unwrap();
        response.into_body().collect().await.unwrap();
        assert_eq!(handle.state(), state, "{row:?}");
    }
}

// ===== Types of reqwest =====

mod reqwest_types {
    use super::*;

    async fn made(row: &Row) -> (u32, GiveUpReason) {
        let layer = RetryLayer::grpc().attempts(2).backoff(Backoff::constant(Duration::ZERO));
        let row_of = row.clone();
        let service = service_fn(move |_: reqwest::Request| {
            let (head, _) = row_of.response().into_parts();
            // The client hides the trailers, so an empty body stands for all of them.
            let response = Response::from_parts(head, reqwest::Body::from(Vec::new()));
            std::future::ready(Ok::<_, reqwest::Error>(reqwest::Response::from(response)))
        });
        let (head, _) = row.request().into_parts();
        let mut request = reqwest::Request::new(head.method, "http://localhost/".parse().unwrap());
        *request.headers_mut() = head.headers;
        let service = ServiceBuilder::new().layer(layer.reqwest()).service(service);
        let response = service.oneshot(request).await.unwrap();
        let told = response.extensions().get::<Attempts>();
        told.map_or((1, GiveUpReason::Responded), |told| (told.made, told.stop))
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_around_a_reqwest_client_classifies_grpc_calls_by_the_same_table() {
        for (row, expected) in [
            (row(Kind::Grpc, 503, Some(HTML)), (2, GiveUpReason::AttemptsUsedUp)),
            (row(Kind::Grpc, 429, Some(HTML)), (2, GiveUpReason::AttemptsUsedUp)),
            (row(Kind::Grpc, 503, Some(GRPC)), (2, GiveUpReason::AttemptsUsedUp)),
            (
                row(Kind::Grpc, 503, Some(GRPC)).with_status(5, Place::Head),
                (1, GiveUpReason::Responded),
            ),
            (
                row(Kind::Grpc, 403, Some(GRPC)).with_status(14, Place::Head),
                (2, GiveUpReason::AttemptsUsedUp),
            ),
            (row(Kind::Grpc, 200, Some(HTML)), (1, GiveUpReason::Responded)),
            (row(Kind::Post, 503, Some(HTML)), (1, GiveUpReason::Unsafe)),
            (row(Kind::Get, 529, Some(HTML)), (2, GiveUpReason::AttemptsUsedUp)),
        ] {
            assert_eq!(made(&row).await, expected, "{row:?}");
        }
    }
}
