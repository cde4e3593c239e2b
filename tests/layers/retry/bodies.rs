//! Request bodies: replayed, or passed through without a replay.

use std::{
    marker::PhantomPinned,
    pin::Pin,
    sync::{Arc, Mutex, atomic::Ordering::SeqCst},
    task::{Context, Poll},
};

use buttress::{
    Attempts, Backoff, BoxError, RetryLayer,
    retry::{GiveUpReason, ReplayBody},
};
use bytes::{Buf, Bytes};
use http::{HeaderMap, Request};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use proptest::prelude::*;
use tokio_test::task;
use tower::{Layer, service_fn};

use super::fixtures::*;

fn layer() -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(ms(1))).without_budget()
}

// ===== Random frames, caps and ends of attempts =====

/// The part of the body that an attempt read before it failed.
#[derive(Debug, Default)]
struct Read {
    data: Vec<u8>,
    trailers: Option<HeaderMap>,
    ended: bool,
}

/// Reads this number of frames, and checks the size hint and `is_end_stream` of the body before each frame.
async fn read_some(body: ReplayBody<ScriptBody>, frames: usize, whole: u64, tells: bool) -> Read {
    let mut body = std::pin::pin!(body);
    let mut read = Read::default();
    for _ in 0..frames {
        let so_far = read.data.len() as u64;
        let hint = body.size_hint();
        if tells {
            assert_eq!(hint.exact(), Some(whole - so_far));
        }
        assert!(hint.lower() <= whole - so_far);
        let claims_end = body.is_end_stream();
        match body.frame().await {
            None => {
                read.ended = true;
                break;
            }
            Some(frame) => {
                assert!(!claims_end, "a frame followed the reported end");
                let frame = frame.unwrap();
                match frame.into_data() {
                    Ok(data) => read.data.extend_from_slice(&data),
                    Err(frame) => read.trailers = frame.into_trailers().ok(),
                }
            }
        }
    }
    read
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn replayed_body_equals_the_sent_body(
        // Few pieces, or so many that the saved request gathers them.
        sizes in prop_oneof![
            proptest::collection::vec(0usize..40, 0..7),
            proptest::collection::vec(0usize..40, 30..70),
        ],
        ends_with_trailers: bool,
        tells: bool,
        cap in prop_oneof![0u64..160, 0u64..2000],
        stops in proptest::collection::vec(prop_oneof![0usize..10, 25usize..75], 1..5),
    ) {
        let whole: Vec<u8> = (0..sizes.iter().sum::<usize>()).map(|n| n as u8).collect();
        let end = ends_with_trailers.then(|| map(&[("x-sum", "1"), ("x-also", "2")]));
        let mut rest = Bytes::from(whole.clone());
        let mut pieces: Vec<_> =
            sizes.iter().map(|size| Piece::Data(rest.split_to(*size))).collect();
        pieces.extend(end.clone().map(Piece::Trailers));
        let nothing = pieces.is_empty();
        let body = if tells { ScriptBody::new(pieces) } else { ScriptBody::new(pieces).without_hints() };

        let reads = Arc::new(Mutex::new(Vec::new()));
        let (seen, plan, size) = (reads.clone(), stops.clone(), whole.len() as u64);
        let inner = Inner::<ScriptBody>::with(move |n, request| {
            let (seen, stop) = (seen.clone(), plan[n as usize - 1]);
            async move {
                let read = read_some(request.into_body(), stop, size, tells).await;
                seen.lock().unwrap().push(read);
                Ok(status(503))
            }
        });
        let layer = layer().attempts(stops.len() as u32).max_replay_bytes(cap);
        let told = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
            .block_on(async { Attempts::of(&send(&layer.layer(inner), put(body)).await.unwrap()) });

        let reads = reads.lock().unwrap();
        let known_over = tells && cap > 0 && size > cap;
        let mut most = 0;
        for (n, read) in reads.iter().enumerate() {
            prop_assert!(whole.starts_with(&read.data), "attempt {n}");
            if read.trailers.is_some() || read.ended {
                prop_assert_eq!(read.data.len(), whole.len());
                prop_assert_eq!(&read.trailers, &end);
            }
            most = most.max(read.data.len() as u64);
            // A body whose known size exceeds the cap is replayed only if no attempt has read data of it.
            let again = (tells && nothing) || most <= if known_over { 0 } else { cap };
            let last = n + 1 == stops.len();
            prop_assert_eq!(reads.len() > n + 1, again && !last, "attempt {}", n);
            if n + 1 == reads.len() && stops.len() > 1 {
                let stop = if again { GiveUpReason::AttemptsUsedUp } else { GiveUpReason::BodyGone };
                prop_assert_eq!(told.stop, stop);
            }
        }
    }
}

