use std::{sync::mpsc, thread, time::Duration};

use buttress::{
    Backoff, RetryLayer,
    retry::{Failure, RetryHandle},
};
use http::{Request, Response, StatusCode};
use tower::{Layer, ServiceExt, service_fn};

use crate::support::{ScriptBody, status};

/// A failure of an application, whose conversion reads and changes the running layer.
struct Mine(RetryHandle);

impl From<Mine> for Failure {
    fn from(mine: Mine) -> Self {
        mine.0.set_attempts(4).unwrap();
        Failure::Status(StatusCode::IM_A_TEAPOT)
    }
}

fn ends(run: impl FnOnce() + Send + 'static) -> bool {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        run();
        let _ = tell.send(());
    });
    told.recv_timeout(Duration::from_secs(5)).is_ok()
}

/// Contract 16: user code never runs under a lock.
#[test]
fn conversion_of_a_failure_may_use_the_handle() {
    for never in [false, true] {
        let handle = RetryLayer::http().handle();
        assert!(
            ends(move || {
                let mine = Mine(handle.clone());
                _ = if never { handle.set_never_on(mine) } else { handle.set_retry_on(mine) };
            }),
            "deadlock: `Into<Failure>` runs under the lock of the policy (never: {never})"
        );
    }
}

async fn attempts(layer: &RetryLayer, answer: u16) -> u32 {
    let inner = service_fn(move |_: Request<buttress::retry::ReplayBody<ScriptBody>>| async move {
        Ok::<Response<ScriptBody>, buttress::BoxError>(status(answer))
    });
    let response = layer.layer(inner).oneshot(Request::new(ScriptBody::empty())).await.unwrap();
    buttress::Attempts::of(&response).made
}

/// A value that contradicts another setting is an error of the setter, or has its documented effect. It does not turn
/// off the retries of the services that are built later.
#[tokio::test(start_paused = true)]
async fn contradiction_through_the_handle_does_not_disable_later_services() {
    let layer = RetryLayer::http()
        .without_budget()
        .backoff(Backoff::constant(Duration::from_millis(1)))
        .unprocessed([StatusCode::TOO_MANY_REQUESTS]);
    assert_eq!(attempts(&layer, 503).await, 3);
    let running =
        layer.layer(service_fn(|_: Request<buttress::retry::ReplayBody<ScriptBody>>| async {
            Ok::<Response<ScriptBody>, buttress::BoxError>(status(503))
        }));
    layer.handle().set_never_on(StatusCode::TOO_MANY_REQUESTS).unwrap_err();
    let response = running.oneshot(Request::new(ScriptBody::empty())).await.unwrap();
    assert_eq!(buttress::Attempts::of(&response).made, 3, "a running service");
    assert_eq!(attempts(&layer, 503).await, 3, "a service built after the change, as axum does");
}

/// The same by `set_unprocessed`, which has an error to return.
#[tokio::test(start_paused = true)]
async fn contradiction_is_an_error_of_set_unprocessed() {
    let layer = RetryLayer::http()
        .without_budget()
        .backoff(Backoff::constant(Duration::from_millis(1)))
        .never_on(StatusCode::TOO_MANY_REQUESTS);
    let set = layer.handle().set_unprocessed([StatusCode::TOO_MANY_REQUESTS]);
    assert!(
        set.is_err() || attempts(&layer, 503).await == 3,
        "accepted, and then nothing is retried"
    );
}

/// The handle resolves a contradiction with which the layer was used. Services that are built later retry.
#[tokio::test(start_paused = true)]
async fn contradiction_that_the_handle_resolves_does_not_stay() {
    let layer = RetryLayer::http()
        .without_budget()
        .backoff(Backoff::constant(Duration::from_millis(1)))
        .unprocessed([StatusCode::TOO_MANY_REQUESTS])
        .never_on(StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(attempts(&layer, 503).await, 1, "a misconfigured layer retries nothing");
    layer.handle().set_unprocessed([]).unwrap();
    assert_eq!(attempts(&layer, 503).await, 3);
}
