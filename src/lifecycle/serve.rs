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
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use tower_layer::Layer;
use tower_service::Service;

use super::{Drained, Lifecycle, Phase};
use crate::{BoxError, event};

impl Lifecycle {
    /// Serves HTTP/1 and HTTP/2 until the process has drained: an axum `Router`, or any other service of hyper's
    /// requests, with a [`layer`](Self::layer) of this lifecycle around it. It does not say that the process is
    /// [ready](Self::ready).
    ///
    /// Once the delay is over it takes no new connection, closes idle ones, and ends the others after what is under
    /// way: `Connection: close`, GOAWAY. What is left after the longest time is cut, and counted. A connection that
    /// was upgraded (a WebSocket) is the handler's own: it is not waited for.
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
        // With a timer hyper gives a client 30 s for the head of a request.
        server.http1().timer(TokioTimer::new());
        server.http2().timer(TokioTimer::new());
        let graceful = GracefulShutdown::new();
        let mut connections = JoinSet::new();
        let mut stopping = pin!(self.stopping());
        let layer = self.layer();
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
                    event!(WARN, %error, "cannot accept connections");
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
            connections.spawn(async move {
                let connection =
                    server.serve_connection_with_upgrades(TokioIo::new(stream), service);
                // What goes wrong on one connection is its client's to know.
                let _ = watcher.watch(connection.into_owned()).await;
            });
        }
        drop(listener);
        tokio::select! {
            biased;
            () = graceful.shutdown() => {}
            () = self.0.reached(Phase::Stopped) => {}
        }
        while connections.try_join_next().is_some() {}
        let drained = Drained {
            cut_calls: self.in_flight(),
            cut_connections: connections.len(),
            refused: self.refused(),
        };
        connections.shutdown().await;
        drained
    }
}

/// A client that went away is no reason to rest; no more file descriptors are.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
