//! A hedge that is not sent costs no allocation.

use std::{convert::Infallible, time::Duration};

use allocation_counter::measure;
use buttress::HedgeLayer;
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Empty;
use tower::{Layer, Service, ServiceExt, service_fn};

/// Counts the allocations of ten calls with this method, whose responses are ready at the first poll or at the second.
fn allocations(method: &Method, at_once: bool) -> u64 {
    let inner = service_fn(move |_: Request<_>| async move {
        if !at_once {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    let mut service = HedgeLayer::http(Duration::from_secs(1)).layer(inner);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.unwrap();
    let mut calls = || {
        runtime.block_on(async {
            for _ in 0..10 {
                let mut request = Request::new(Empty::<Bytes>::new());
                *request.method_mut() = method.clone();
                let response = service.ready().await.unwrap().call(request).await.unwrap();
                assert_eq!(response.status(), 200);
            }
        });
    };
    // The runtime allocates at its first timer.
    calls();
    measure(calls).count_total
}

#[test]
fn no_allocation_without_a_hedge() {
    for method in [Method::GET, Method::POST] {
        for at_once in [true, false] {
            assert_eq!(allocations(&method, at_once), 0, "{method} {at_once}");
        }
    }
    let one = || drop(std::hint::black_box(Box::new(1)));
    assert_eq!(measure(one).count_total, 1, "the counter works");
}
