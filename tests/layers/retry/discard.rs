//! Discarded responses: drained or dropped.

use std::sync::{Arc, Mutex, atomic::Ordering::SeqCst};

use buttress::{Attempts, Backoff, ConcurrencyLimitLayer, RetryLayer};
use bytes::Bytes;
use tokio::time::Instant;
use tower::{Layer, ServiceBuilder};

use super::fixtures::*;

/// Makes a call whose first response has this body and is discarded. Returns the time in milliseconds, and the frames
/// and bytes that were read of the body. Asserts that the body is dropped before the second attempt.
async fn discard(pieces: Vec<Piece>, tells: bool) -> (u128, u32, u32) {
    let watched = Arc::new(Mutex::new(None));
    let seen = watched.clone();
    let inner: Inner = Inner::new(move |n| {
        let mut last = seen.lock().unwrap();
        if n == 2 {
            let last: &Arc<BodyReads> = last.as_ref().unwrap();
            assert_eq!(Arc::strong_count(last), 1, "the body is dropped before the next attempt");
            return Ok(status(200));
        }
        let body = ScriptBody::new(pieces.clone());
        let body = if tells { body } else { body.without_hints() };
        *last = Some(body.reads());
        Ok(status(503).map(|_| body))
    });
    let layer = RetryLayer::http().backoff(Backoff::constant(ms(0)));
    let start = Instant::now();
    let response = send(&layer.layer(inner), get()).await.unwrap();
    assert_eq!(Attempts::of(&response).made, 2);
    let watched = watched.lock().unwrap().take().unwrap();
    (start.elapsed().as_millis(), watched.frames.load(SeqCst), watched.bytes.load(SeqCst))
}

fn chunk(kib: usize) -> Piece {
    Piece::Data(Bytes::from(vec![7; kib * 1024]))
}

