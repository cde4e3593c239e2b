//! The same upstreams with a client that closes idle connections before the upstream does.

use std::time::Duration;

use buttress::{
    RetryLayer,
    connect::{Client, ConnectLayer, ConnectSnapshot},
};
use tower::Layer;

use super::{
    Gap::{self, *},
    KEEPALIVE, MAX_WAIT, Upstream,
    access_log::AccessLog,
    between,
    client::{Clients, Ending, LANES},
    embedded::Embedded,
    none_is_lost_and_none_doubled, runtime,
};

/// Fewer connections than lanes, so that lanes share them.
const CAP: usize = 24;

fn play(upstream: Box<dyn Upstream>, gaps: &[Gap]) -> (Vec<Ending>, AccessLog, ConnectSnapshot) {
    let runtime = runtime();
    let connections = ConnectLayer::new().max_per_host(CAP).max_idle(KEEPALIVE / 2);
    let handle = connections.handle();
    let client = {
        let _in_runtime = runtime.enter();
        Client::builder(connections).build_http()
    };
    let clients = Clients::over(RetryLayer::http().layer(client), upstream.port());
    for gap in gaps {
        runtime.block_on(async {
            let round = between(*gap, &*upstream, &clients, 500);
            tokio::time::timeout(3 * MAX_WAIT, round).await.expect("no request hangs");
            // Time for the connections of the last responses to become idle.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let seen = handle.snapshot();
            assert!(seen.open <= CAP, "{seen:?}");
            assert_eq!((seen.in_use, seen.waiting, seen.connecting, seen.saturated), (0, 0, 0, 0));
        });
    }
    let seen = handle.snapshot();
    drop(runtime);
    let log = AccessLog::read(&upstream.log());
    let endings = clients.endings();
    none_is_lost_and_none_doubled(&endings, &log);
    (endings, log, seen)
}

/// Returns the requests that were retried or failed although the upstream did not cut them off.
fn met_a_stale_connection<'a>(endings: &'a [Ending], log: &AccessLog) -> Vec<&'a Ending> {
    let stale = |ending: &&Ending| match ending.method {
        "GET" => ending.made > 1,
        "POST" => ending.status.is_none() && log.times(&ending.id) == 0,
        // The upstream cuts off three attempts. If one of them met a stale connection, the log contains fewer.
        _ => log.times(&ending.id) < 3,
    };
    endings.iter().filter(stale).collect()
}

fn judge(upstream: Box<dyn Upstream>) {
    let gaps = [Silence, Stall, Silence, Stall];
    let (endings, log, seen) = play(upstream, &gaps);
    let stale = met_a_stale_connection(&endings, &log);
    assert!(stale.is_empty(), "{} were stale, such as {:?}", stale.len(), stale[0]);
    // The scenario took place: each gap was so long that the server would have closed the idle connections.
    assert!(seen.closed_for_idleness >= (gaps.len() * LANES / 4) as u64, "{seen:?}");
    println!("{} requests, none met a stale connection; {seen:?}", endings.len());
}

#[test]
fn connections_that_nginx_would_close_are_not_reused() {
    judge(super::nginx());
}

#[test]
fn connections_that_are_closed_without_notice_are_not_reused() {
    judge(Box::new(Embedded::start()));
}

#[test]
fn over_bounded_connections_no_get_is_lost_through_reloads() {
    let gaps = [ReloadUnderLoad, StallOverReload, ReloadUnderLoad, Silence, StallOverReload];
    let (endings, log, seen) = play(super::nginx(), &gaps);
    assert!(endings.len() > 2500 && log.connections() > 3 * CAP, "{seen:?}");
    let stale = met_a_stale_connection(&endings, &log).len();
    println!(
        "{} requests, {stale} met a connection that a reload had closed; {seen:?}",
        endings.len()
    );
}
