//! The samples that an adaptive limit records, and the application of the changes of its algorithm.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{
    ConcurrencyLimit, ConcurrencyLimitLayer, Outcome,
    limit::adaptive::{Algorithm, ChangeReason, LimitChange, Sample},
};
use http::Request;
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower::{Layer, ServiceExt, util::Oneshot};

use crate::support::{
    Oops, Piece, Strict, Then, Watch, empty, grpc, hello, read, request, status, trailers,
    trailers_only,
};

/// Records its samples, and returns prepared changes.
#[derive(Clone, Debug, Default)]
struct Spy(Arc<Mutex<Notes>>);

#[derive(Debug, Default)]
struct Notes {
    heard: Vec<Sample>,
    answers: Vec<LimitChange>,
    by_hand: Vec<u32>,
}

impl Spy {
    /// Takes the samples since the last call, each as its latency in milliseconds, the number in flight and whether
    /// it is a drop.
    fn heard(&self) -> Vec<(u128, u32, bool)> {
        let heard = std::mem::take(&mut self.0.lock().unwrap().heard);
        heard.iter().map(|call| (call.latency.as_millis(), call.in_flight, call.dropped)).collect()
    }
}

impl Algorithm for Spy {
    fn limit(&self) -> u32 {
        self.0.lock().unwrap().by_hand.last().map_or(2, |limit| (*limit).min(8))
    }

    fn set_limit(&mut self, limit: u32) {
        self.0.lock().unwrap().by_hand.push(limit);
    }

    fn on_sample(&mut self, sample: &Sample) -> Option<LimitChange> {
        let mut notes = self.0.lock().unwrap();
        notes.heard.push(*sample);
        notes.answers.pop()
    }
}

type Limit = ConcurrencyLimit<Strict>;

fn limit() -> (Spy, ConcurrencyLimitLayer, Limit, Watch) {
    let spy = Spy::default();
    let layer = ConcurrencyLimitLayer::adaptive(spy.clone()).queue(8, Duration::from_secs(60));
    let (inner, watch) = Strict::holding();
    let service = layer.layer(inner);
    (spy, layer, service, watch)
}

fn hold(service: &Limit) -> task::Spawn<Oneshot<Limit, Request<()>>> {
    let mut call = task::spawn(service.clone().oneshot(request()));
    assert_pending!(call.poll());
    call
}

const MS: Duration = Duration::from_millis(1);

#[tokio::test(start_paused = true)]
async fn latency_is_to_the_head_and_without_the_time_in_the_queue() {
    let (spy, _layer, service, watch) = limit();
    let (mut first, mut second, mut third) = (hold(&service), hold(&service), hold(&service));
    advance(30 * MS).await;
    watch.end(0, Ok(hello()));
    let response = assert_ready_ok!(first.poll());
    assert_eq!(spy.heard(), [(30, 1, false)]);
    advance(100 * MS).await;
    read(response.into_body()).await.unwrap();
    assert_eq!(spy.heard(), [], "recorded once");
    assert_pending!(third.poll());
    advance(5 * MS).await;
    for (number, call) in [(1, &mut second), (2, &mut third)] {
        watch.end(number, Ok(empty()));
        assert_ready_ok!(call.poll());
    }
    assert_eq!(spy.heard(), [(135, 2, false), (5, 2, false)]);
}

#[tokio::test(start_paused = true)]
async fn latency_is_to_the_end_of_the_body_with_until_body_end() {
    let (spy, layer, service, watch) = limit();
    layer.handle().set_until_body_end(true);
    let mut call = hold(&service);
    advance(30 * MS).await;
    watch.end(0, Ok(hello()));
    let response = assert_ready_ok!(call.poll());
    assert_eq!(spy.heard(), []);
    advance(70 * MS).await;
    read(response.into_body()).await.unwrap();
    assert_eq!(spy.heard(), [(30, 1, false)], "the time of the reader is not measured");
}

#[tokio::test(start_paused = true)]
async fn outcomes_without_information_about_the_load_are_not_recorded() {
    let (spy, _layer, service, watch) = limit();
    drop(hold(&service));
    for then in [Then::Answer(status(500)), Then::Answer(status(502)), Then::Fail(Oops("no"))] {
        watch.script([then]);
        let _ = service.clone().oneshot(request()).await;
    }
    assert_eq!(spy.heard(), []);
    assert_eq!(watch.seen().calls, 4);
}

