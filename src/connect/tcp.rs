//! hyper-util's TCP connector with the connect timeout of a layer, divided among the addresses of a host.

use std::{
    fmt,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use tower_service::Service;

use super::{core::Connections, resolve::Resolver};
use crate::call::Shared;

/// hyper-util's [`HttpConnector`] with a [connect timeout](super::ConnectLayer::connect_timeout) that is divided among
/// the addresses of a host: made by [`ClientBuilder::tcp_connector`](super::ClientBuilder::tcp_connector).
///
/// If a host has several addresses, an address that does not respond takes only its part of the timeout, and the
/// connector goes on to the next one. If a host has IPv4 and IPv6 addresses, the family of the first address has a head
/// start of 300 ms or a quarter of the timeout, whichever is shorter; then both families are tried at once (RFC 8305).
/// A change of the connect timeout applies to connects that begin later.
#[derive(Clone)]
pub struct TcpConnector<R = Resolver> {
    http: HttpConnector<R>,
    all: Shared<Connections>,
}

/// The head start of the first address family: the default of hyper-util.
const MAX_HEAD_START: Duration = Duration::from_millis(300);

impl<R> TcpConnector<R> {
    pub(super) fn new(http: HttpConnector<R>, all: &Shared<Connections>) -> Self {
        Self { http, all: all.clone() }
    }

    /// Connects for `https` URIs too. Only for a TLS connector around this one: by itself it would send requests
    /// unencrypted.
    #[must_use]
    pub fn for_tls(mut self) -> Self {
        self.http.enforce_http(false);
        self
    }

    /// Divides the connect timeout as it is now.
    fn divide(&mut self) {
        let max = self.all.connect_timeout();
        // The layer ends the connect after the whole timeout. The parts add up to a little more, so that a connect which
        // ends by the last part is counted as timed out and not as failed.
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
        let max = self.all.connect_timeout();
        f.debug_struct("TcpConnector").field("connect_timeout", &max).finish_non_exhaustive()
    }
}
