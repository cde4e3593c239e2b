//! Shared by all test binaries: scripted services and bodies, the test list of the Tower contract, servers on loopback,
//! and the programs that the tests start.
#![allow(dead_code, unused_imports, unused_macros)] // Each binary uses a part of this module.

mod body;
pub mod contract;
pub mod fuzz;
pub mod net;
pub mod pipe;
pub mod programs;
pub mod rpc;
pub mod scripted_peer;
mod strict;
pub mod tracing_events;

use std::{error::Error, fmt, time::Duration};

pub use self::{
    body::{BodyReads, Piece, ScriptBody},
    strict::{Strict, Then, Watch},
};

use buttress::{BoxError, Rejected, outcome::RejectedKind};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use tokio::sync::{Semaphore, SemaphorePermit};

pub const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Yields 64 times, so that every task makes the progress that it can make without the clock.
pub async fn settle() {
    for _ in 0..64 {
        tokio::task::yield_now().await;
    }
}

/// Returns the number of tasks of the current runtime that have not ended.
pub fn alive_tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// Waits for a future on the paused clock. Panics after an hour.
pub async fn within_an_hour<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(secs(3600), future).await.expect("no result within an hour")
}

/// Waits until no other test holds this permit.
///
/// Tests of one binary run in parallel. A test that uses all cores delays the timers of other tests, so that both kinds
/// of tests can fail: those that load the machine, and those that measure time on sockets within narrow bounds. Such
/// tests hold this permit while they run.
pub async fn alone() -> SemaphorePermit<'static> {
    static ALONE: Semaphore = Semaphore::const_new(1);
    ALONE.acquire().await.unwrap()
}

/// The error of inner services and bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oops(pub &'static str);

impl fmt::Display for Oops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Error for Oops {}

// ===== Requests and responses =====

pub fn request() -> Request<()> {
    Request::new(())
}

/// A 200 response with an empty body, whose `is_end_stream` is `true`.
pub fn empty() -> Response<ScriptBody> {
    Response::new(ScriptBody::new([]))
}

/// A 200 response with one frame.
pub fn hello() -> Response<ScriptBody> {
    Response::new(ScriptBody::new([Piece::data("hello")]))
}

/// A response with this status and an empty body.
pub fn status(status: u16) -> Response<ScriptBody> {
    let mut response = empty();
    *response.status_mut() = status.try_into().unwrap();
    response
}

/// A gRPC response without a status in its head.
pub fn grpc(pieces: impl IntoIterator<Item = Piece>) -> Response<ScriptBody> {
    let mut response = Response::new(ScriptBody::new(pieces));
    response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    response
}

/// A gRPC response with its status in the head and an empty body (`Trailers-Only`).
pub fn trailers_only(code: &'static str) -> Response<ScriptBody> {
    let mut response = grpc([]);
    response.headers_mut().insert("grpc-status", code.parse().unwrap());
    response
}

pub fn trailers(code: &'static str) -> HeaderMap {
    HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.parse().unwrap())])
}

// ===== Results =====

/// Returns the kind of the rejection. Panics if the result is not a rejection.
#[track_caller]
pub fn refused_as<T>(
    result: Result<T, impl AsRef<dyn Error + Send + Sync + 'static>>,
) -> RejectedKind {
    let Err(error) = result else { panic!("the call was not rejected") };
    match Rejected::find(error.as_ref()) {
        Some(refused) => refused.kind(),
        None => panic!("not a rejection: {}", error.as_ref()),
    }
}

pub fn is_refusal(error: &(dyn Error + 'static)) -> bool {
    Rejected::find(error).is_some()
}

/// Returns the rejection among the sources of an error. Panics if there is none.
#[track_caller]
pub fn rejection(error: &BoxError) -> &Rejected {
    Rejected::find(&**error).unwrap_or_else(|| panic!("not a rejection: {error:?}"))
}

/// Reads a body to its end. Returns its bytes and its trailers.
pub async fn read<B>(mut body: B) -> Result<(Vec<u8>, Option<HeaderMap>), B::Error>
where
    B: http_body::Body<Data = Bytes> + Unpin,
{
    use http_body_util::BodyExt;
    let (mut bytes, mut trailers) = (Vec::new(), None);
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => bytes.extend_from_slice(&data),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok((bytes, trailers))
}