#[tokio::test(start_paused = true)]
async fn responses_that_signal_overload_are_drops() {
    let (spy, layer, service, watch) = limit();
    let answers = [
        status(429),
        status(529),
        status(503),
        status(504),
        trailers_only("8"),
        trailers_only("14"),
    ];
    for answer in answers {
        watch.script([Then::Answer(answer)]);
        let _ = service.clone().oneshot(request()).await;
        assert_eq!(spy.heard(), [(0, 1, true)]);
    }
    // A status in the trailers is recorded when they arrive, whether the head or the end is measured.
    for until_body_end in [false, true] {
        if until_body_end {
            layer.handle().set_until_body_end(true);
        }
        watch.script([Then::Answer(grpc([Piece::data("a"), Piece::Trailers(trailers("4"))]))]);
        let response = service.clone().oneshot(request()).await.unwrap();
        assert_eq!(spy.heard(), []);
        read(response.into_body()).await.unwrap();
        assert_eq!(spy.heard(), [(0, 1, true)]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_grpc_call_is_recorded_with_its_trailers_and_the_latency_to_its_head() {
    let (spy, _layer, service, watch) = limit();
    let mut call = hold(&service);
    advance(30 * MS).await;
    watch.end(0, Ok(grpc([Piece::data("a"), Piece::Trailers(trailers("0"))])));
    let response = assert_ready_ok!(call.poll());
    assert_eq!(spy.heard(), []);
    advance(70 * MS).await;
    read(response.into_body()).await.unwrap();
    assert_eq!(spy.heard(), [(30, 1, false)]);
    // A call that is dropped before its trailers is not recorded.
    let mut call = hold(&service);
    watch.end(1, Ok(grpc([Piece::data("a"), Piece::Stuck])));
    drop(assert_ready_ok!(call.poll()));
    assert_eq!(spy.heard(), []);
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_releases_at_the_head_records_a_grpc_call_there() {
    let (spy, layer, service, watch) = limit();
    layer.handle().set_release_at_head(true);
    let mut call = hold(&service);
    advance(30 * MS).await;
    watch.end(0, Ok(grpc([Piece::data("a"), Piece::Trailers(trailers("14"))])));
    let response = assert_ready_ok!(call.poll());
    assert_eq!(spy.heard(), [(30, 1, false)]);
    read(response.into_body()).await.unwrap();
    assert_eq!(spy.heard(), []);
}

#[tokio::test(start_paused = true)]
async fn a_change_is_applied_and_admits_queued_callers() {
    let (spy, layer, service, watch) = limit();
    let mut calls: Vec<_> = (0..5).map(|_| hold(&service)).collect();
    let change = LimitChange { limit: 4, reason: ChangeReason::Other("test") };
    spy.0.lock().unwrap().answers = vec![change];
    watch.end(0, Ok(empty()));
    assert_ready_ok!(calls[0].poll());
    let now = layer.handle().snapshot();
    assert_eq!((now.limit, now.in_flight, now.waiting), (4, 4, 0));
    assert_eq!(now.last_change, Some(change));
    assert_eq!(calls.iter().filter(|call| call.is_woken()).count(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_algorithm_continues_from_a_limit_set_by_the_handle() {
    let (spy, layer, _service, _watch) = limit();
    let handle = layer.handle();
    assert_eq!((handle.snapshot().limit, handle.snapshot().last_change), (2, None));
    handle.set_limit(5).unwrap();
    assert_eq!(
        handle.snapshot().last_change,
        Some(LimitChange { limit: 5, reason: ChangeReason::ByHand })
    );
    handle.set_limit(100).unwrap();
    assert_eq!(handle.snapshot().limit, 8, "the algorithm bounds the limit");
    assert_eq!(spy.0.lock().unwrap().by_hand, [5, 100]);
}

#[tokio::test(start_paused = true)]
async fn services_of_any_types_are_measured_to_their_response() {
    let spy = Spy::default();
    let judge = |result: Result<&u8, &Oops>| match result {
        Ok(_) => Outcome::success(),
        Err(_) => Outcome::throttled(),
    };
    let layer = ConcurrencyLimitLayer::adaptive(spy.clone()).classify(judge);
    let (inner, watch) = Strict::<u8>::of(|| Then::Hold);
    let mut call = task::spawn(layer.layer(inner).oneshot("any"));
    assert_pending!(call.poll());
    advance(7 * MS).await;
    watch.end(0, Ok(1));
    assert_ready_ok!(call.poll());
    assert_eq!(spy.heard(), [(7, 1, false)]);
}

#[tokio::test(start_paused = true)]
async fn connection_housekeeping_is_not_recorded() {
    use buttress::outcome::Reason as Why;

    let spy = Spy::default();
    let layer = ConcurrencyLimitLayer::adaptive(spy.clone());
    let layer = layer.classify(|outcome: Result<&Outcome, &Oops>| *outcome.unwrap());
    let handle = layer.handle();
    let service = layer.layer(tower::service_fn(async |outcome| Ok::<Outcome, Oops>(outcome)));
    for reason in
        [Why::NeverSent, Why::RefusedStream, Why::GoAway, Why::StaleConnection, Why::Reset]
    {
        let outcome = Outcome::cancelled().because(reason);
        service.clone().oneshot(outcome).await.unwrap();
        assert_eq!(spy.heard(), [], "{reason}");
    }
    service.clone().oneshot(Outcome::failure().because(Why::Timeout)).await.unwrap();
    assert_eq!(spy.heard(), [(0, 1, true)]);
    assert_eq!(handle.in_flight(), 0);
}
