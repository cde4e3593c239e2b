//! hyper-util's TCP connector with the connect timeout of a layer, divided among the addresses of a host.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use tower_service::Service;

use super::{resolve::Resolver, state::ConnectState};

/// hyper-util's [`HttpConnector`], which divides the [connect timeout](super::layer::ConnectLayer::connect_timeout)
/// among the addresses of a host. Made by
/// [`ClientBuilder::tcp_connector`](super::client::ClientBuilder::tcp_connector).
///
/// An address that does not respond uses only its part of the timeout. The connector then tries the next address. If a
/// host has IPv4 and IPv6 addresses, the family of the first address has a head start of 300 ms or a quarter of the
/// timeout, whichever is shorter. Then the connector tries both families concurrently (RFC 8305).
///
/// A change of the connect timeout applies to connects that begin later.
#[derive(Clone)]
pub struct TcpConnector<R = Resolver> {
    http: HttpConnector<R>,
    shared: Arc<ConnectState>,
}

/// The maximum head start of the first address family: the default of hyper-util.
const MAX_HEAD_START: Duration = Duration::from_millis(300);

impl<R> TcpConnector<R> {
    pub(super) fn new(http: HttpConnector<R>, shared: &Arc<ConnectState>) -> Self {
        Self { http, shared: shared.clone() }
    }

    /// Accepts `https` URIs too, for a TLS connector around this one. Without a TLS connector, it sends the requests of
    /// such URIs unencrypted.
    #[must_use]
    pub fn for_tls(mut self) -> Self {
        self.http.enforce_http(false);
        self
    }

    /// Passes the current connect timeout to the wrapped connector.
    fn divide(&mut self) {
        let max = self.shared.connect_timeout();
        // The layer ends the connect after the whole timeout. The sum of the parts is slightly greater, so that a
        // connect whose last address does not respond is counted as timed out and not as failed.
        let divided = max.map(|max| max + max / 16 + Duration::from_millis(5));
        let head_start = max.map_or(MAX_HEAD_START, |max| MAX_HEAD_START.min(max / 4));
        self.http.set_connect_timeout(divided);
        self.http.set_happy_eyeballs_timeout(Some(head_start));
    }
}

impl<R> Service<Uri> for TcpConnector<R>
where
    HttpConnector<R>: Service<Uri>,
{
    type Response = <HttpConnector<R> as Service<Uri>>::Response;
    type Error = <HttpConnector<R> as Service<Uri>>::Error;
    type Future = <HttpConnector<R> as Service<Uri>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.http.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        self.divide();
        self.http.call(uri)
    }
}

impl<R> fmt::Debug for TcpConnector<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let max = self.shared.connect_timeout();
        f.debug_struct("TcpConnector").field("connect_timeout", &max).finish_non_exhaustive()
    }
}
