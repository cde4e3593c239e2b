//! The same upstreams, over connections that end before their server ends them.

use std::time::Duration;

use buttress::{
    RetryLayer,
    connect::{Client, ConnectLayer, ConnectSnapshot},
};
use tower::Layer;

use super::{
    Gap::{self, *},
    KEEPALIVE, MAX_WAIT, Upstream, between,
    client::{Clients, Ending, LANES},
    embedded::Embedded,
    none_is_lost_and_none_doubled, runtime,
    witness::Witness,
};

/// Fewer than there are lanes: they share.
const CAP: usize = 24;

fn play(upstream: Box<dyn Upstream>, gaps: &[Gap]) -> (Vec<Ending>, Witness, ConnectSnapshot) {
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
            // As the server's, but to be sure.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let seen = handle.snapshot();
            assert!(seen.open <= CAP, "{seen:?}");
            assert_eq!((seen.in_use, seen.waiting, seen.connecting, seen.saturated), (0, 0, 0, 0));
        });
    }
    let seen = handle.snapshot();
    drop(runtime);
    let witness = Witness::read(&upstream.log());
    let endings = clients.endings();
    none_is_lost_and_none_doubled(&endings, &witness);
    (endings, witness, seen)
}

/// Who was sent again, or failed, though the upstream cut nothing off on purpose.
fn met_a_stale_connection<'a>(endings: &'a [Ending], witness: &Witness) -> Vec<&'a Ending> {
    let stale = |ending: &&Ending| match ending.method {
        "GET" => ending.made > 1,
        "POST" => ending.status.is_none() && witness.times(&ending.id) == 0,
        // Each is cut off three times: one that met a stale connection was seen less often.
        _ => witness.times(&ending.id) < 3,
    };
    endings.iter().filter(stale).collect()
}

fn judge(upstream: Box<dyn Upstream>) {
    let gaps = [Silence, Stall, Silence, Stall];
    let (endings, witness, seen) = play(upstream, &gaps);
    let stale = met_a_stale_connection(&endings, &witness);
    assert!(stale.is_empty(), "{} met one, such as {:?}", stale.len(), stale[0]);
    // That it was put to the test: each gap was long enough for the server to close them all.
    assert!(seen.closed_for_idleness >= (gaps.len() * LANES / 4) as u64, "{seen:?}");
    println!("{} requests, none met a stale connection; {seen:?}", endings.len());
}

#[test]
fn connections_that_nginx_would_close_are_not_reused() {
    judge(super::nginx());
}

#[test]
fn connections_that_are_closed_without_a_word_are_not_reused() {
    judge(Box::new(Embedded::start()));
}

#[test]
fn over_bounded_connections_no_get_is_lost_through_reloads() {
    let gaps = [ReloadUnderLoad, StallOverReload, ReloadUnderLoad, Silence, StallOverReload];
    let (endings, witness, seen) = play(super::nginx(), &gaps);
    assert!(endings.len() > 2500 && witness.connections() > 3 * CAP, "{seen:?}");
    let stale = met_a_stale_connection(&endings, &witness).len();
    println!(
        "{} requests, {stale} met a connection that a reload had closed; {seen:?}",
        endings.len()
    );
}
