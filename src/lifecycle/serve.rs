use std::{io, net::SocketAddr, pin::pin, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{sleep, timeout},
};
use tower_layer::Layer;
use tower_service::Service;

use super::{Drained, Lifecycle, Phase};
use crate::{BoxError, event, event::RepeatedEvent, redact};

/// Who connects has to say something within this time.
const FIRST_WORD: Duration = Duration::from_secs(30);
/// Who has spoken, and within what time the head of the next request must be there: hyper has one clock for both.
/// Longer than load balancers keep what is idle (Google's, 10 minutes): it is for them to close, who know whether
/// they have just sent something.
const IDLE: Duration = Duration::from_secs(11 * 60);

/// How long what is cut may take to be gone.
const GONE: Duration = Duration::from_millis(100);

impl Lifecycle {
    /// Serves HTTP/1 and HTTP/2 until the process has drained: an axum `Router`, or any other service of hyper's
    /// requests, with a [`layer`](Self::layer) of this lifecycle around it. It does not say that the process is
    /// [ready](Self::ready).
    ///
    /// Once the delay is over it takes no new connection, closes idle ones, and ends the others after what is under
    /// way: `Connection: close`, GOAWAY. What is left after the longest time is cut, and counted. A connection that
    /// was upgraded (a WebSocket) is the handler's own: it is waited for if the handler has a
    /// [guard](crate::lifecycle::Drain::guard).
    ///
    /// A connection on which nothing was said for 30 s since it was made, or, over HTTP/1, for 11 minutes since its last
    /// answer, is closed.
    ///
    /// Dropping the future cuts everything at once.
    ///
    /// ```no_run
    /// # async fn start() -> Result<(), Box<dyn std::error::Error>> {
    /// use axum::{Router, routing::get};
    /// use buttress::{Health, Lifecycle};
    ///
    /// let health = Health::new();
    /// let lifecycle = Lifecycle::new(&health)?;                   // first of all: signals are listened to
    /// let app: Router = Router::new().route("/", get(|| async { "found" })).layer(health.endpoints());
    /// let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
    /// lifecycle.ready();
    /// println!("{:?}", lifecycle.serve(listener, app).await);
    /// # Ok(()) }
    /// ```
    pub async fn serve<S, B>(&self, listener: TcpListener, service: S) -> Drained
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError> + Send + 'static,
        B: Body<Data: From<Bytes> + Send, Error: Into<BoxError>> + Send + 'static,
    {
        self.serve_each(listener, move |_| service.clone()).await
    }

    /// [`serve`](Self::serve) with a service made for each connection: for what wants to know its peer, as
    /// `|peer| app.clone().layer(Extension(ConnectInfo(peer)))`.
    pub async fn serve_each<F, S, B>(&self, listener: TcpListener, mut make: F) -> Drained
    where
        F: FnMut(SocketAddr) -> S,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError> + Send + 'static,
        B: Body<Data: From<Bytes> + Send, Error: Into<BoxError>> + Send + 'static,
    {
        let mut server = auto::Builder::new(TokioExecutor::new());
        server.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
        // As axum's own: WebSockets go over HTTP/2 as well.
        server.http2().timer(TokioTimer::new()).enable_connect_protocol();
        let graceful = GracefulShutdown::new();
        let mut connections = JoinSet::new();
        let mut stopping = pin!(self.stopping());
        let layer = self.layer();
        let accept_failures = RepeatedEvent::new();
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut stopping => break,
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) if is_passing(&error) => continue,
                Err(error) => {
                    if let Some(_occurrences) = accept_failures.record() {
                        let occurrences = _occurrences;
                        event!(WARN, error = %redact::Redacted(&error), occurrences, "cannot accept connections");
                        let _ = occurrences;
                    }
                    let _ = error;
                    tokio::select! {
                        () = &mut stopping => break,
                        () = sleep(Duration::from_secs(1)) => continue,
                    }
                }
            };
            // Answers are small or streams: both want to leave at once.
            let _ = stream.set_nodelay(true);
            let (server, watcher) = (server.clone(), graceful.watcher());
            let service = TowerToHyperService::new(layer.layer(make(peer)));
            let stopping = self.stopping();
            connections.spawn(async move {
                // hyper waits for the first word without an end.
                let mut first = [0];
                let spoken = tokio::select! {
                    biased;
                    spoken = stream.peek(&mut first) => spoken.is_ok(),
                    () = stopping => false,
                    () = sleep(FIRST_WORD) => false,
                };
                if !spoken {
                    return;
                }
                let connection =
                    server.serve_connection_with_upgrades(TokioIo::new(stream), service);
                // What goes wrong on one connection is its client's to know.
                let _ = watcher.watch(connection.into_owned()).await;
            });
        }
        drop(listener);
        let all_end = async {
            graceful.shutdown().await;
            // A connection that has ended may still have a task.
            while connections.join_next().await.is_some() {}
            self.0.emptied().await;
        };
        tokio::select! {
            biased;
            () = all_end => {}
            () = self.0.reached(Phase::Stopped) => {}
        }
        while connections.try_join_next().is_some() {}
        let drained = Drained {
            cut_calls: self.in_flight(),
            cut_connections: connections.len(),
            refused: self.refused(),
        };
        connections.abort_all();
        // Who blocks its thread does not hear of that, and must not be what the process waits for.
        let _ = timeout(GONE, async { while connections.join_next().await.is_some() {} }).await;
        drained
    }
}

/// A client that went away is no reason to rest; no more file descriptors are.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
