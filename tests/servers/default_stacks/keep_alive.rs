//! HTTP/1.1 servers that close an idle connection at the moment at which the next call uses it.

use std::time::Duration;

use buttress::breaker::CircuitBreakerHandle;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use super::{
    CALLS,
    report::Report,
    scripts::Script,
    stacks::{self, HttpClient},
};
use crate::support::{
    alone,
    programs::{
        MAX_WAIT, block_for,
        nginx::{BINARY, Nginx},
        skip,
    },
};

/// Maximum distance between the end of the keep-alive time and the next call.
const MAX_OFFSET: Duration = Duration::from_millis(5);
/// Number of calls that are made at once, each over a connection of its own. Their responses have to arrive within a
/// few milliseconds, so that the keep-alive times of the connections end together.
const GROUP_SIZE: usize = 32;
/// Number of groups for each second of the keep-alive time. Each group makes its calls at another moment.
const GROUPS_PER_SECOND: usize = 16;
/// Number of measurements of the keep-alive time, and the time from one to the next.
const MEASUREMENTS: u32 = 8;
const MEASUREMENT_INTERVAL: Duration = Duration::from_millis(50);
/// Minimum number of attempts on a closed connection. Below that the test has not met the case.
const MIN_STALE_CONNECTIONS: usize = 100;

#[tokio::test]
async fn ready_made_client_loses_no_call_to_connections_that_nginx_closes() {
    let Some(nginx) = nginx() else { return skip(BINARY) };
    calls_at_the_end_of_keep_alive(|| stacks::ready_made(false), nginx.port()).await;
}

#[tokio::test]
async fn hand_built_stack_loses_no_call_to_connections_that_nginx_closes() {
    let Some(nginx) = nginx() else { return skip(BINARY) };
    calls_at_the_end_of_keep_alive(|| stacks::hand_built(false), nginx.port()).await;
}

#[tokio::test]
async fn ready_made_client_loses_no_call_to_connections_that_node_closes() {
    let Some(node) = Script::node() else { return skip("node") };
    calls_at_the_end_of_keep_alive(|| stacks::ready_made(false), node.addr().port()).await;
}

#[tokio::test]
async fn hand_built_stack_loses_no_call_to_connections_that_node_closes() {
    let Some(node) = Script::node() else { return skip("node") };
    calls_at_the_end_of_keep_alive(|| stacks::hand_built(false), node.addr().port()).await;
}

fn nginx() -> Option<Nginx> {
    Nginx::start("", "keepalive_timeout 1s; location / { return 200 ok; }")
}

/// Each group has a client of its own, with its own connections. It repeats its calls when the keep-alive time since
/// their last responses ends, plus an offset that sweeps over the range.
///
/// All clients run on one thread, which is blocked in the milliseconds before the calls, as it may be on a busy
/// machine. The client then does not see that the server closes a connection in this time, and uses the connection
/// again. On a thread that is not blocked fewer than ten of 10,000 calls meet the case.
async fn calls_at_the_end_of_keep_alive<S: HttpClient>(
    client: impl Fn() -> (S, CircuitBreakerHandle),
    port: u16,
) {
    let _alone = alone().await;
    let keep_alive = keep_alive_time(port).await;
    let groups = GROUPS_PER_SECOND * keep_alive.as_secs().max(1) as usize;
    let rounds = CALLS.div_ceil(groups * GROUP_SIZE);
    let (report, uri) = (Report::default(), format!("http://127.0.0.1:{port}/"));
    let (mut running, mut circuits) = (JoinSet::new(), Vec::new());
    for group in 0..groups {
        let (client, circuit) = client();
        circuits.push(circuit);
        let (report, uri) = (report.clone(), uri.clone());
        running.spawn(async move {
            sleep(keep_alive * group as u32 / groups as u32).await;
            for round in 0..rounds {
                let mut calls = JoinSet::new();
                for _ in 0..GROUP_SIZE {
                    let (client, uri, report) = (client.clone(), uri.clone(), report.clone());
                    calls.spawn(async move { report.record(&stacks::get(client, &uri).await) });
                }
                calls.join_all().await;
                let next = Instant::now() + keep_alive - MAX_OFFSET + offset(group + round);
                sleep_until(next - 2 * MAX_OFFSET).await;
                block_for(next.saturating_duration_since(Instant::now()));
            }
        });
    }
    running.join_all().await;
    println!("keep-alive time {keep_alive:?}; {report}");
    report.assert_all_good(rounds * groups * GROUP_SIZE, &circuits);
    let stale = report.stale_connections();
    assert!(
        stale >= MIN_STALE_CONNECTIONS,
        "only {stale} attempts met a closed connection; {report}"
    );
}

/// From zero to twice [`MAX_OFFSET`], in whole milliseconds.
fn offset(step: usize) -> Duration {
    let steps = 2 * MAX_OFFSET.as_millis() as usize + 1;
    Duration::from_millis((step % steps) as u64)
}

/// Measures the time from a response to the end of its connection, because some versions of Node.js close later than
/// they are configured to. On a busy machine a single measurement may be too long, so the minimum of several is used.
async fn keep_alive_time(port: u16) -> Duration {
    let mut running = JoinSet::new();
    for number in 0..MEASUREMENTS {
        running.spawn(async move {
            sleep(MEASUREMENT_INTERVAL * number).await;
            measure_keep_alive_time(port).await
        });
    }
    running.join_all().await.into_iter().min().unwrap()
}

async fn measure_keep_alive_time(port: u16) -> Duration {
    let measure = async {
        let mut tcp = TcpStream::connect(("127.0.0.1", port)).await?;
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: peer\r\n\r\n").await?;
        let mut buffer = [0; 1024];
        let mut response = Vec::new();
        while !response.ends_with(b"ok") {
            let length = tcp.read(&mut buffer).await?;
            assert!(length > 0, "the response has ended early");
            response.extend_from_slice(&buffer[..length]);
        }
        let start = Instant::now();
        let length = tcp.read(&mut buffer).await?;
        assert_eq!(length, 0, "more bytes than the response");
        Ok::<_, std::io::Error>(start.elapsed())
    };
    tokio::time::timeout(MAX_WAIT, measure)
        .await
        .expect("the server closes the connection")
        .unwrap()
}
