//! The test list of the Tower contract, for a layer that holds no permits.

use buttress::TimeoutLayer;
use http::Request;
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, ServiceExt};
use tower_test::mock::Spawn;

use crate::layers::time::fixtures::{Nothing, request};
use crate::support::{Piece, ScriptBody, Strict, Then, Watch, read};

fn service() -> (Spawn<buttress::Timeout<Strict>>, Watch) {
    let (inner, watch) = Strict::new();
    (Spawn::new(TimeoutLayer::http().layer(inner)), watch)
}

#[tokio::test(start_paused = true)]
async fn readiness_is_that_of_the_inner_service_and_is_not_cloned() {
    let (mut service, watch) = service();
    assert_ready_ok!(service.poll_ready::<Request<Nothing>>());
    watch.set_ready(false);
    assert_ready_ok!(service.poll_ready::<Request<Nothing>>(), "a ready service stays ready");
    let mut clone = service.clone();
    assert_pending!(clone.poll_ready::<Request<Nothing>>());
    assert_eq!(watch.seen().reserved, 1);
    drop(service.call(request()));
    assert_eq!((watch.seen().reserved, watch.seen().in_flight), (0, 0));
    watch.set_ready(true);
    assert!(clone.is_woken());
    assert_ready_ok!(clone.poll_ready::<Request<Nothing>>());
    clone.call(request()).await.unwrap();
    watch.break_readiness();
    assert_ready_err!(clone.poll_ready::<Request<Nothing>>());
    assert_eq!(watch.seen().without_ready, 0);
}

#[tokio::test(start_paused = true)]
async fn a_call_dropped_at_any_point_releases_the_inner_service() {
    for polls in [0, 1] {
        let (inner, watch) = Strict::holding();
        let mut call = task::spawn(TimeoutLayer::http().layer(inner).oneshot(request()));
        for _ in 0..polls {
            assert_pending!(call.poll());
        }
        drop(call);
        assert_eq!((watch.seen().in_flight, watch.seen().reserved), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_inner_service_propagates_and_releases_it() {
    for step in [Then::PanicInCall, Then::PanicInPoll] {
        let (inner, watch) = Strict::new();
        watch.script([step]);
        let task = tokio::spawn(TimeoutLayer::http().layer(inner).oneshot(request()));
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!((watch.seen().reserved, watch.seen().in_flight), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_error_is_returned_unchanged() {
    let (inner, watch) = Strict::new();
    watch.script([Then::Answer(http::Response::new(ScriptBody::new([
        Piece::data("a"),
        Piece::Error,
    ])))]);
    let response = TimeoutLayer::http().layer(inner).oneshot(request()).await.unwrap();
    let error = read(response.into_body()).await.unwrap_err();
    assert!(error.downcast_ref::<crate::support::Oops>().is_some());
}

#[test]
fn auto_traits() {
    fn is<T: Clone + Send + Sync + 'static>(_: &T) {}
    fn sends<T: Send + 'static>(_: &T) {}
    let (inner, _watch) = Strict::new();
    let layer = TimeoutLayer::http();
    is(&layer);
    is(&layer.handle());
    let service = layer.layer(inner);
    is(&service);
    sends(&service.oneshot(request()));
}
