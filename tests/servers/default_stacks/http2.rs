//! nginx over HTTP/2 without TLS. It sends GOAWAY after a number of requests on one connection.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use buttress::{breaker::CircuitBreakerHandle, outcome::Reason};
use tokio::task::JoinSet;

use super::{
    CALLS,
    report::Report,
    stacks::{self, HttpClient},
};
use crate::support::{
    alone,
    programs::{
        nginx::{BINARY, Nginx},
        skip,
    },
};

/// Number of calls in flight.
const CONCURRENCY: usize = 20;
const REQUESTS_PER_CONNECTION: usize = 100;
/// Minimum number of connections. Below that the test has not met the end of enough connections.
const MIN_CONNECTIONS: usize = CALLS / REQUESTS_PER_CONNECTION / 2;
/// Minimum number of attempts that a GOAWAY ended and the client repeated.
const MIN_REPEATED: usize = 50;

#[tokio::test]
async fn ready_made_client_loses_no_call_when_nginx_sends_goaway() {
    calls_through_goaways(stacks::ready_made(true)).await;
}

#[tokio::test]
async fn hand_built_stack_loses_no_call_when_nginx_sends_goaway() {
    calls_through_goaways(stacks::hand_built(true)).await;
}

async fn calls_through_goaways((client, circuit): (impl HttpClient, CircuitBreakerHandle)) {
    let _alone = alone().await;
    let server =
        format!("keepalive_requests {REQUESTS_PER_CONNECTION}; location / {{ return 200 ok; }}");
    let Some(nginx) = Nginx::start("http2", &server) else { return skip(BINARY) };
    let uri = format!("http://127.0.0.1:{}/", nginx.port());
    let (report, left) = (Report::default(), Arc::new(AtomicUsize::new(CALLS)));
    let mut lanes = JoinSet::new();
    for _ in 0..CONCURRENCY {
        let (client, uri, report, left) =
            (client.clone(), uri.clone(), report.clone(), left.clone());
        lanes.spawn(async move {
            while left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
                report.record(&stacks::get(client.clone(), &uri).await);
            }
        });
    }
    lanes.join_all().await;
    println!("{report}");
    report.assert_all_good(CALLS, &[circuit]);
    let repeated = report.repeated(&[Reason::GoAway]);
    assert!(repeated >= MIN_REPEATED, "only {repeated} attempts were repeated; {report}");

    // The log shows that nginx did close the connections: one line for each request, with the process and the
    // connection.
    let log = nginx.quit();
    let connections: HashSet<_> = log.lines().map(|line| line.split(' ').nth(4)).collect();
    assert!(connections.len() >= MIN_CONNECTIONS, "only {} connections", connections.len());
}
