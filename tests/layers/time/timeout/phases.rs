//! Each phase of the timeout layer: its start, its end, and what it releases.

use std::{
    future::{Future, Ready, poll_fn, ready},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use buttress::{
    Backoff, BoxError, ConcurrencyLimitLayer, Deadline, Outcome, RetryLayer, TimeoutLayer,
    Timeouts,
    outcome::RejectedKind,
    retry::Attempt,
    timeout::{SendingBody, TimeoutPhase},
};
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use tokio::time::{Instant, advance, sleep};
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt};

use crate::layers::time::fixtures::*;
use crate::support::{Oops, Piece, ScriptBody, Strict, Then, hello, read, refused_as, trailers};

// ===== The head =====

#[tokio::test(start_paused = true)]
async fn a_head_timeout_ends_the_call_and_releases_its_permits() {
    let limit = ConcurrencyLimitLayer::new(1);
    let (handle, (inner, watch)) = (limit.handle(), Strict::holding());
    let service = TimeoutLayer::new(Timeouts::new().head(secs(3))).layer(limit.layer(inner));
    let start = Instant::now();
    let mut call = task::spawn(service.oneshot(request()));
    assert_pending!(call.poll());
    assert_eq!((handle.in_flight(), watch.seen().in_flight), (1, 1));
    let error = poll_fn(|cx| call.enter(|_, call| call.poll(cx))).await.unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Head, secs(3)));
    // The future is not dropped, but holds no permit.
    assert_eq!((handle.in_flight(), watch.seen().in_flight), (0, 0));
    drop(call);
}

#[tokio::test(start_paused = true)]
async fn an_available_response_precedes_the_timer() {
    let (inner, watch) = Strict::holding();
    let service = TimeoutLayer::new(Timeouts::new().head(secs(3)).total(secs(3))).layer(inner);
    let mut call = task::spawn(service.oneshot(request()));
    assert_pending!(call.poll());
    advance(secs(100)).await;
    assert!(watch.end(0, Ok(hello())));
    let response = assert_ready_ok!(call.poll());
    assert_eq!(
        read(response.into_body()).await.unwrap().0,
        b"hello",
        "the last frame is not late either"
    );
}

#[test]
fn a_response_at_the_first_poll_creates_no_timer() {
    // A timer would panic, because there is no runtime.
    let (inner, _watch) = Strict::new();
    let service = TimeoutLayer::http().layer(inner);
    let response = assert_ready_ok!(task::spawn(service.oneshot(request())).poll());
    let mut body = task::spawn(response.into_body());
    assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).unwrap().is_ok());
    assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).is_none());
}

// ===== The request =====

#[tokio::test(start_paused = true)]
async fn the_timeout_of_the_head_begins_when_the_request_has_been_sent() {
    // The upload takes 100 s, with a frame every 2 s.
    for (thinking, late) in [(29, false), (31, true)] {
        let service = TimeoutLayer::http().layer(serve(
            move |request: Request<SendingBody<Paced>>| async move {
                BodyExt::collect(request.into_body()).await?;
                sleep(secs(thinking)).await;
                Ok(Response::new(Full::<bytes::Bytes>::default()))
            },
        ));
        let start = Instant::now();
        let result = service.oneshot(Request::new(Paced::every(secs(2), 50))).await;
        match result {
            Ok(_) => assert!(!late && start.elapsed() == secs(129)),
            Err(error) => {
                assert!(late, "{error}");
                assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Head, secs(130)));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_request_body_has_been_sent() {
    let service =
        TimeoutLayer::http().layer(serve(|request: Request<SendingBody<Paced>>| async move {
            sleep(secs(100)).await;
            drop(request);
            std::future::pending::<Result<Response<Nothing>, _>>().await
        }));
    let start = Instant::now();
    let error = service.oneshot(Request::new(Paced::every(secs(2), 50))).await.unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Head, secs(130)));
}

