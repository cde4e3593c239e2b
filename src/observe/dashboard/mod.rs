//! A live page with the state of all layers of a process, for the person on call.
//!
//! The page begins with a verdict in words, and one sentence for each layer that needs attention: its state, the reason,
//! the time at which the state ends, and what happens next. Below are the layers, the most severe first, with their
//! numbers beside the limits and five minutes of history on one time axis, and the last [decisions](super::Decisions). The
//! page is one document without requests to other origins. It states when its data is old.
//!
//! ```no_run
//! use std::net::SocketAddr;
//!
//! use axum::Router;
//! use buttress::{CircuitBreakerLayer, observe::Registry};
//!
//! # async fn start() -> Result<(), Box<dyn std::error::Error>> {
//! let registry = Registry::new();
//! let breaker = CircuitBreakerLayer::http().name("search"); // a layer of a client
//! registry.watch(&breaker.handle())?;
//! tokio::spawn(registry.run()); // the history
//! let dashboard = registry.dashboard().title("checkout").loopback();
//! let app: Router = Router::new().layer(dashboard.layer()?); // http://127.0.0.1:8080/buttress/
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
//! axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>()).await?;
//! # Ok(()) }
//! ```
//!
//! # Paths
//!
//! | path | response |
//! |---|---|
//! | `GET /buttress/` | the page |
//! | `GET /buttress/status.json` | [`Status`](super::Status) as JSON, for scripts and tests |
//! | `GET /buttress/events` | the same data as server-sent events: `snapshot` at first, `tick` once a second with the changes, `decision` |
//! | `POST /buttress/circuits/{name}/{open,close,reset}` | sets the state of a circuit; only with [`controls`](Dashboard::controls) |
//!
//! The layer responds to all requests below `/buttress` itself, and passes others through. It responds even if the
//! wrapped service is not ready. Put it outside of every layer that rejects, and outside of
//! [`Lifecycle::layer`](crate::lifecycle::Lifecycle::layer).
//!
//! # Access
//!
//! The page shows the names of layers and of upstreams, so the application must choose which requests are served:
//!
//! - [`loopback`](Dashboard::loopback) serves requests of this machine only. It needs the address of the peer in the
//!   extensions of the request: axum's `ConnectInfo<SocketAddr>` (feature `axum`), or [`PeerAddr`]. With
//!   [`Lifecycle::serve_each`](crate::lifecycle::Lifecycle::serve_each), insert it for each connection:
//!   `|peer| app.clone().layer(Extension(ConnectInfo(peer)))`.
//! - [`guard`](Dashboard::guard) serves requests that a closure accepts, for example by a session or a client
//!   certificate.
//!
//! In both cases:
//!
//! - The host of the request must be `localhost`, `127.0.0.1`, `[::1]` or a name that [`host`](Dashboard::host) has
//!   added; otherwise the response is 421. Without this check a website could resolve its own name to 127.0.0.1 and read
//!   the page (DNS rebinding).
//! - Scripts of other websites cannot read the responses, and cannot open streams.
//! - No response has a URL, header, body or address of a call. The errors of probes are withheld without
//!   [`with_reasons`](Dashboard::with_reasons).
//! - The page is read-only without [`controls`](Dashboard::controls).
//!
//! # Streams and drains
//!
//! A registry has at most 16 streams. A further stream gets 503, and its page polls `status.json` every 5 s. A page in a
//! hidden tab closes its stream. A reader that is slower than the ticks skips to the newest one, so no data is queued for it.
//!
//! If the registry watches a [`Lifecycle`](crate::lifecycle::Lifecycle), the streams end when the process is
//! *stopping*, so that an open page does not hold the drain.

mod access;
mod feed;
mod routes;
mod stream;

use std::{fmt, sync::Arc};

use http::request::Parts;

pub use self::{access::PeerAddr, routes::DashboardRoutes};
use self::{
    access::{Access, is_host_name},
    feed::{Feed, PageOptions},
};
use super::registry::Registry;
use crate::{
    endpoint::{Endpoint, EndpointLayer, EndpointService},
    error::ConfigError,
};

/// Serves the live page under `/buttress/`. Other requests pass through. Made by [`Dashboard::layer`].
pub type DashboardLayer = EndpointLayer<DashboardRoutes>;

/// The service of a [`DashboardLayer`].
pub type DashboardEndpoint<S> = Endpoint<S, DashboardRoutes>;

/// Serves the live page under `/buttress/`, and responds with 404 to other paths. Made by [`Dashboard::service`].
pub type DashboardService = EndpointService<DashboardRoutes>;

/// The maximum number of characters of a title.
const MAX_TITLE: usize = 64;

