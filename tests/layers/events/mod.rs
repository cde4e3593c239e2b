//! The events and spans of all layers: `docs/events.md` lists them, and these tests compare the page with the layers.

mod keys;
mod opentelemetry;
mod request_id;
mod spans;
mod table;

use std::{
    convert::Infallible,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tokio::time::sleep;
use tower::{Service, ServiceExt, service_fn};

type Body = Full<Bytes>;

fn request() -> Request<Body> {
    Request::new(Body::default())
}

fn status(code: u16) -> Response<Body> {
    let mut response = Response::new(Body::default());
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

/// Returns a service of any request that responds with the next of these statuses, each after its time. The last one is
/// repeated.
fn upstream<B: Send + 'static>(
    script: impl Into<Vec<(u16, Duration)>>,
) -> impl Service<
    Request<B>,
    Response = Response<Body>,
    Error = Infallible,
    Future: Future<Output = Result<Response<Body>, Infallible>> + Send + 'static,
> + Clone
+ Send
+ 'static {
    let script = Arc::new(script.into());
    let calls = Arc::new(AtomicUsize::new(0));
    service_fn(move |_: Request<B>| {
        let nth = calls.fetch_add(1, Ordering::SeqCst);
        let (code, after) = script[nth.min(script.len() - 1)];
        async move {
            sleep(after).await;
            Ok(status(code))
        }
    })
}

async fn call<S: Service<Request<Body>>>(service: S) -> Result<S::Response, S::Error> {
    service.oneshot(request()).await
}

const AT_ONCE: Duration = Duration::ZERO;