#[tokio::test(start_paused = true)]
async fn a_request_body_that_stalls_while_it_is_polled_is_ended() {
    let layer = TimeoutLayer::http();
    let handle = layer.handle();
    let service = layer.layer(serve(|request: Request<SendingBody<Paced>>| async move {
        // A client reports this error when the request body has failed.
        let sent = request.into_body().collect().await;
        sent.map_err(|_| Oops("the request broke off"))?;
        Ok(Response::new(Full::<bytes::Bytes>::default()))
    }));
    let start = Instant::now();
    let body = Paced::every(secs(50), 3).then_silent();
    let error = service.oneshot(Request::new(body)).await.unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Sending, secs(210)));
    let snapshot = handle.snapshot();
    assert_eq!((snapshot.timed_out_by(TimeoutPhase::Sending), snapshot.timed_out()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_request_body_that_is_read_slowly_is_not_ended() {
    let service =
        TimeoutLayer::http().layer(serve(|request: Request<SendingBody<Paced>>| async move {
            let mut body = request.into_body();
            while !body.is_end_stream() {
                // A slow reader is not a stall of the request body.
                sleep(secs(299)).await;
                assert!(body.frame().await.unwrap().is_ok());
            }
            Ok(Response::new(Full::<bytes::Bytes>::default()))
        }));
    service.oneshot(Request::new(Paced::every(secs(1), 5))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_body_that_is_no_longer_polled_is_a_failure() {
    let take = |frames: usize| async move {
        let layer = TimeoutLayer::http();
        let handle = layer.handle();
        let service = layer.layer(serve(move |request: Request<SendingBody<Paced>>| async move {
            let mut body = request.into_body();
            for _ in 0..frames {
                assert!(body.frame().await.unwrap().is_ok());
            }
            // The upstream holds the body without reading it, like a client that is still connecting or an upstream
            // that hangs.
            std::future::pending::<()>().await;
            drop(body);
            Ok(Response::new(Full::<bytes::Bytes>::default()))
        }));
        let start = Instant::now();
        let body = Paced::every(secs(1), 50);
        let error = service.oneshot(Request::new(body)).await.unwrap_err();
        assert_eq!(phase_of(&error), TimeoutPhase::Taking);
        assert_eq!(handle.snapshot().timed_out_by(TimeoutPhase::Taking), 1);
        assert!(Outcome::of_error(&*error).is_failure(), "the upstream caused the failure");
        start.elapsed()
    };
    assert_eq!(take(0).await, secs(300));
    assert_eq!(take(9).await, secs(309));
}

#[tokio::test(start_paused = true)]
async fn without_request_idle_a_request_body_may_stall_for_any_time() {
    let layer = TimeoutLayer::http().request_idle(None);
    let service = layer.layer(serve(|request: Request<SendingBody<Paced>>| async move {
        request.into_body().collect().await?;
        Ok(Response::new(Full::<bytes::Bytes>::default()))
    }));
    let body = Paced::every(secs(1000), 3);
    service.oneshot(Request::new(body)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_long_frame_is_split_into_pieces_without_a_change() {
    const LONG: usize = 200_000;
    let long: bytes::Bytes = (0..LONG).map(|n| n as u8).collect::<Vec<_>>().into();
    let whole = long.clone();
    let service =
        TimeoutLayer::http().layer(serve(move |request: Request<SendingBody<ScriptBody>>| {
            let whole = whole.clone();
            async move {
                let mut body = request.into_body();
                let (mut got, mut pieces) = (Vec::new(), 0);
                assert_eq!(
                    (body.size_hint().exact(), body.is_end_stream()),
                    (Some(LONG as u64 + 1), false)
                );
                while let Some(frame) = body.frame().await {
                    match frame?.into_data() {
                        Ok(data) => {
                            assert!(data.len() <= 64 * 1024);
                            (pieces, got) = (pieces + 1, [&got[..], &data].concat());
                            assert_eq!(
                                body.size_hint().exact(),
                                Some((LONG + 1 - got.len()) as u64)
                            );
                        }
                        Err(frame) => assert_eq!(frame.trailers_ref(), Some(&trailers("7"))),
                    }
                }
                assert!(body.is_end_stream());
                assert_eq!((pieces, got.pop()), (5, Some(b'x')));
                assert_eq!(got, whole);
                Ok(Response::new(Full::<bytes::Bytes>::default()))
            }
        }));
    let pieces = [Piece::Data(long), Piece::data("x"), Piece::Trailers(trailers("7"))];
    service.oneshot(Request::new(ScriptBody::new(pieces))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_body_may_stall_after_the_response_head() {
    // As in a bidirectional gRPC stream whose client only receives.
    let (told, mut read) = tokio::sync::mpsc::unbounded_channel();
    let service = TimeoutLayer::http().layer(serve(move |request: Request<SendingBody<Paced>>| {
        let told = told.clone();
        async move {
            tokio::spawn(async move { told.send(drain(request.into_body()).await.1) });
            sleep(secs(30)).await;
            Ok(Response::new(Paced::every(secs(20), 30)))
        }
    }));
    let body = Paced::every(secs(1), 3).then_silent();
    let response = service.oneshot(Request::new(body)).await.unwrap();
    let (frames, end) = drain(response.into_body()).await;
    assert!(end.is_ok());
    assert_eq!(frames, 30);
    assert!(
        read.try_recv().is_err(),
        "the request body is still read after ten minutes of silence"
    );
}

// ===== The response body =====

async fn streaming(layer: TimeoutLayer, body: Paced) -> (usize, Duration, Option<TimeoutPhase>) {
    let (dropped, start) = (body.dropped(), Instant::now());
    let body = Mutex::new(Some(body));
    let body = Arc::new(body);
    let service = layer.layer(serve(move |_: Request<_>| {
        let body = body.lock().unwrap().take().expect("called once");
        async move { Ok(Response::new(body)) }
    }));
    let response = service.oneshot(request()).await;
    let mut body = response.unwrap().into_body();
    let (frames, end) = drain(&mut body).await;
    if end.is_err() {
        assert_eq!(dropped.load(SeqCst), 1, "the inner body is dropped with the error");
        assert!(body.is_end_stream() && body.size_hint().exact() == Some(0));
        assert!(body.frame().await.is_none());
    }
    (frames, start.elapsed(), end.err().as_ref().map(phase_of))
}

#[tokio::test(start_paused = true)]
async fn each_phase_of_a_body_can_be_off() {
    let body = || Paced::at([5, 8, 11, 40].map(secs)).then_silent();
    let with = |timeouts| streaming(TimeoutLayer::new(timeouts), body());
    let none = Timeouts::new();
    assert_eq!(with(none.first_frame(secs(4))).await, (0, secs(4), Some(TimeoutPhase::FirstFrame)));
    assert_eq!(with(none.response_idle(secs(4))).await, (3, secs(15), Some(TimeoutPhase::Idle)));
    let both = none.first_frame(secs(6)).response_idle(secs(30));
    assert_eq!(with(both).await, (4, secs(70), Some(TimeoutPhase::Idle)));
    assert_eq!(with(none.total(secs(10))).await, (2, secs(10), Some(TimeoutPhase::Total)));
    let all = both.total(secs(39)).head(secs(1));
    assert_eq!(with(all).await, (3, secs(39), Some(TimeoutPhase::Total)));
    // If none of these timeouts is set, the call does not end.
    let waiting = tokio::time::timeout(secs(100_000), with(none.head(secs(1)))).await;
    assert!(waiting.is_err());
}

#[tokio::test(start_paused = true)]
async fn gaps_below_the_timeout_do_not_end_a_body() {
    // Twenty gaps, each just below the timeout, with one timer.
    let (frames, _, end) = streaming(
        TimeoutLayer::new(Timeouts::new().first_frame(secs(3)).response_idle(secs(3))),
        Paced::every(ms(2999), 20),
    )
    .await;
    assert_eq!((frames, end), (20, None));
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_is_never_timed_out() {
    let (inner, watch) = Strict::new();
    let pieces = ["a", "b", "c", "d"].map(Piece::data);
    watch.script([Then::Answer(Response::new(ScriptBody::new(pieces)))]);
    let service = TimeoutLayer::http().layer(inner);
    let mut body = service.oneshot(request()).await.unwrap().into_body();
    for _ in 0..4 {
        sleep(secs(3600)).await;
        assert!(body.frame().await.unwrap().is_ok());
    }

    // A reader that waits for a moment after each of its pauses is not cut either.
    let body = Paced::at([0, 3601, 7202].map(secs));
    let body = Arc::new(Mutex::new(Some(body)));
    let service = TimeoutLayer::http().layer(serve(move |_: Request<_>| {
        let body = body.lock().unwrap().take().unwrap();
        async move { Ok(Response::new(body)) }
    }));
    let mut body = service.oneshot(request()).await.unwrap().into_body();
    for _ in 0..3 {
        assert!(body.frame().await.unwrap().is_ok());
        sleep(secs(3600)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_always_has_another_frame_ends_at_the_total() {
    let (inner, watch) = Strict::new();
    let pieces = std::iter::repeat_n(Piece::data("x"), 1000);
    watch.script([Then::Answer(Response::new(ScriptBody::new(pieces)))]);
    let service = TimeoutLayer::new(Timeouts::new().total(secs(10))).layer(inner);
    let mut body = service.oneshot(request()).await.unwrap().into_body();
    let mut frames = 0;
    let error = loop {
        match body.frame().await.unwrap() {
            Ok(_) => frames += 1,
            Err(error) => break error,
        }
        sleep(secs(1)).await;
    };
    assert_eq!((frames, phase_of(&error)), (10, TimeoutPhase::Total));
}

#[tokio::test(start_paused = true)]
async fn trailers_and_size_hint_are_forwarded() {
    let (inner, watch) = Strict::new();
    let pieces = [Piece::data("ab"), Piece::data("cde"), Piece::Trailers(trailers("7"))];
    watch.script([Then::Answer(Response::new(ScriptBody::new(pieces)))]);
    let service = TimeoutLayer::http().layer(inner);
    let body = service.oneshot(request()).await.unwrap().into_body();
    assert_eq!(body.size_hint().exact(), Some(5), "a response of 5 bytes keeps its content-length");
    assert!(!body.is_end_stream());
    assert_eq!(
        read(body.map_err(|_| Oops("")).boxed_unsync()).await.unwrap(),
        (b"abcde".to_vec(), Some(trailers("7")))
    );

    // The same for a request body.
    let service =
        TimeoutLayer::http().layer(serve(|request: Request<SendingBody<ScriptBody>>| async move {
            let body = request.into_body();
            assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some(5), false));
            let sent = body.collect().await?;
            assert_eq!(sent.trailers(), Some(&trailers("7")));
            Ok(Response::new(Full::<bytes::Bytes>::default()))
        }));
    let body = ScriptBody::new([Piece::data("abcde"), Piece::Trailers(trailers("7"))]);
    service.oneshot(Request::new(body)).await.unwrap();
}

// ===== The caller's deadline =====

fn within(time: Duration) -> Request<Nothing> {
    let mut request = request();
    request.extensions_mut().insert(Deadline::after(time));
    request
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_call_and_its_body() {
    let (inner, watch) = Strict::holding();
    let service = TimeoutLayer::http().layer(inner);
    let start = Instant::now();
    let error = service.clone().oneshot(within(secs(2))).await.unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Deadline, secs(2)));
    assert_eq!(watch.seen().in_flight, 0);

    watch.script([Then::Answer(Response::new(ScriptBody::new([Piece::data("a"), Piece::Stuck])))]);
    let start = Instant::now();
    let body = service.oneshot(within(secs(2))).await.unwrap().into_body();
    let (frames, end) = drain(body).await;
    assert_eq!((frames, phase_of(&end.unwrap_err())), (1, TimeoutPhase::Deadline));
    assert_eq!(start.elapsed(), secs(2));
}

#[tokio::test(start_paused = true)]
async fn a_call_past_its_deadline_is_not_begun() {
    let (inner, watch) = Strict::new();
    let layer = TimeoutLayer::http();
    let handle = layer.handle();
    let mut service = tower_test::mock::Spawn::new(layer.layer(inner));
    assert_ready_ok!(service.poll_ready::<Request<Nothing>>());
    assert_eq!(watch.seen().reserved, 1);
    let refused = service.call(within(ms(0))).await;
    assert_eq!(refused_as(refused.map(drop)), RejectedKind::DeadlinePassed);
    let seen = watch.seen();
    assert_eq!((seen.calls, seen.reserved), (0, 0), "the reservation is released");
    assert_eq!(handle.snapshot().rejected_deadline, 1);
}

// ===== Futures that exhaust the coop budget =====

/// Exhausts the coop budget of its task at each poll.
async fn busy<T>() -> T {
    loop {
        tokio::task::consume_budget().await;
    }
}

struct Busy(Pin<Box<dyn Future<Output = ()> + Send>>);

impl Body for Busy {
    type Data = bytes::Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Self::Error>>> {
        self.0.as_mut().poll(cx).map(|()| None)
    }
}

/// Runs a call in a task while the clock advances in steps. Returns its result.
async fn beside<T: Send + 'static>(call: impl Future<Output = T> + Send + 'static) -> T {
    let call = tokio::spawn(call);
    for _ in 0..100 {
        advance(ms(100)).await;
    }
    assert!(call.is_finished());
    call.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_call_that_exhausts_the_coop_budget_times_out() {
    let start = Instant::now();
    let service = TimeoutLayer::new(Timeouts::new().head(secs(3)))
        .layer(serve(|_| busy::<Result<Response<Nothing>, _>>()));
    let (phase, took) = beside(async move {
        let error = service.oneshot(request()).await.unwrap_err();
        (phase_of(&error), start.elapsed())
    })
    .await;
    assert_eq!(phase, TimeoutPhase::Head);
    assert!(took >= secs(3) && took <= secs(4), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn the_drain_of_a_response_that_exhausts_the_coop_budget_ends() {
    let service = RetryLayer::http().backoff(Backoff::constant(ms(100))).layer(serve(
        |request: Request<_>| async move {
            let again = request.extensions().get::<Attempt>().is_some();
            let status = if again { 200 } else { 503 };
            Ok(Response::builder().status(status).body(Busy(Box::pin(busy())))?)
        },
    ));
    let answered = beside(async move { service.oneshot(request()).await.unwrap().status() }).await;
    assert_eq!(answered, 200);
}

/// A service that is ready if the flag is set. Otherwise its `poll_ready` exhausts the coop budget.
#[derive(Clone)]
struct Unready(Arc<AtomicBool>);

impl<B> Service<Request<B>> for Unready {
    type Response = Response<Nothing>;
    type Error = BoxError;
    type Future = Ready<Result<Response<Nothing>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self.0.load(SeqCst) {
            true => Poll::Ready(Ok(())),
            false => pin!(busy()).poll(cx),
        }
    }

    fn call(&mut self, _: Request<B>) -> Self::Future {
        self.0.store(false, SeqCst);
        ready(Ok(Response::builder().status(503).body(Nothing::new()).unwrap()))
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_exhausts_the_coop_budget_before_it_is_ready_times_out() {
    let inner = |is| Unready(Arc::new(AtomicBool::new(is)));
    // The limit is full when it is polled ready, so the call itself waits for the inner service.
    let limit = ConcurrencyLimitLayer::new(1).queue(1, secs(60));
    let first = limit.handle().try_acquire().unwrap();
    let mut parked = limit.layer(inner(false));
    let start = Instant::now();
    let ends = beside(async move {
        ServiceExt::<Request<Nothing>>::ready(&mut parked).await.unwrap();
        let call = parked.call(within(secs(3)));
        drop(first);
        (refused_as(call.await), start.elapsed())
    });
    let (kind, took) = ends.await;
    assert!(kind == RejectedKind::DeadlinePassed && took >= secs(3) && took <= secs(4), "{took:?}");

    let retry = RetryLayer::http().backoff(Backoff::constant(ms(100))).layer(inner(true));
    let start = Instant::now();
    let ends =
        beside(async move { (refused_as(retry.oneshot(within(secs(3))).await), start.elapsed()) });
    let (kind, took) = ends.await;
    assert!(kind == RejectedKind::DeadlinePassed && took >= secs(3) && took <= secs(4), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_exhausts_the_coop_budget_times_out() {
    for (timeouts, phase) in [
        (Timeouts::new().first_frame(secs(3)), TimeoutPhase::FirstFrame),
        (Timeouts::new().total(secs(3)), TimeoutPhase::Total),
    ] {
        let start = Instant::now();
        let service = TimeoutLayer::new(timeouts)
            .layer(serve(|_| async { Ok(Response::new(Busy(Box::pin(busy())))) }));
        let (ended, took) = beside(async move {
            let response = service.oneshot(request()).await.unwrap();
            let end = drain(response.into_body()).await.1;
            (phase_of(&end.unwrap_err()), start.elapsed())
        })
        .await;
        assert_eq!(ended, phase);
        assert!(took >= secs(3) && took <= secs(4), "{took:?}");
    }
}
