//! The causes of the test, and the result that the caller must get for each.

use std::{net::SocketAddr, time::Duration};

use axum::{Router, body::Body, routing::any};
use buttress::{Attempts, BoxError, Deadline, DeadlineSource};
use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request, Response, request::Builder};
use http_body_util::BodyExt;
use tokio::time::{sleep, timeout};

use super::stacks::{DEADLINE_HEADER, Stack};
use crate::support::{
    net::{self, soon},
    scripted_peer::{self, End, Peer, Second},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The caller hangs up before the response.
    HangUp,
    /// The deadline of the caller passes. It comes in a header.
    DeadlineHeader,
    /// The deadline of the caller passes. It comes in the `grpc-timeout` of a gRPC request.
    DeadlineGrpc,
    /// The deadline of the caller passes. It comes in the extensions of the request.
    DeadlineExtension,
    /// The caller takes longer than [`SLOW`] to send its request.
    SlowUpload,
    /// The caller takes longer than [`SLOW`] to read the response.
    SlowReader,
    /// The upstream sends GOAWAY with `NO_ERROR` and a last stream below that of the request.
    GoAway,
    /// The upstream resets the stream with `REFUSED_STREAM`.
    RefusedStream,
    /// The upstream closes an idle connection as the request arrives.
    StaleConnection,
    /// The upstream resets a connection on which it has responded before.
    ReusedReset,
}

pub const CAUSES: [Cause; 10] = [
    Cause::HangUp,
    Cause::DeadlineHeader,
    Cause::DeadlineGrpc,
    Cause::DeadlineExtension,
    Cause::SlowUpload,
    Cause::SlowReader,
    Cause::GoAway,
    Cause::RefusedStream,
    Cause::StaleConnection,
    Cause::ReusedReset,
];

/// A call that takes longer is slow for every circuit and limit of this test.
pub const SLOW: Duration = Duration::from_secs(1);

/// Time for which a caller waits. The response takes longer, but is not slow.
const SHORT: Duration = Duration::from_millis(400);

const LARGE: usize = 4 << 20;

// ===== Upstreams =====

/// The upstream of one case.
pub enum Target {
    Works(SocketAddr),
    Ends(Peer),
}

impl Target {
    pub async fn works() -> Self {
        /// Reads the request, and responds as its path specifies.
        async fn respond(request: Request<Body>) -> Body {
            let path = request.uri().path().to_owned();
            let _ = request.into_body().collect().await;
            match path.as_str() {
                "/wait" => sleep(SLOW * 7 / 10).await,
                "/large" => return Body::from(vec![0; LARGE]),
                _ => {}
            }
            Body::from("ok")
        }
        Self::Works(net::serve(Router::new().fallback(any(respond))).await)
    }

    fn addr(&self) -> SocketAddr {
        match self {
            Self::Works(addr) => *addr,
            Self::Ends(peer) => peer.addr,
        }
    }

    /// Returns the number of connections that the upstream ended with a request on them.
    pub fn ended(&self) -> usize {
        match self {
            Self::Works(_) => 0,
            Self::Ends(peer) => peer.ended(),
        }
    }

    pub fn get(&self, path: &str) -> Request<Body> {
        self.request(path).body(Body::empty()).unwrap()
    }

    fn request(&self, path: &str) -> Builder {
        Request::builder().uri(format!("http://{}{path}", self.addr()))
    }
}

impl Cause {
    pub fn is_housekeeping(self) -> bool {
        use Cause::*;
        matches!(self, GoAway | RefusedStream | StaleConnection | ReusedReset)
    }

    pub fn is_http2(self) -> bool {
        matches!(self, Self::GoAway | Self::RefusedStream)
    }

    /// Starts an upstream that serves one `GET /`. What it does with the next request is the cause.
    pub async fn target(self) -> Target {
        const NO_ERROR: u32 = 0;
        const REFUSED_STREAM: u32 = 7;
        Target::Ends(match self {
            Self::GoAway => scripted_peer::http2(Second::GoAway(NO_ERROR)).await,
            Self::RefusedStream => scripted_peer::http2(Second::Reset(REFUSED_STREAM)).await,
            Self::StaleConnection => scripted_peer::goes_stale(1, End::Fin).await,
            Self::ReusedReset => scripted_peer::goes_stale(1, End::Rst).await,
            _ => return Target::works().await,
        })
    }

    /// Makes the cause happen, and checks what the caller gets. Returns the number of attempts if the result records
    /// it.
    pub async fn fire(self, case: &str, stack: &Stack, target: &Target) -> Option<u32> {
        let wait = target.request("/wait");
        match self {
            Self::HangUp => {
                let call = stack.call(target.get("/wait"));
                assert!(timeout(SHORT, call).await.is_err(), "{case}: it responded");
                None
            }
            Self::DeadlineHeader => {
                let wait = wait.header(DEADLINE_HEADER, SHORT.as_millis().to_string());
                expires(case, stack, wait).await
            }
            Self::DeadlineGrpc => {
                let wait = wait.method(Method::POST).header("content-type", "application/grpc");
                let wait = wait.header("grpc-timeout", format!("{}m", SHORT.as_millis()));
                expires(case, stack, wait).await
            }
            Self::DeadlineExtension => {
                let deadline = Deadline::after(SHORT).with_source(DeadlineSource::Caller);
                expires(case, stack, wait.extension(deadline)).await
            }
            Self::SlowUpload => {
                let pieces = stream::unfold(0, |n| async move {
                    sleep(SLOW / 2).await;
                    (n < 3).then_some((Ok::<_, BoxError>(Bytes::from_static(b"piece")), n + 1))
                });
                let upload = target.request("/").method(Method::PUT);
                let result = stack.call(upload.body(Body::from_stream(pieces)).unwrap()).await;
                assert!(is_ok(&result), "{case}: {result:?}");
                attempts(&result)
            }
            Self::SlowReader => {
                let result = stack.call(target.get("/large")).await;
                let attempts = attempts(&result);
                let mut body = result.unwrap().into_body();
                let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
                sleep(SLOW * 3 / 2).await;
                let rest = soon(body.collect()).await.unwrap().to_bytes();
                assert_eq!(first.len() + rest.len(), LARGE, "{case}");
                attempts
            }
            Self::GoAway | Self::RefusedStream | Self::StaleConnection | Self::ReusedReset => {
                let result = stack.call(target.get("/")).await;
                assert_eq!(is_ok(&result), stack.retries, "{case}: {result:?}");
                attempts(&result)
            }
        }
    }
}

type CallResult = Result<Response<Body>, BoxError>;

pub fn is_ok(result: &CallResult) -> bool {
    result.as_ref().is_ok_and(|response| response.status().is_success())
}

fn attempts(result: &CallResult) -> Option<u32> {
    let made = match result {
        Ok(response) => response.extensions().get::<Attempts>()?.made,
        Err(error) => Attempts::find(&**error)?.made,
    };
    Some(made)
}

async fn expires(case: &str, stack: &Stack, request: Builder) -> Option<u32> {
    let result = soon(stack.call(request.body(Body::empty()).unwrap())).await;
    let is_rejected = result.as_ref().is_ok_and(|response| {
        let status = response.headers().get("grpc-status");
        response.status() == 504 || status.is_some_and(|status| status == "4")
    });
    assert!(result.is_err() || is_rejected, "{case}: {result:?}");
    attempts(&result)
}
