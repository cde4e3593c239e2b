//! Keep-alive times that end and reloads, against a real nginx: no `GET` is lost, and no `POST` is sent twice.
//!
//! The access log states which requests the upstream received. If nginx is not installed, an embedded upstream replaces
//! it, unless `BUTTRESS_REQUIRE_REAL` is set.

mod access_log;
mod client;
mod connect;
mod embedded;
mod real;

use std::{collections::HashSet, fmt::Debug, time::Duration};

use buttress::BoxError;
use bytes::Bytes;
use client::{Clients, Ending, LANES};
use embedded::Embedded;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use real::Nginx;
use tokio::runtime::{self, Runtime};
use tower::Service;

use self::access_log::AccessLog;
use crate::support::programs::{self, MAX_WAIT, block_for, block_until, nginx::BINARY};

/// Time after which the upstream closes an idle connection.
const KEEPALIVE: Duration = Duration::from_secs(1);

trait Upstream {
    fn port(&self) -> u16;
    /// Reloads as `nginx -s reload` does: idle connections are closed, and calls in flight end first.
    fn reload(&self);
    /// Returns whether every reload is complete: no connection of an earlier configuration is served any more.
    fn is_reloaded(&self) -> bool;
    /// Ends the upstream. Returns its log, with one line for each request.
    fn log(self: Box<Self>) -> String;
}

fn nginx() -> Box<dyn Upstream> {
    match Nginx::start() {
        Some(nginx) => Box::new(nginx),
        None if programs::are_required() => {
            panic!("BUTTRESS_REQUIRE_REAL is set, but {BINARY} is not installed")
        }
        None => {
            println!("{BINARY} is not installed: the test uses an embedded upstream");
            Box::new(Embedded::start())
        }
    }
}

#[test]
fn no_get_is_lost_and_no_post_is_doubled_through_expiry_and_reloads() {
    play(nginx(), 10_000);
}

/// The embedded upstream has to cause the same results as nginx, because it replaces nginx.
#[test]
fn the_embedded_upstream_has_the_results_of_nginx() {
    play(Box::new(Embedded::start()), 2_000);
}

// ===== The scenario =====

/// What happens between two rounds of requests.
#[derive(Clone, Copy)]
enum Gap {
    /// The upstream reloads under load.
    ReloadUnderLoad,
    /// Each lane pauses for about the keep-alive time.
    Silence,
    /// The client's only thread is blocked until the upstream has closed all connections, so the client does not know
    /// this.
    Stall,
    /// The same, but by a reload.
    StallOverReload,
}
use Gap::*;

const GAPS: [Gap; 10] = [
    ReloadUnderLoad,
    Silence,
    Stall,
    StallOverReload,
    ReloadUnderLoad,
    Silence,
    ReloadUnderLoad,
    Silence,
    Stall,
    StallOverReload,
];

fn play(upstream: Box<dyn Upstream>, gets: usize) {
    let runtime = runtime();
    let clients = Clients::new(upstream.port());
    for gap in GAPS {
        runtime.block_on(between(gap, &*upstream, &clients, gets / GAPS.len()));
    }
    drop(runtime);
    judge(&clients.endings(), &AccessLog::read(&upstream.log()), gets);
}

/// Creates a runtime with one thread. While this thread is blocked, the client does not see that the upstream closes
/// connections.
fn runtime() -> Runtime {
    runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs a round of this many `GET`s, and then the gap. A reload under load runs within the round.
async fn between<S, B>(gap: Gap, upstream: &dyn Upstream, clients: &Clients<S>, gets: usize)
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = BoxError> + Clone,
    B: Body<Error: Debug>,
{
    let round = clients.round(gets);
    match gap {
        ReloadUnderLoad => {
            let half = clients.round(gets / 2);
            tokio::join!(round, async {
                half.await;
                upstream.reload();
            })
            .0
        }
        Silence => {
            round.await;
            clients.after_silences(KEEPALIVE).await;
        }
        Stall => {
            round.await;
            clients.fill_pool().await;
            block_for(KEEPALIVE + KEEPALIVE / 5);
            clients.burst().await;
        }
        StallOverReload => {
            round.await;
            clients.fill_pool().await;
            upstream.reload();
            block_until(|| upstream.is_reloaded());
            clients.burst().await;
        }
    }
}

// ===== The checks =====

fn judge(endings: &[Ending], log: &AccessLog, least_gets: usize) {
    let of = |method: &'static str| endings.iter().filter(move |ending| ending.method == method);

    none_is_lost_and_none_doubled(endings, log);
    let gets = of("GET").count();
    assert!(gets >= least_gets, "{gets} GETs");

    // The scenario took place: requests of both kinds met stale connections, ...
    let stale_gets = of("GET").filter(|get| get.made > 1).count();
    let stale_posts =
        of("POST").filter(|post| post.status.is_none() && log.times(&post.id) == 0).count();
    assert!(stale_gets >= LANES, "{stale_gets} GETs met a stale connection");
    assert!(stale_posts >= LANES / 4, "{stale_posts} POSTs met a stale connection");
    // ... some POSTs were received and got no response, and the log reveals requests that were sent repeatedly.
    let cut = of("POST").filter(|post| post.status.is_none() && log.times(&post.id) == 1).count();
    assert!(cut >= 10, "{cut} POSTs were cut off after they had been received");
    // Five transparent retries and three attempts, because the client does not reveal that the connection was
    // new. Some of these requests may have been lost on a stale connection.
    assert!(of("PUT").all(|put| put.made == 8 && (2..=8).contains(&log.times(&put.id))));
    assert!(of("PUT").count() >= 5);
    let connections = log.connections();
    assert!(connections > 4 * LANES, "{connections} connections");
    // The client creates the ids, so it has to be checked that they are unique.
    let ids: HashSet<_> = endings.iter().map(|ending| &ending.id).collect();
    assert_eq!(ids.len(), endings.len());

    println!(
        "{gets} GETs, none lost, {stale_gets} of them sent again; {} POSTs, none doubled, {stale_posts} lost \
         to a stale connection, {cut} cut off; {connections} connections, at most {} requests on one",
        of("POST").count(),
        log.most_on_one(),
    );
}

fn none_is_lost_and_none_doubled(endings: &[Ending], log: &AccessLog) {
    let of = |method: &'static str| endings.iter().filter(move |ending| ending.method == method);

    // Every GET got its response, and the log contains it.
    let lost: Vec<&Ending> = of("GET").filter(|get| get.status != Some(200)).collect();
    assert!(lost.is_empty(), "{} GETs lost, such as {:?}", lost.len(), lost[0]);
    assert!(of("GET").all(|get| log.times(&get.id) >= 1));

    // The log contains no POST twice, and each POST that got a response exactly once.
    let doubled: Vec<_> = of("POST").filter(|post| log.times(&post.id) > 1).collect();
    assert!(doubled.is_empty(), "{} POSTs doubled, such as {:?}", doubled.len(), doubled[0]);
    assert!(of("POST").filter(|post| post.status.is_some()).all(|p| log.times(&p.id) == 1));
}
