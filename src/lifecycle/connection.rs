//! One HTTP connection and its graceful shutdown.
//!
//! hyper has one operation for this, `graceful_shutdown`. Its effect depends on the connection, and only the first of
//! the three effects is safe at any time:
//!
//! - HTTP/2: sends GOAWAY with the last stream id 2³¹−1 and a PING. h2 serves the streams that arrive before the
//!   acknowledgement of the PING, then sends GOAWAY with the last stream that it has served, and ignores later
//!   streams: the client can safely send these again on another connection (RFC 9113 §6.8). No call is lost.
//! - HTTP/1 with a call: adds `close` to the `Connection` header of the response. This breaks an upgrade.
//! - HTTP/1 without a call, or a connection whose protocol is not known yet: closes the connection. A request that is
//!   on its way is lost.
//!
//! Therefore:
//!
//! | phase | HTTP/2 | HTTP/1 | not known yet |
//! |---|---|---|---|
//! | *draining* | GOAWAY, on a connection that is open already | the lifecycle layer adds `Connection: close` to responses | |
//! | *stopping* | GOAWAY, on every other connection | the same | as soon as the protocol is known: as that protocol |
//! | *stopping*, idle for the grace | closed | closed | closed |
//!
//! A connection that is accepted while the process is *draining* receives no GOAWAY before *stopping*. The router still
//! selects this process, so a client that connects again at once would be routed here again.
//!
//! A connection is idle if it has no call and nothing has been written to it for the grace. A call ends at the end of
//! its response body. Then a part of the body can still be in the buffers of hyper and h2, so the end of the last call
//! alone does not permit closing the connection. Two conditions prevent the close:
//!
//! - A write is pending: hyper has a part of a response in its buffer.
//! - An HTTP/2 client has acknowledged the PING: it is alive, and h2 closes the connection after its last stream. Only
//!   h2 has the information whether a part of a response waits for the window of its stream.

use std::{
    future::poll_fn,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use http_body::Body;
use hyper::{
    body::Incoming,
    rt::{Read, Write},
    service::Service,
};
use hyper_util::server::conn::auto::{Builder, HttpServerConnExec};
use tokio::time::timeout;

use super::{
    stages::{ConnectionState, StageClock, StageVerdict},
    state::{LifecyclePhase, LifecycleState, LifecycleStep},
};
use crate::{drain, error::BoxError, permit::ShardedRef};

/// Minimum time for which an idle connection stays open at *stopping*, so that a client of HTTP/2 can acknowledge the
/// GOAWAY even if the grace is zero.
const MIN_IDLE_TIME: Duration = Duration::from_millis(100);

/// Maximum number of idle times for which the connection of a client that does not acknowledge the PING stays open,
/// although it makes the server write, for example by PING frames of its own.
const MAX_IDLE_ROUNDS: u32 = 5;

/// Serves one connection to its end, and shuts it down when the process drains.
///
/// The IO object and the service record the activity of the connection in `stages`. An error of the connection concerns
/// its client only and is discarded. Dropping the future closes the connection.
pub(super) async fn serve_connection<I, S, B, E>(
    server: &Builder<E>,
    io: I,
    service: S,
    stages: Arc<ConnectionState>,
    mut clock: StageClock,
    state: ShardedRef<LifecycleState>,
) where
    I: Read + Write + Unpin + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Future: 'static,
    S::Error: Into<BoxError>,
    B: Body<Error: Into<BoxError>> + 'static,
    E: HttpServerConnExec<S::Future, B>,
{
    let is_old = state.phase() < LifecyclePhase::Draining;
    let mut connection = pin!(server.serve_connection_with_upgrades(io, service));
    let mut is_announced = false;
    // Polls the connection. If `announces` is set, a poll sends GOAWAY first if the protocol is known to be HTTP/2,
    // else as soon as it is.
    let mut poll = |cx: &mut Context<'_>, announces: bool| loop {
        if announces && !is_announced && stages.is_http2() {
            connection.as_mut().graceful_shutdown();
            is_announced = true;
            stages.await_acknowledgement();
        }
        if connection.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        if announces && !is_announced && stages.is_http2() {
            continue;
        }
        match clock.check(cx) {
            StageVerdict::Wait => return Poll::Pending,
            StageVerdict::Close => return Poll::Ready(()),
            StageVerdict::ShutDown => connection.as_mut().graceful_shutdown(),
        }
    };

    tokio::select! {
        biased;
        () = poll_fn(|cx| poll(cx, false)) => return,
        () = state.reached(LifecycleStep::Draining) => {}
    }
    let announces = is_old && stages.is_http2();
    tokio::select! {
        biased;
        () = poll_fn(|cx| poll(cx, announces)) => return,
        () = state.reached(LifecycleStep::Stopping) => {}
    }
    let idle_time = state.times(|times| times.grace).max(MIN_IDLE_TIME);
    // The first poll sets the number of writes, after it has written the GOAWAY, so that the GOAWAY does not count as
    // activity.
    let mut writes = None;
    let (mut idle_rounds, mut waited) = (0, Duration::ZERO);
    loop {
        let served = poll_fn(|cx| {
            let polled = poll(cx, true);
            writes.get_or_insert_with(|| stages.writes());
            polled
        });
        if timeout(idle_time, served).await.is_ok() {
            return;
        }
        waited = waited.saturating_add(idle_time);
        idle_rounds = if stages.has_calls() { 0 } else { idle_rounds + 1 };
        let is_silent = writes == Some(stages.writes()) || idle_rounds >= MAX_IDLE_ROUNDS;
        // The rest of a rejected upload can still arrive. It is drained within its own time limit.
        if stages.may_close() && is_silent && (!stages.has_late_body() || waited >= drain::TIMEOUT)
        {
            break;
        }
        writes = Some(stages.writes());
    }
    if stages.is_http1() {
        // Closes the connection in order, with TLS's `close_notify`, unless the head of a request is incomplete.
        connection.as_mut().graceful_shutdown();
        let _ = poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx).is_ready())).await;
    }
}
