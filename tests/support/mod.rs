//! What all layer tests share: a strict inner service, a scripted body, and the test list of the
//! Tower contract, generic over layers. Everything is polled by hand or under a paused clock.
#![allow(dead_code, unused_imports, unused_macros)] // Every test file uses its own part of it.

mod body;
pub mod contract;
mod strict;

pub use self::{
    body::{Piece, ScriptBody},
    strict::{Strict, Then, Watch},
};

use buttress::{Rejected, call::RejectedKind};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use std::{error::Error, fmt};

/// The one error of inner services and bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oops(pub &'static str);

impl fmt::Display for Oops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Error for Oops {}

// ===== Requests and answers =====

pub fn request() -> Request<()> {
    Request::new(())
}

/// 200 with nothing in it, and it says so at once.
pub fn empty() -> Response<ScriptBody> {
    Response::new(ScriptBody::new([]))
}

/// 200 with one frame.
pub fn hello() -> Response<ScriptBody> {
    Response::new(ScriptBody::new([Piece::data("hello")]))
}

/// An empty answer of this status.
pub fn status(status: u16) -> Response<ScriptBody> {
    let mut response = empty();
    *response.status_mut() = status.try_into().unwrap();
    response
}

/// A gRPC answer whose status is still to come.
pub fn grpc(pieces: impl IntoIterator<Item = Piece>) -> Response<ScriptBody> {
    let mut response = Response::new(ScriptBody::new(pieces));
    response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    response
}

/// A gRPC answer that is over with its head.
pub fn trailers_only(code: &'static str) -> Response<ScriptBody> {
    let mut response = grpc([]);
    response.headers_mut().insert("grpc-status", code.parse().unwrap());
    response
}

pub fn trailers(code: &'static str) -> HeaderMap {
    HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.parse().unwrap())])
}

// ===== What came of it =====

/// The kind of refusal in an error that ought to be one.
#[track_caller]
pub fn refused_as<T>(
    result: Result<T, impl AsRef<dyn Error + Send + Sync + 'static>>,
) -> RejectedKind {
    let Err(error) = result else { panic!("the call was let through") };
    match Rejected::find(error.as_ref()) {
        Some(refused) => refused.kind(),
        None => panic!("not a refusal: {}", error.as_ref()),
    }
}

pub fn is_refusal(error: &(dyn Error + 'static)) -> bool {
    Rejected::find(error).is_some()
}

/// Everything that a body gives: its bytes, and its trailers.
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
