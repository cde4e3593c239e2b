use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// The options of an accepted TCP socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct SocketOptions {
    /// Makes the progress of a slow reader visible: see [`MAX_UNSENT`].
    pub(super) observes_writes: bool,
    pub(super) user_timeout: Option<Duration>,
}

/// Number of bytes that the kernel holds beyond those on their way (`TCP_NOTSENT_LOWAT`). A blocked write continues
/// when it holds fewer. Without this limit, a send buffer of several MiB has to drain by a third first, and a slow but
/// steady reader looks like one that has stopped.
#[cfg(any(target_os = "linux", target_os = "android"))]
const MAX_UNSENT: u32 = 128 * 1024;

/// The kernel counts keepalive times in seconds, up to this value (Linux `MAX_TCP_KEEPIDLE`).
const MAX_KEEPALIVE: Duration = Duration::from_secs(32_767);

impl SocketOptions {
    /// Sets the options. A socket that rejects one is served without it.
    pub(super) fn set(self, tcp: &TcpStream) {
        // Small responses and events are sent at once.
        let _ = tcp.set_nodelay(true);
        let socket = SockRef::from(tcp);
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if self.observes_writes {
            let _ = socket.set_tcp_notsent_lowat(MAX_UNSENT);
        }
        let Some(timeout) = self.user_timeout else { return };
        let keepalive = TcpKeepalive::new().with_time(seconds(timeout / 3));
        // With a user timeout, it decides about unanswered probes, and not their number.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let keepalive = keepalive.with_interval(seconds(timeout / 6)).with_retries(6);
        let _ = socket.set_tcp_keepalive(&keepalive);
        // It also ends a connection whose client acknowledges probes and does not read. So it must not be set where
        // such clients are welcome.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if self.observes_writes {
            let _ = socket.set_tcp_user_timeout(Some(timeout.min(MAX_KEEPALIVE)));
        }
    }
}

/// Whole seconds, at least one.
fn seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs()).clamp(Duration::from_secs(1), MAX_KEEPALIVE)
}

/// Makes the close of a socket a reset: the kernel discards unsent data instead of keeping it for a peer that does not
/// read.
pub(super) fn reset_on_close(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}
