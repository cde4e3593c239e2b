//! Open-loop load over TCP: calls start at a fixed rate, regardless of the results of earlier calls.

use std::{collections::BTreeMap, net::SocketAddr};

use buttress::limit::{QueueOrder, adaptive::Knee};
use futures_util::stream;
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use super::*;
use crate::support::alone;

/// Responds within `ms`: half of the time passes before the head, the other half between the chunks of the body.
async fn works(inside: net::Gauge, ms: u64, chunks: u32) -> axum::body::Body {
    let inside = inside.enter();
    let pause = Duration::from_millis(ms / 2) / chunks.max(1);
    sleep(Duration::from_millis(ms / 2)).await;
    axum::body::Body::from_stream(stream::unfold(
        (inside, chunks),
        move |(inside, left)| async move {
            let left = left.checked_sub(1)?;
            sleep(pause).await;
            Some((Ok::<_, BoxError>("tick"), (inside, left)))
        },
    ))
}

/// Serves responses that take 2 to 10 ms: short ones, streams and failures.
fn server(inside: &net::Gauge) -> Router {
    let (a, b, c) = (inside.clone(), inside.clone(), inside.clone());
    let own = StatusCode::INTERNAL_SERVER_ERROR;
    Router::new()
        .route("/short", get(move || works(a, 4, 1)))
        .route("/stream", get(move || works(b, 10, 5)))
        .route("/fails", get(move || async move { (own, works(c, 2, 1).await) }))
}

/// The results of a load.
#[derive(Debug, Default)]
struct Told {
    statuses: BTreeMap<u16, usize>,
    gone: usize,
    errors: Vec<String>,
}

/// Starts `calls` calls, two each millisecond. Every seventh caller hangs up after 3 ms, regardless of the progress of
/// its call.
async fn load(addr: SocketAddr, calls: usize) -> Told {
    const PATHS: [&str; 4] = ["/short", "/stream", "/short", "/fails"];
    let client = client::<http_body_util::Empty<bytes::Bytes>>();
    let mut callers = JoinSet::new();
    let mut ticks = interval(Duration::from_millis(1));
    // Missed ticks are made up for in a burst, which keeps the mean rate.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for nth in 0..calls {
        if nth % 2 == 0 {
            ticks.tick().await;
        }
        let (client, path) = (client.clone(), PATHS[nth % PATHS.len()]);
        callers.spawn(async move {
            let call = async {
                let response = client.request(net::get(addr, path)).await?;
                let (head, body) = response.into_parts();
                let body = body.collect().await?.to_bytes();
                if head.status == StatusCode::SERVICE_UNAVAILABLE {
                    assert!(head.headers.contains_key("retry-after"));
                    assert!(body.starts_with(br#"{"type":"about:blank""#));
                }
                Ok::<_, BoxError>(head.status.as_u16())
            };
            let patience = Duration::from_millis(if nth % 7 == 0 { 3 } else { 10_000 });
            tokio::time::timeout(patience, call).await.ok()
        });
    }
    let mut told = Told::default();
    while let Some(caller) = soon(callers.join_next()).await {
        match caller.unwrap() {
            None => told.gone += 1,
            Some(Ok(status)) => *told.statuses.entry(status).or_default() += 1,
            Some(Err(error)) => told.errors.push(error.to_string()),
        }
    }
    told
}

/// Asserts that no more calls than the limit reached the handlers at once, and that each call got a response of a
/// handler, was rejected by the limit, or was cancelled by its caller.
fn holds(told: &Told, inside: &net::Gauge, limit: usize, calls: usize) {
    assert!(inside.peak() <= limit, "{} of {limit}", inside.peak());
    assert!(told.errors.is_empty(), "{:?}", told.errors);
    let known = told.statuses.keys().all(|status| [200, 500, 503].contains(status));
    assert!(known, "{told:?}");
    assert_eq!(told.statuses.values().sum::<usize>() + told.gone, calls);
}

const CALLS: usize = 3000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_open_loop_load_never_more_than_the_limit_is_in_flight() {
    let _alone = alone().await;
    let inside = net::Gauge::default();
    let limit = ConcurrencyLimitLayer::new(4);
    let handle = limit.handle();
    let addr = serve(server(&inside).layer(limit.respond())).await;
    let told = load(addr, CALLS).await;
    holds(&told, &inside, 4, CALLS);
    assert_eq!(inside.peak(), 4, "the load was too low");
    let shed = told.statuses[&503];
    assert!(shed > 0 && told.statuses[&200] > 0, "{told:?}");
    until(|| inside.now() == 0 && handle.in_flight() == 0).await;
    // Some of the calls that their callers cancelled may have been rejected, too.
    let refused = handle.snapshot().rejected_full as usize;
    assert!((shed..=shed + told.gone).contains(&refused), "{refused}: {told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_open_loop_load_the_queue_is_bounded_and_the_limit_resizes() {
    let _alone = alone().await;
    let inside = net::Gauge::default();
    let limit = ConcurrencyLimitLayer::new(6)
        .queue(8, Duration::from_millis(20))
        .queue_order(QueueOrder::Adaptive(Duration::from_millis(5)));
    let handle = limit.handle();
    let addr = serve(server(&inside).layer(limit.respond())).await;
    let resizes = handle.clone();
    let watched = tokio::spawn(async move {
        let (until, mut longest) = (Instant::now() + Duration::from_secs(1), 0);
        for limit in (1..=6).cycle() {
            if Instant::now() >= until {
                break;
            }
            resizes.set_limit(limit).unwrap();
            longest = longest.max(resizes.snapshot().waiting);
            sleep(Duration::from_millis(3)).await;
        }
        longest
    });
    let told = load(addr, CALLS).await;
    holds(&told, &inside, 6, CALLS);
    assert!((1..=8).contains(&watched.await.unwrap()));
    until(|| inside.now() == 0 && handle.in_flight() == 0).await;
    let left = handle.snapshot();
    assert_eq!(left.waiting, 0);
    assert!(left.wait_p99.is_some_and(|wait| wait < Duration::from_secs(5)), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_open_loop_load_an_adaptive_limit_stays_within_its_bounds() {
    let _alone = alone().await;
    let inside = net::Gauge::default();
    let limit = ConcurrencyLimitLayer::adaptive(Knee::new(2, 2..=9).unwrap());
    let handle = limit.handle();
    let addr = serve(server(&inside).layer(limit.until_body_end().respond())).await;
    let told = load(addr, CALLS).await;
    holds(&told, &inside, 9, CALLS);
    assert!((2..=9).contains(&handle.snapshot().limit));
    until(|| inside.now() == 0 && handle.in_flight() == 0).await;
}