#[tokio::test(start_paused = true)]
async fn a_small_response_is_drained() {
    let end = trailers(&[("x-sum", "1")]);
    for tells in [true, false] {
        let pieces = vec![chunk(1), Piece::Pause(ms(20)), chunk(30), end.clone()];
        assert_eq!(discard(pieces, tells).await, (20, 3, 31 * 1024), "{tells}");
    }
    assert_eq!(discard(vec![chunk(64)], true).await, (0, 1, 64 * 1024), "64 KiB are drained");
    assert_eq!(discard(Vec::new(), false).await, (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_large_response_is_dropped() {
    assert_eq!(
        discard(vec![chunk(65)], true).await,
        (0, 0, 0),
        "a body that is known to be too large is not read"
    );
    let (took, _, bytes) = discard(vec![Piece::Endless(Bytes::from(vec![7; 1000]))], false).await;
    assert_eq!(took, 0);
    assert!((64_000..=67_000).contains(&bytes), "{bytes}");
}

/// This applies to a body of unknown length, too.
#[tokio::test(start_paused = true)]
async fn without_drain_bytes_every_response_is_dropped_at_once() {
    for tells in [true, false] {
        let inner: Inner = Inner::new(move |n| {
            let body = ScriptBody::new([Piece::Pause(ms(40)), data("busy")]);
            let body = if tells { body } else { body.without_hints() };
            Ok(if n == 1 { status(503).map(|_| body) } else { status(200) })
        });
        let layer = RetryLayer::http().max_drain_bytes(0).backoff(Backoff::constant(ms(0)));
        let start = Instant::now();
        let response = send(&layer.layer(inner), get()).await.unwrap();
        assert_eq!((Attempts::of(&response).made, start.elapsed()), (2, ms(0)), "{tells}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_drain_of_a_body_of_empty_frames_ends() {
    let (took, frames, bytes) = discard(vec![Piece::Endless(Bytes::new())], false).await;
    assert_eq!((took, bytes), (0, 0));
    assert!(frames <= 2048, "{frames}");
}

#[tokio::test(start_paused = true)]
async fn the_drain_of_a_stuck_body_ends_after_50_ms() {
    let (took, frames, _) = discard(vec![chunk(1), Piece::Stuck], false).await;
    assert!((50..=51).contains(&took), "{took}");
    assert_eq!(frames, 1);
    // The time bounds the whole drain of a slow body.
    let slow = [Piece::Pause(ms(20)), chunk(1)];
    let (took, frames, _) = discard(slow.iter().cloned().cycle().take(20).collect(), true).await;
    assert!((50..=51).contains(&took), "{took}");
    assert_eq!(frames, 2);
}

#[tokio::test(start_paused = true)]
async fn an_erroring_body_is_dropped() {
    assert_eq!(discard(vec![chunk(1), Piece::Error], true).await, (0, 1, 1024));
}

/// The time of the drain is part of the delay, not added to it.
#[tokio::test(start_paused = true)]
async fn the_time_of_the_drain_is_a_part_of_the_delay() {
    let inner: Inner = Inner::new(|n| {
        Ok(if n == 1 { status(503).map(|_| ScriptBody::new([Piece::Stuck])) } else { status(200) })
    });
    let layer = RetryLayer::http().backoff(Backoff::constant(ms(80)).without_jitter());
    let start = Instant::now();
    send(&layer.layer(inner), get()).await.unwrap();
    assert!(start.elapsed() >= ms(80) && start.elapsed() <= ms(82), "{:?}", start.elapsed());
}

/// The inner limit has one permit. Another call can acquire it during the delay, whether the discarded response is
/// empty, stuck, too large, or an error.
#[tokio::test(start_paused = true)]
async fn the_permit_of_an_inner_limit_is_free_during_the_backoff() {
    type First = fn() -> Answer;
    let firsts: [First; 4] = [
        || Ok(status(503)),
        || Ok(status(503).map(|_| ScriptBody::new([Piece::Stuck]))),
        || Ok(status(503).map(|_| ScriptBody::new([chunk(65)]))),
        || Err(io(std::io::ErrorKind::ConnectionReset)),
    ];
    for first in firsts {
        let inner: Inner = Inner::new(move |n| if n == 1 { first() } else { Ok(status(200)) });
        let log = inner.log.clone();
        let service = ServiceBuilder::new()
            .layer(RetryLayer::http().backoff(Backoff::constant(ms(1000)).without_jitter()))
            .layer(ConcurrencyLimitLayer::new(1))
            .service(inner);
        let retried = tokio::spawn(tower::ServiceExt::oneshot(service.clone(), get()));
        tokio::time::sleep(ms(60)).await;
        assert_eq!((log.calls(), log.taken()), (1, (0, 0)));
        assert_eq!(send(&service, get()).await.unwrap().status(), 200, "the permit is free");
        let response = retried.await.unwrap().unwrap();
        assert_eq!(Attempts::of(&response).made, 2);
    }
}

/// The drain yields regularly, whatever its bound, so that its timer and other tasks run.
#[tokio::test]
async fn a_body_that_is_always_ready_lets_other_tasks_run() {
    let watched = Arc::new(Mutex::new(None));
    let seen = watched.clone();
    let inner: Inner = Inner::new(move |n| {
        if n == 2 {
            return Ok(status(200));
        }
        let body = ScriptBody::new(vec![chunk(1); 10_000]).without_hints();
        *seen.lock().unwrap() = Some(body.reads());
        Ok(status(503).map(|_| body))
    });
    let layer = RetryLayer::http().max_drain_bytes(u64::MAX).backoff(Backoff::constant(ms(0)));
    let service = layer.layer(inner);
    let mut call = tokio_test::task::spawn(send(&service, get()));
    tokio_test::assert_pending!(call.poll());
    let frames = watched.lock().unwrap().as_ref().unwrap().frames.load(SeqCst);
    assert!(frames < 1000, "{frames}");
}
