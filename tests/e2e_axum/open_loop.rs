//! Open-loop load over TCP: callers come when they come, whatever became of the earlier ones.

use std::{collections::BTreeMap, net::SocketAddr};

use buttress::limit::{QueueOrder, adaptive::Knee};
use futures_util::stream;
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use super::*;

/// What takes a while: half of it before the head, half of it while the body goes on.
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

/// Answers of 2 to 10 ms: short, long, streamed, failing of themselves.
fn server(inside: &net::Gauge) -> Router {
    let (a, b, c) = (inside.clone(), inside.clone(), inside.clone());
    let own = StatusCode::INTERNAL_SERVER_ERROR;
    Router::new()
        .route("/short", get(move || works(a, 4, 1)))
        .route("/stream", get(move || works(b, 10, 5)))
        .route("/fails", get(move || async move { (own, works(c, 2, 1).await) }))
}

/// What became of a load.
#[derive(Debug, Default)]
struct Told {
    statuses: BTreeMap<u16, usize>,
    gone: usize,
    errors: Vec<String>,
}

/// So many calls, two each millisecond. Every seventh caller leaves after 3 ms, wherever the answer is.
async fn load(addr: SocketAddr, calls: usize) -> Told {
    const PATHS: [&str; 4] = ["/short", "/stream", "/short", "/fails"];
    let client = client::<http_body_util::Empty<bytes::Bytes>>();
    let mut callers = JoinSet::new();
    let mut ticks = interval(Duration::from_millis(1));
    // Late is late: the load is made up for, and comes in a burst.
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

/// Never more than the limit at once, as the handlers count; nothing but answers and our own refusals.
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
    let inside = net::Gauge::default();
    let limit = ConcurrencyLimitLayer::new(4);
    let handle = limit.handle();
    let addr = serve(server(&inside).layer(limit.respond())).await;
    let told = load(addr, CALLS).await;
    holds(&told, &inside, 4, CALLS);
    assert_eq!(inside.peak(), 4, "the load was too little");
    let shed = told.statuses[&503];
    assert!(shed > 0 && told.statuses[&200] > 0, "{told:?}");
    until(|| inside.now() == 0 && handle.in_flight() == 0).await;
    // Those who left may have been refused, too.
    let refused = handle.snapshot().refused_full as usize;
    assert!((shed..=shed + told.gone).contains(&refused), "{refused}: {told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_open_loop_load_the_queue_is_bounded_and_the_limit_resizes() {
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
    let inside = net::Gauge::default();
    let limit = ConcurrencyLimitLayer::adaptive(Knee::new(2, 2..=9).unwrap());
    let handle = limit.handle();
    let addr = serve(server(&inside).layer(limit.until_body_end().respond())).await;
    let told = load(addr, CALLS).await;
    holds(&told, &inside, 9, CALLS);
    assert!((2..=9).contains(&handle.snapshot().limit));
    until(|| inside.now() == 0 && handle.in_flight() == 0).await;
}
