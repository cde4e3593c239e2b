//! Keep-alives that run out and reloads, against a real nginx: no `GET` is lost, no `POST` is sent twice.
//!
//! The access log is the witness. Where there is no nginx an upstream of our own stands in for it, unless
//! `BUTTRESS_REQUIRE_REAL` is set.
#![cfg(all(feature = "retry", feature = "hyper"))]

mod client;
#[cfg(feature = "connect")]
mod connect;
mod embedded;
mod nginx;
#[path = "../peers/mod.rs"]
mod peers;
mod witness;

use std::{collections::HashSet, fmt::Debug, time::Duration};

use buttress::BoxError;
use bytes::Bytes;
use client::{Clients, Ending, LANES};
use embedded::Embedded;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use nginx::Nginx;
use peers::{MAX_WAIT, block_for, block_until, nginx::BINARY};
use tokio::runtime::{self, Runtime};
use tower::Service;
use witness::Witness;

/// When the upstream closes a connection on which nothing was asked.
const KEEPALIVE: Duration = Duration::from_secs(1);

trait Upstream {
    fn port(&self) -> u16;
    /// Starts anew as `nginx -s reload` does: idle connections are closed, calls under way end first.
    fn reload(&self);
    /// Whether every reload is over: nobody of before serves any more.
    fn is_reloaded(&self) -> bool;
    /// The log, one line a request, once all of them are in it.
    fn log(self: Box<Self>) -> String;
}

fn nginx() -> Box<dyn Upstream> {
    match Nginx::start() {
        Some(nginx) => Box::new(nginx),
        None if peers::are_required() => {
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

/// The stand-in is held to the same, so that it can be relied on where it is needed.
#[test]
fn the_stand_in_tells_the_same() {
    play(Box::new(Embedded::start()), 2_000);
}

// ===== The scenario =====

/// What happens between two rounds of requests.
#[derive(Clone, Copy)]
enum Gap {
    /// The upstream starts anew under load.
    ReloadUnderLoad,
    /// Each lane is silent for about as long as a connection is kept.
    Silence,
    /// The client's only thread is held up until all its connections are closed: it cannot know yet.
    Stall,
    /// The same, by a reload.
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
    judge(&clients.endings(), &Witness::read(&upstream.log()), gets);
}

/// One thread for the client: while it is held up, nobody sees what the upstream closes.
fn runtime() -> Runtime {
    runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// A round of so many `GET`s, and the gap.
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

// ===== The verdict =====

fn judge(endings: &[Ending], witness: &Witness, least_gets: usize) {
    let of = |method: &'static str| endings.iter().filter(move |ending| ending.method == method);

    none_is_lost_and_none_doubled(endings, witness);
    let gets = of("GET").count();
    assert!(gets >= least_gets, "{gets} GETs");

    // That all this was put to the test: connections did go stale under requests of both kinds ...
    let stale_gets = of("GET").filter(|get| get.made > 1).count();
    let stale_posts =
        of("POST").filter(|post| post.status.is_none() && witness.times(&post.id) == 0).count();
    assert!(stale_gets >= LANES, "{stale_gets} GETs met a stale connection");
    assert!(stale_posts >= LANES / 4, "{stale_posts} POSTs met a stale connection");
    // ... POSTs were taken in and never answered, and those that asked for a doubling tell one from two.
    let cut =
        of("POST").filter(|post| post.status.is_none() && witness.times(&post.id) == 1).count();
    assert!(cut >= 10, "{cut} POSTs were cut off after they had been taken in");
    // Five transparent retries and three attempts, because the client does not reveal that the connection was
    // new. Some of these requests may have been lost on a stale connection.
    assert!(of("PUT").all(|put| put.made == 8 && (2..=8).contains(&witness.times(&put.id))));
    assert!(of("PUT").count() >= 5);
    let connections = witness.connections();
    assert!(connections > 4 * LANES, "{connections} connections");
    // Ids are the client's own: none may have been made up twice.
    let ids: HashSet<_> = endings.iter().map(|ending| &ending.id).collect();
    assert_eq!(ids.len(), endings.len());

    println!(
        "{gets} GETs, none lost, {stale_gets} of them sent again; {} POSTs, none doubled, {stale_posts} lost \
         to a stale connection, {cut} cut off; {connections} connections, at most {} requests on one",
        of("POST").count(),
        witness.most_on_one(),
    );
}

fn none_is_lost_and_none_doubled(endings: &[Ending], witness: &Witness) {
    let of = |method: &'static str| endings.iter().filter(move |ending| ending.method == method);

    // Every GET has its answer, and nginx knows of it.
    let lost: Vec<&Ending> = of("GET").filter(|get| get.status != Some(200)).collect();
    assert!(lost.is_empty(), "{} GETs lost, such as {:?}", lost.len(), lost[0]);
    assert!(of("GET").all(|get| witness.times(&get.id) >= 1));

    // No POST came twice; who has an answer came once.
    let doubled: Vec<_> = of("POST").filter(|post| witness.times(&post.id) > 1).collect();
    assert!(doubled.is_empty(), "{} POSTs doubled, such as {:?}", doubled.len(), doubled[0]);
    assert!(of("POST").filter(|post| post.status.is_some()).all(|p| witness.times(&p.id) == 1));
}
