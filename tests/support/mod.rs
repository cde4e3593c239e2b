//! Shared by the tests of all layers: a strict inner service, a scripted body, and the test list of the Tower contract,
//! generic over layers. The tests poll by hand or run on a paused clock.
#![allow(dead_code, unused_imports, unused_macros)] // Each test uses a part of this module.

mod body;
pub mod contract;
mod strict;

pub use self::{
    body::{Piece, ScriptBody},
    strict::{Strict, Then, Watch},
};

use buttress::{Rejected, outcome::RejectedKind};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use std::{error::Error, fmt};

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
