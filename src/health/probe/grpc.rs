//! Health probes by the gRPC health service.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use http_body::Body;
use tokio::time::{Instant, timeout_at};
use tower_service::Service;

use super::{
    FailedProbe, Probe, ProbeFailure, StatusProbe,
    http::{call_http, parse, read},
    opaque_debug,
};
use crate::{error::ConfigError, outcome::grpc, redact, sealed::Sealed};

/// Calls `grpc.health.v1.Health/Check`. Made by
/// [`HealthProbeLayer::grpc`](super::super::layer::HealthProbeLayer::grpc).
#[derive(Clone)]
pub struct Grpc<F> {
    uri: Uri,
    message: Bytes,
    body: F,
}

impl<F> Grpc<F> {
    pub(in super::super) fn new(
        origin: &str,
        service: &str,
        body: F,
    ) -> (Self, Option<ConfigError>) {
        let uri = format!("{}/grpc.health.v1.Health/Check", origin.trim_end_matches('/'));
        let (uri, fault) = match parse(&uri) {
            Ok(uri) => (uri, None),
            Err(_) => {
                let remedy = "use `/`, or the origin of the server: `http://host:port`";
                (
                    Uri::default(),
                    Some(ConfigError::new("grpc.origin", redact::Value(origin), remedy)),
                )
            }
        };
        (Self { uri, message: check_request(service), body }, fault)
    }
}

/// Returns `HealthCheckRequest { service }` in a gRPC frame. Field 1 is a string. An absent field is the empty string.
fn check_request(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.put_u8(length as u8 | 0x80);
            length >>= 7;
        }
        message.put_u8(length as u8);
        message.put_slice(service.as_bytes());
    }
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.unsplit(message);
    frame.freeze()
}

/// Returns whether a frame contains `HealthCheckResponse { status: SERVING }`. The status must be the first field, and
/// later fields are ignored.
fn is_serving(frame: &[u8]) -> bool {
    matches!(frame, [0, 0, 0, 0, 2..=u8::MAX, 0x08, 0x01, ..])
}

impl<S, F, B, RB> Probe<S> for Grpc<F>
where
    F: Fn(Bytes) -> B + Clone + Send + 'static,
    S: Service<Request<B>, Response = Response<RB>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: Send + 'static,
    RB: Body + Send,
{
    async fn run(self, service: S, deadline: Instant) -> Result<(), FailedProbe> {
        let mut request = Request::new((self.body)(self.message));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri;
        *request.version_mut() = Version::HTTP_2;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(header::TE, HeaderValue::from_static("trailers"));

        let (head, body) = call_http(service, request, deadline).await?;
        if head.status != StatusCode::OK {
            return Err(ProbeFailure::Status(head.status).into());
        }
        let read = timeout_at(deadline, read(body, true)).await;
        let read = read.map_err(|_| ProbeFailure::TimedOut)??;
        match grpc::code(&head.headers).or_else(|| grpc::code(read.trailers.as_ref()?)) {
            None => Err(ProbeFailure::Body.into()),
            Some(0) if is_serving(&read.data) => Ok(()),
            Some(0) => Err(ProbeFailure::NotServing.into()),
            // A server without the health service is healthy (gRFC A17).
            Some(grpc::UNIMPLEMENTED) => Ok(()),
            Some(code) => Err(ProbeFailure::GrpcStatus(code).into()),
        }
    }
}

impl<F> Sealed for Grpc<F> {}

impl<F> StatusProbe for Grpc<F> {}

opaque_debug!(Grpc<F>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_equal_those_of_prost() {
        use prost::Message;
        use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

        let framed = |message: Vec<u8>| {
            let length = u32::try_from(message.len()).unwrap().to_be_bytes();
            [&[0][..], &length, &message].concat()
        };
        for service in
            ["", "search.Search", &"x".repeat(127), &"x".repeat(128), &"x".repeat(70_000)]
        {
            let expected = HealthCheckRequest { service: service.to_owned() }.encode_to_vec();
            assert_eq!(check_request(service), framed(expected));
        }
        for status in 0..4 {
            let expected = framed(HealthCheckResponse { status }.encode_to_vec());
            assert_eq!(is_serving(&expected), status == 1, "{expected:?}");
        }
        assert!(!is_serving(&[0, 0, 0, 0, 2, 8]), "cut off");
    }
}
