//! Random calls, cancellations and changes of the caps: the caps hold at every moment, each call that is not cancelled
//! is served, and no permit or connection is left behind.

use std::{pin::pin, time::Duration};

use buttress::connect::{ConnectHandle, ConnectLayer};
use fastrand::Rng;
use futures_util::FutureExt;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::fixtures::{Piped, Pipes, ask, client, http2, request};
use crate::support::settle;

const HOSTS: [&str; 4] = ["a", "b", "c", "d"];
const CALLERS: usize = 12;
const CALLS: usize = 20;
const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test(start_paused = true)]
async fn caps_hold_and_remaining_callers_are_served_in_any_schedule() {
    for seed in 0..12 {
        // `Pipes` draws the times of connects from the generator of the thread.
        fastrand::seed(seed);
        let mut random = Rng::with_seed(seed);
        let total = random.usize(1..10);
        round(&mut random, client, total).await;
        // A connection that calls share is never idle, so it is not closed for another host: the total has to allow a
        // connection for each host.
        round(&mut random, http2, total.max(HOSTS.len())).await;
    }
}

async fn round(random: &mut Rng, connect: fn(&ConnectLayer, &Pipes) -> Piped, total: usize) {
    let per_host = random.usize(1..5);
    let mut some = || Duration::from_millis(random.u64(20..1000));
    let layer = ConnectLayer::new()
        .max_per_host(per_host)
        .max_total(total)
        .queue(CALLERS, HOUR)
        .max_age(some())
        .max_idle(some());
    let pipes = Pipes::dawdling();
    let (client, handle) = (connect(&layer, &pipes), layer.handle());
    let mut callers: JoinSet<_> =
        (0..CALLERS).map(|_| call_on(client.clone(), random.fork())).collect();
    let shaker = tokio::spawn(shake(handle.clone(), random.fork(), (per_host, total)));
    while let Some(ended) = callers.join_next().await {
        ended.unwrap();
    }
    shaker.abort();

    assert!(pipes.open.peak() <= total, "{} open, more than {total}", pipes.open.peak());
    for host in HOSTS {
        let peak = pipes.open_to(host).peak();
        assert!(peak <= per_host, "{peak} open to {host}, more than {per_host}");
    }
    // The connections that cancelled calls have left behind end.
    sleep(Duration::from_secs(2)).await;
    settle().await;
    let seen = handle.snapshot();
    assert_eq!((seen.open, pipes.open.now()), (0, 0), "{seen:?}");
    assert_eq!((seen.in_use, seen.connecting, seen.waiting, seen.saturated), (0, 0, 0, 0));
    assert_eq!(seen.created, seen.closed);
    assert!(format!("{handle:?}").contains("open: 0"));
}

async fn call_on(client: Piped, mut random: Rng) {
    for _ in 0..CALLS {
        let path = ["", "tenth"][random.usize(..2)];
        let uri = format!("http://{}/{path}", HOSTS[random.usize(..HOSTS.len())]);
        match random.u8(..10) {
            0 => drop(client.request(request(&uri))),
            1 => drop(pin!(client.request(request(&uri))).now_or_never()),
            // Reads the response head if it arrives in time, and never the body.
            2 => {
                let longest = Duration::from_millis(random.u64(..200));
                drop(timeout(longest, client.request(request(&uri))).await);
            }
            3 => {
                let longest = Duration::from_millis(random.u64(..200));
                drop(timeout(longest, ask(&client, &uri)).await);
            }
            // Cancelled calls do not delay calls that are not cancelled.
            _ => {
                let answer = timeout(Duration::from_secs(10), ask(&client, &uri)).await;
                answer.expect("not served in time").expect("not served");
            }
        }
        sleep(Duration::from_millis(random.u64(..50))).await;
    }
}

/// Renews the connections and changes the caps, never beyond the caps that are checked.
async fn shake(handle: ConnectHandle, mut random: Rng, (per_host, total): (usize, usize)) {
    loop {
        sleep(Duration::from_millis(random.u64(..100))).await;
        match random.u8(..3) {
            0 => handle.recycle(),
            1 => handle.set_max_per_host(random.usize(1..=per_host)).unwrap(),
            _ => handle.set_max_total(random.usize(1..=total)).unwrap(),
        }
    }
}
