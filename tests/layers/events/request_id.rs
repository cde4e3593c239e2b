//! `x-request-id` of tower-http around retries and hedges.

use std::sync::{Arc, Mutex};

use buttress::{BoxError, HedgeLayer, RetryLayer};
use http::{Request, Response};
use tokio::time::sleep;
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_http::request_id::{
    MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer,
};

use super::{Body, request, status};
use crate::support::ms;

#[derive(Clone, Default)]
struct Numbers(Arc<Mutex<u32>>);

impl MakeRequestId for Numbers {
    fn make_request_id<B>(&mut self, _: &Request<B>) -> Option<RequestId> {
        let mut last = self.0.lock().unwrap();
        *last += 1;
        Some(RequestId::new(format!("id-{last}").parse().unwrap()))
    }
}

#[tokio::test(start_paused = true)]
async fn request_id_is_the_same_in_all_attempts_and_in_the_response() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let ids = seen.clone();
    let upstream = service_fn(move |request: Request<_>| {
        let id = request.headers()["x-request-id"].to_str().unwrap().to_owned();
        assert_eq!(request.extensions().get::<RequestId>().unwrap().header_value(), &*id);
        let mut ids = ids.lock().unwrap();
        ids.push(id);
        let (code, after) = if ids.len() < 4 { (503, ms(100)) } else { (200, ms(10)) };
        async move {
            sleep(after).await;
            Ok::<Response<Body>, BoxError>(status(code))
        }
    });
    let stack = ServiceBuilder::new()
        .layer(SetRequestIdLayer::x_request_id(Numbers::default()))
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(RetryLayer::http())
        .layer(HedgeLayer::http(ms(80)))
        .service(upstream);
    let response = stack.clone().oneshot(request()).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-request-id"]),
        (200, &"id-1".parse().unwrap())
    );
    let next = stack.oneshot(request()).await.unwrap();
    assert_eq!(next.headers()["x-request-id"], "id-2");
    // Two attempts of the retry, each with a hedge attempt, and then the next call.
    assert_eq!(*seen.lock().unwrap(), ["id-1", "id-1", "id-1", "id-1", "id-2"]);
}
