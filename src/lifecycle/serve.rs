use std::{pin::pin, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};
use tower_layer::Layer;
use tower_service::Service;

use super::{
    connection::serve_connection,
    handle::Lifecycle,
    listener::Listener,
    server::Server,
    socket::reset_on_close,
    stages::{ConnectionState, StageClock, StagedIo},
    state::{Drained, LifecycleStep},
    streams::StagedService,
    tls::MaybeTls,
};
use crate::{error::BoxError, listener::AcceptErrors};

/// Time from the start of *stopping* to the close of the listener.
///
/// In this time the server accepts the connections that the kernel has already established. Closing the listener at
/// once would reset them, with the requests that they carry.
const BACKLOG_TIME: Duration = Duration::from_millis(50);

/// Maximum time for which the server waits for the tasks of cut connections to end.
const ABORT_TIMEOUT: Duration = Duration::from_millis(100);

impl Lifecycle {
    /// Serves HTTP/1 and HTTP/2 until the process has drained.
    ///
    /// The service is an axum `Router`, or any other service of hyper's requests. `serve` wraps it in the
    /// [`layer`](Self::layer) of this lifecycle. It does not report the process as [ready](Self::ready).
    ///
    /// The [module](super#no-call-is-lost) describes the end of the connections. Calls and connections that remain when
    /// the drain timeout ([`drain_timeout`](Self::drain_timeout)) expires are cut and counted. A connection that was
    /// upgraded (a WebSocket) belongs to its handler: `serve` waits for it if the handler holds a
    /// [guard](super::token::Drain::guard).
    ///
    /// The listener is any [`Listener`]: tokio's, the capped
    /// [`LimitedListener`](crate::listener::LimitedListener), or another implementation. Every stage of a
    /// connection has a time limit: [`Server`] lists the limits, and [`server`](Self::server) changes them.
    ///
    /// Dropping the future cuts all connections at once.
    ///
    /// ```no_run
    /// # async fn start() -> Result<(), Box<dyn std::error::Error>> {
    /// use axum::{Router, routing::get};
    /// use buttress::{Health, Lifecycle};
    ///
    /// let health = Health::new();
    /// let lifecycle = Lifecycle::new(&health)?;                   // first, so that signals are handled
    /// let app: Router = Router::new().route("/", get(|| async { "found" })).layer(health.endpoints());
    /// let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
    /// lifecycle.ready();
    /// println!("{:?}", lifecycle.serve(listener, app).await);
    /// # Ok(()) }
    /// ```
    pub async fn serve<L, S, B>(&self, listener: L, service: S) -> Drained
    where
        L: Listener,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError> + Send + 'static,
        B: Body<Data: From<Bytes> + Send, Error: Into<BoxError>> + Send + 'static,
    {
        self.serve_each(listener, move |_| service.clone()).await
    }

    /// Serves as [`serve`](Self::serve) does, with one service for each connection.
    ///
    /// The closure makes the service from the address of the peer:
    /// `|peer| app.clone().layer(Extension(ConnectInfo(peer)))`.
    pub async fn serve_each<L, F, S, B>(&self, listener: L, make: F) -> Drained
    where
        L: Listener,
        F: FnMut(L::Addr) -> S,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError> + Send + 'static,
        B: Body<Data: From<Bytes> + Send, Error: Into<BoxError>> + Send + 'static,
    {
        self.server().run(listener, make).await
    }
}

impl Server {
    pub(super) async fn run<L, F, S, B>(mut self, mut listener: L, mut make: F) -> Drained
    where
        L: Listener,
        F: FnMut(L::Addr) -> S,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError> + Send + 'static,
        B: Body<Data: From<Bytes> + Send, Error: Into<BoxError>> + Send + 'static,
    {
        let server = self.builder();
        let Self { lifecycle, limits, socket, tls, .. } = self;
        let mut connections = JoinSet::new();
        let mut closing = pin!(async {
            lifecycle.stopping().await;
            sleep(BACKLOG_TIME).await;
        });
        let layer = lifecycle.layer();
        let mut errors = AcceptErrors::new();
        loop {
            let accept = async {
                errors.pause().await;
                listener.accept().await
            };
            let accepted = tokio::select! {
                biased;
                () = &mut closing => break,
                Some(_) = connections.join_next() => continue,
                accepted = accept => accepted,
            };
            let Some((io, peer)) = errors.check(accepted) else { continue };
            let accepted = Instant::now();
            if let Some(tcp) = L::tcp(&io) {
                socket.set(tcp);
            }
            let stages = ConnectionState::new(L::slot(&io).cloned());
            let service = TowerToHyperService::new(layer.layer(make(peer)));
            let service = StagedService::new(service, stages.clone());
            let (server, tls, state) = (server.clone(), tls.clone(), lifecycle.0.lease());
            connections.spawn(async move {
                // `None`: the clock cannot represent the deadline, so the handshake has none.
                let deadline = accepted.checked_add(limits.head);
                let handshake = async {
                    match deadline {
                        Some(deadline) => timeout_at(deadline, tls.accept(io)).await.ok(),
                        None => Some(tls.accept(io).await),
                    }
                };
                let io = tokio::select! {
                    biased;
                    io = handshake => io,
                    () = state.reached(LifecycleStep::Rejecting) => None,
                };
                let Some(Ok(io)) = io else { return };
                let reset = |io: &MaybeTls<L::Io>| {
                    if let Some(tcp) = L::tcp(io.get_ref()) {
                        reset_on_close(tcp);
                    }
                };
                let io = StagedIo::new(io, stages.clone(), limits.write, reset);
                let clock = StageClock::new(stages.clone(), limits, accepted);
                serve_connection(&server, TokioIo::new(io), service, stages, clock, state).await;
            });
        }
        drop(listener);
        let all_end = async {
            while connections.join_next().await.is_some() {}
            lifecycle.0.wait_until_empty().await;
        };
        tokio::select! {
            biased;
            () = all_end => {}
            () = lifecycle.0.reached(LifecycleStep::Stopped) => {}
        }
        while connections.try_join_next().is_some() {}
        let drained = Drained {
            cut_calls: lifecycle.in_flight(),
            cut_connections: connections.len(),
            rejected: lifecycle.rejected(),
        };
        connections.abort_all();
        // The task of a handler that blocks its thread cannot be aborted, and must not delay the end of the process.
        let _ = timeout(ABORT_TIMEOUT, async { while connections.join_next().await.is_some() {} })
            .await;
        lifecycle.0.notify_of_drained(&drained);
        drained
    }
}