// ===== Bodies above the cap =====

#[tokio::test(start_paused = true)]
async fn a_body_over_the_cap_continues_and_is_not_retried() {
    let kib = || Piece::Data(Bytes::from(vec![7; 1024]));
    for answer in [503, 200] {
        let inner = Inner::<ScriptBody>::with(move |_, request| async move {
            assert_eq!(format!("{:?}", request.body()), "ReplayBody(replayable)");
            let (data, end) = read(request.into_body()).await;
            assert_eq!((data.len(), end), (65 * 1024, Some(map(&[("x-sum", "1")]))));
            Ok(status(answer))
        });
        let pieces = (0..65).map(|_| kib()).chain([trailers(&[("x-sum", "1")])]);
        let response = send(&layer().layer(inner), put(ScriptBody::new(pieces).without_hints()))
            .await
            .unwrap();
        assert_eq!(response.status(), answer);
        let stop = if answer == 503 { GiveUpReason::BodyGone } else { GiveUpReason::Responded };
        assert_eq!((Attempts::of(&response).made, Attempts::of(&response).stop), (1, stop));
    }
    // A body of the size of the cap is saved.
    let inner: Inner = Inner::new(|n| Ok(status(if n == 1 { 503 } else { 200 })));
    let body = ScriptBody::new((0..64).map(|_| kib())).without_hints();
    let response = send(&layer().layer(inner), put(body)).await.unwrap();
    assert_eq!(Attempts::of(&response).made, 2);
}

#[tokio::test(start_paused = true)]
async fn a_body_known_to_be_over_the_cap_is_not_saved() {
    let inner = Inner::<ScriptBody>::with(|_, request| async move {
        assert_eq!(request.body().size_hint().exact(), Some(11));
        let (data, end) = read(request.into_body()).await;
        assert_eq!((&data[..], end), (&b"hello world"[..], Some(map(&[("x-sum", "1")]))));
        Ok(status(503))
    });
    let body = ScriptBody::new([data("hello "), data("world"), trailers(&[("x-sum", "1")])]);
    let service = layer().max_replay_bytes(10).layer(inner);
    let response = send(&service, put(body)).await.unwrap();
    assert_eq!(Attempts::of(&response).stop, GiveUpReason::BodyGone);
}

/// A body above the cap is not saved. It can be sent again until an attempt reads data of it.
#[tokio::test(start_paused = true)]
async fn an_unread_post_is_retried_whatever_its_size() {
    for touched in [false, true] {
        let inner = Inner::<ScriptBody>::with(move |n, request| async move {
            let mut body = request.into_body();
            assert_eq!(body.size_hint().exact(), Some(11));
            if n == 1 {
                if touched {
                    body.frame().await.unwrap().unwrap();
                }
                return Err(io(std::io::ErrorKind::ConnectionRefused));
            }
            assert_eq!(read(body).await.0, "hello world");
            Ok(status(200))
        });
        let body = ScriptBody::new([data("hello "), data("world")]);
        let result = send(&layer().max_replay_bytes(10).layer(inner), post(body)).await;
        let told = told(&result);
        let expected =
            if touched { (1, GiveUpReason::BodyGone) } else { (2, GiveUpReason::Responded) };
        assert_eq!((told.made, told.stop), expected);
    }
}

// ===== Incomplete bodies =====

