//! Health probes over connections that end as a matter of routine.

use std::time::Duration;

use buttress::{
    HealthProbeLayer,
    health::{HealthProbeHandle, ProbeFailure, ProbeState},
};
use tower::Layer;

use super::hyper_util;
use crate::support::{
    net::until,
    scripted_peer::{self, ENDS, Peer},
};

/// Returns the handle of a gate that goes down at the first failed probe. The probes run while the second value lives.
fn probes(peer: &Peer, every: Duration, timeout: Duration) -> (HealthProbeHandle, impl Sized) {
    let layer = HealthProbeLayer::get(&format!("http://{}/", peer.addr))
        .every(every)
        .jitter(0.0)
        .timeout(timeout)
        .thresholds(1, 1);
    let handle = layer.handle();
    (handle, layer.layer(hyper_util(false)))
}

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_probe_over_a_stale_connection_is_sent_once_more() {
    for end in ENDS {
        let peer = scripted_peer::responds_once(end).await;
        let (handle, _gate) = probes(&peer, Duration::from_millis(10), SECOND);
        until(|| {
            let snapshot = handle.snapshot();
            assert_ne!(snapshot.state, ProbeState::Down, "{end:?}: {snapshot:?}");
            snapshot.probes >= 10
        })
        .await;
        assert!(peer.ended() >= 5, "{end:?}: {} connections were stale", peer.ended());
    }
}

#[tokio::test]
async fn the_result_of_the_second_request_counts() {
    for end in ENDS {
        let peer = scripted_peer::ends_all(end).await;
        let (handle, _gate) = probes(&peer, Duration::from_secs(60), SECOND);
        until(|| handle.snapshot().state == ProbeState::Down).await;
        let snapshot = handle.snapshot();
        let last = snapshot.last.unwrap();
        assert_eq!((snapshot.probes, last.result), (1, Err(ProbeFailure::Error)), "{end:?}");
        assert_eq!(peer.connections(), 2, "{end:?}");
    }
}

#[tokio::test]
async fn both_requests_of_a_probe_share_its_timeout() {
    let peer = scripted_peer::ends_then_hangs(Duration::from_millis(300)).await;
    let timeout = Duration::from_millis(500);
    let (handle, _gate) = probes(&peer, Duration::from_secs(60), timeout);
    until(|| handle.snapshot().state == ProbeState::Down).await;
    let last = handle.snapshot().last.unwrap();
    assert_eq!((peer.connections(), last.result), (2, Err(ProbeFailure::TimedOut)));
    assert!((500..700).contains(&last.took.as_millis()), "{:?}", last.took);
}
