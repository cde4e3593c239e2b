//! A chain of three real servers that passes the caller's deadline on.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Extension, Router, body::Body, routing::get};
use buttress::{Deadline, DeadlineLayer};
use http::{Request, StatusCode};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};
use tower::{Layer, ServiceExt};

use crate::support::{ms, net};

const LEFT: &str = "x-request-timeout-ms";

async fn serve(app: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let deadline = DeadlineLayer::new().header(LEFT).max(ms(5000)).respond();
    let server = axum::serve(listener, app.layer(deadline));
    tokio::spawn(async move { server.await.unwrap() });
    at
}

/// Calls the next server, and passes the deadline on.
async fn call(next: SocketAddr, deadline: Deadline) -> StatusCode {
    let client = Client::builder(TokioExecutor::new()).build_http::<Body>();
    let client = DeadlineLayer::new().header(LEFT).reserve(ms(30)).respond().layer(client);
    let mut request = Request::get(format!("http://{next}/")).body(Body::empty()).unwrap();
    request.extensions_mut().insert(deadline);
    client.oneshot(request).await.map_or(StatusCode::BAD_GATEWAY, |response| response.status())
}

/// Starts a server that calls the next one after `before`. The call is made by a task of its own, which continues when
/// the caller hangs up.
async fn hop(next: SocketAddr, before: Duration) -> SocketAddr {
    let handler = move |Extension(deadline): Extension<Deadline>| async move {
        let task = tokio::spawn(async move {
            sleep(before).await;
            call(next, deadline).await
        });
        task.await.unwrap_or(StatusCode::BAD_GATEWAY)
    };
    serve(Router::new().route("/", get(handler))).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadline_passes_through_three_servers_and_ends_the_work_of_the_last() {
    let (worked, calls) = (Arc::new(Mutex::new(None)), Arc::new(AtomicUsize::new(0)));
    let last = {
        let (worked, calls) = (worked.clone(), calls.clone());
        serve(Router::new().route(
            "/",
            get(move || async move {
                calls.fetch_add(1, Ordering::SeqCst);
                // Two seconds of work, unless the deadline ends the call.
                for _ in 0..400 {
                    *worked.lock().unwrap() = Some(Instant::now());
                    sleep(ms(5)).await;
                }
            }),
        ))
        .await
    };
    let first = hop(hop(last, ms(0)).await, ms(0)).await;
    let start = Instant::now();
    let status = net::soon(call(first, Deadline::after(ms(400)))).await;
    let gave_up = Instant::now();
    assert_eq!((status, calls.load(Ordering::SeqCst)), (StatusCode::GATEWAY_TIMEOUT, 1));
    assert!(start.elapsed() >= ms(250) && start.elapsed() < ms(1900), "{:?}", start.elapsed());
    // Work that the deadline did not end would continue in this time.
    sleep(ms(100)).await;
    let worked = worked.lock().unwrap().unwrap();
    assert!(worked <= gave_up, "worked {:?} after the response", worked - gave_up);

    // The time on the way is subtracted from the deadline, so nothing remains and the last server is not called.
    let slow = hop(hop(last, ms(300)).await, ms(0)).await;
    net::soon(call(slow, Deadline::after(ms(300)))).await;
    sleep(ms(350)).await;
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}
