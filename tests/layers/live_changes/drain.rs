use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body as AxumBody;
use buttress::{BoxError, ConcurrencyLimitLayer};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, service_fn};

/// Trailers, and then nothing, not even the end.
struct Trailers {
    polls: u32,
    dropped: Arc<Mutex<(u32, Option<Instant>)>>,
}

impl Body for Trailers {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.polls += 1;
        if self.polls == 1 {
            return Poll::Ready(Some(Ok(Frame::trailers(HeaderMap::new()))));
        }
        Poll::Pending
    }
}

impl Drop for Trailers {
    fn drop(&mut self) {
        *self.dropped.lock().unwrap() = (self.polls, Some(Instant::now()));
    }
}

/// Trailers end a body: the drain of a rejected request ends there, and frees its slot.
#[tokio::test(start_paused = true)]
async fn drain_ends_at_the_trailers() {
    let layer = ConcurrencyLimitLayer::new(1).respond();
    let _held = layer.handle().try_acquire().unwrap();
    let service = layer.layer(service_fn(|_: Request<AxumBody>| async {
        Ok::<_, BoxError>(Response::new(AxumBody::empty()))
    }));
    let dropped = Arc::new(Mutex::new((0, None)));
    let body = AxumBody::new(Trailers { polls: 0, dropped: dropped.clone() });
    let start = Instant::now();
    let response = service.oneshot(Request::post("/").body(body).unwrap()).await.unwrap();
    assert_eq!(response.status(), 503);
    sleep(Duration::from_secs(2)).await;
    let (polls, at) = *dropped.lock().unwrap();
    let took = at.expect("dropped") - start;
    assert!(took < Duration::from_millis(100), "dropped after {took:?} and {polls} polls");
}