impl Registry {
    /// Returns the live page of this registry, to be mounted by [`Dashboard::layer`] or [`Dashboard::service`].
    pub fn dashboard(&self) -> Dashboard {
        Dashboard {
            registry: self.clone(),
            access: Access::default(),
            options: PageOptions::default(),
            fault: None,
        }
    }
}

/// A live page that is not mounted yet. Made by [`Registry::dashboard`]. See the [module](self).
#[derive(Clone)]
#[must_use = "the page is served by its layer or its service"]
pub struct Dashboard {
    registry: Registry,
    access: Access,
    options: PageOptions,
    /// The first setting that cannot work.
    fault: Option<ConfigError>,
}

impl Dashboard {
    /// Serves requests that come from this machine: the peer has a loopback address, and no header such as `Forwarded`,
    /// `X-Forwarded-For`, `X-Real-Ip` or `Via` states that a proxy has forwarded the request.
    ///
    /// A request without the address of its peer is declined: see [access](self#access). A proxy on the same machine that
    /// adds no such header makes the page public.
    pub fn loopback(mut self) -> Self {
        self.access.is_loopback = true;
        self
    }

    /// Serves requests that the closure accepts. It runs for each request below `/buttress`, after the check of the host;
    /// a panic declines the request. Together with [`loopback`](Self::loopback), both must accept.
    pub fn guard(mut self, guard: impl Fn(&Parts) -> bool + Send + Sync + 'static) -> Self {
        self.access.guard = Some(Arc::new(guard));
        self
    }

    /// Serves requests for this host as well, on any port. By default only requests for `localhost`, `127.0.0.1` and
    /// `[::1]` are served.
    ///
    /// An invalid name is an error of [`layer`](Self::layer) and [`service`](Self::service).
    pub fn host(mut self, name: impl Into<String>) -> Self {
        let name = name.into();
        if is_host_name(&name) {
            self.access.hosts.push(name);
        } else {
            let remedy = "use a host name or an IP address, without scheme and port";
            self.fault.get_or_insert(ConfigError::new("dashboard.host", name, remedy));
        }
        self
    }

    /// Sets the title of the page, such as the name of the service. At most 64 characters of it are shown.
    pub fn title(mut self, title: impl AsRef<str>) -> Self {
        self.options.title = title.as_ref().chars().take(MAX_TITLE).collect();
        self
    }

    /// Adds controls to the page, which force circuits open and closed, and reset them after a confirmation.
    ///
    /// The closure returns the name of the person or program that makes the request, or `None` to decline it with 403. It
    /// runs for each `POST` that has passed all other checks. Each use emits a WARN event and a
    /// [decision](super::Decision) with this name, of which at most 64 characters are used.
    ///
    /// A `POST` is declined if a browser reports that another site has made it, by `Sec-Fetch-Site`, or without this header
    /// by an `Origin` that is not the host of the request. It is also declined without the header `x-buttress-confirm` with
    /// the name of the circuit. A form cannot send this header.
    pub fn controls<N: Into<String>>(
        mut self,
        guard: impl Fn(&Parts) -> Option<N> + Send + Sync + 'static,
    ) -> Self {
        self.access.controls = Some(Arc::new(move |parts| guard(parts).map(Into::into)));
        self.options.has_controls = true;
        self
    }

    /// Shows the texts of errors of health probes. By default they are withheld, because they can contain names of hosts
    /// and paths. The errors of health checks are never shown.
    pub fn with_reasons(mut self) -> Self {
        self.options.has_details = true;
        self
    }

    /// Returns a layer that serves the page under `/buttress/` without a call of the wrapped service.
    ///
    /// # Errors
    ///
    /// Returns an error if neither [`loopback`](Self::loopback) nor [`guard`](Self::guard) was called, or for an invalid
    /// [`host`](Self::host).
    pub fn layer(self) -> Result<DashboardLayer, ConfigError> {
        Ok(EndpointLayer { endpoints: self.routes()? })
    }

    /// Returns a service that serves the page under `/buttress/`, for a separate port or for routes.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`layer`](Self::layer).
    pub fn service(self) -> Result<DashboardService, ConfigError> {
        Ok(EndpointService { endpoints: self.routes()? })
    }

    fn routes(self) -> Result<DashboardRoutes, ConfigError> {
        let Self { registry, access, options, fault } = self;
        if let Some(fault) = fault {
            return Err(fault);
        }
        if !access.is_chosen() {
            let remedy = "call `loopback()`, or `guard(…)` with a check of the request";
            return Err(ConfigError::new("dashboard.access", "not chosen", remedy));
        }
        Ok(DashboardRoutes::new(Feed::new(registry, options), access))
    }
}

impl fmt::Debug for Dashboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dashboard")
            .field("access", &self.access)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
