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

/// Number of unsent bytes in the kernel below which a blocked write continues (`TCP_NOTSENT_LOWAT`).
///
/// Without this limit, a third of the send buffer of several MiB has to be sent before a blocked write continues. In
/// this time a slow but steady reader is indistinguishable from a client that has stopped reading.
#[cfg(any(target_os = "linux", target_os = "android"))]
const MAX_UNSENT: u32 = 128 * 1024;

/// Maximum keepalive time of the kernel, which counts it in seconds (Linux `MAX_TCP_KEEPIDLE`).
const MAX_KEEPALIVE: Duration = Duration::from_secs(32_767);

impl SocketOptions {
    /// Sets the options of a socket. Errors are ignored: the connection is served without the failed option.
    pub(super) fn set(self, tcp: &TcpStream) {
        // Without Nagle's algorithm, small responses and server-sent events are sent at once.
        let _ = tcp.set_nodelay(true);
        let socket = SockRef::from(tcp);
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if self.observes_writes {
            let _ = socket.set_tcp_notsent_lowat(MAX_UNSENT);
        }
        let Some(timeout) = self.user_timeout else { return };
        let keepalive = TcpKeepalive::new().with_time(seconds(timeout / 3));
        // If TCP_USER_TIMEOUT is set, it limits the time of unacknowledged probes, and the kernel ignores their number.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let keepalive = keepalive.with_interval(seconds(timeout / 6)).with_retries(6);
        let _ = socket.set_tcp_keepalive(&keepalive);
        // TCP_USER_TIMEOUT also ends a connection whose client acknowledges probes but does not read. So it must not be
        // set if the write timeout is off, which permits such clients.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if self.observes_writes {
            let _ = socket.set_tcp_user_timeout(Some(timeout.min(MAX_KEEPALIVE)));
        }
    }
}

/// Returns the duration in whole seconds, from 1 s to [`MAX_KEEPALIVE`].
fn seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs()).clamp(Duration::from_secs(1), MAX_KEEPALIVE)
}

/// Sets `SO_LINGER` to zero, so that closing the socket resets the connection: the kernel discards the unsent data
/// instead of holding it for a peer that does not read.
pub(super) fn reset_on_close(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}