#[tokio::test(start_paused = true)]
async fn a_body_still_streaming_is_not_sent_twice() {
    // The server responds early, and the connection continues to send the body.
    let held = Arc::new(Mutex::new(Vec::new()));
    let keep = held.clone();
    let inner = Inner::<ScriptBody>::with(move |_, request| {
        let keep = keep.clone();
        async move {
            let mut body = request.into_body();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
            keep.lock().unwrap().push(body);
            Ok(status(503))
        }
    });
    let body = ScriptBody::new([data("one"), data("two")]).without_hints();
    let response = send(&layer().layer(inner), put(body)).await.unwrap();
    assert_eq!(Attempts::of(&response).stop, GiveUpReason::StillSending);
    // The connection receives the rest of the body.
    let body = held.lock().unwrap().pop().unwrap();
    assert_eq!(read(body).await.0, "two");
}

/// A connection reports its end before it drops the body. The reader of the old attempt is then cut off.
#[tokio::test(start_paused = true)]
async fn a_body_whose_connection_has_ended_is_taken_over() {
    type Error = fn() -> BoxError;
    let cases: [(Error, bool); 3] = [
        (|| io(std::io::ErrorKind::ConnectionReset), true),
        (|| io(std::io::ErrorKind::ConnectionRefused), true),
        // After a timeout the connection may continue to send the body.
        (|| io(std::io::ErrorKind::TimedOut), false),
    ];
    for (error, again) in cases {
        let held = Arc::new(Mutex::new(None));
        let keep = held.clone();
        let inner = Inner::<ScriptBody>::with(move |n, request| {
            let keep = keep.clone();
            async move {
                let mut body = request.into_body();
                if n == 1 {
                    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
                    *keep.lock().unwrap() = Some(body);
                    return Err(error());
                }
                assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
                if let Some(old) = keep.lock().unwrap().take() {
                    let mut old = task::spawn(old);
                    let next = old.enter(|cx, body| body.poll_frame(cx).is_pending());
                    assert!(
                        next && !old.is_end_stream(),
                        "the old reader has neither a frame nor an end"
                    );
                }
                assert_eq!(read(body).await.0, "two");
                Ok(status(if n == 2 { 503 } else { 200 }))
            }
        });
        let body = ScriptBody::new([data("one"), data("two")]);
        let result = send(&layer().layer(inner), put(body)).await;
        if again {
            assert_eq!(told(&result).made, 3);
        } else {
            assert_eq!((told(&result).made, told(&result).stop), (1, GiveUpReason::StillSending));
            let body = held.lock().unwrap().take().unwrap();
            assert_eq!(read(body).await.0, "two");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_read_to_its_end_is_replayed_although_it_is_not_dropped() {
    let held = Arc::new(Mutex::new(Vec::new()));
    let keep = held.clone();
    let inner = Inner::<ScriptBody>::with(move |n, request| {
        let keep = keep.clone();
        async move {
            let mut body = request.into_body();
            let (data, end) = read(&mut body).await;
            assert_eq!((&data[..], end.is_some()), (&b"one"[..], true));
            keep.lock().unwrap().push(body);
            Ok(status(if n < 3 { 503 } else { 200 }))
        }
    });
    let body = ScriptBody::new([data("one"), trailers(&[("x-sum", "1")])]).without_hints();
    let response = send(&layer().layer(inner), put(body)).await.unwrap();
    assert_eq!(Attempts::of(&response).made, 3);
    let mut held = std::mem::take(&mut *held.lock().unwrap());
    assert!(held[0].frame().await.is_none(), "the old reader is cut off");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_fails_is_not_replayed() {
    let inner = Inner::<ScriptBody>::with(|_, request| async move {
        let mut body = request.into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
        assert_eq!(body.frame().await.unwrap().unwrap_err(), Oops("body"));
        assert!(body.frame().await.is_none());
        Err(io(std::io::ErrorKind::ConnectionReset))
    });
    let body = ScriptBody::new([data("one"), Piece::Error]).without_hints();
    let result = send(&layer().layer(inner), put(body)).await;
    assert_eq!((told(&result).made, told(&result).stop), (1, GiveUpReason::BodyGone));
}

/// The second attempt continues to read a slow body where the first one stopped.
#[tokio::test(start_paused = true)]
async fn a_pending_body_is_taken_over_with_its_waker() {
    let inner = Inner::<ScriptBody>::with(|n, request| async move {
        let mut body = request.into_body();
        if n == 1 {
            body.frame().await.unwrap().unwrap();
            // The attempt ends while the body is pending.
            tokio::time::timeout(ms(10), body.frame()).await.unwrap_err();
            return Err(io(std::io::ErrorKind::ConnectionReset));
        }
        assert_eq!(read(body).await.0, "onetwo");
        Ok(status(200))
    });
    let body = ScriptBody::new([data("one"), Piece::Pause(ms(500)), data("two")]).without_hints();
    let watch = body.reads();
    let response = send(&layer().layer(inner), put(body)).await.unwrap();
    assert_eq!(Attempts::of(&response).made, 2);
    assert_eq!(watch.frames.load(SeqCst), 2, "each frame is read once");
}

/// The saved request is dropped with the call.
#[tokio::test(start_paused = true)]
async fn the_saved_request_is_dropped_with_the_call() {
    let inner: Inner = Inner::new(|_| Ok(status(503)));
    let service = layer().layer(inner);
    let body = ScriptBody::text("kept").without_hints();
    let watch = body.reads();
    send(&service, put(body)).await.unwrap();
    assert_eq!(Arc::strong_count(&watch), 1);
}

// ===== Other types of bodies =====

pin_project_lite::pin_project! {
    struct Pinned {
        script: ScriptBody,
        #[pin]
        _pinned: PhantomPinned,
    }
}

impl Body for Pinned {
    type Data = Bytes;
    type Error = Oops;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Oops>>> {
        Pin::new(self.project().script).poll_frame(cx)
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_need_not_be_unpin() {
    for cap in [100, 0] {
        let inner = Inner::<Pinned>::with(|n, request| async move {
            let body = std::pin::pin!(request.into_body());
            if n == 1 {
                return Err(io(std::io::ErrorKind::ConnectionRefused));
            }
            assert_eq!(read(body).await.0, "pinned");
            Ok(status(200))
        });
        let body = Pinned { script: ScriptBody::text("pinned"), _pinned: PhantomPinned };
        let request = Request::put("/").body(body).unwrap();
        let response = send(&layer().max_replay_bytes(cap).layer(inner), request).await.unwrap();
        assert_eq!(Attempts::of(&response).made, 2);
    }
}

#[tokio::test(start_paused = true)]
async fn data_of_other_types_is_copied_once() {
    type Odd = Full<bytes::buf::Chain<Bytes, Bytes>>;
    let service = layer().layer(service_fn(|request: Request<ReplayBody<Odd>>| async move {
        let again = request.extensions().get::<buttress::retry::Attempt>().is_some();
        assert_eq!(read(request.into_body()).await.0, "one, two");
        Ok::<_, BoxError>(status(if again { 200 } else { 503 }))
    }));
    let odd = Bytes::from("one, ").chain(Bytes::from("two"));
    let response = send(&service, Request::put("/").body(Odd::new(odd)).unwrap()).await.unwrap();
    assert_eq!(Attempts::of(&response).made, 2);
}

/// The connection is reset, but the task that sends the body still reads it. The frames that this task reads during the
/// delay must not be missing in the next attempt.
#[tokio::test(start_paused = true)]
async fn frames_that_are_read_during_the_delay_are_replayed() {
    let sent = Arc::new(Mutex::new(None));
    let told = sent.clone();
    let inner: Inner = Inner::with(move |n, request| {
        let told = told.clone();
        async move {
            let mut body = request.into_body();
            if n == 1 {
                let _ = body.frame().await;
                tokio::spawn(async move {
                    tokio::time::sleep(ms(10)).await;
                    while let Some(Ok(_)) = body.frame().await {}
                });
                return Err(io(std::io::ErrorKind::ConnectionReset));
            }
            *told.lock().unwrap() = Some(body.collect().await?.to_bytes());
            Ok(status(200))
        }
    });
    let layer = RetryLayer::http()
        .max_replay_bytes(10)
        .backoff(Backoff::constant(ms(100)).without_jitter());
    let body = [data("12345"), data("67890"), data("abc"), Piece::Pause(ms(200)), data("def")];
    let response =
        send(&layer.layer(inner), put(ScriptBody::new(body).without_hints())).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(sent.lock().unwrap().as_deref(), Some(&b"1234567890abcdef"[..]));
}
