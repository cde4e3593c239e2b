//! A hedge that is not sent costs no allocation.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    convert::Infallible,
    time::Duration,
};

use buttress::HedgeLayer;
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Empty;
use tower::{Layer, Service, ServiceExt, service_fn};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What `calls` of this method allocate, when they are answered at once or only at their second poll.
async fn allocations(method: Method, at_once: bool) -> u64 {
    let inner = service_fn(move |_: Request<_>| async move {
        if !at_once {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    let mut service = HedgeLayer::http(Duration::from_secs(1)).layer(inner);
    let mut before = 0;
    for round in 0..20 {
        // The runtime's own, at the first timer.
        if round == 10 {
            before = ALLOCATIONS.get();
        }
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.method_mut() = method.clone();
        let response = service.ready().await.unwrap().call(request).await.unwrap();
        assert_eq!(response.status(), 200);
    }
    ALLOCATIONS.get() - before
}

#[tokio::test(start_paused = true)]
async fn no_allocation_without_a_hedge() {
    for method in [Method::GET, Method::POST] {
        for at_once in [true, false] {
            assert_eq!(allocations(method.clone(), at_once).await, 0, "{method} {at_once}");
        }
    }
    let before = ALLOCATIONS.get();
    std::hint::black_box(Box::new(1));
    assert_eq!(ALLOCATIONS.get() - before, 1, "they are counted");
}
